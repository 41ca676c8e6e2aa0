"""Sets of workers as bit masks, and workers by load: against lists that are looked through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Bench
from sglang_router.routing.candidates import candidates_of
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.roster import Roster, seat_of

seats = st.integers(0, 200)


def numbers(mask: int) -> list[int]:
    return [seat for seat in range(mask.bit_length()) if mask >> seat & 1]


@given(st.sets(seats, min_size=1))
def test_a_worker_is_found_by_its_place_in_a_set(members: set[int]) -> None:
    mask = sum(1 << seat for seat in members)
    assert [seat_of(mask, number) for number in range(len(members))] == sorted(members)


@settings(max_examples=50)
@given(st.data())
def test_the_roster_says_what_looking_at_all_would_say(data: st.DataObject) -> None:
    roster, loads = Roster(), dict[int, int]()
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(("add", "add", "raise", "raise", "raise", "lower", "remove")))
        if step == "add":
            seat, load = data.draw(seats.filter(lambda seat: seat not in loads)), data.draw(st.integers(0, 12))
            loads[seat] = load
            roster.add(1 << seat, load)
        elif loads:
            seat = data.draw(st.sampled_from(sorted(loads)))
            if step == "raise":
                roster.raised(1 << seat, loads[seat])
                loads[seat] += 1
            elif step == "lower" and loads[seat]:
                roster.lowered(1 << seat, loads[seat])
                loads[seat] -= 1
            elif step == "remove":
                roster.remove(1 << seat, loads.pop(seat))
        assert numbers(roster.all) == sorted(loads)
        assert (roster.low, roster.high) == (min(loads.values(), default=0), max(loads.values(), default=0))
        some = data.draw(st.sets(st.sampled_from(sorted(loads)), min_size=1)) if loads else set[int]()
        mask = sum(1 << seat for seat in some)
        least = min((loads[seat] for seat in some), default=0)
        assert numbers(roster.least_loaded(mask)) == sorted(seat for seat in some if loads[seat] == least)
        assert roster.running(mask) == sum(loads[seat] for seat in some)
        bound = data.draw(st.integers(0, 14))
        assert numbers(roster.at_least(bound)) == sorted(seat for seat in loads if loads[seat] >= bound)
        if some:
            assert (roster.least(mask), roster.most(mask)) == (least, max(loads[seat] for seat in some))


def test_how_far_apart_the_loads_are_does_not_matter() -> None:
    """One worker may have thousands of requests more than another: all with one routing key, or it hangs."""
    roster = Roster()
    for bit, load in ((1, 0), (2, 3), (4, 100_000)):
        roster.add(bit, load)
    roster.raised(4, 100_000)
    roster.lowered(2, 3)
    assert roster.levels == {0: 1, 2: 2, 100_001: 4}
    assert (roster.low, roster.high, roster.running(0b111)) == (0, 100_001, 100_003)
    assert (roster.least(0b110), roster.most(0b011)) == (2, 2)
    assert (roster.least_loaded(0b110), roster.least_loaded(0b1000), roster.at_least(3)) == (0b10, 0, 0b100)


def test_candidates_are_a_sequence_of_workers() -> None:
    b = Bench(4)
    some = candidates_of([b.workers[1], b.workers[3]])
    assert (len(some), list(some), some[0], some[1]) == (2, [b.workers[1], b.workers[3]], b.workers[1], b.workers[3])
    assert (b.workers[1] in some, b.workers[0] in some) == (True, False)
    for number in (-1, 2):
        with pytest.raises(IndexError):
            some[number]
    assert not candidates_of(())
    assert list(some.those(some.set_of([b.workers[0], b.workers[3]]))) == [b.workers[3]]


def test_a_worker_of_another_pool_is_no_candidate_whatever_its_seat() -> None:
    one, other = Bench(1), Bench(1)
    assert one.workers[0].seat == other.workers[0].seat
    assert other.workers[0] not in one.pool.candidates(0.0)
    assert one.pool.candidates(0.0).set_of(other.workers) == 0


def test_a_removed_worker_is_no_candidate_while_its_requests_end() -> None:
    b = Bench(2, "least_load")
    leases = [b.fleet.lease(worker) for worker in b.workers]
    b.fleet.remove(b.workers[0])
    leases[0].close(Outcome.SERVED, 0.0)
    found = b.pool.candidates(0.0)
    assert (list(found), found.roster.least(found.mask)) == ([b.workers[1]], 1)


@pytest.mark.parametrize("policy", ["round_robin", "cache_aware"])
def test_a_worker_that_changes_and_leaves_before_anyone_asks_leaves_nothing(policy: str) -> None:
    b = Bench(3, policy)
    b.fleet.set_draining(b.workers[0], True)
    b.fleet.remove(b.workers[0])
    assert list(b.pool.candidates(0.0)) == b.workers[1:]
    assert b.pool.candidates(0.0).roster.all.bit_count() == 2
