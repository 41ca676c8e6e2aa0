"""A router that learns the key of its fleet late: from then on all is shared, and nothing of before is believed."""

from __future__ import annotations

import random

import pytest

from fleets import facts
from joined import Joined
from sglang_router.routing.sessions import Sessions

OTHER = bytes(reversed(range(32)))


def text(seed: int, size: int = 4096) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("policy", ["cache_aware", "cost"])
def test_routers_hear_each_other_when_both_have_the_key(policy: str) -> None:
    joined = Joined(2, 4, policy)
    early, late = joined.states
    early.use_key(OTHER)
    joined.benches[0].serve(text(1))
    joined.flush(0.1)
    assert late.reading.dropped["foreign"] > 0
    assert joined.benches[1].serve(text(1)).matched == 0

    late.use_key(OTHER)
    first = joined.benches[0].serve(text(2))
    joined.flush(2.0)
    second = joined.benches[1].serve(text(2) + text(3, 600))
    assert joined.benches[0].number(first.worker) == joined.benches[1].number(second.worker)
    assert (second.branch, second.matched) == ("hit", 4096)
    assert len(late.peers) == 1


def test_what_was_placed_before_is_not_told_with_names_that_nobody_knows() -> None:
    joined = Joined(2, 4, "cache_aware")
    joined.benches[0].serve(text(1))
    for state in joined.states:
        state.use_key(OTHER)
    joined.flush(0.1)
    assert joined.states[1].reading.heard == 0
    assert joined.states[1].reading.entries == 0


def test_strangers_go_to_the_same_worker_under_the_new_key() -> None:
    joined = Joined(2, 8, "cache_aware")
    for state in joined.states:
        state.use_key(OTHER)
        state.connected = False
    for seed in range(20):
        placed = [bench.serve(text(seed)) for bench in joined.benches]
        numbers = [bench.number(each.worker) for bench, each in zip(joined.benches, placed, strict=True)]
        assert numbers[0] == numbers[1]


def test_loads_and_homes_of_before_count_no_more() -> None:
    joined = Joined(2, 2, "least_load", sessions=lambda: Sessions(True))
    asked = facts()
    asked.session = b"s"
    joined.benches[0].ask(asked, 0.0)
    joined.flush(0.1)
    assert sum(joined.loads(1)) == 1
    assert joined.states[1].reading.homes == 1
    joined.states[1].use_key(OTHER)
    assert sum(joined.loads(1)) == 0
    assert joined.states[1].reading.homes == 0
    assert len(joined.states[1].peers) == 0
