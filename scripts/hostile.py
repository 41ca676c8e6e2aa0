"""Attack a router on this machine, and measure how a polite client is served during each attack.

    attackers (this process) ──┐
                               ├──> router ──> worker that misbehaves on request      each a process of its own
    polite client ─────────────┘

The polite client sends one small request after the other whose answer comes from the router itself (an error: the body
is not JSON), and measures how long it waits. So the worker, which sends as fast as it can, does not delay it. Printed
for each attack: its outcome, the polite client's p50, p99 and longest wait, and the router's memory and descriptors
during and after it. `scripts/hostile` (a shell script) prepares the environment and runs this. The same attacks,
smaller, are tests in tests/hostile; workers and clients come from there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from hostile.arena import Answer, Client, Leg, Lie, Polite, lying_worker, post
from routers import RouterProcess, start_router

IDLE = 10_000
SLOW = 1000
FLOODED = 200
FLAGS = ("--head-timeout-secs", "5", "--body-timeout-secs", "5", "--max-payload-size", "10000000")
PLAIN = ("--disable-retries", "--disable-circuit-breaker", "--disable-access-log")
EVENT = b"1f4c\r\ndata: " + b"x" * 8004 + b"\n\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DEEP = b'{"text": %s}' % (b"[" * 100_000 + b"]" * 100_000)


# -- the two other processes -------------------------------------------------------------------------------------------


def endless(start: bytes, more: bytes) -> Lie:
    """A worker that sends `start` and then `more` forever."""

    async def lie(leg: Leg) -> None:
        await leg.send(start)
        while True:
            await leg.send(more)

    return lie


async def late(leg: Leg) -> None:
    """Answer after a while."""
    await asyncio.sleep(5.0)
    await leg.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


LIES: dict[str, bytes | Lie] = {
    "late": late,
    "flood": endless(STREAM, EVENT),
    "interim": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "head": endless(b"HTTP/1.1 200 OK\r\nA: ", b"b" * 100),
    "garbage": STREAM + EVENT + b"no chunk\r\n",
    "lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


def be_worker() -> None:
    """Print its URL, then answer until standard input ends."""
    with lying_worker() as worker:
        worker.lies |= LIES
        print(worker.url, flush=True)
        sys.stdin.read()


def be_polite(port: int) -> None:
    """Send requests until standard input ends; then print all waits, in seconds, and what went wrong."""
    polite = Polite(port, post("/generate", b"no JSON"), 400)
    polite.start()
    sys.stdin.read()
    polite.stop()
    print(json.dumps({"waits": polite.waits, "failures": [str(failure) for failure in polite.failures]}))


class Part:
    """This script in another process, until its standard input ends."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "scripts.hostile", *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> str:
        """End it; return the rest of its output."""
        return self.process.communicate("", timeout=60)[0]


# -- the router under attack -------------------------------------------------------------------------------------------


class Field:
    """A router and its worker."""

    def __init__(self, router: RouterProcess, seconds: float) -> None:
        self.router = router
        self.seconds = seconds
        self.port = urlsplit(router.url).port or 0

    def until(self) -> float:
        """Return when an attack that begins now is over."""
        return time.monotonic() + self.seconds

    def clients(self, stack: contextlib.ExitStack, count: int, receive_buffer: int = 0) -> list[Client]:
        return [stack.enter_context(Client(self.port, receive_buffer=receive_buffer)) for _ in range(count)]

    @property
    def megabytes(self) -> float:
        with open(f"/proc/{self.router.process.pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.router.process.pid}/fd"))


def _tally(answers: Iterable[Answer | None]) -> str:
    seen = Counter("cut" if answer is None else f"{answer.status}" for answer in answers)
    return ", ".join(f"{count} x {what}" for what, count in seen.most_common())


# -- the attacks -------------------------------------------------------------------------------------------------------


def nothing(field: Field) -> str:
    """Do nothing, for comparison."""
    time.sleep(field.seconds)
    return "-"


def idle_connections(field: Field) -> str:
    """Open connections that are served once and then stay idle."""
    with contextlib.ExitStack() as stack:
        end = field.until()
        clients = field.clients(stack, min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200))
        for client in clients:
            client.send(post("/generate", b"no JSON"))
        answers = [client.answer() for client in clients]
        time.sleep(max(0.0, end - time.monotonic()))
        return f"{_tally(answers)}; {field.descriptors} descriptors"


def churn(field: Field) -> str:
    """Open connections and close them, with and without the beginning of a request."""
    count, end = 0, field.until()
    while time.monotonic() < end:
        client = Client(field.port)
        client.send((b"", b"POST /gen", post("/generate"))[count % 3])
        client.reset() if count % 2 else client.close()
        count += 1
    return f"{count} connections"


def _dripping(field: Field, start: bytes, drop: bytes) -> str:
    with contextlib.ExitStack() as stack:
        clients = field.clients(stack, SLOW)
        for client in clients:
            client.send(start)
        end = field.until()
        while time.monotonic() < end:
            for client in clients:
                client.send(drop)
            time.sleep(0.5)
        for client in clients:
            client.sock.settimeout(0.001)
        return _tally(_at_once(client) for client in clients)


def _at_once(client: Client) -> Answer | None:
    try:
        return client.answer()
    except TimeoutError:
        return Answer(0, {}, b"", False)


def slow_headers(field: Field) -> str:
    """Send heads byte by byte; status 0 counts those that have no answer yet."""
    return _dripping(field, b"POST /generate HTTP/1.1\r\nHost: x\r\nA: ", b"b")


def slow_bodies(field: Field) -> str:
    return _dripping(field, b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{", b" ")


def floods_that_are_not_read(field: Field) -> str:
    """Request endless streams and never read them."""
    with contextlib.ExitStack() as stack:
        for client in field.clients(stack, FLOODED, receive_buffer=4096):
            client.send(post("/generate?lie=flood", b'{"stream": true}'))
        time.sleep(field.seconds)
        return f"{FLOODED} streams, {field.megabytes:.0f} MB"


def slow_readers(field: Field) -> str:
    """Request streams and read one byte per second."""
    with contextlib.ExitStack() as stack:
        clients = field.clients(stack, FLOODED, receive_buffer=4096)
        for client in clients:
            client.send(post("/generate?lie=flood", b'{"stream": true}'))
        end = field.until()
        while time.monotonic() < end:
            for client in clients:
                client.sock.recv(1)
            time.sleep(1.0)
        return f"{FLOODED} streams, {field.megabytes:.0f} MB"


def _again_and_again(field: Field, raw: bytes) -> str:
    answers, end = [], field.until()
    while time.monotonic() < end:
        with Client(field.port) as client:
            client.send(raw)
            answers.append(client.answer())
    return _tally(answers)


def bodies_of_100_mb(field: Field) -> str:
    """Send bodies above the limit of 10 MB without a Content-Length."""
    start = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5f5e100\r\n"
    return _again_and_again(field, start + b"x" * 100_000_000)


def five_thousand_headers(field: Field) -> str:
    return _again_and_again(field, post("/generate", b"{}", *(f"A{number}: b" for number in range(5000))))


def deep_json(field: Field) -> str:
    return _again_and_again(field, post("/generate", DEEP))


def pipelines_that_are_not_read(field: Field) -> str:
    """Pipeline requests and read no answer."""
    sent, raw = 0, post("/generate", b"no JSON") * 100
    with contextlib.ExitStack() as stack:
        clients = field.clients(stack, 10, receive_buffer=4096)
        for client in clients:
            client.sock.setblocking(False)
        end = field.until()
        while time.monotonic() < end and sent < 100_000_000:
            for client in clients:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    sent += client.sock.send(raw)
            time.sleep(0.001)
        return f"{sent / 1e6:.0f} MB taken, {field.megabytes:.0f} MB held"


def tiny_chunks(field: Field) -> str:
    """Send bodies of 4 MB in chunks of two bytes."""
    start = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return _again_and_again(field, start + b"2\r\nxx\r\n" * 2_000_000 + b"0\r\n\r\n")


def nested_prompts_of_9_mb(field: Field) -> str:
    """Send prompts that are slow to read: nested arrays that no endpoint knows."""
    return _again_and_again(field, post("/generate", b'{"text":"x","a":[%b[]]}' % (b"[[],[[]]]," * 900_000)))


def invented_models(field: Field) -> str:
    """Name a new model of 100 kB in each request."""
    answers: list[Answer | None] = []
    end = field.until()
    while time.monotonic() < end:
        with Client(field.port) as client:
            name = f"model-{len(answers)}-".ljust(100_000, "x")
            client.send(post("/v1/chat/completions", json.dumps({"model": name, "messages": []}).encode()))
            answers.append(client.answer())
    return _tally(answers)


def scrapes(field: Field) -> str:
    """Read /metrics without a pause."""
    return _again_and_again(field, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


def lies(field: Field) -> str:
    """Let the worker send endless interim answers and heads, two lengths, and garbage between chunks."""
    answers, end = [], field.until()
    while time.monotonic() < end:
        for lie in ("interim", "head", "lengths", "garbage"):
            with Client(field.port) as client:
                client.send(post(f"/generate?lie={lie}"))
                answers.append(client.answer())
    return _tally(answers)


# -- third-party tools -------------------------------------------------------------------------------------------------


def _tool(command: Sequence[str], pattern: str) -> str:
    if shutil.which(command[0]) is None:
        return f"left out: {command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    found = re.findall(pattern, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr))
    return ", ".join(" ".join(match.split()) for match in found) or f"exit status {done.returncode}"


def _slowhttptest(field: Field, *words: str) -> str:
    command = ["slowhttptest", "-c", str(SLOW), "-r", "500", "-l", str(round(field.seconds)), "-p", "3", *words]
    return _tool([*command, "-u", f"{field.router.url}/generate"], r"service available: *\w+|closed: *\d+")


def slowhttptest_headers(field: Field) -> str:
    return _slowhttptest(field, "-H", "-i", "1", "-x", "24")


def slowhttptest_bodies(field: Field) -> str:
    return _slowhttptest(field, "-B", "-i", "1", "-s", "8192", "-x", "10", "-t", "POST")


def slowhttptest_reads(field: Field) -> str:
    return _slowhttptest(field, "-X", "-w", "10", "-y", "20", "-n", "1", "-z", "1", "-k", "3")


def h2load(field: Field) -> str:
    command = ["h2load", "--h1", "-c", "100", "-D", str(round(field.seconds)), f"{field.router.url}/liveness"]
    return _tool(command, r"[\d.]+ req/s|\d+ failed")


def wrk(field: Field) -> str:
    command = ["wrk", "-c", "100", "-t", "1", "-d", f"{round(field.seconds)}s", f"{field.router.url}/liveness"]
    return _tool(command, r"Requests/sec: *[\d.]+|Socket errors:.*")


ATTACKS: tuple[Callable[[Field], str], ...] = (
    nothing,
    idle_connections,
    churn,
    slow_headers,
    slow_bodies,
    slow_readers,
    floods_that_are_not_read,
    pipelines_that_are_not_read,
    bodies_of_100_mb,
    five_thousand_headers,
    deep_json,
    tiny_chunks,
    nested_prompts_of_9_mb,
    invented_models,
    scrapes,
    lies,
    slowhttptest_headers,
    slowhttptest_bodies,
    slowhttptest_reads,
    h2load,
    wrk,
)


# -- the table ---------------------------------------------------------------------------------------------------------


def _row(field: Field, attack: Callable[[Field], str]) -> str:
    polite = Part("--role", "polite", "--port", str(field.port))
    try:
        result = attack(field)
        memory = field.megabytes
    finally:
        said = polite.end()
    told = json.loads(said)
    waits = sorted(told["waits"])
    times = [1000 * waits[min(len(waits) - 1, int(len(waits) * share))] for share in (0.5, 0.99, 1.0)]
    figures = "".join(f"{value:>9.1f}" for value in times)
    trouble = f"  POLITE CLIENT FAILED: {told['failures'][0]}" if told["failures"] else ""
    name = attack.__name__.replace("_", " ")
    return f"{name:<24}{len(waits):>7}{figures}{memory:>8.0f}{field.descriptors:>7}  {result}{trouble}"


@contextlib.contextmanager
def running(seconds: float) -> Iterator[Field]:
    """The router and its worker."""
    worker = Part("--role", "worker")
    try:
        with tempfile.TemporaryDirectory() as folder:
            router = start_router([worker.line()], *PLAIN, *FLAGS, log=Path(folder) / "router.log")
            try:
                router.until_healthy()
                yield Field(router, seconds)
                router.end()
            finally:
                if router.process.poll() is None:
                    router.process.kill()
                    router.process.wait()
    finally:
        worker.end()


def main() -> int:
    parser = argparse.ArgumentParser(prog="hostile", description="Attacks a router that runs here.")
    parser.add_argument("--quick", action="store_true", help="3 seconds for each attack instead of 10")
    parser.add_argument("--only", default="", metavar="WORD", help="only attacks whose name holds this word")
    parser.add_argument("--role", choices=("worker", "polite"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.role == "worker":
        be_worker()
        return 0
    if chosen.role == "polite":
        be_polite(chosen.port)
        return 0
    attacks = [attack for attack in ATTACKS if chosen.only in attack.__name__]
    if not attacks:
        parser.error(f"no attack has {chosen.only!r} in its name; there are {', '.join(a.__name__ for a in ATTACKS)}")
    print(f"{'':<24}{'a polite client: asked, p50, p99, longest [ms]':<34}")
    print(f"{'attack':<24}{'asked':>7}{'p50':>9}{'p99':>9}{'longest':>9}{'MB':>8}{'fds':>7}  what came of it")
    failed = False
    for attack in attacks:  # a new router for each attack, so that memory and descriptors belong to it
        with running(3.0 if chosen.quick else 10.0) as field:
            row = _row(field, attack)
        failed = failed or "FAILED" in row
        print(row, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
