"""Faults that need their own router in front of the same engines, because the router ends or loses a resource.

Each function starts the router, causes the fault, and returns what the load saw and what was wrong, with the
invariants.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.real_engines.launched import Launched
from scripts.reliability.faults import CUT
from scripts.reliability.field import Field, Router, Watch, megabytes, start_router, stop_router
from scripts.reliability.load import Load
from scripts.reliability.shim import Shim

from routers import free_port

WORKERS = 1000
ALIVE = 60
"""Live workers among the thousand; the others are addresses of this machine where no process listens."""
DESCRIPTORS = 256
SMALL = 64 << 10
"""Size of the log in bytes at which the disk is full."""
DEADLY = b"a prompt that ends engines"
SEVERAL = ("--relay-processes", "2")
KILLS = 3
"""Processes of the router that one fault kills."""
SOON = 0.25
"""Requests sent within these seconds before SIGTERM may be unread when the signal comes."""


class Seen(NamedTuple):
    """The outcome of a fault."""

    load: Load
    wrong: list[str]
    megabytes: float = 0.0


class OwnFault(NamedTuple):
    name: str
    strike: Callable[[Field, float], Seen]
    allowed: tuple[str, ...] = ()


def _own(
    field: Field,
    strike: Callable[[Router, Load], list[str]],
    *flags: str,
    urls: Sequence[str] = (),
    well: Sequence[str] = (),
) -> Seen:
    """Run a router under load during `strike`, then wait until it is idle. well: of its workers, those that answer."""
    router = start_router(field.folder, urls or field.urls, *field.flags, *flags)
    wrong: list[str] = []
    try:
        router.until_healthy(*(well or field.urls))
        load = field.load(lambda: router.port)
        watch = Watch(router)
        load.start()
        try:
            wrong += strike(router, load)
        finally:
            load.stop()
        wrong += watch.settle(workers=len(urls) or len(field.urls))
        used = watch.router.facts().megabytes
    finally:
        wrong += stop_router(router)
    return Seen(load, wrong, used)


def thousand(field: Field, seconds: float) -> Seen:
    """Give the router a thousand workers, most of them dead. It must keep checking all of them."""
    aliases = [f"127.0.4.{number}" for number in range(1, ALIVE + 1)]
    alive = field.more(Shim(free_port(), field.engines[1].port, aliases))
    dead = [f"http://127.1.{n // 250}.{n % 250 + 1}:9" for n in range(WORKERS - ALIVE - len(field.urls))]
    urls = [*field.urls, *(f"http://{alias}:{alive.port}" for alias in aliases), *dead]

    def strike(router: Router, load: Load) -> list[str]:
        time.sleep(seconds)
        known = router.workers()
        well = sum(worker["is_healthy"] for worker in known.values())
        return [] if len(known) == WORKERS and well >= len(field.urls) else [f"{well} of {len(known)} are healthy"]

    pace = ("--worker-startup-check-interval", "5", "--health-check-interval-secs", "5")
    return _own(field, strike, *pace, "--engine-report-interval-secs", "0", urls=urls)


def query_of_death(field: Field, seconds: float) -> Seen:
    """Send a prompt that ends each engine that gets it, again and again: two of six may end, no more."""
    shims = [field.more(Shim(free_port(), engine.port, deadly=DEADLY)) for engine in (*field.engines, *field.engines)]
    urls = [shim.url for shim in shims]

    def strike(router: Router, load: Load) -> list[str]:
        time.sleep(0.3 * seconds)
        told = [router.ask("POST", "/generate", {"text": DEADLY.decode()}).status for _ in range(4)]
        time.sleep(0.5 * seconds)
        dead = sum(shim.dead for shim in shims)
        wrong = [] if dead == 2 else [f"{dead} engines ended"]
        return wrong if told == [502, 422, 422, 422] else [*wrong, f"the prompt was answered {told}"]

    return _own(field, strike, urls=urls, well=urls)


def full_disk(field: Field, seconds: float) -> Seen:
    """Let every log write fail for half of the time; then there is room again."""
    folder = field.folder / f"logs-{time.monotonic_ns():x}"

    def strike(router: Router, load: Load) -> list[str]:
        pid = router.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        full = max([SMALL, *(path.stat().st_size for path in folder.iterdir())])
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (full, hard))
        router.until(lambda: router.samples().total("sgl_router_log_lines_lost_total") > 0, 20 * seconds)
        time.sleep(0.5 * seconds)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        sizes = {path: path.stat().st_size for path in folder.iterdir()}
        time.sleep(0.5 * seconds)
        more = any(path.stat().st_size > size for path, size in sizes.items())
        return [] if more else ["nothing is logged although there is room again"]

    return _own(field, strike, "--log-dir", str(folder), "--log-level", "debug")


def few_descriptors(field: Field, seconds: float) -> Seen:
    """Give the router 256 descriptors, and for half of the time more idle clients than that."""

    def strike(router: Router, load: Load) -> list[str]:
        resource.prlimit(router.process.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        time.sleep(0.1 * seconds)
        with contextlib.ExitStack() as stack:
            for _ in range(2 * DESCRIPTORS):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", router.port))
            time.sleep(0.5 * seconds)
            most = len(os.listdir(f"/proc/{router.process.pid}/fd"))
        answered = load.tally().answered
        time.sleep(0.4 * seconds)
        router.until(lambda: load.tally().answered > answered)
        return [] if most <= DESCRIPTORS else [f"{most} descriptors"]

    return _own(field, strike)


def sigterm(field: Field, seconds: float) -> Seen:
    """End the router by SIGTERM: it must answer all requests; then another router takes its port."""
    first = start_router(field.folder, field.urls, *field.flags)
    port = first.port
    wrong: list[str] = []
    routers = [first]
    try:
        first.until_healthy(*field.urls)
        load = field.load(lambda: port)
        load.start()
        time.sleep(0.4 * seconds)
        asked = time.monotonic()
        first.send_signal(signal.SIGTERM)
        if (status := first.exit_status(60.0)) != 0:
            wrong.append(f"exit status {status}")
        routers.append(start_router(field.folder, field.urls, *field.flags, port=port))
        field.outage = time.monotonic() - asked
        routers[1].until_healthy(*field.urls)
        time.sleep(0.4 * seconds)
        load.stop()
        early = [result for result in load.results if result.began < asked - SOON]
        lost = [r for r in early if r.fate.value in ("lost", "refused", "failed", "cut")]
        wrong += [f"asked before SIGTERM, and {result.fate.value} {result.reason}" for result in lost]
        wrong += Watch(routers[1]).settle()
        used = routers[1].facts().megabytes
    finally:
        for router in routers:
            wrong += stop_router(router)
    return Seen(load, wrong, used)


def launched(field: Field, seconds: float) -> Seen:
    """Kill the replicas of launch_server one after the other, then restart all of them one after the other."""
    flags = ("--backend", "builtin", "--dp-size", "2", "--router-restart-initial-backoff-secs", "0.1")
    more = ("--router-health-check-interval-secs", "0.5", "--router-dp-worker-base-port", str(free_port()))
    server = Launched(field.folder / f"launched-{time.monotonic_ns():x}", [*flags, *more], {})
    wrong: list[str] = []
    try:
        server.until(lambda: server.healthy() == 2, 60.0, "both replicas healthy")
        load = field.load(lambda: server.port)
        load.start()
        try:
            for rank in range(2):
                time.sleep(0.1 * seconds)
                replica = next(w["replica"] for w in server.workers() if w["replica"]["rank"] == rank)
                os.kill(replica["pid"], signal.SIGKILL)
                server.until(lambda: server.healthy() < 2, 30.0, "the loss of a replica noticed")
                server.until(lambda: server.healthy() == 2, 60.0, "the replica back")
            server.ask("POST", "/restart_workers")
            server.until(lambda: server.ask("GET", "/restart_workers").json()["state"] != "running", 120.0, "restarts")
            state = server.ask("GET", "/restart_workers").json()["state"]
            wrong += [] if state == "done" else [f"the rolling restart: {state}"]
            time.sleep(0.1 * seconds)
        finally:
            load.stop()
        server.until(lambda: not any(w["load"] for w in server.workers()), 30.0, "loads of 0")
        used = megabytes(server.process.pid)
        server.interrupt()
        if (status := server.process.wait(60.0)) != 0:
            wrong.append(f"exit status {status}")
        wrong += [f"{left} is left" for left in server.left()]
        wrong += ["a traceback in its log"] if "Traceback" in _text(server.log) else []
    finally:
        server.end()
    return Seen(load, wrong, used)


def relay_killed(field: Field, seconds: float) -> Seen:
    """Kill a relay process, again and again: only its connections may break."""
    return _own(field, lambda router, _: _kill(router, r"relay 1 is process (\d+)", seconds), *SEVERAL)


def decider_killed(field: Field, seconds: float) -> Seen:
    """Kill the process that decides, again and again: nothing may fail."""
    return _own(field, lambda router, _: _kill(router, r"process (\d+) decides", seconds), *SEVERAL)


def _kill(router: Router, named: str, seconds: float) -> list[str]:
    """Kill a process of the router, and each that is started in its place, as its log names them."""
    killed: list[str] = []

    def next_one() -> str:
        return str(["", *re.findall(named, router.log())][-1])

    for _ in range(KILLS):
        time.sleep(seconds / (KILLS + 1))
        router.until(lambda: next_one() not in (*killed, ""))
        killed.append(next_one())
        os.kill(int(killed[-1]), signal.SIGKILL)
    router.until(lambda: next_one() not in killed)
    time.sleep(seconds / (KILLS + 1))
    return []


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


OWN_FAULTS = (
    OwnFault("1,000 workers", thousand),
    OwnFault("query of death", query_of_death, (*CUT, "failed worker_broken")),
    OwnFault("full disk for logs", full_disk),
    OwnFault("256 descriptors", few_descriptors, ("lost on a new connection", "failed too_many_connections")),
    OwnFault("SIGTERM under load", sigterm, ("refused", "lost", "failed shutting_down")),
    OwnFault("kill -9 of a relay process", relay_killed, ("lost", "cut")),
    OwnFault("kill -9 of the decider", decider_killed),
    OwnFault("launch_server: kill -9, restart", launched, CUT),
)
