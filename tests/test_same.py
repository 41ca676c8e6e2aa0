"""The compiled router behaves like the interpreted one: both get the same traffic, and everything they do is compared.

    session(INSTALLED)   the package as it is installed: the compiled wheel, with `sh scripts/test --compiled`
    session(SOURCES)     the sources of the checkout, interpreted

In each session one router process plays all scenes in the same order, in front of the same workers, with the same seed.
Compared are the bytes of all answers, what reached the workers, the metrics, and the log. Left out is what depends on
time: durations, and metrics of the process. Without the wheel both sessions are interpreted: then this tests itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import pytest

from hostile.arena import Client, Leg, LyingWorker, lying_worker, post
from hostile.test_bodies import BODIES
from routers import RouterProcess, router_process
from sglang_router import version
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.reserved import HOLDERS, RESERVED
from wire_corpus import corpus

SOURCES = Path(__file__).resolve().parents[1] / "src"
PROGRAM = """
import asyncio, logging, random, sys, threading, time, uuid
class Seeded(random.Random):
    def __init__(self, seed=7):
        super().__init__(seed)
random.Random, ids = Seeded, Seeded()
uuid.uuid4 = lambda: uuid.UUID(int=ids.getrandbits(128), version=4)
time.time, time.monotonic = lambda: 1.8e9, lambda: 1e4
from sglang_router.launch_router import main
sys.exit(main())
"""
"""Runs a router for which no time passes, with one source of chance."""
FLAGS = (
    *("--log-format", "json", "--max-payload-size", "700000", "--disable-outlier-ejection"),
    "--disable-circuit-breaker",  # a health check, which comes sooner or later, closes it
    *("--health-check-interval-secs", "3600", "--worker-startup-check-interval", "3600"),
    *("--engine-report-interval-secs", "0", "--retry-initial-backoff-ms", "1", "--retry-max-backoff-ms", "2"),
)
ROUTERS = (("--policy", "cache_aware"), ("--policy", "round_robin"), ("--resume-streams", "--policy", "prefix_hash"))
"""Further flags of each pair of routers."""
UNSTABLE = re.compile(
    r"process_|python_|smg_worker_connections_active|sgl_router_(loop_lag|config_loaded|request_body_bytes)"
)
"""Names of metrics of the process and of moments, and of what a worker or a client may have closed or not."""
ACCESS = "sglang_router.access"
MADE_ID = re.compile(rb"\b[a-z]+-[0-9a-f]{24}\b")
LOOKS = frozenset(("/health", "/workers", "/metrics", "/version"))
"""Paths by which the test looks, more or less often."""


Asked = tuple[int, bytes, bytes, int]
"""What reached a worker: its number, the head, the body up to 64 kB, the size of the body."""


class Session(NamedTuple):
    """All that can be seen of a router from outside."""

    build: str
    answers: dict[str, bytes]
    asked: list[Asked]
    metrics: dict[Any, float]
    log: list[bytes]


# -- the traffic -------------------------------------------------------------------------------------------------------


EVENTS = [b'data: {"text": "%d", "meta_info": {"id": "e"}}\n\n' % number for number in range(6)]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def streamed(pieces: Sequence[bytes], *, end: bool = True, reset: bool = False) -> Callable[[Leg], Any]:
    """Return a lie that sends these pieces one by one; the router reads each before the next."""

    async def lie(leg: Leg) -> None:
        for piece in (STREAM, *pieces, *([b"0\r\n\r\n"] if end else [])):
            await leg.send(piece)
            await leg.settle()
        if reset:
            leg.reset()
        elif not end:
            leg.writer.close()

    return lie


async def refuse_first(leg: Leg) -> None:
    """Fail like an engine that is overloaded."""
    await leg.send(b"HTTP/1.1 503 No\r\nRetry-After: 1\r\nContent-Length: 4\r\n\r\nbusy")


async def hang_up(leg: Leg) -> None:
    """Close without an answer."""
    leg.writer.close()


async def half_an_answer(leg: Leg) -> None:
    await leg.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    await leg.settle()
    leg.reset()


MOST = 4096
"""Bytes of an answer that are surely one read: of more, what the client gets before a fault depends on time."""
LIES: dict[str, bytes | Callable[[Leg], Any]] = {
    "events": streamed([chunk(event) for event in EVENTS]),
    "split": streamed(
        [chunk(EVENTS[0])[:9], chunk(EVENTS[0])[9:], chunk(b"".join(EVENTS[1:])), chunk(b"data: [DONE]\n\n")]
    ),
    "bytewise": streamed([b"%c" % byte for byte in chunk(EVENTS[0] + b"data: [DONE]\n\n")]),
    "broken": streamed([chunk(EVENTS[0]), chunk(EVENTS[1])[:12]], end=False),
    "reset": streamed([chunk(EVENTS[0])], end=False, reset=True),
    "no-event": streamed([], end=False),
    "error-event": streamed([chunk(b'data: {"error": {"message": "no", "code": 500}}\n\n')]),
    "bad-chunk": streamed([chunk(EVENTS[0]), b"zz\r\n"], end=False),
    "busy": refuse_first,
    "hang-up": hang_up,
    "half": half_an_answer,
    **{f"r{number}": case.raw for number, case in enumerate(corpus("responses.txt")) if len(case.raw) <= MOST},
}


class Scene(NamedTuple):
    """What one connection sends. The router closes it after the last answer, unless that is not so; then:

    answers  methods of the requests that are answered
    cut      the message is not complete: the client closes its side
    """

    name: str
    raw: bytes
    answers: Sequence[str] = ()
    cut: bool = False


def generate(target: str = "/generate", body: bytes = b'{"text": "x"}', *fields: str) -> bytes:
    return post(target, body, "Connection: close", *fields)


def scenes() -> Iterator[Scene]:
    for number, case in enumerate(corpus("requests.txt")):
        entries = [entry.split(" ")[0] for entry in case.understood.split(", ") if entry]
        answers = entries if case.verdict == "ok" else ()
        yield Scene(f"request {number}: {case.name}", case.raw, answers, case.verdict == "more")
    for name, body in BODIES.items():
        for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            yield Scene(f"body {path}: {name}", generate(path, body))
    for holder in ("", *HOLDERS):
        for value in (b"1", b"null", b'"x"', b"{}", b"[1]", b"1e999", b"NaN"):
            for name in RESERVED[:2]:
                field = b'"%b": %b' % (name.encode(), value)
                body = b'{"text": "x", %b}' % (b'"%b": {%b}' % (holder.encode(), field) if holder else field)
                yield Scene(f"field {holder} {field!r}", generate("/generate", body))
    anything = b'{"model": "m", "prompt": "p", "text": ["t"], "input": "i", "stream": true}'
    for place, endpoint in ENDPOINTS.items():
        for verb in endpoint.methods:
            raw = generate(place.decode(), anything).replace(b"POST", verb, 1)
            yield Scene(f"endpoint {verb!r} {place!r}", raw)
    for turn in range(3):
        for name in LIES:
            body = b'{"text": "%b, and more", "stream": %b}' % (name.encode(), b"true" if turn else b"false")
            raw = generate(f"/generate?lie={name}", body, f"X-Request-Id: {name}-{turn}")
            yield Scene(f"answer {name}, {turn}", raw)
    for size in (100, 5_000, 40_000, 600_000):
        for turn in range(4):
            prompt = b"%d" % (turn % 2) * size
            body = b'{"text": "%b", "n": %d}' % (prompt, turn)
            yield Scene(f"prompt of {size}, {turn}", generate("/generate", body))
    pipeline = b"".join(post("/generate", b'{"text": "p%d"}' % number) for number in range(12))
    yield Scene("pipeline", pipeline + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + generate())
    for method, target, body in CONTROL:
        raw = generate(target, body).replace(b"POST", method.encode(), 1)
        yield Scene(f"{method} {target} {body!r}", raw)


NEW = "http://127.0.0.1:9/"
CONTROL: tuple[tuple[str, str, bytes], ...] = (
    ("GET", "/health", b""),
    ("GET", "/readiness", b""),
    ("GET", "/v1/models", b""),
    ("GET", "/list_workers", b""),
    ("GET", "/workers", b""),
    ("GET", "/get_loads", b""),
    ("POST", f"/add_worker?url={NEW}&wait=false", b""),
    ("POST", f"/add_worker?url={NEW}&wait=false", b""),
    ("POST", "/add_worker?url=nonsense", b""),
    ("POST", "/workers", json.dumps({"url": "http://127.0.0.1:10", "priority": "high"}).encode()),
    ("POST", "/workers", json.dumps({"url": "http://127.0.0.1:10", "labels": {"a": "b"}}).encode()),
    ("PUT", f"/workers/{quote('http://127.0.0.1:10', safe='')}", b'{"cost": -1}'),
    ("PUT", f"/workers/{quote('http://127.0.0.1:10', safe='')}", b'{"priority": 3}'),
    ("POST", f"/workers/{quote('http://127.0.0.1:10', safe='')}/drain", b""),
    ("DELETE", f"/workers/{quote('http://127.0.0.1:10', safe='')}", b""),
    ("POST", f"/remove_worker?url={NEW}", b""),
    ("POST", "/flush_cache", b""),
    ("GET", "/workers", b""),
    ("GET", "/nothing", b""),
    ("OPTIONS", "/generate", b""),
    ("POST", "/health", b"{}"),
)


# -- a session ---------------------------------------------------------------------------------------------------------


def play(port: int, scene: Scene) -> bytes:
    """Send all; return all that comes back, until the router closes the connection or the last answer is whole."""
    with Client(port, keep=True) as client:
        client.send(scene.raw)
        for method in scene.answers:
            client.answer(method)
        if scene.cut:
            settle(port)
            client.sock.shutdown(socket.SHUT_WR)
        if not scene.answers:
            with contextlib.suppress(ConnectionError):
                client.kept.read()
        return client.kept.got


def settle(port: int) -> None:
    """Return when the router's event loop has run twice: it has read what had been sent before."""
    for _ in range(2):
        play(port, Scene("look", b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))


def session(variables: dict[str, str], workers: Sequence[LyingWorker], *flags: str) -> Session:
    """Play all scenes to a router that runs with these variables of the environment."""
    for worker in workers:
        worker.asked.clear()
    urls = [worker.url for worker in workers]
    command = (sys.executable, "-W", "error", "-c", PROGRAM)
    with router_process(urls, *FLAGS, *flags, variables=variables, command=command) as router:
        port = urlsplit(router.url).port or 0
        for worker in workers:
            worker.settle = lambda: settle(port)
        before, answers = router.samples().all, {}
        for scene in scenes():
            answers[scene.name] = play(port, scene)
            for worker in workers:
                worker.until_honest()
            settle(port)
        after = router.samples().all
        build = router.get("/version").json()["build"]
    lines, ids = log_of(router), Ids()
    return Session(
        build,
        {name: ids.numbered(answer) for name, answer in answers.items()},
        asked_of(workers, ids),
        {key: value - before.get(key, 0.0) for key, value in after.items() if not UNSTABLE.match(key[0])},
        [ids.numbered(line.encode()) for line in lines],
    )


def asked_of(workers: Sequence[LyingWorker], ids: Ids) -> list[Asked]:
    """Return what reached the workers. A repetition counts once: a kept connection may have closed just before."""
    asked = [
        (at, ids.numbered(each.head.encode("latin-1")), each.body, each.size)
        for at, worker in enumerate(workers)
        for each in worker.asked
    ]
    return [each for each, _ in itertools.groupby(asked)]


def log_of(router: RouterProcess) -> list[str]:
    """Return the lines of the log, without the router's ports and the test's looks: first those of requests.

    The others are sorted: some are written when a task ends, sooner or later.
    """
    text = router.log()
    for url in (router.url, router.metrics_url):
        text = text.replace(url, "http://router")
    records = [(line, json.loads(line)) for line in text.splitlines()]
    requests = [line for line, record in records if record["logger"] == ACCESS and record["path"] not in LOOKS]
    return requests + sorted(line for line, record in records if record["logger"] != ACCESS)


class Ids:
    """Numbers the ids that the router makes, in the order in which answers show them: it makes others between them."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def numbered(self, text: bytes) -> bytes:
        """Return the text with these numbers instead."""
        return MADE_ID.sub(lambda match: b"<id %d>" % self._numbers.setdefault(match[0], len(self._numbers)), text)


class Both(NamedTuple):
    installed: Session
    sources: Session


@pytest.fixture(scope="module", params=ROUTERS, ids=" ".join)
def both(request: pytest.FixtureRequest) -> Both:
    with lying_worker() as one, lying_worker() as two:
        for worker in (one, two):
            worker.lies.update(LIES)
        sessions = [session(code, (one, two), *request.param) for code in ({}, {"PYTHONPATH": str(SOURCES)})]
    return Both(*sessions)


def test_the_sessions_run_what_they_should(both: Both) -> None:
    assert (both.installed.build, both.sources.build) == (version.build(), "interpreted")


def test_answers_are_the_same(both: Both) -> None:
    assert both.installed.answers.keys() == both.sources.answers.keys()
    pairs = {name: (got, both.sources.answers[name]) for name, got in both.installed.answers.items()}
    assert not {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def test_workers_get_the_same(both: Both) -> None:
    assert both.installed.asked == both.sources.asked


def test_metrics_are_the_same(both: Both) -> None:
    assert both.installed.metrics == both.sources.metrics


def test_logs_are_the_same(both: Both) -> None:
    assert both.installed.log == both.sources.log
