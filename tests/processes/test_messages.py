"""Every message arrives as it was sent, in any number of pieces; and so do errors."""

from __future__ import annotations

import asyncio
import logging
import typing
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.errors import (
    InternalError,
    MethodNotAllowed,
    QueueFull,
    ReservedField,
    RouterError,
    Unavailable,
)
from sglang_router.processes import facing, failures
from sglang_router.processes.facing import answer_of, answered_of
from sglang_router.processes.link import Link, decode_from_decider, decode_from_relay, frame
from sglang_router.processes.logs import RelayLog
from sglang_router.processes.message import Message
from sglang_router.processes.messages import FromDecider, FromRelay, Said, Withdraw
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.events import Answered
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import RequestTag, Route, Target

SIDES = [(FromRelay, decode_from_relay), (FromDecider, decode_from_decider)]


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values of a field's type."""
    if isinstance(kind, type) and issubclass(kind, Message):
        return made(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=2)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if arguments:  # a union
        return st.one_of(*map(values, arguments))
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        str: st.text(max_size=5),
        bytes: st.binary(max_size=5),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        type(None): st.none(),
    }[kind]


def made(kind: type[Message]) -> st.SearchStrategy[Message]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, *(values(hints[name]) for name in kind.__struct_fields__))


class Heard:
    """Owns a link, and keeps what it hears."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = []
        self.lost = 0

    def heard(self, link: Link, heard: list[Any]) -> None:
        self.frames.append(heard)

    def link_lost(self, link: Link) -> None:
        self.lost += 1


@pytest.mark.parametrize(("side", "decode"), SIDES)
@settings(max_examples=25)
@given(data=st.data())
def test_every_message_arrives_as_it_was_sent_in_any_pieces(side: Any, decode: Any, data: st.DataObject) -> None:
    kinds = typing.get_args(side)
    sent = data.draw(st.lists(st.lists(st.one_of(*map(made, kinds)), min_size=1, max_size=3), min_size=1, max_size=3))
    stream = b"".join(bytes(frame(cast("list[Message]", each))) for each in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    owner = Heard()
    link = Link(owner, decode, lambda _: None)
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        if begin < end:
            link.data_received(stream[begin:end])
    assert owner.frames == sent


def test_tags_are_unique_over_both_sides() -> None:
    tags = [kind.__struct_config__.tag for side, _ in SIDES for kind in typing.get_args(side)]
    assert len(set(tags)) == len(tags)


class Written:
    """Stands for a transport. open: False, once it closes."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.open = True

    def write(self, data: bytearray) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return not self.open

    def abort(self) -> None:
        self.open = False


def test_messages_of_one_turn_are_one_write() -> None:
    later: list[Link] = []
    link, wire = Link(Heard(), decode_from_relay, later.append), Written()
    link.transport = cast("asyncio.Transport", wire)
    for number in range(5):
        link.put(Withdraw(number, 1.0))
    assert (later, wire.writes) == ([link], [])
    link.send()
    assert decode_from_relay(memoryview(wire.writes[0])[4:]) == [Withdraw(number, 1.0) for number in range(5)]
    link.send()
    assert len(wire.writes) == 1, "nothing to send"


def test_what_is_no_frame_closes_the_link() -> None:
    owner, wire = Heard(), Written()
    link = Link(owner, decode_from_relay, lambda _: None)
    link.transport = cast("asyncio.Transport", wire)
    link.data_received(b"\xff\xff\xff\xff and so on")
    assert not wire.open
    assert not owner.frames


ERRORS: list[RouterError] = [
    QueueFull(retry_after=3.0),
    MethodNotAllowed(allow=("GET", "POST")),
    ReservedField("bootstrap_room"),
    Unavailable("for a reason", retry_after=0.5),
    InternalError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_errors_arrive_as_they_were_raised(error: RouterError) -> None:
    sent = msgspec.msgpack.decode(
        msgspec.msgpack.encode(failures.failure_of(error)), type=type(failures.failure_of(error))
    )
    found = failures.error_of(sent)
    assert type(found) is type(error)
    assert (str(found), found.param, found.retry_after, tuple(found.fields)) == (
        str(error),
        error.param,
        error.retry_after,
        tuple(error.fields),
    )
    assert found.body() == error.body()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_asked_is_what_the_decider_sees(path: bytes) -> None:
    endpoint = ENDPOINTS[path]
    route = endpoint.route or Route("POST", "/other/path", endpoint.name)
    tag = RequestTag(7, b"id-1", 12.5, route, "10.0.0.9", "alice", 321, (b"id-1", b"session", b"trace", None, True, 10))
    tag.model, tag.streaming = '"m"', True
    facts = Facts(endpoint, b"namespace", b"text", 2, True, b'"m"', b"session", b"x" * 321)
    ask = facing.ask_of(tag, facts, 13.0, facing.TextForm(b"text", digest=b"digest"))
    seen, known = facing.tag_of(ask, 99), facing.facts_of(ask, b"text")
    assert seen.number == 99, "the decider's own"
    for name in ("client", "explained", "id", "model", "named", "peer", "raw_id", "received", "start", "streaming"):
        assert getattr(seen, name) == getattr(tag, name), name
    assert (seen.route.method, seen.route.path, seen.route.endpoint) == (route.method, route.path, route.endpoint)
    for name in ("endpoint", "model", "namespace", "reserved", "routing_key", "scaffold", "streaming", "text"):
        assert getattr(known, name) == getattr(facts, name), name
    assert len(known.body) == 321
    assert (ask.digest, ask.now) == (b"digest", 13.0)


def test_outcomes_and_workers_keep_their_identity() -> None:
    assert [facing.OUTCOMES[facing.code_of(outcome)] for outcome in Outcome] == [*Outcome]
    assert facing.code_of(None) == -1
    target = Target("http://w:1", 3, b"key", "http://w:1@3", "an id", "prefill")
    assert facing.target_of(facing.known_of(5, target)) == target


HALF = "/keys/\udcff"
"""A file's name that is not UTF-8, as Python has it. It cannot cross: the whole frame was lost with it."""


def test_what_became_of_a_handoff_crosses() -> None:
    answered = Answered(200, outcome=Outcome.SERVED)
    answered.handoff = "absent"
    assert answered_of(answer_of(answered)).handoff == "absent"


def test_half_of_a_surrogate_pair_crosses_as_an_escape() -> None:
    failure = failures.failure_of(InternalError(HALF))
    assert failures.error_of(failure).args == (r"/keys/\udcff",)
    frame([failure])


def test_a_log_record_with_half_of_a_surrogate_pair_crosses() -> None:
    put: list[Any] = []

    class Kept(Link):
        def put(self, message: Message) -> None:
            put.append(message)

    handler = RelayLog("info", "text", 0)
    handler.link = Kept(cast("Any", None), decode_from_decider, lambda _: None)
    record = logging.LogRecord("sglang_router", logging.INFO, "", 0, "read %s", (HALF,), None)
    record.fields = {"file": HALF}
    handler.emit(record)
    (said,) = put
    assert (said.message, said.fields) == (r"read /keys/\udcff", {"file": r"/keys/\udcff"})
    assert decode_from_relay(memoryview(frame([said]))[4:]) == [said]
    assert isinstance(said, Said)
