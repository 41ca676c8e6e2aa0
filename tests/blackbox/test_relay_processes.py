"""A router of several processes behaves as one router, and survives the death of each of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from engines import engine_processes
from routers import COMMAND, WITHIN, RouterProcess, environment, free_port, plain_worker, router_process

TWO = ("--relay-processes", "2")


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(2, "--speed", "0") as found:
        yield list(found)


def relays(router: RouterProcess) -> dict[int, int]:
    """Return the process ids of the relays, by number."""
    return {int(number): int(pid) for number, pid in re.findall(r"relay (\d) is process (\d+)", router.log())}


def decider(router: RouterProcess) -> int:
    """Return the process id of the decider."""
    found: list[str] = re.findall(r"process (\d+) decides for 2 relays", router.log())
    return int(found[-1])


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Client(threading.Thread):
    """Sends one request after the other, each on its own connection or all on one; counts what it sees."""

    def __init__(self, url: str, kept: bool, body: dict[str, object]) -> None:
        super().__init__(daemon=True)
        self.seen: Counter[str] = Counter()
        self._host = urlsplit(url).netloc
        self._kept = kept
        self._body = json.dumps(body)
        self._over = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._host, timeout=WITHIN)
        while not self._over.is_set():
            try:
                connection.request("POST", "/generate", self._body, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                self.seen[str(answer.status)] += 1
            except (OSError, http.client.HTTPException):
                self.seen["broken"] += 1
                connection.close()
            if not self._kept:
                connection.close()
        connection.close()

    def end(self) -> None:
        self._over.set()
        self.join(WITHIN)


@contextlib.contextmanager
def load(router: RouterProcess, clients: int = 8) -> Iterator[list[Client]]:
    """Send requests all the time, from so many clients, half of them on kept connections."""
    threads = [Client(router.url, number % 2 == 0, {"text": f"group {number % 4} " * 20}) for number in range(clients)]
    for each in threads:
        each.start()
    try:
        router.until(lambda: all(each.seen["200"] > 2 for each in threads))
        yield threads
    finally:
        for each in threads:
            each.end()


def total(clients: list[Client]) -> Counter[str]:
    """Return what all clients saw."""
    return sum((each.seen for each in clients), Counter())


def goes_on(router: RouterProcess, clients: list[Client]) -> None:
    """Wait until each client has been served again."""
    known = [each.seen["200"] for each in clients]
    router.until(lambda: all(each.seen["200"] > before + 2 for each, before in zip(clients, known, strict=True)))


def at_rest(router: RouterProcess) -> None:
    """Wait until no worker has any load, and nothing is in flight or queued."""
    router.until(lambda: all(worker["load"] == 0 for worker in router.workers().values()))
    assert router.samples().total("sgl_router_queued_requests") == 0


@contextlib.contextmanager
def stream(router: RouterProcess, tokens: int) -> Iterator[http.client.HTTPResponse]:
    """Yield an answer whose first event has arrived."""
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
    with contextlib.closing(connection):
        params = {"max_new_tokens": tokens, "ignore_eos": True}
        body = {"text": "a story", "stream": True, "sampling_params": params}
        connection.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline().startswith(b"data: ")
        yield answer


# -- as one router -----------------------------------------------------------------------------------------------------


def test_requests_workers_metrics_and_keys_as_of_one_router(urls: list[str], tmp_path: Path) -> None:
    """What one relay does, all know: workers that come and go, prefixes, counts, keys that are read again."""
    keys = tmp_path / "keys"
    keys.write_text("alice secret-a\n")
    keys.chmod(0o600)
    with router_process([urls[0]], *TWO, "--api-key-file", str(keys), key="secret-a") as router:
        router.until_healthy(urls[0])
        assert router.post(f"/add_worker?url={quote(urls[1])}").status in (200, 202)
        router.until_healthy(*urls)
        prompts = [f"the prompt of group {number} " * 40 for number in range(6)]
        answers = [router.post("/generate", {"text": prompt}) for prompt in prompts for _ in range(5)]
        assert {answer.status for answer in answers} == {200}
        router.until(lambda: router.samples().total("sgl_router_requests_total") == 30)
        samples = router.samples()
        assert samples.total("sgl_router_processed_requests_total") == 30
        assert samples.total("sgl_router_cache_hits_total") == 24, "each prompt is new once, whoever relays it"
        assert samples.total("sgl_router_active_requests") == 1, "the scrape itself"
        router.until(lambda: router.log().count("POST /generate 200") == 30)
        assert (
            len({len(router.post("/generate", {"text": "x" * size}).body) > 0 for size in (10, 70_000, 300_000)}) == 1
        )

        assert router.get("/get_loads", authorization="Bearer wrong").status == 401
        assert router.post("/generate", {"text": "x"}, authorization="Bearer wrong").status == 401
        keys.write_text("bob secret-b\n")
        router.send_signal(signal.SIGHUP)
        for _ in range(8):  # whichever relay has it
            router.until(lambda: router.post("/generate", {"text": "x"}).status == 401)
        router._key = "secret-b"
        router.until(lambda: router.log().count("loaded") >= 3)
        assert {router.post("/generate", {"text": "x"}).status for _ in range(8)} == {200}

        assert router.post(f"/remove_worker?url={quote(urls[0])}").status == 200
        assert {router.post("/generate", {"text": "x"}).status for _ in range(8)} == {200}
        assert set(router.workers()) == {urls[1]}
        at_rest(router)


def test_a_second_router_on_the_port_is_refused(urls: list[str]) -> None:
    """SO_REUSEPORT alone would let two routers share a port, and each would get half of the requests."""
    with router_process(urls, *TWO) as router:
        port = str(urlsplit(router.url).port)
        words = [*COMMAND, "--port", port, "--prometheus-port", str(free_port()), *TWO]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=WITHIN, check=False)
        assert done.stderr == f"error: 127.0.0.1:{port} is in use; choose another --port\n"
        assert done.returncode == 2


def test_sigterm_lets_a_stream_finish(urls: list[str]) -> None:
    with engine_processes(1, "--speed", "0.1") as slow, router_process(slow, *TWO) as router:
        router.until_healthy(*slow)
        with stream(router, 12) as answer:
            router.send_signal(signal.SIGTERM)
            rest = answer.read()
            assert rest.count(b"data: {") == 11
            assert rest.endswith(b"data: [DONE]\n\n")
        assert router.exit_status() == 0
        assert "finishing 1 running request" in router.log()


def test_sigterm_to_all_processes_is_one_signal() -> None:
    """systemd sends it to each process of a unit, `pkill` to each of that name; the second one must cut no stream."""
    with engine_processes(1, "--speed", "0.1") as slow, router_process(slow, *TWO) as router:
        router.until_healthy(*slow)
        with stream(router, 12) as answer:
            own = (decider(router), *relays(router).values())
            router.send_signal(signal.SIGTERM)
            router.until(lambda: "finishing 1 running request" in router.log())
            for pid in own:
                os.kill(pid, signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert router.exit_status() == 0
        assert "second signal" not in router.log()


@contextlib.contextmanager
def killed_at_last(process: subprocess.Popen[bytes], supervisor: int) -> Iterator[None]:
    """Kill the processes at the end, if they still run, so that a failure is not a wait."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.kill(supervisor, signal.SIGKILL)
            process.kill()


def test_nohup_outlives_its_terminal() -> None:
    """The process that decides must know that the supervisor was started by nohup: it closes no terminal itself."""
    program = (
        "import os, pty, signal, sys\n"
        "pid, terminal = pty.fork()\n"
        "if pid == 0:\n"
        "    signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "    os.dup2(log, 1), os.dup2(log, 2)\n"
        "    os.execv(sys.argv[2], sys.argv[2:])\n"
        "print(pid, flush=True)\n"
        "sys.stdin.read(1)\n"
        "os.close(terminal)\n"
        "os.waitpid(pid, 0)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        port = free_port()
        words = [*COMMAND, "--port", str(port), "--prometheus-port", str(free_port()), *TWO]
        with subprocess.Popen(
            [sys.executable, "-c", program, str(log), *words],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            supervisor = int(process.stdout.readline())
            router = RouterProcess(process, f"http://127.0.0.1:{port}", "", log)
            with killed_at_last(process, supervisor):
                router.until(lambda: log.exists() and "listening on" in router.log())
                process.stdin.write(b".")
                process.stdin.flush()
                os.kill(supervisor, signal.SIGHUP)  # as of the kernel, which may not have sent its own one yet
                router.until(lambda: "SIGHUP: reading keys" in router.log())
                assert router.get("/workers").status == 200
                os.kill(supervisor, signal.SIGTERM)
                assert router.exit_status() == 0
        assert "the terminal was closed" not in router.log()


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_a_relay_that_is_killed_loses_only_its_own_connections(urls: list[str]) -> None:
    with router_process(urls, *TWO) as router:
        router.until_healthy(*urls)
        with load(router) as clients:
            os.kill(relays(router)[1], signal.SIGKILL)
            router.until(lambda: "relay 1: started again: the one before was killed by signal 9" in router.log())
            goes_on(router, clients)
        seen = total(clients)
        assert set(seen) <= {"200", "broken"}
        assert seen["broken"] <= len(clients)
        at_rest(router)


def test_a_decider_that_is_killed_is_back_with_its_state(urls: list[str], tmp_path: Path) -> None:
    """Streams go on, no request fails, and prefixes and workers that were added over the API are kept."""
    flags = ("--state-file", str(tmp_path / "state"))
    with (
        engine_processes(1, "--speed", "0.1") as slow,
        plain_worker({}) as other,
        router_process([urls[0], other.url], *TWO, *flags) as router,
    ):
        router.until_healthy(urls[0])
        assert router.post(f"/remove_worker?url={quote(other.url)}").status == 200
        assert router.post(f"/add_worker?url={quote(urls[1])}").status in (200, 202)
        router.until_healthy(*urls)
        with load(router) as clients, contextlib.ExitStack() as open_streams:
            router.post(f"/add_worker?url={quote(slow[0])}")
            router.until_healthy(*slow)
            held = prefixes(router)
            router.until(
                lambda: (tmp_path / "state").exists() and slow[0].encode() in (tmp_path / "state").read_bytes()
            )
            for url in urls:
                router.post(f"/workers/{quote(url, safe='')}/drain")
            answer = open_streams.enter_context(stream(router, 20))
            for url in urls:
                router.post(f"/workers/{quote(url, safe='')}/resume")
            killed = decider(router)
            os.kill(killed, signal.SIGKILL)
            router.until(lambda: decider(router) != killed)
            goes_on(router, clients)
            assert answer.read().count(b"data: {") == 19
            assert prefixes(router) >= held * 0.9
        assert set(total(clients)) == {"200"}
        assert "the process that decides is started again: the one before was killed by signal 9" in router.log()
        assert set(router.workers()) == {*urls, *slow}, "what was removed stays away, whatever the flags say"
        at_rest(router)


def test_a_log_that_nobody_reads_hurts_nobody(urls: list[str]) -> None:
    """What a new relay logs goes to standard error: there is no decider yet. A closed pipe ended it, each time."""
    read, write = os.pipe()
    port = free_port()
    words = [*COMMAND, "--port", str(port), "--prometheus-port", str(free_port()), "--worker-urls", *urls, *TWO]
    with subprocess.Popen(words, env=environment(), stdin=subprocess.DEVNULL, stdout=write, stderr=write) as process:
        os.close(write)
        with os.fdopen(read) as log:
            written = ""
            while "listening on" not in written:
                written += log.readline()
        with killed_at_last(process, process.pid):
            killed = int(re.findall(r"relay 1 is process (\d+)", written)[-1])
            parent = process.pid
            others = children(parent) - {killed}
            os.kill(killed, signal.SIGKILL)
            router = RouterProcess(process, f"http://127.0.0.1:{port}", "", Path(os.devnull))
            router.until(lambda: len(children(parent) - {killed}) == len(others) + 1)
            first = children(parent)
            assert {router.post("/generate", {"text": "x"}).status for _ in range(20)} == {200}
            assert children(parent) == first, "the new relay lives"
            process.terminate()
            assert router.exit_status() == 0


def children(pid: int) -> set[int]:
    """Return the processes that a process has started and that run."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {child for child in map(int, found) if is_alive(child)}


def saved(state: Path, url: str) -> bool:
    """Return whether the state file knows a worker."""
    return state.exists() and url.encode() in state.read_bytes()


def prefixes(router: RouterProcess) -> float:
    """Return the bytes of all prefixes that the router remembers."""
    return router.samples().total("sgl_router_tree_held_bytes")


def test_nothing_is_left_when_the_supervisor_is_killed(urls: list[str]) -> None:
    with router_process(urls, *TWO) as router:
        pids = [*relays(router).values(), decider(router)]
        assert len(pids) == 3
        router.process.kill()
        router.exit_status()
        deadline = time.monotonic() + WITHIN
        while any(map(is_alive, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(("before", "after"), [("0", "2"), ("2", "0"), ("2", "3")])
def test_hand_over_loses_no_request(before: str, after: str, tmp_path: Path) -> None:
    """Any number of relay processes can take over from any other."""
    with plain_worker({"/generate": (200, {"content-type": "application/json"}, b"{}")}) as worker:
        port, metrics = free_port(), free_port()
        words = ["--port", str(port), "--prometheus-port", str(metrics), "--worker-urls", worker.url]
        words += ["--reuse-port", "--state-file", str(tmp_path / "state"), "--disable-access-log"]
        with started(tmp_path / "old", port, *words, "--relay-processes", before) as old:
            old.until_healthy(worker.url)
            with load(old) as clients, started(tmp_path / "new", port, *words, "--relay-processes", after) as new:
                old.send_signal(signal.SIGTERM)
                assert old.exit_status(WITHIN) == 0
                goes_on(new, clients)
                for each in clients:
                    each.end()
        assert set(total(clients)) == {"200"}


def test_a_decider_that_dies_after_a_hand_over_serves_at_once(tmp_path: Path) -> None:
    """The first one waited for the checks of its workers: the router before it served. Nobody serves for the second."""
    with (
        plain_worker({"/generate": (200, {"content-type": "application/json"}, b"{}")}) as worker,
        socket.create_server(("127.0.0.1", 0)) as hanging,
    ):
        port, state = free_port(), tmp_path / "state"
        words = ["--port", str(port), "--prometheus-port", str(free_port()), "--worker-urls", worker.url, *TWO]
        words += ["--reuse-port", "--state-file", str(state)]
        words += ["--startup-wait-secs", "600", "--health-check-timeout-secs", "600"]
        with started(tmp_path / "old", port, *words) as old, started(tmp_path / "new", port, *words) as new:
            old.send_signal(signal.SIGTERM)
            assert old.exit_status(WITHIN) == 0
            added = f"http://127.0.0.1:{hanging.getsockname()[1]}"
            assert new.post("/workers", {"url": added}).status == 202
            new.until(lambda: saved(state, added))
            killed = decider(new)
            os.kill(killed, signal.SIGKILL)
            assert new.post("/generate", {"text": "x"}).status == 200
            new.until(lambda: decider(new) != killed)


@contextlib.contextmanager
def started(log: Path, port: int, *words: str) -> Iterator[RouterProcess]:
    """Yield a router that listens."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*COMMAND, *words], env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
    router = RouterProcess(process, f"http://127.0.0.1:{port}", "", log)
    try:
        router.until(lambda: "listening on" in router.log())
        yield router
        router.end()
    finally:
        process.kill()
        process.wait()
