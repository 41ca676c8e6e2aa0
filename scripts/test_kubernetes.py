"""Discovery against a real API server: what happens to pods, and how soon each router follows.

scripts/test-kubernetes [--only ours]      (a shell script; prepares the environment and runs this)

All routers follow the same pods at the same time, over the same link to the API server, which is cut and healed. Two of
them are this one. Each event is measured until every router follows it, or for a limit. What this router must do is
checked, and the table goes into docs/kubernetes.md.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from scripts import reporting
from scripts.benchmark.environments import python_of
from scripts.kubernetes.cluster import NAMESPACE, Cluster, NoCluster
from scripts.kubernetes.link import Background, Engines, Link
from scripts.reliability.page import write_tables

from routers import free_port

PAGE = reporting.ROOT / "docs" / "kubernetes.md"
OURS, AGAIN = "this router", "a second one"
RIVALS = {"0.3.2": ("reference", "sglang-router==0.3.2"), "smg 1.13.0": ("smg", "smg==1.13.0")}
MODULES = {"0.3.2": "sglang_router.launch_router", "smg 1.13.0": "smg.launch_router"}
ADDRESSES = [f"127.0.0.{number}" for number in range(21, 31)]
WITHIN = 3.0
"""Seconds in which this router must follow what it can know."""
CUT_FOR = 4.5
ASKED = 20
"""Requests that show who gets them."""


Condition = Callable[[set[str]], bool]
"""Whether the addresses of a router's workers are those that they should be."""


class Router:
    """A router in a process of its own."""

    def __init__(self, name: str, command: Sequence[str], log: Path, variables: dict[str, str]) -> None:
        self.name = name
        self.port = free_port()
        self.log = log
        words = [*command, "--host", "127.0.0.1", "--port", str(self.port), "--prometheus-port", str(free_port())]
        with log.open("wb") as sink:
            environment = {**os.environ, "SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "0", **variables}
            self.process = subprocess.Popen(words, stdout=sink, stderr=sink, env=environment)

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """Send a request; (0, None) without an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        except (OSError, http.client.HTTPException, ValueError):
            return 0, None
        finally:
            connection.close()

    def hosts(self) -> set[str]:
        """Return the addresses of the workers that it has and finds healthy."""
        _, answer = self.ask("GET", "/workers")
        found = answer.get("workers", []) if isinstance(answer, dict) else []
        return {str(urlsplit(each["url"]).hostname or each["url"].split(":")[0]) for each in found if _serves(each)}

    def report(self) -> dict[str, Any]:
        """Return what this router's source says of itself."""
        _, answer = self.ask("GET", "/workers")
        return dict(answer["discovery"][0]) if isinstance(answer, dict) else {}

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _serves(worker: dict[str, Any]) -> bool:
    return bool(worker.get("is_healthy"))


class Row(NamedTuple):
    """An event, and what each router made of it, in words."""

    event: str
    cells: dict[str, str]


class Course:
    """Lets things happen, and measures. failures: what this router should have done."""

    def __init__(self, cluster: Cluster, folder: Path, rivals: dict[str, Path]) -> None:
        self.cluster = cluster
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self._folder = folder
        self._rivals = rivals
        self._background = Background()
        self.link = Link(self._background, cluster.port)
        self.engines = Engines(self._background, ADDRESSES, free_port())
        self.routers: list[Router] = []

    def close(self) -> None:
        for router in self.routers:
            router.end()
        self._background.close()

    # -- routers -------------------------------------------------------------------------------------------------------

    def start(self, name: str, config: str) -> Router:
        """Start a router that follows the pods by a kubeconfig."""
        ours = name not in self._rivals
        python = sys.executable if ours else str(self._rivals[name])
        command = [python, "-m", MODULES.get(name, "sglang_router.launch_router")]
        command += ["--service-discovery", "--selector", "app=engine", "--policy", "round_robin"]
        command += ["--service-discovery-port", str(self.engines.port), "--service-discovery-namespace", NAMESPACE]
        command += ["--kubeconfig", config] if ours else []
        # Their health checks are as often as ours; only ours looks for the package in the checkout.
        command += ["--worker-startup-check-interval", "1"]
        variables = {"KUBECONFIG": config} if ours else {"KUBECONFIG": config, "PYTHONPATH": ""}
        router = Router(name, command, self._folder / f"{name.replace(' ', '-')}-{len(self.routers)}.log", variables)
        self.routers.append(router)
        return router

    def start_all(self) -> None:
        config = self.cluster.kubeconfig("router", self.link.port)
        for name in (OURS, AGAIN, *self._rivals):
            self.start(name, config)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def follow(self, events: dict[str, Condition], limit: float, ours: float = WITHIN) -> None:
        """Measure how long each router takes until each condition holds for its workers. ours: this router's limit."""
        began = time.monotonic()
        took: dict[str, dict[str, float]] = {event: {} for event in events}
        while any(len(each) < len(self.routers) for each in took.values()) and time.monotonic() - began < limit:
            for router in self.routers:
                hosts = router.hosts()
                for event, holds in events.items():
                    if router.name not in took[event] and holds(hosts):
                        took[event][router.name] = time.monotonic() - began
            time.sleep(0.05)
        for event, found in took.items():
            for router in self.routers:
                if router.name in (OURS, AGAIN) and found.get(router.name, limit) > ours:
                    self.failures.append(f"{event}: {router.name}: {found.get(router.name, 'not at all')}")
            never = f"not within {limit:.0f} s"
            self.add(event, {r.name: f"{found[r.name]:.1f} s" if r.name in found else never for r in self.routers})

    def add(self, event: str, cells: dict[str, str]) -> None:
        self.rows.append(Row(event, cells))
        print(f"{event}: {cells}", flush=True)

    def shares(self, event: str, address: str) -> None:
        """Count how many of some requests each router sends to an address that should get none."""
        cells = {}
        for router in self.routers:
            before = self.engines.served[address]
            failed = sum(router.ask("POST", "/generate", b'{"text":"x"}')[0] != 200 for _ in range(ASKED))
            got = self.engines.served[address] - before
            cells[router.name] = f"{got} of {ASKED}" + (f", {failed} failed" if failed else "")
            if router.name in (OURS, AGAIN) and (got or failed):
                self.failures.append(f"{event}: {router.name}: {cells[router.name]}")
        self.add(event, cells)

    def expect(self, what: str, holds: Callable[[], bool], within: float) -> None:
        """Check something of this router."""
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > within:
                self.failures.append(f"{what}: not within {within:g} s")
                print(f"FAILED {what}", flush=True)
                return
            time.sleep(0.05)
        print(f"ok     {what} ({time.monotonic() - began:.1f} s)", flush=True)

    # -- what happens --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it."""
        cluster = self.cluster
        cluster.grant("router")
        for number in (1, 2):
            cluster.create(f"p{number}", ADDRESSES[number])
        self.start_all()
        self.follow({"two ready pods serve, since the process was started": _has(1, 2)}, 60, ours=15.0)
        cluster.create("p3", ADDRESSES[3])
        self.follow({"a third pod serves": _has(3)}, 60)
        cluster.report("p3", ADDRESSES[3], ready=False)
        time.sleep(WITHIN)
        self.shares("a pod is not ready any more: requests that it gets", ADDRESSES[3])
        cluster.report("p3", ADDRESSES[3], ready=True)
        time.sleep(WITHIN)
        cluster.delete("p3", grace=30)
        time.sleep(WITHIN)
        self.shares("a pod is being deleted: requests that it gets", ADDRESSES[3])
        cluster.delete("p3")
        self.follow({"it is gone: so is its worker": _lacks(3)}, 60)
        self.cut()
        self.half_open()
        self.restart()

    def cut(self) -> None:
        """The link is cut while a pod goes and another one comes."""
        self.link.cut()
        self.cluster.delete("p1")
        self.cluster.create("p4", ADDRESSES[4])
        time.sleep(CUT_FOR)
        self.link.heal()
        self.follow(_both("link cut for 4.5 s", 4, 1), 130)

    def half_open(self) -> None:
        """The connection stays open, and says nothing."""
        self.link.drop()
        self.cluster.delete("p2")
        self.cluster.create("p5", ADDRESSES[5])
        self.follow(_both("a connection that stays open, and silent", 5, 2), 100, ours=64.0)

    def restart(self) -> None:
        """The API server restarts, and a pod goes as soon as it is back."""
        self.cluster.end("apiserver")
        time.sleep(5)
        self.cluster.start_api()
        self.cluster.delete("p4")
        self.cluster.create("p6", ADDRESSES[6])
        self.follow(_both("API server restarted, then", 6, 4), 60)

    def alone(self) -> None:
        """What concerns this router only: permissions, tokens, a burst in pages."""
        cluster, token = self.cluster, self._folder / "token"
        for router in self.routers:
            router.end()
        self.routers.clear()
        guest = self.start(OURS, cluster.kubeconfig("guest", cluster.port))
        self.expect("without a Role: 403 is said", lambda: "needs a Role" in str(_error(guest)), 30)
        cluster.grant("guest")
        self.expect("the Role is granted: it works", lambda: _is(5, 6)(guest.hosts()), 10)
        token.write_text("nonsense")
        account = self.start(AGAIN, cluster.kubeconfig("router", cluster.port, token))
        self.expect("a bad token: 401 is said", lambda: "does not accept the token" in str(_error(account)), 30)
        token.write_text(cluster.token_of_account())
        self.expect("another token in the file: it works", lambda: _is(5, 6)(account.hosts()), 10)
        cluster.renew_account()
        token.write_text(cluster.token_of_account())
        cluster.end("apiserver")
        cluster.start_api()
        self.expect("old tokens are not accepted, the file has a new one: it works", lambda: _well(account), 30)
        before = guest.report()["passes"]
        ports = ",".join(str(self.engines.port + 1 + number) for number in range(4))
        for number in range(150):
            address = f"127.0.{1 + number // 100}.{1 + number % 100}"
            cluster.create(f"many-{number}", address, {"sglang.ai/worker-ports": ports})
        self.expect("150 pods with 4 ports each", lambda: guest.report().get("workers") == 602, 60)
        print(f"       passes for 300 events: {guest.report()['passes'] - before}", flush=True)
        fresh = self.start("a third one", cluster.kubeconfig("guest", cluster.port))
        self.expect("they come in two pages", lambda: fresh.report().get("workers") == 602, 30)
        cluster.clear()
        self.expect("all pods are gone", lambda: guest.report().get("workers") == 0, 30)


def _has(*numbers: int) -> Condition:
    wanted = {ADDRESSES[number] for number in numbers}
    return lambda hosts: wanted <= hosts


def _lacks(number: int) -> Condition:
    return lambda hosts: bool(hosts) and ADDRESSES[number] not in hosts


def _both(event: str, new: int, old: int) -> dict[str, Condition]:
    return {f"{event}: a new pod serves": _has(new), f"{event}: the worker of a deleted pod is gone": _lacks(old)}


def _is(*numbers: int) -> Condition:
    wanted = {ADDRESSES[number] for number in numbers}
    return lambda hosts: hosts == wanted


def _error(router: Router) -> object:
    return router.report().get("error")


def _well(router: Router) -> bool:
    report = router.report()
    return report.get("error") is None and (report.get("listed_secs") or 1e9) < 60.0


def table(course: Course, names: Sequence[str]) -> str:
    """Return the table of the page."""
    rows = [[row.event, *(row.cells[name] for name in names)] for row in course.rows]
    text = reporting.table(["event", *names], rows, markdown=True)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"{text}\n\n{today}: {reporting.machine([])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ours"], help="leave the other routers out, and the table as it is")
    options = parser.parse_args()
    found = {} if options.only else {name: python_of(*where) for name, where in RIVALS.items()}
    rivals = {name: python for name, python in found.items() if python is not None}
    with tempfile.TemporaryDirectory(prefix="test-kubernetes-") as folder:
        try:
            with Cluster(Path(folder)) as cluster:
                course = Course(cluster, Path(folder), rivals)
                try:
                    course.run()
                    course.alone()
                finally:
                    course.close()
        except NoCluster as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    names = [OURS, *rivals]
    print(table(course, names))
    if rivals and len(rivals) == len(RIVALS):
        write_tables("kubernetes", table(course, names), PAGE)
    for failure in course.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if course.failures else 0


if __name__ == "__main__":
    sys.exit(main())
