"""Plans with two legs between the process that decides and the relays: both cross, both end, and a new decider adopts
both."""

from __future__ import annotations

from typing import Any

import pytest

from desks import Decider, Ends, Relay
from fleets import ROUTE
from pairs import UNCHECKED, Pairs, chat, spliced
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.rules import QueueRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.usage import Usage


class Play:
    """A relay with a decider of two prefill and two decode workers."""

    def __init__(self, runtime: str = "") -> None:
        self.ends = Ends()
        self.now = 0.0
        self.decider = Decider(1, self.ends, Pairs(2, 2, runtime=runtime))
        self.relay = Relay(0, lambda: self.now)
        self.relay.remote.paired = True
        self.relay.connect(self.decider)

    @property
    def loads(self) -> list[int]:
        return [worker.load for worker in self.decider.bench.workers]

    def exchange(self) -> None:
        self.relay.up()
        self.relay.down()

    def ask(self, number: int, **fields: Any) -> None:
        tag = self.relay.tags[number] = RequestTag(number, b"r%d" % number, 0.0, ROUTE)
        tag.streaming = bool(fields.get("stream"))
        self.relay.waits.add(number)
        self.relay.remote.ask(tag, chat(**fields), 0.0)
        self.exchange()


@pytest.mark.parametrize("runtime", ["", "vllm"])
def test_both_legs_cross(runtime: str) -> None:
    play = Play(runtime)
    play.ask(1, stream=True)
    plan = play.relay.plans[1]
    assert [leg.target.role for leg in plan.legs] == ["prefill", "decode"]
    assert plan.handoff == (runtime == "vllm")
    prefill, decode = plan.legs
    if runtime:
        assert spliced(prefill)["max_tokens"] == 1
    else:
        assert spliced(prefill)["bootstrap_room"] == spliced(decode)["bootstrap_room"]
        assert prefill.rid == decode.rid != b""
    assert play.loads == [1, 0, 1, 0]
    play.relay.remote.ended(play.relay.tags[1], prefill, Outcome.SERVED, 0.5, Usage(10, 8, 1))
    play.exchange()
    assert play.loads == [0, 0, 1, 0]
    play.relay.finish(1, Outcome.SERVED)
    play.exchange()
    assert play.loads == [0, 0, 0, 0]
    assert play.ends.heard == {"r1": 1}
    assert play.decider.desk.requests == 0


def test_a_failed_leg_is_retried_as_a_pair() -> None:
    play = Play()
    play.ask(1)
    prefill, decode = play.relay.plans[1].legs
    play.relay.remote.ended(play.relay.tags[1], decode, Outcome.ABANDONED, 0.1)
    play.relay.waits.add(1)
    play.relay.remote.retry(play.relay.tags[1], prefill, chat(), Outcome.BROKEN, 0.1)
    play.exchange()
    again = play.relay.plans[1]
    assert again.retries == 1
    assert again.legs[0].target != prefill.target
    assert sum(play.loads) == 2
    play.relay.finish(1, Outcome.SERVED)
    play.exchange()
    assert sum(play.loads) == 0


def test_a_prefill_leg_that_has_ended_can_be_blamed() -> None:
    play = Play()
    play.ask(1)
    prefill, decode = play.relay.plans[1].legs
    tag = play.relay.tags[1]
    play.relay.remote.ended(tag, prefill, Outcome.SERVED, 0.1)
    play.relay.remote.ended(tag, decode, Outcome.ABANDONED, 0.2)
    play.exchange()
    play.relay.finish(1, Outcome.FAILED)
    play.exchange()
    assert sum(play.loads) == 0
    play.ask(2)
    prefill, decode = play.relay.plans[2].legs
    tag = play.relay.tags[2]
    play.relay.remote.ended(tag, prefill, Outcome.SERVED, 0.1)
    play.relay.waits.add(2)
    play.relay.remote.retry(tag, prefill, chat(), Outcome.FAILED, 0.2, False, 500)
    play.relay.remote.ended(tag, decode, Outcome.ABANDONED, 0.2)
    play.exchange()
    assert play.relay.plans[2].legs[0].target != prefill.target
    play.relay.finish(2, Outcome.SERVED)
    play.exchange()
    assert sum(play.loads) == 0


def test_the_decider_hears_how_many_answers_are_wanted() -> None:
    """It has no body."""
    play = Play()
    play.ask(1, n=2)
    assert 1 not in play.relay.plans
    assert 1 not in play.relay.tags, "it was refused"
    assert sum(play.loads) == 0
    play.relay.remote.paired = False
    play.ask(2)
    assert len(play.relay.plans[2].legs) == 2


def test_it_hears_so_before_it_is_known_that_there_are_pairs() -> None:
    """Requests are queued while workers start, and roles are found out meanwhile."""
    play = Play()
    play.relay.remote.paired = False
    play.ask(1, n=2)
    assert 1 not in play.relay.plans
    assert sum(play.loads) == 0


def test_a_new_decider_that_does_not_know_roles_yet_adopts_both_as_one_request() -> None:
    play = Play()
    play.ask(1)
    prefill, _ = play.relay.plans[1].legs
    play.relay.remote.lost()
    bench = Pairs(0, 0, queue=QueueRules(max_concurrent=1))
    for worker in play.decider.bench.workers:
        bench.workers.append(bench.fleet.add(WorkerSpec(url=worker.url, health=UNCHECKED), 0.0, restored=worker.id))
    play.decider = Decider(2, play.ends, bench)
    play.relay.connect(play.decider)
    play.exchange()
    assert (sum(play.loads), bench.router.queue.running) == (2, 1)
    play.relay.remote.ended(play.relay.tags[1], prefill, Outcome.SERVED, 0.5)
    play.exchange()
    assert (sum(play.loads), bench.router.queue.running) == (1, 1), "the decode leg has the place"
    play.relay.finish(1, Outcome.SERVED)
    play.exchange()
    assert (sum(play.loads), bench.router.queue.running) == (0, 0)


def test_a_client_that_leaves_ends_both() -> None:
    play = Play()
    play.ask(1)
    play.decider.desk.leave(play.relay.end.port, 1.0)
    assert sum(play.loads) == 0
    assert play.ends.heard == {"r1": 1}


def test_a_new_decider_adopts_both() -> None:
    play = Play()
    play.ask(1, stream=True)
    play.relay.remote.lost()
    play.decider = Decider(2, play.ends, Pairs(2, 2))
    play.relay.connect(play.decider)
    play.exchange()
    assert sum(play.loads) == 2
    assert [worker.role for worker in play.decider.bench.workers if worker.load] == ["prefill", "decode"]
    play.relay.finish(1, Outcome.SERVED)
    play.exchange()
    assert sum(play.loads) == 0
    assert not play.decider.bench.router.leases
    assert play.ends.heard == {"r1": 1}
