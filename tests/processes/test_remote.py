"""A relay without a decider, or with one that does not read: what waits, what is refused, what goes on."""

from __future__ import annotations

import asyncio
import math
from typing import Any, cast

import pytest

from fleets import ROUTE, facts
from sglang_router.errors import DeciderGone
from sglang_router.processes import messages
from sglang_router.processes.link import Link, decode_from_decider, decode_from_relay
from sglang_router.processes.message import PlannedOne
from sglang_router.processes.remote import GRACE, MOST, RemoteDecider, Reporter
from sglang_router.processes.texts import SHARED, TextRing
from sglang_router.routing.decider import Delivered
from sglang_router.routing.events import Answered, Finished
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag, Target, Wait
from sglang_router.routing.usage import Usage

TARGET = Target("http://w:1", name="http://w:1", worker_id="id")


class Sent:
    """Stands for a transport. reads: bytes after which the other side does not read; longest: of one frame."""

    def __init__(self, reads: float = math.inf) -> None:
        self.messages: list[Any] = []
        self.link: Link
        self.reads = reads
        self.written = self.longest = 0

    def write(self, data: bytearray) -> None:
        self.messages += decode_from_relay(memoryview(data)[4:])
        self.longest = max(self.longest, len(data))
        self.written += len(data)
        if self.written > self.reads:
            self.link.pause_writing()

    def is_closing(self) -> bool:
        return False


class Nobody:
    """Owns a link, and hears nothing."""

    def heard(self, link: Link, heard: list[Any]) -> None: ...

    def link_lost(self, link: Link) -> None: ...


class Relay:
    """A RemoteDecider with a link that can be cut, and what it delivers."""

    def __init__(self, connected: bool = True) -> None:
        self.now = 0.0
        self.remote = RemoteDecider(0, TextRing(bytearray(2 * SHARED)), 10.0, lambda: self.now, b"key")
        self.remote.deliver = self._deliver
        self.delivered: list[tuple[int, Delivered]] = []
        self.reporter = Reporter(self.remote)
        if connected:
            self.connect()

    def _deliver(self, number: int, answer: Delivered) -> None:
        self.delivered.append((number, answer))

    def connect(self, reads: float = math.inf) -> None:
        self.wire = Sent(reads)
        self.wire.link = self.link = Link(Nobody(), decode_from_decider, lambda _: None)
        self.link.transport = cast("asyncio.Transport", self.wire)
        self.remote.connected(self.link)
        self.remote.targets[1] = TARGET

    def sent(self) -> list[Any]:
        """Return what was sent since the last call."""
        self.link.send()
        found, self.wire.messages = self.wire.messages, []
        return found

    def ask(self, number: int, text: bytes = b"text") -> RequestTag:
        tag = RequestTag(number, b"id-%d" % number, self.now, ROUTE)
        self.remote.ask(tag, facts(text), self.now)
        return tag

    def plan(self, number: int, lease: int) -> PlannedLeg:
        self.remote.planned(messages.Planned(number, [PlannedOne(lease, 1, "hit", 1, 2, b"", b"")], 0.0, 0, False))
        return PlannedLeg(lease, TARGET, "hit", 1, 2)


def kinds(sent: list[Any]) -> list[str]:
    return [type(each).__name__ for each in sent]


def test_what_is_asked_without_a_decider_is_asked_in_order_when_there_is_one() -> None:
    relay = Relay(connected=False)
    tags = [relay.ask(number) for number in (3, 1, 2)]
    relay.remote.withdraw(tags[1])
    relay.reporter.finished(Finished(tags[1], None, Answered(0)))
    relay.connect()
    sent = relay.sent()
    assert kinds(sent) == ["Hello", "Unasked", "Ask", "Ask"]
    assert [ask.number for ask in sent[2:]] == [3, 2]


def test_so_many_may_wait_and_further_ones_are_refused() -> None:
    relay = Relay(connected=False)
    for number in range(MOST):
        relay.ask(number)
    with pytest.raises(DeciderGone):
        relay.ask(MOST)


def test_a_decider_that_does_not_read_gets_nothing_until_it_reads() -> None:
    relay = Relay()
    relay.sent()
    relay.link.pause_writing()
    relay.ask(1)
    relay.ask(2)
    assert relay.sent() == []
    relay.link.resume_writing()
    relay.ask(3)
    assert relay.sent() == [], "the earlier ones first"
    relay.remote.read_again()
    assert [ask.number for ask in relay.sent()] == [1, 2, 3]


def test_what_was_kept_goes_as_far_as_the_decider_reads() -> None:
    """All of it in one frame, as it was, could be longer than a frame may be; no decider would ever take it."""
    relay = Relay(connected=False)
    numbers = list(range(300))
    for number in numbers:
        relay.ask(number, bytes(SHARED))
    relay.connect(reads=3 * SHARED)
    assert relay.wire.longest < 3 * SHARED
    asked = [each.number for each in relay.sent() if type(each) is messages.Ask]
    assert asked == numbers[: len(asked)]
    assert len(asked) < 10
    while len(asked) < len(numbers):
        relay.wire.written = 0
        relay.link.resume_writing()
        relay.remote.read_again()
        asked += [each.number for each in relay.sent()]
    assert asked == numbers


def test_ends_that_a_decider_does_not_read_are_kept_in_bounds() -> None:
    relay = Relay()
    relay.sent()
    relay.link.pause_writing()
    tags = [relay.ask(number) for number in range(3)]
    for tag in tags:
        relay.remote.withdraw(tag)
        relay.reporter.finished(Finished(tag, None, Answered(503)))
    assert relay.sent() == []
    relay.link.resume_writing()
    relay.remote.read_again()
    assert kinds(relay.sent()) == ["Unasked"] * 3


def test_a_retry_waits_for_a_decider_that_reads() -> None:
    relay = Relay()
    tag = relay.ask(1)
    leg = relay.plan(1, 7)
    relay.sent()
    relay.link.pause_writing()
    assert isinstance(relay.remote.retry(tag, leg, facts(b"text"), Outcome.UNREACHABLE, 0.0), Wait)
    assert relay.sent() == []
    relay.link.resume_writing()
    relay.remote.read_again()
    assert kinds(relay.sent()) == ["Retry"]


def test_what_waited_too_long_is_503_and_its_late_plan_reaches_nobody() -> None:
    relay = Relay()
    tag = relay.ask(1)
    assert isinstance(relay.remote.expired(tag, 15.0), DeciderGone)
    assert kinds(relay.sent())[-1] == "Withdraw"
    relay.plan(1, 7)
    assert relay.delivered == []


def test_the_relay_waits_longer_than_the_decider_says() -> None:
    relay = Relay()
    relay.ask(1)
    relay.remote.waits(messages.Waits(1, 30.0, "place"))
    ((number, wait),) = relay.delivered
    assert isinstance(wait, Wait)
    assert (number, wait.until, wait.why) == (1, 30.0 + GRACE, "place")


def test_a_retry_that_nobody_decides_is_no_retry() -> None:
    relay = Relay()
    tag = relay.ask(1)
    leg = relay.plan(1, 7)
    assert isinstance(relay.remote.retry(tag, leg, facts(b"text"), Outcome.FAILED, 1.0), Wait)
    relay.remote.look(10.0)
    assert len(relay.delivered) == 1
    relay.remote.look(11.5)
    assert relay.delivered[-1] == (1, None)


def test_open_legs_are_told_to_the_next_decider_and_their_ends_as_well() -> None:
    relay = Relay()
    tag = relay.ask(1)
    leg = relay.plan(1, 7)
    relay.remote.began(leg, 1.0)
    relay.sent()
    relay.remote.lost()
    relay.connect()
    (hello,) = relay.sent()
    ((asked, legs),) = [(each.ask, each.legs) for each in hello.requests]
    assert (asked.number, asked.id) == (1, b"id-1")
    assert [(each.lease, each.name, each.worker_id, each.began) for each in legs] == [(7, TARGET.name, "id", True)]
    relay.remote.ended(tag, leg, Outcome.SERVED, 2.0)
    relay.reporter.finished(Finished(tag, leg, Answered(200, outcome=Outcome.SERVED)))
    (done,) = relay.sent()
    assert (done.number, done.lease, done.ended >= 0, done.answer.status) == (1, 7, True, 200)


def test_what_an_engine_told_goes_with_the_end() -> None:
    """Once, if leg and request end together; else with both."""
    relay = Relay()
    usage = Usage(10, 4, -1)
    tag = relay.ask(1)
    leg = relay.plan(1, 7)
    relay.remote.ended(tag, leg, Outcome.SERVED, 2.0, usage)
    relay.reporter.finished(Finished(tag, leg, Answered(200, outcome=Outcome.SERVED, usage=usage)))
    done = relay.sent()[-1]
    assert (done.ended >= 0, done.answer.prompt, done.answer.cached, done.answer.completion) == (True, 10, 4, -1)
    tag = relay.ask(2)
    leg = relay.plan(2, 8)
    relay.remote.retry(tag, leg, facts(b"the rest"), Outcome.CUT, 2.5, True)
    last = relay.plan(2, 9)
    relay.remote.ended(tag, last, Outcome.SERVED, 3.0)
    relay.reporter.finished(Finished(tag, leg, Answered(200, outcome=Outcome.SERVED, resumed=1, usage=usage)))
    ended, done = relay.sent()[-2:]
    assert (ended.lease, ended.prompt, done.lease, done.ended, done.answer.prompt) == (9, -1, 8, -1, 10)


def test_a_retry_of_a_leg_of_an_earlier_decider_has_the_facts_with_it() -> None:
    relay = Relay()
    tag = relay.ask(1, b"the prompt")
    leg = relay.plan(1, 7)
    relay.remote.lost()
    relay.connect()
    relay.sent()
    relay.remote.retry(tag, leg, facts(b"the prompt"), Outcome.BROKEN, 1.0)
    (retry,) = relay.sent()
    assert retry.facts is not None
    assert retry.facts.text == b"the prompt"


def test_a_long_text_is_in_the_ring_until_its_ask_is_answered() -> None:
    relay = Relay()
    long = b"x" * SHARED
    relay.sent()
    for number in (1, 2, 3):
        relay.ask(number, long)
    places = [(ask.text is None, ask.at) for ask in relay.sent()]
    assert places == [(True, 0), (True, SHARED), (False, -1)], "the third finds no room, and goes inline"
    relay.remote.waits(messages.Waits(1, 5.0, "place"))
    relay.plan(1, 7)
    relay.ask(4, long)
    (ask,) = relay.sent()
    assert (ask.text, ask.at) == (None, 0)


def test_ends_are_kept_for_a_decider_that_is_away() -> None:
    relay = Relay()
    tag = relay.ask(1)
    leg = relay.plan(1, 7)
    relay.remote.lost()
    relay.remote.ended(tag, leg, Outcome.SERVED, 2.0)
    relay.reporter.finished(Finished(tag, leg, Answered(200, outcome=Outcome.SERVED)))
    assert repr(relay.remote) == "<RemoteDecider 0 requests, 0 unheard, the decider is away>"
    relay.connect()
    hello, told = relay.sent()
    assert (hello.requests, told.id, told.leg.name, told.answer.status) == ([], b"id-1", TARGET.name, 200)
