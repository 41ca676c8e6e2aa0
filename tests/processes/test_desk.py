"""The desk answers as the router of one process would, and blames no worker for a relay that is gone."""

from __future__ import annotations

import mmap

import pytest

from desks import Decider, DeskEnd, Ends
from fleets import ROUTE, facts
from sglang_router.errors import InternalError, QueueTimeout
from sglang_router.processes import failures, messages
from sglang_router.processes.facing import OUTCOMES, TextForm, answer_of, ask_of, code_of, usage_of
from sglang_router.processes.link import decode_from_decider
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.events import Answered
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.usage import Usage


class Desks:
    """A decider with a port for each of two relays. Its queue has 3 places, and room for 4."""

    def __init__(self) -> None:
        self.ends = Ends()
        self.decider = Decider(1, self.ends)
        self.ports = [DeskEnd(self.decider, index, mmap.mmap(-1, 10)) for index in range(2)]

    def tell(self, relay: int, *told: messages.FromRelay) -> list[messages.FromDecider]:
        """Send messages of a relay in one frame; return what it is answered."""
        end = self.ports[relay]
        end.heard(end.link, list(told))
        return self.heard(relay)

    def heard(self, relay: int) -> list[messages.FromDecider]:
        end = self.ports[relay]
        end.link.send()
        sent, end.wire.sent = end.wire.sent, []
        return [each for data in sent for each in decode_from_decider(memoryview(data)[4:])]

    def ask(self, relay: int, number: int, now: float = 1.0) -> list[messages.FromDecider]:
        tag = RequestTag(number, b"id-%d-%d" % (relay, number), now, ROUTE)
        return self.tell(relay, ask_of(tag, facts(b"text"), now, TextForm(b"text")))


def planned(answers: list[messages.FromDecider]) -> messages.Planned:
    (answer,) = answers
    assert isinstance(answer, messages.Planned)
    return answer


def test_questions_of_one_frame_are_answered_in_one_write() -> None:
    desks = Desks()
    tags = [RequestTag(number, b"id", 1.0, ROUTE) for number in (1, 2)]
    asks = [ask_of(tag, facts(b"text"), 1.0, TextForm(b"text")) for tag in tags]
    assert [type(each).__name__ for each in desks.tell(0, *asks)] == ["Planned", "Planned"]


def test_who_waited_too_long_gets_the_error_of_one_process() -> None:
    desks = Desks()
    for number in (1, 2, 3):
        planned(desks.ask(0, number))
    (waits,) = desks.ask(1, 1)
    assert isinstance(waits, messages.Waits)
    assert (waits.number, waits.until, waits.why) == (1, 6.0, "place")
    desks.decider.desk.look(5.9)
    assert desks.heard(1) == []
    desks.decider.desk.look(6.0)
    (refused,) = desks.heard(1)
    assert isinstance(refused, messages.Refused)
    assert type(failures.error_of(refused.error)) is QueueTimeout


def test_requests_of_all_relays_begin_in_the_order_of_their_arrival() -> None:
    """Their own numbers say nothing about it."""
    desks = Desks()
    plans = [planned(desks.ask(0, number)) for number in (7, 8, 9)]
    assert len(desks.ask(1, 500)) == len(desks.ask(0, 10)) == 1
    ended = code_of(Outcome.SERVED)
    desks.tell(0, messages.Ended(plans[0].legs[0].lease, ended, 2.0, b""))
    desks.decider.bench.settle(2.0)
    assert planned(desks.heard(1)).number == 500
    assert desks.heard(0) == []


def test_a_policy_that_fails_is_answered_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Policy):
        def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
            raise RuntimeError("this policy is broken")

    desks = Desks()
    first = planned(desks.ask(0, 1))
    pool = desks.decider.bench.pool
    monkeypatch.setattr(pool, "policy", Broken(pool.policy.settings, pool.policy.rng))
    with pytest.raises(RuntimeError):
        desks.ask(0, 2)
    (refused,) = desks.heard(0)
    assert isinstance(refused, messages.Refused)
    assert isinstance(failures.error_of(refused.error), InternalError)
    with pytest.raises(RuntimeError):
        desks.tell(0, messages.Retry(1, first.legs[0].lease, code_of(Outcome.REFUSED), 2.0, False, 0, b"", None))
    assert [type(each) for each in desks.heard(0)] == [messages.NoRetry]


def test_a_relay_that_is_gone_frees_everything_and_blames_nobody() -> None:
    desks = Desks()
    for number in (1, 2, 3):
        planned(desks.ask(0, number))
    desks.ask(0, 4)
    desks.ask(1, 1)
    desks.decider.desk.leave(desks.ports[0].port, 2.0)
    desks.decider.bench.settle(2.0)
    assert planned(desks.heard(1)).number == 1
    assert sorted(desks.ends.heard) == ["id-0-1", "id-0-2", "id-0-3", "id-0-4"]
    assert desks.decider.bench.log.moves("breaker") == []
    assert desks.decider.desk.requests == 1
    assert repr(desks.decider.desk) == "<Desk 1 requests, 0 queued>"


def test_a_retry_of_a_leg_that_nobody_knows_is_no_retry() -> None:
    """Its worker was removed while there was no decider."""
    desks = Desks()
    failed = messages.Retry(1, 99, code_of(Outcome.BROKEN), 1.0, False, 0, b"", None)
    assert desks.tell(0, failed) == [messages.NoRetry(1)]
    assert OUTCOMES[failed.outcome] is Outcome.BROKEN


def test_times_never_go_back() -> None:
    """A relay may be a moment behind another one; the router's windows and buckets must not see that."""
    desks = Desks()
    desks.ask(0, 1, now=5.0)
    desks.ask(1, 1, now=4.0)
    assert desks.decider.desk._now == 5.0


def test_what_an_engine_told_reaches_counters_and_listeners() -> None:
    desks = Desks()
    ended = code_of(Outcome.SERVED)

    def counted() -> tuple[int, int]:
        tokens = [worker.tokens for worker in desks.decider.bench.workers]
        return sum(each.cached for each in tokens), sum(each.prompt for each in tokens)

    lease = planned(desks.ask(0, 1)).legs[0].lease
    answer = answer_of(Answered(200, outcome=Outcome.SERVED, usage=Usage(10, 4, 2)))
    desks.tell(0, messages.Done(1, lease, answer, 2.0, ended, b""))
    assert counted() == (4, 10)
    lease = planned(desks.ask(0, 2)).legs[0].lease
    desks.tell(0, messages.Ended(lease, ended, 3.0, b"", 10, 5, 2))
    assert counted() == (9, 20)
    desks.tell(0, messages.Done(2, lease, answer, 0.0, -1, b""))
    assert counted() == (9, 20)
    assert [repr(usage) for usage in desks.ends.usages] == ["<Usage 4 of 10 cached, 2 written>"] * 2
    assert usage_of(answer_of(Answered(200))) is None
