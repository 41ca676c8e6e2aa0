"""The endpoint picker behind a real Envoy: what clients see, and what it costs.

scripts/test-epp [--checks | --docs | --kubernetes]      (a shell script, which prepares the environment and runs this)

Two small engines, the router as `sglang-router epp`, and Envoy in front of it, all on loopback. The cost is measured on
kept connections, through Envoy and picker, and through the router's own port with the same router process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts import reporting
from scripts.kubernetes.cluster import NAMESPACE, Cluster
from scripts.reliability.page import write_tables

from routers import RouterProcess, free_port, router_process

PAGE = reporting.ROOT / "docs" / "endpoint-picker.md"
COMMAND = (sys.executable, "-W", "error", "-m", "sglang_router", "epp")
EVENTS = 5
PACE = 0.2
"""Seconds between two events of an engine's stream."""
MEASURED = 3000
TOGETHER = 8
SIZES = (200, 4000)
TICKS = os.sysconf("SC_CLK_TCK")


class Engine:
    """A small engine in a thread's event loop: it takes chunked bodies, and says how much of a body arrived."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.seen: list[dict[str, str]] = []
        self.gone = 0
        self._loop = loop
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    def start(self) -> None:
        """Listen."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def kill(self) -> None:
        """Refuse connections, and break those that are open."""
        asyncio.run_coroutine_threadsafe(self._kill(), self._loop).result(10)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", self.port, limit=1 << 24)

    async def _kill(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                await self._answer(*await _read(reader), writer)
        self._writers.discard(writer)
        writer.close()

    async def _answer(self, path: str, head: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/completions":
            self.seen.append(head)
        if b'"stream"' in body:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for number in range(EVENTS if b'"long"' not in body else 1000):
                event = b'data: {"choices":[{"text":"%d"}]}\n\n' % number
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                try:
                    await writer.drain()
                    await asyncio.sleep(PACE)
                except ConnectionError:
                    self.gone += 1
                    raise
            writer.write(b"0\r\n\r\n")
        else:
            usage = {"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
            answer = json.dumps({"engine": self.url, "bytes": len(body), "usage": usage}).encode()
            fields = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer)
            writer.write(b"HTTP/1.1 200 OK\r\n" + fields + answer)
        await writer.drain()


async def _read(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    head = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    body = b""
    if head.get("transfer-encoding") == "chunked":
        pieces = []
        while size := int(await reader.readline(), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
        await reader.readline()
        body = b"".join(pieces)
    else:
        body = await reader.readexactly(int(head.get("content-length", 0)))
    return lines[0].split()[1], head, body


class Got(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes
    times: list[float]
    """When each piece of the body came, in seconds from the request."""

    def json(self) -> Any:
        return json.loads(self.body)


def ask_blocking(port: int, body: Any, fields: dict[str, str], path: str, method: str) -> Got:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        began, times, pieces = time.monotonic(), [], []
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        connection.request(method, path, data, {"content-type": "application/json", **fields})
        answer = connection.getresponse()
        while piece := answer.read1(1 << 20):
            times.append(time.monotonic() - began)
            pieces.append(piece)
        return Got(answer.status, {name.lower(): v for name, v in answer.getheaders()}, b"".join(pieces), times)


def ask_growing(port: int, most: int) -> Got:
    """Send a chunked body without an end, up to so many pieces of 64 kB; return the answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("transfer-encoding", "chunked")
        connection.endheaders()
        with contextlib.suppress(ConnectionError):  # the answer has come, and Envoy reads no further
            for _ in range(most):
                connection.send(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        answer = connection.getresponse()
        return Got(answer.status, {name.lower(): v for name, v in answer.getheaders()}, answer.read(), [])


class Bench:
    """Everything that runs, and what was checked."""

    def __init__(self, gateway: int, router: RouterProcess, engines: Sequence[Engine], envoy: int) -> None:
        self.gateway = gateway
        self.router = router
        self.engines = engines
        self.envoy = envoy
        self.failed: list[str] = []

    async def ask(
        self, body: Any, path: str = "/v1/completions", method: str = "POST", fields: dict[str, str] | None = None
    ) -> Got:
        return await asyncio.to_thread(ask_blocking, self.gateway, body, fields or {}, path, method)

    def check(self, good: bool, fact: str, told: object = "") -> None:
        print(f"{'ok  ' if good else 'FAIL'} {fact}  [{told}]", flush=True)
        if not good:
            self.failed.append(fact)

    async def until(self, holds: Any, within: float = 10.0) -> bool:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            if await asyncio.to_thread(holds):
                return True
            await asyncio.sleep(0.05)
        return False

    def loads(self) -> list[int]:
        return [worker["load"] for worker in self.router.workers().values()]


# -- what clients see --------------------------------------------------------------------------------------------------


async def checks(bench: Bench) -> None:
    ask, check, engines = bench.ask, bench.check, bench.engines
    found = [await ask({"prompt": f"prompt {number} " * 50}) for number in range(6)]
    landed = [got.json()["engine"] for got in found]
    told = [got.fields["x-sglang-router-worker"] for got in found]
    check(landed == told and len(set(landed)) == 2, "requests land on the workers that the router has chosen", landed)
    again = [(await ask({"prompt": "prompt 0 " * 50})).json()["engine"] for _ in range(4)]
    check(set(again) == {landed[0]}, "the same prefix goes to the same worker", again)
    got = await ask({"prompt": "s", "stream": True})
    paced = got.times[-1] - got.times[0]
    flows = got.body.count(b"data:") == EVENTS and paced > PACE * (EVENTS - 2)
    check(flows, "a stream flows event by event", got.times)
    got = await ask({"prompt": "y" * 2_000_000})
    check(got.status == 200 and got.json()["bytes"] > 2_000_000, "a body of 2 MB arrives whole", got.body[:80])
    got = await asyncio.to_thread(ask_growing, bench.gateway, 100)
    code = got.fields.get("x-smg-error-code")
    check(got.status == 413 and code == "payload_too_large", "a body that grows too large is 413 before its end", code)
    engines[0].seen.clear()
    forged = {"x-gateway-destination-endpoint": f"127.0.0.1:{engines[0].port}", "x-data-parallel-rank": "3"}
    got = await ask({"prompt": "forged"}, fields=forged)
    landed_at = got.fields["x-sglang-router-worker"]
    check(got.json()["engine"] == landed_at, "a client's own destination is replaced", landed_at)
    heads = [head for engine in engines for head in engine.seen[-1:]]
    check(not any("x-data-parallel-rank" in head for head in heads), "nor may it choose a rank")
    got = await ask(b'{"prompt')
    check(got.status == 400 and got.json()["error"]["code"] == "json_parse_error", "garbage is 400", got.body[:60])
    got = await ask(None, path="/v1/models", method="GET")
    check(got.status == 200, "GET /v1/models is any worker's", got.status)
    got = await ask({}, path="/flush_cache")
    check(got.status == 404, "what clients have no business with is 404", got.status)
    first = asyncio.create_task(ask({"prompt": "a", "stream": True}))
    second = asyncio.create_task(ask({"prompt": "b", "stream": True}))
    await bench.until(lambda: sum(bench.loads()) == 2)
    waits = asyncio.create_task(ask({"prompt": "c"}))
    await bench.until(lambda: bench.router.samples().total("sgl_router_waiting_requests") == 1)
    got = await ask({"prompt": "d"})
    after = got.fields.get("retry-after")
    check(got.status == 429 and after is not None, "a full queue is 429 with Retry-After", (got.status, after))
    waited = await waits
    check(waited.status == 200 and waited.times[-1] > PACE, "who waits gets its answer", waited.times)
    await asyncio.gather(first, second)
    await leave(bench)
    check(await bench.until(lambda: sum(bench.loads()) == 0), "a client that leaves frees its worker", bench.loads())
    ended = await bench.until(lambda: sum(engine.gone for engine in engines) == 1)
    check(ended, "and its engine stops")
    samples = await asyncio.to_thread(bench.router.samples)
    cached = samples.total("sgl_router_cached_tokens_total")
    check(cached > 0, "what the engines tell of tokens is counted", cached)
    await kill(bench)


async def leave(bench: Bench) -> None:
    """Begin a long stream, and leave."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.gateway)
    body = b'{"prompt":"long","long":1,"stream":true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    await reader.readuntil(b"data:")
    writer.transport.abort()


async def kill(bench: Bench) -> None:
    """Kill an engine in the middle of streams, then the other one."""
    ask, check, engines = bench.ask, bench.check, bench.engines
    streams = [asyncio.create_task(ask({"prompt": "ab"[place], "long": 1, "stream": True})) for place in range(2)]
    await bench.until(lambda: sum(bench.loads()) == 2)
    await asyncio.to_thread(engines[0].kill)
    statuses = Counter([(await ask({"prompt": f"after {number}"})).status for number in range(20)])
    few = statuses[200] >= 18 and not statuses.keys() - {200, 503}
    check(few, "an engine dies: at most --cb-failure-threshold answers fail", statuses)
    await asyncio.to_thread(engines[1].kill)
    await asyncio.gather(*streams, return_exceptions=True)
    told = ""
    deadline = time.monotonic() + 20.0
    while told != "no_available_workers" and time.monotonic() < deadline:
        got = await ask({"prompt": "nobody"})
        told = got.fields.get("x-smg-error-code", str(got.status))
    check(got.status == 503 and "retry-after" in got.fields, "no worker is left: 503 of the router", told)
    check(await bench.until(lambda: sum(bench.loads()) == 0), "all load counters are zero", bench.loads())


# -- what it costs -----------------------------------------------------------------------------------------------------


def _cpu(pid: int) -> float:
    """Return the seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def _client(port: int, body: bytes, times: list[float], left: list[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    request = head % len(body) + body
    while left[0] > 0:
        left[0] -= 1
        began = time.perf_counter()
        writer.write(request)
        fields = await reader.readuntil(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in fields:
            await reader.readuntil(b"0\r\n\r\n")
        else:
            length = int(fields.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        times.append(time.perf_counter() - began)
    writer.close()


async def measure(bench: Bench) -> str:
    """Return the table of the cost."""
    load = os.getloadavg()[0]
    pids = (bench.router.process.pid, bench.envoy)
    own = int(bench.router.url.rpartition(":")[2])
    rows = []
    for size in SIZES:
        body = json.dumps({"prompt": "x" * (size - 14)}).encode()
        for name, port in (("own port", own), ("Envoy and picker", bench.gateway)):
            await _run(port, body, MEASURED // 10, TOGETHER)
            single = await _run(port, body, MEASURED // 10, 1)
            before = [_cpu(pid) for pid in pids]
            began = time.monotonic()
            times = await _run(port, body, MEASURED, TOGETHER)
            took = time.monotonic() - began
            used = [(_cpu(pid) - was) / MEASURED * 1e6 for pid, was in zip(pids, before, strict=True)]
            cells = [f"{size} B", name, f"{MEASURED / took:,.0f}", _ms(single), _ms(times)]
            rows.append(_row(cells + [f"{each:,.0f}" for each in used]))
            print(rows[-1], flush=True)
    head = ["request", "through", "requests/s, 8 at once", "p50, one at a time", "p50, 8 at once"]
    head += ["router: µs of CPU a request", "Envoy: µs of CPU a request"]
    machine = f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}, not compiled"
    how = f"Measured with `sh scripts/test-epp --docs` on {machine}; {MEASURED:,} requests a row, on kept connections."
    how += f" Others used the machine as well (load average before: {load:.1f}), so look at the CPU first."
    return "\n".join([how, "", _row(head), _row(["---"] * len(head)), *rows])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


async def _run(port: int, body: bytes, requests: int, clients: int) -> list[float]:
    times: list[float] = []
    left = [requests]
    await asyncio.gather(*[_client(port, body, times, left) for _ in range(clients)])
    return times


def _ms(times: list[float]) -> str:
    return f"{statistics.median(times) * 1000:.2f} ms"


# -- an InferencePool --------------------------------------------------------------------------------------------------


_GROUP = "inference.networking.k8s.io"
_POOLS = f"/apis/{_GROUP}/v1/namespaces/{NAMESPACE}/inferencepools"
_ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_NAMES = {
    "kind": "InferencePool",
    "listKind": "InferencePoolList",
    "plural": "inferencepools",
    "singular": "inferencepool",
}


def pool_checks(folder: Path) -> list[str]:
    """Check that the pods of an InferencePool in a real API server become workers; return what failed."""
    failed: list[str] = []

    def check(router: RouterProcess, fact: str, *urls: str) -> None:
        began = time.monotonic()
        with contextlib.suppress(AssertionError):
            router.until(lambda: router.workers().keys() == set(urls), 20.0)
        found = sorted(router.workers())
        print(f"{'ok  ' if found == sorted(urls) else 'FAIL'} {fact}  [{time.monotonic() - began:.2f} s, {found}]")
        if found != sorted(urls):
            failed.append(fact)

    with Cluster(folder) as cluster:
        version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": _ANYTHING}}
        spec = {"group": _GROUP, "names": _NAMES, "scope": "Namespaced", "versions": [version]}
        notes = {"api-approved.kubernetes.io": "unapproved, for a test"}
        crd = {"metadata": {"name": f"inferencepools.{_GROUP}", "annotations": notes}, "spec": spec}
        kind = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
        cluster.must("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", kind | crd)
        cluster.grant("router")
        cluster.grant("router", _GROUP, "inferencepools")
        for number in (1, 2):
            cluster.create(f"p{number}", f"127.0.0.2{number}")
        flags = ["--inference-pool", f"{NAMESPACE}/llama", "--kubeconfig", cluster.kubeconfig("router", cluster.port)]
        picker = ["--epp-port", str(free_port())]
        with router_process([], *flags, *picker, command=COMMAND) as router:
            check(router, "without the pool there are no workers")
            pool = {"apiVersion": f"{_GROUP}/v1", "kind": "InferencePool", "metadata": {"name": "llama"}}
            cluster.must("POST", _POOLS, pool | {"spec": _selecting({"app": "engine"}, 8000)})
            check(router, "a pool is made: its pods are workers", "http://127.0.0.21:8000", "http://127.0.0.22:8000")
            cluster.delete("p1")
            check(router, "a pod is deleted", "http://127.0.0.22:8000")
            patch = "application/merge-patch+json"
            cluster.must("PATCH", f"{_POOLS}/llama", {"spec": _selecting({"app": "engine"}, 8000, 8001)}, patch)
            check(router, "another port", "http://127.0.0.22:8000", "http://127.0.0.22:8001")
            cluster.must("PATCH", f"{_POOLS}/llama", {"spec": _selecting({"app": "other"}, 8000)}, patch)
            check(router, "another selector")
            cluster.must("PATCH", f"{_POOLS}/llama", {"spec": _selecting({"app": "engine"}, 8000)}, patch)
            check(router, "the first one again", "http://127.0.0.22:8000")
            cluster.must("DELETE", f"{_POOLS}/llama")
            check(router, "the pool is deleted")
    return failed


def _selecting(labels: dict[str, str], *ports: int) -> dict[str, Any]:
    return {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]}


# -- all of it ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def envoy(program: str, listen: int, picker: int, folder: Path) -> Iterator[int]:
    """Run Envoy; yield the number of its process."""
    admin = free_port()
    text = (reporting.ROOT / "scripts" / "envoy.yaml").read_text()
    for word, port in (("LISTEN", listen), ("PICKER", picker), ("ADMIN", admin)):
        text = text.replace(f"port_value: {word}", f"port_value: {port}")
    config = folder / "envoy.yaml"
    config.write_text(text)
    words = ["-c", str(config), "--concurrency", "1", "--log-level", "warning", "--use-dynamic-base-id"]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen([program, *words], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                if ask_blocking(admin, None, {}, "/ready", "GET").status == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("Envoy does not start:\n" + (folder / "envoy.log").read_text())
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def engines_running(number: int) -> Iterator[list[Engine]]:
    """Run engines on an event loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    engines = [Engine(loop) for _ in range(number)]
    for engine in engines:
        engine.start()
    try:
        yield engines
    finally:
        for engine in engines:
            engine.kill()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def run(program: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Check and measure; return what failed."""
    gateway, picker = free_port(), free_port()
    flags = ["--epp-port", str(picker), "--disable-access-log"]
    checked = ["--decision-headers", "--health-check-interval-secs", "1"]
    checked += ["--max-concurrent-requests", "2", "--queue-size", "1", "--cb-failure-threshold", "2"]
    checked += ["--max-payload-size", "4000000"]
    with envoy(program, gateway, picker, folder) as pid:
        with engines_running(2) as engines:
            urls = [engine.url for engine in engines]
            got = ask_blocking(gateway, {"prompt": "x"}, {}, "/v1/completions", "POST")
            reached = any(engine.seen for engine in engines)
            with router_process(urls, *flags, *checked, command=COMMAND) as router:
                bench = Bench(gateway, router, engines, pid)
                bench.check(got.status == 500 and not reached, "no picker: 500, and nothing reaches an engine")
                asyncio.run(checks(bench))
        if not options.checks:
            with engines_running(2) as engines:
                urls = [engine.url for engine in engines]
                with router_process(urls, *flags, command=COMMAND) as router:
                    table = asyncio.run(measure(Bench(gateway, router, engines, pid)))
            if options.docs and not bench.failed:
                write_tables("cost", table, PAGE)
    return bench.failed


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="test-epp", description="Test the endpoint picker behind a real Envoy.")
    parser.add_argument("--checks", action="store_true", help="check only, and measure nothing")
    parser.add_argument("--docs", action="store_true", help="write the measurement into docs/endpoint-picker.md")
    parser.add_argument("--kubernetes", action="store_true", help="check --inference-pool on a real API server only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        failed = pool_checks(where) if options.kubernetes else run(os.environ["ENVOY"], where, options)
    print("all is well" if not failed else "failed: " + "; ".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
