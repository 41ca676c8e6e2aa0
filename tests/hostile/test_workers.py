"""Workers that lie, break off, flood or fall silent: the client gets a correct answer or a visible break, nothing else.

The table says what a lie may lead to: the answer as it is, an error of the router in its place, or a body that the
client can see is cut. Nothing that a worker sends beyond its answer may reach any client, and a connection on which it
lied is not used again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from urllib.parse import quote

import pytest

from hostile.arena import Arena, Leg, Lie, lying_worker, post
from routers import router_process

OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: %d\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EVENTS = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'f\r\ndata: {"a":1}\n\n\r\n'
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"


class Outcome(NamedTuple):
    """What the client must get. `code`: the router's error; `complete`: whether the body ended as announced."""

    status: int
    code: str = ""
    complete: bool = True
    body: bytes = b""


INVALID = Outcome(502, "worker_invalid_response")
BROKEN = Outcome(502, "worker_broken")


def sent(*parts: bytes, then: Callable[[Leg], Awaitable[None]] | None = None) -> Lie:
    """Send that, each part in a read of its own, and wait for the router to close, or do something else."""

    async def lie(leg: Leg) -> None:
        for part in parts:
            await leg.send(part)
            if part is not parts[-1]:
                await leg.settle()
        if then is not None:
            await then(leg)
        else:
            await leg.hung_up()

    return lie


def closed(*parts: bytes) -> Lie:
    async def close(leg: Leg) -> None:
        leg.writer.close()

    return sent(*parts, then=close)


def half_closed(*parts: bytes) -> Lie:
    async def half_close(leg: Leg) -> None:
        leg.half_close()
        await leg.hung_up()

    return sent(*parts, then=half_close)


def reset(*parts: bytes) -> Lie:
    async def cut(leg: Leg) -> None:
        leg.reset()

    return sent(*parts, then=cut)


def forever(start: bytes, more: bytes) -> Lie:
    """Send without end; the router must close."""

    async def lie(leg: Leg) -> None:
        await leg.send(start)
        await leg.settle()
        while True:
            await leg.send(more)

    return lie


def dripping(head: bytes) -> Lie:
    """Send in pieces of a hundred bytes, each as soon as the one before is sent."""

    async def lie(leg: Leg) -> None:
        for start in range(0, len(head), 100):
            await leg.send(head[start : start + 100])
        await leg.hung_up()

    return lie


LIES: dict[str, tuple[Lie, Outcome]] = {
    # two ways to find the end
    "length and coding": (sent(OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), INVALID),
    "coding and length": (sent(OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"), INVALID),
    "two lengths": (sent(OK + b"Content-Length: 2\r\nContent-Length: 4\r\n\r\nevil"), INVALID),
    "a coding nobody knows": (sent(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"), INVALID),
    # the wrong length
    "short body, closed": (closed(SIZED % 5 + b"he"), Outcome(200, complete=False, body=b"he")),
    "short body, half closed": (half_closed(SIZED % 5 + b"he"), Outcome(200, complete=False, body=b"he")),
    "short body, reset": (reset(SIZED % 5 + b"he"), Outcome(200, complete=False)),
    "long body": (sent(SIZED % 2 + b"hello"), Outcome(200, body=b"he")),
    "no framing, closed": (closed(OK + b"\r\nhello"), Outcome(200, body=b"hello")),
    "no framing, half closed": (half_closed(OK + b"\r\nhello"), Outcome(200, body=b"hello")),
    # another answer after the answer, and bodies where none is allowed
    "an answer behind the answer": (sent(SIZED % 2 + b"{}" + EVIL), Outcome(200, body=b"{}")),
    "an answer behind the last chunk": (sent(CHUNKED + b"0\r\n\r\n" + EVIL), Outcome(200)),
    "204 with a body": (sent(b"HTTP/1.1 204 No\r\nContent-Length: 4\r\n\r\nevil"), Outcome(204)),
    "204 with chunks": (
        sent(b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nevil\r\n0\r\n\r\n"),
        Outcome(204),
    ),
    "304 with a body": (sent(b"HTTP/1.1 304 No\r\nContent-Length: 4\r\n\r\nevil"), Outcome(304)),
    "an answer behind a 204": (sent(b"HTTP/1.1 204 No\r\n\r\n" + EVIL), Outcome(204)),
    # interim responses
    "101": (sent(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n" + EVIL), INVALID),
    "1xx flood": (forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), INVALID),
    "1xx flood in one read": (sent(b"HTTP/1.1 102 Wait\r\n\r\n" * 2000 + EVIL), INVALID),
    "100, then nothing": (closed(b"HTTP/1.1 100 Continue\r\n\r\n"), BROKEN),
    # the head
    "header splitting by LF": (sent(OK + b"A: b\nSet-Cookie: evil\r\nContent-Length: 0\r\n\r\n"), INVALID),
    "header splitting by CR": (sent(OK + b"A: b\rSet-Cookie: evil\r\nContent-Length: 0\r\n\r\n"), INVALID),
    "header splitting by folding": (sent(OK + b"A: b\r\n Content-Length: 5\r\n\r\n"), INVALID),
    "NUL in a header": (sent(OK + b"A: \0\r\nContent-Length: 0\r\n\r\n"), INVALID),
    "status 000": (sent(b"HTTP/1.1 000 No\r\nContent-Length: 0\r\n\r\n"), INVALID),
    "status 1000": (sent(b"HTTP/1.1 1000 No\r\nContent-Length: 0\r\n\r\n"), INVALID),
    "status 600": (sent(b"HTTP/1.1 600 No\r\nContent-Length: 0\r\n\r\n"), INVALID),
    "HTTP/2 preface": (sent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), INVALID),
    "HTTP/0.9": (closed(b"hello"), INVALID),
    "head of 10 MB": (sent(OK + b"A: " + b"b" * 10_000_000 + b"\r\nContent-Length: 0\r\n\r\n"), INVALID),
    "head of 10 MB in many fields": (sent(OK + b"A: b\r\n" * 1_666_666 + b"\r\n"), INVALID),
    "head without an end": (forever(OK + b"A: ", b"b" * 1000), INVALID),
    "head that drips": (dripping(OK + b"A: b\r\n" * 11_000), INVALID),
    "reason without an end": (forever(b"HTTP/1.1 200 ", b"b" * 1000), INVALID),
    "fields without an end": (forever(OK, b"A: b\r\n" * 100), INVALID),
    "head, half closed": (half_closed(OK + b"Content-Le"), BROKEN),
    "head, reset": (reset(OK + b"Content-Le"), BROKEN),
    "nothing, closed": (closed(), BROKEN),
    "nothing, reset": (reset(), BROKEN),
    # chunks
    "chunk garbage": (sent(CHUNKED + b"5\r\nhello\r\n", b"nonsense\r\n"), Outcome(200, complete=False, body=b"hello")),
    "chunk of 16 digits": (sent(CHUNKED, b"ffffffffffffffff\r\n" + b"x" * 100), INVALID),
    "chunk extension without an end": (forever(CHUNKED + b"5;", b"a" * 1000), INVALID),
    "trailers without an end": (forever(CHUNKED + b"0\r\n", b"A: b\r\n"), INVALID),
    "garbage inside a stream of events": (sent(EVENTS + EVENT, b"data: not a chunk\n\n"), Outcome(200, complete=False)),
    "reset inside a stream of events": (reset(EVENTS + EVENT * 3), Outcome(200, complete=False)),
    "half closed inside a stream of events": (half_closed(EVENTS + EVENT * 3), Outcome(200, complete=False)),
}


SILENT = ("nothing", "100")
"""Lies that begin like a stale connection: it closes without a byte of an answer. The request is sent once more, on a
new connection."""


@pytest.mark.parametrize("name", LIES)
def test_lies(field: Arena, name: str) -> None:
    lie, outcome = LIES[name]
    word = name.replace(" ", "-").replace(",", "")
    field.worker.lies[word] = lie
    field.worker.asked.clear()
    before = field.rss
    with field.polite():
        answer = field.ask(post(f"/generate?lie={word}", b'{"stream": true}'))
        for _ in range(3):
            assert field.ask(post("/generate")).body == b"{}"
    assert (answer.status, answer.code, answer.complete) == outcome[:3], answer
    if not outcome.code:
        assert answer.body.startswith(outcome.body)
        assert b"evil" not in answer.body
        assert "set-cookie" not in answer.headers
    assert field.rss - before < 20_000_000
    asked = list(field.worker.asked)
    told = [place for place, one in enumerate(asked) if one.target.endswith(word)]
    assert 1 <= len(told) <= (2 if name.startswith(SILENT) else 1)
    for place in told:  # nothing follows on a connection on which it lied
        assert asked[place].connection not in {one.connection for one in asked[place + 1 :]}


def test_answer_to_half_a_request(field: Arena) -> None:
    """The answer goes to the client; the connection, on which the worker does not read the rest, is not used again."""

    async def early(leg: Leg) -> None:
        await leg.reader.readexactly(10)
        await leg.send(SIZED % 2 + b"{}")
        await leg.settle()

    field.worker.lies["early"] = early
    with field.polite():
        for _ in range(3):
            answer = field.ask(post("/generate?lie=early", b'{"text": "%s"}' % (b"x" * 900_000)))
            assert (answer.status, answer.body, answer.complete) == (200, b"{}", True)
            assert field.ask(post("/generate")).body == b"{}"


@pytest.mark.parametrize("hurry", [EVIL, b"nonsense\r\n\r\n"], ids=["an answer", "nonsense"])
def test_worker_that_speaks_before_it_is_asked(brief: Arena, hurry: bytes) -> None:
    """No client hangs: the leg breaks at once, or (where the request was faster) gets its answer."""
    brief.worker.hurry = hurry
    try:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(brief.connect()) for _ in range(20)]
            for client in clients:
                client.send(post("/generate"))
            answers = [client.answer() for client in clients]
    finally:
        brief.worker.hurry = b""
    assert {answer.status for answer in answers if answer is not None} <= {200, 502}
    assert None not in answers


@pytest.mark.parametrize("start", [b"", OK, b"HTTP/1.1 100 Continue\r\n\r\n", EVENTS + EVENT], ids=repr)
def test_worker_that_falls_silent(brief: Arena, start: bytes) -> None:
    """Nothing, half a head, an interim answer, half a stream: after the timeout the router closes the connection."""
    brief.worker.lies["silent"] = sent(start)
    with brief.polite():
        answer = brief.ask(post("/generate?lie=silent", b'{"stream": true}'))
    if start.startswith(EVENTS):
        assert (answer.status, answer.complete) == (200, False)
        assert b"error" in answer.body
    else:
        assert (answer.status, answer.code) == (504, "request_overdue")
    brief.until(lambda: brief.router.worker(brief.worker.url)["load"] == 0)


def test_liar_beside_an_honest_worker() -> None:
    """With retries, which are the default, no client notices a worker whose answers are invalid."""
    hidden = [name for name, (_, outcome) in LIES.items() if outcome.code]
    retried = ("--policy", "round_robin", "--cb-failure-threshold", "1000", "--retry-budget-ratio", "1")
    flags = (*retried, "--disable-outlier-ejection")  # on a busy machine the test lasts long enough for one
    with (
        lying_worker() as liar,
        lying_worker() as honest,
        router_process([liar.url, honest.url], *flags) as router,
    ):
        for name in hidden:
            liar.lies[name] = LIES[name][0]
            for _ in range(2):
                assert router.post("/generate?lie=" + quote(name), {"text": "x"}).body == b"{}"
        assert len([one for one in liar.asked if "lie" in one.target]) >= len(hidden)
