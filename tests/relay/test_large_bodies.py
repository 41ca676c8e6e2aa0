"""Large bodies over real sockets and on their own: each turn of the event loop does one piece of their work."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections.abc import Callable, Coroutine
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from played import Play, post, run
from sglang_router.errors import NotFound, RouterError
from sglang_router.relay.answers import Answers
from sglang_router.relay.batch import Batch
from sglang_router.relay.body import no_handler
from sglang_router.relay.bulk import Bulk
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.full_read import FEW, FULL
from sglang_router.relay.memory import Discarded
from sglang_router.relay.outgoing import SLICE, Outgoing
from sglang_router.relay.reading import read_and_ask
from sglang_router.relay.relay import Relay, RelayRules
from sglang_router.relay.rules import Timeouts
from sglang_router.relay.states import LINGERING, NEW
from sglang_router.relay.upstream import UpstreamConnection
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.events import Listeners
from sglang_router.routing.facts import LARGE, MOST_TEXT, QUICK, TINY, Facts, read
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import RequestTag, Route, Wait
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.request import Request
from sglang_router.wire.request_id import RequestIds
from sglang_router.wire.splice import Spliced, splice_at

CHAT = "/v1/chat/completions"
PROMPT = bytes(range(97, 123)) * (6 * LARGE // 26)


def chat(prompt: bytes = PROMPT, rest: bytes = b"") -> bytes:
    """A chat request with a large prompt."""
    return b'{"model": "m","messages":[{"role":"user","content":"' + prompt + b'"}]' + rest + b" }\n"


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def wrapper() -> None:
        run(test())

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    return wrapper


class Turns:
    """An event loop that is turned by hand."""

    def __init__(self) -> None:
        self._next: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._next.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        """Forget it: no time passes here."""

    def time(self) -> float:
        return 0.0

    def turn(self) -> bool:
        """Call what is due; return whether there was anything."""
        due, self._next = self._next, []
        for callback in due:
            callback()
        return bool(due)


class Pipe:
    """A transport that keeps what is written, and is full when the test says so."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.reads: list[str] = []
        self.closed = ""

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))

    def pause_reading(self) -> None:
        self.reads.append("pause")

    def resume_reading(self) -> None:
        self.reads.append("resume")

    def get_extra_info(self, name: str) -> None:
        """Return None: there is no socket."""

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return bool(self.closed)

    def abort(self) -> None:
        self.closed = "aborted"

    def close(self) -> None:
        self.closed = "closed"


class Sink:
    """Takes an answer; keeps its bytes."""

    decoding = False
    bodyless = False

    def __init__(self) -> None:
        self.got = b""
        self.done = False

    def begin(self, head: Any, framing: Any, data: bytes, done: bool) -> None:
        self.data(data, done)

    def data(self, data: bytes, done: bool) -> None:
        self.got += data
        self.done = done


def upstream() -> tuple[UpstreamConnection, Pipe, Turns, list[UpstreamConnection]]:
    """Return an open connection to a worker, its transport, its loop, and the connections that were released."""
    turns, pipe = Turns(), Pipe()
    released: list[UpstreamConnection] = []
    home = SimpleNamespace(opened=lambda connection: None, release=released.append, target=SimpleNamespace(name="w0"))
    connection = UpstreamConnection(cast("Any", home), Batch(cast("asyncio.AbstractEventLoop", turns)))
    connection.connection_made(cast("asyncio.Transport", pipe))
    return connection, pipe, turns, released


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_f10_a_turn_of_the_loop_does_one_piece_however_many_large_bodies_there_are() -> None:
    """F10: large bodies that came together held up the loop for as long as all of them took."""
    turns = Turns()
    bulk = Bulk(turns.call_soon)
    done: list[str] = []

    def piece(name: str, times: int) -> Callable[[], bool]:
        left = iter(range(times - 1, -1, -1))

        def work() -> bool:
            done.append(name)
            return bool(next(left))

        return work

    for name in "abc":
        bulk.add(piece(name, 3))
    counts = []
    while turns.turn():
        counts.append(len(done))
    assert counts == list(range(1, 10)), "one piece a turn"
    assert "".join(done) == "abc" * 3, "in turn"


def last(done: list[int]) -> bool:
    """Do a piece that is the only one."""
    done.append(1)
    return False


def test_a_piece_that_fails_does_not_stop_the_others() -> None:
    turns = Turns()
    bulk = Bulk(turns.call_soon)
    done: list[int] = []
    bulk.add(lambda: bool(1 // 0))
    bulk.add(lambda: last(done))
    with pytest.raises(ZeroDivisionError):
        turns.turn()
    while turns.turn():
        pass
    assert done == [1]
    assert repr(bulk) == "<Bulk 0 pieces>"


# -- towards the worker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_f10_a_large_body_is_written_a_slice_a_turn(kind: type[bytes] | type[bytearray]) -> None:
    """F10, F30: one write of the whole body took the system as long as the body is large, and kept a copy of it."""
    connection, pipe, turns, _ = upstream()
    body = kind(chat())
    connection.send(cast("Any", Sink()), b"HEAD", body)
    assert not pipe.written
    before = 0
    while turns.turn():
        after = sum(map(len, pipe.written))
        assert after - before <= SLICE + len(b"HEAD")
        before = after
    assert b"".join(pipe.written) == b"HEAD" + body


def test_f30_nothing_is_written_while_the_worker_does_not_read() -> None:
    """F30: what a worker did not read stood in the write buffer, beside the body itself."""
    connection, pipe, turns, _ = upstream()
    body = b" " * 12 * SLICE  # whole slices, which the batch writes at once
    connection.send(cast("Any", Sink()), b"HEAD", body)
    turns.turn()
    while len(b"".join(pipe.written)) < len(body) + 4:
        connection.pause_writing()
        written = len(pipe.written)
        while turns.turn():
            pass
        assert len(pipe.written) == written
        connection.resume_writing()
        assert turns.turn()
    assert b"".join(pipe.written) == b"HEAD" + body


@pytest.mark.parametrize("end", ["answered", "aborted", "lost"])
def test_the_rest_of_a_body_is_not_written_after_the_end(end: str) -> None:
    connection, pipe, turns, released = upstream()
    sink = Sink()
    connection.send(cast("Any", sink), b"HEAD", chat())
    turns.turn()
    if end == "answered":
        connection.data_received(b"HTTP/1.1 413 Large\r\ncontent-length: 2\r\n\r\n{}")
        assert (sink.got, sink.done) == (b"{}", True)
        assert pipe.closed == "closed", "the worker would read the rest as the next request"
    elif end == "aborted":
        connection.abort()
    else:
        cast("Any", connection)._home.lost = lambda connection: None
        cast("Any", sink).broken = lambda outcome, detail: None
        connection.connection_lost(None)
    written = len(pipe.written)
    while turns.turn():
        pass
    assert len(pipe.written) == written
    assert not released


def test_members_are_added_to_a_large_body_without_a_copy_of_it() -> None:
    for empty in (b"", b'"x":1'):
        body = b"{" + empty + b" " * 70_000 + b"} \n"
        spliced = splice_at(body, (len(body) - 3, b"," if empty else b""), b'"rank":1')
        assert isinstance(spliced, Spliced)
        outgoing, sent = Outgoing(spliced), b""
        while not outgoing.done:
            sent += outgoing.next()
        assert len(spliced) == len(sent)
        assert json.loads(sent) == {**json.loads(body), "rank": 1}
        assert sent[: len(body) - 3] == body[:-3]
    assert splice_at(b"{} " + b" " * 70_000, (1, b""), b'"rank":1') == b'{"rank":1}'


# -- reading sockets ---------------------------------------------------------------------------------------------------


def test_f10_a_worker_is_read_once_a_turn_while_its_answer_comes_fast() -> None:
    """F10: a socket is read up to 32 times in a turn, 256 kB each."""
    connection, pipe, turns, _ = upstream()
    connection.send(cast("Any", Sink()), b"HEAD", b"{}")
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n")
    turns.turn()
    connection.data_received(b"x" * (FULL - 1))
    assert pipe.reads == []
    connection.data_received(b"x" * FULL)
    assert pipe.reads == ["pause"]
    turns.turn()
    assert pipe.reads == ["pause", "resume"]
    connection.data_received(b"x" * FULL)
    connection.pause()  # the client does not read
    turns.turn()
    assert pipe.reads == ["pause", "resume", "pause", "pause"]
    connection.resume()
    assert pipe.reads[4:] == ["resume"]


@on_loop
async def test_f10_a_client_is_read_once_a_turn_while_its_body_comes_fast() -> None:
    """F10: eight megabytes of a body were read and parsed in one turn of the loop."""
    async with Play() as play:
        connection, pipe = ClientConnection(play.app.frontend), Pipe()
        connection.connection_made(cast("asyncio.Transport", pipe))
        body = b'{"text":"' + b"0123456789" * (3 * FULL // 10) + b'"}'
        request = post("/generate", body)
        connection.data_received(request[: FULL - 1])
        assert pipe.reads == []
        connection.data_received(request[FULL - 1 : -1])
        assert pipe.reads == ["pause"]
        parsed = [connection._parser.received]
        while len(pipe.reads) < 2:
            await asyncio.sleep(0)
            parsed.append(connection._parser.received)
        assert pipe.reads == ["pause", "resume"]
        assert max(after - before for before, after in pairwise(parsed)) <= 65536, "parsed in pieces"
        assert parsed[-1] == len(body) - 1
        connection.data_received(request[-1:])
        leg = await play.leg()
        assert leg.body == body
        connection.connection_lost(None)


def chunks(content: bytes, size: int) -> bytes:
    """Content in chunks of so many bytes, without the last chunk."""
    pieces = (content[at : at + size] for at in range(0, len(content), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


async def parsed_by_turn(play: Play, request: bytes, first: int) -> tuple[list[int], Pipe]:
    """Receive a request in two reads; return how much of the content was parsed in each turn, and the transport."""
    connection, pipe = ClientConnection(play.app.frontend), Pipe()
    connection.connection_made(cast("asyncio.Transport", pipe))
    connection.data_received(request[:first])
    received = [connection._parser.received]
    connection.data_received(request[first:])
    received.append(connection._parser.received)
    while pipe.reads != ["pause", "resume"]:
        await asyncio.sleep(0)
        received.append(connection._parser.received)
    connection.connection_lost(None)
    return [after - before for before, after in pairwise(received)], pipe


@on_loop
async def test_f10_tiny_chunks_of_one_read_are_parsed_in_parts() -> None:
    """F10: ten clients whose chunks have one byte held up the loop for 80 ms: 128 kB of them were parsed at once."""
    async with Play() as play:
        head = post("/generate", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        assert b"chunked" in head
        read = chunks(b"x" * 16_000, 1)
        assert FEW < len(read) < FULL
        steps, _ = await parsed_by_turn(play, head + read, len(head))
        assert sum(steps) == 16_000
        assert max(steps) <= FEW // 6 + 1, "a chunk of one byte takes six"


@on_loop
async def test_large_chunks_are_parsed_at_once() -> None:
    async with Play() as play:
        connection, pipe = ClientConnection(play.app.frontend), Pipe()
        connection.connection_made(cast("asyncio.Transport", pipe))
        head = post("/generate", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        connection.data_received(head + chunks(b"x" * 60_000, 4_000))
        assert (pipe.reads, connection._parser.received) == ([], 60_000)
        connection.connection_lost(None)


@on_loop
async def test_f10_what_a_refused_client_still_sends_is_read_once_a_turn() -> None:
    """F10: a body for a path that does not exist was discarded by up to 8 MB in one turn."""
    async with Play() as play:
        connection, pipe = ClientConnection(play.app.frontend), Pipe()
        connection.connection_made(cast("asyncio.Transport", pipe))
        connection.refuse(NotFound())
        assert connection.state is LINGERING
        connection.data_received(b"x" * 2 * FULL)
        assert pipe.reads == ["pause"]
        await play.until(lambda: pipe.reads == ["pause", "resume"])
        connection.connection_lost(None)


class Notebook:
    """A decider that notes what it is asked, and lets everybody wait."""

    def __init__(self) -> None:
        self.asked: list[Facts] = []

    def ask(self, tag: RequestTag, facts: Facts, now: float) -> Wait:
        self.asked.append(facts)
        return Wait(math.inf, "room")


def relay_on(turns: Turns, decider: Notebook) -> Relay:
    """Return a relay that opens no connection."""
    loop = cast("asyncio.AbstractEventLoop", turns)
    connections = ConnectionPool(loop, Batch(loop), connect_timeout=1.0, idle_timeout=1.0, max_idle=1, tls=None)
    answers = Answers(RequestIds(random.Random(1).getrandbits), None)
    rules = RelayRules(Timeouts(), ForwardRules(trusted=True), no_handler, MOST_TEXT)
    return Relay(loop, lambda: 0.0, cast("Any", decider), connections, answers, Listeners(), rules)


class Asked:
    """An exchange that is new."""

    def __init__(self, body: bytes, relay: Relay) -> None:
        self.state = NEW
        self.request = Request(b"POST", CHAT.encode(), CHAT.encode(), [])
        self.request.body = body
        self.tag = RequestTag(1, b"r", 0.0, Route("POST", CHAT, "chat"))
        self.refused: list[RouterError] = []
        self.relay = relay

    def queue(self, wait: Wait) -> None:
        """The decider's answer is nothing here."""

    def refuse(self, error: RouterError) -> None:
        self.refused.append(error)


def test_f10_bodies_that_are_complete_together_are_decoded_one_a_turn() -> None:
    """F10: forty bodies of 500 kB that became complete in the same turn of the loop were all decoded in it: 120 ms."""
    turns, decider = Turns(), Notebook()
    relay, asked = relay_on(turns, decider), decider.asked
    for _ in range(5):
        read_and_ask(cast("Any", Asked(chat(b"x" * QUICK), relay)), ENDPOINTS[CHAT.encode()], b"", 0.0)
    assert not asked
    for count in range(1, 6):
        assert turns.turn()
        assert len(asked) == count
    assert not turns.turn()
    read_and_ask(cast("Any", Asked(chat(b"x" * 1000), relay)), ENDPOINTS[CHAT.encode()], b"", 0.0)
    assert len(asked) == 6, "a small one is decoded at once"


@pytest.mark.parametrize(
    "rest",
    [
        b', "n": NaN',
        b', "cut": "\\ud83d"',
        b', "kv_transfer_params": {"do_remote_prefill": true}',
        b', "stream": true, "x": [-Infinity]',
        b', "model": "\\u006f", "y": NaN',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_f10_a_body_that_the_fast_decoder_refuses_is_read_in_steps(rest: bytes, encoding: str) -> None:
    """F10: NaN, half a surrogate pair or a reserved field made a body of 500 kB take up to 190 ms in one turn."""
    turns, decider = Turns(), Notebook()
    many = b",".join(b'"%d":[[],{"a":1}]' % number for number in range(9000))
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"x":{%b}%b}' % (many, rest)
    body = body.decode("utf-8", "surrogatepass").encode(encoding, "surrogatepass")
    assert TINY < len(body) <= LARGE
    exchange = Asked(body, relay_on(turns, decider))
    read_and_ask(cast("Any", exchange), ENDPOINTS[CHAT.encode()], b"", 0.0)
    steps = 0
    while turns.turn():
        steps += 1
    assert steps > 5
    (facts,) = decider.asked
    whole = read(ENDPOINTS[CHAT.encode()], body)
    for name in ("text", "scaffold", "model", "namespace", "streaming", "reserved", "body"):
        assert getattr(facts, name) == getattr(whole, name), name
    assert facts.place is None or body[facts.place[0] :] == b"}"


def test_text_in_another_encoding_that_is_none_is_refused() -> None:
    turns = Turns()
    exchange = Asked('{"text":"'.encode("utf-16") + b"\x00\xdc" * TINY + b"\x00", relay_on(turns, Notebook()))
    read_and_ask(cast("Any", exchange), ENDPOINTS[b"/generate"], b"", 0.0)
    while turns.turn():
        pass
    assert [error.code for error in exchange.refused] == ["json_parse_error"]


# -- whole requests ----------------------------------------------------------------------------------------------------


@on_loop
async def test_a_large_body_reaches_the_worker_byte_for_byte() -> None:
    async with Play() as play:
        client = await play.client()
        bodies = (chat(), chat(rest=b', "stream" : false, "x":[["]"]]'), b"{}" + b" " * 2 * LARGE)
        await client.send(post(CHAT, bodies[0]))
        leg = await play.leg()
        for number, body in enumerate(bodies):
            if number:
                await client.send(post(CHAT, body))
                await leg.request()
            assert leg.body == body
            await leg.answer(200, b'{"ok":1}')
            assert (await client.response()).body == b'{"ok":1}'
        ends = await play.ended(3)
        assert [end.tag.model for end in ends] == ['"m"', '"m"', ""]
        assert [end.tag.received for end in ends][2] == 2 * LARGE + 2


@on_loop
async def test_small_requests_are_answered_while_a_large_body_is_read() -> None:
    """F10: a small request waited until the large one was read to its end."""
    async with Play() as play:
        large, small = await play.client(), await play.client()
        await large.send(post(CHAT, b'{"unread":[' + b"[[]]," * LARGE + b"1]}"))
        await play.until(lambda: play.clients.active == 1)
        await small.send(post(CHAT, b'{"messages":[]}'))
        leg = await play.leg()
        assert leg.body == b'{"messages":[]}'
        await leg.answer(200)
        assert (await small.response()).status == 200
        await leg.request()
        await leg.answer(200)
        assert (await large.response()).status == 200


@on_loop
async def test_a_large_body_that_is_no_json_object_is_refused() -> None:
    async with Play() as play:
        client = await play.client()
        for body in (b"[" * 2 * LARGE, chat()[:-3], b"{" + b'"a":1,' * LARGE + b'"b":2}'):
            await client.send(post(CHAT, body))
            reply = await client.response()
            assert reply.status == 400
            assert json.loads(reply.body)["error"]["code"] in ("json_parse_error", "invalid_request")
        assert play.legs.empty()


@on_loop
async def test_a_client_that_leaves_while_its_body_is_read_costs_no_worker_anything() -> None:
    async with Play() as play:
        client = await play.client()
        await client.send(post(CHAT, b'{"unread":[' + b"[[]]," * 2 * LARGE + b"1]}"))
        await play.until(lambda: play.clients.active == 1)
        client.reset()
        (end,) = await play.ended(1)
        assert (end.answer.outcome, end.leg) == (Outcome.GONE, None)
        assert play.legs.empty()


@on_loop
async def test_a_large_body_is_sent_again_whole() -> None:
    async with Play(workers=2) as play:
        client = await play.client()
        body = chat()
        await client.send(post(CHAT, body))
        first = await play.leg()
        await first.answer(503)
        second = await play.leg()
        assert first.body == second.body == body
        await second.answer(200)
        assert (await client.response()).status == 200


# -- its memory --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back one by one on Linux only")
def test_f10_the_pages_of_a_body_are_given_back_in_slices() -> None:
    """F10: freeing a large body took the system as long as it is large, in one step of the loop."""
    turns = Turns()
    bulk = Bulk(turns.call_soon)
    request = Request(b"POST", b"/", b"/", [])
    request.body = body = bytearray(b"x" * 20_000_000)
    view = memoryview(body)
    bulk.discard(request)
    assert request.body == b""
    turns.turn()
    assert body.count(0) == 0, "somebody looks at it"
    view.release()
    gone = [body.count(0)]
    while turns.turn():
        gone.append(body.count(0))
    steps = [after - before for before, after in pairwise(gone)]
    assert max(steps) <= 1 << 22
    assert gone[-1] > 19_900_000


def test_a_body_that_somebody_looks_at_for_ever_is_let_go() -> None:
    body = bytearray(b"x" * 1000)
    view = memoryview(body)
    discarded = Discarded(body)
    assert sum(discarded.step() for _ in range(1000)) < 200
    assert view[0] == ord("x")
