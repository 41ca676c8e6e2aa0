"""The request-body budget as arithmetic: who is admitted, who waits, in which order, and what is counted."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.relay.budget import GRACE, SMALL, ByteBudget, Hold
from sglang_router.relay.moves import IllegalMove
from sglang_router.relay.states import ADMITTED, HELD, IN_LINE, PAUSED, PLAIN, SMALL_BODY

LIMIT = 8_000_000
MB = 1_000_000


class Body:
    """A connection that sends one body. It reads when it may. length: -1 for a chunked body."""

    def __init__(self, budget: ByteBudget, length: int, total: int = 0) -> None:
        self.hold: Hold = budget.hold(self)
        self.length = length
        self.total = total or length
        self.received = 0
        self.woken = 0
        self.refused = False

    def read_on(self) -> None:
        self.woken += 1

    def overdue(self, now: float) -> None:
        self.refused = True
        self.hold.release()

    def send(self, size: int, now: float = 0.0) -> bool:
        """Send a part of the body; return whether more may be read."""
        size = min(size, self.total - self.received)
        if self.hold.state < ADMITTED:
            self.hold.grow(size)
        self.received += size
        if self.received == self.total and self.hold.state is not IN_LINE:
            self.hold.complete(self.total)
            return True
        return self.hold.admits(self.length, self.received, now)


def started(budget: ByteBudget, *lengths: int) -> list[Body]:
    bodies = [Body(budget, length) for length in lengths]
    for body in bodies:
        body.send(1000)
    return bodies


def states(bodies: list[Body]) -> list[object]:
    return [body.hold.state for body in bodies]


def test_f1_what_does_not_fit_waits_unread_and_in_order() -> None:
    """Bodies that do not fit together were all read in step, so that none could end."""
    budget = ByteBudget(LIMIT)
    bodies = started(budget, 3 * MB, 3 * MB, 3 * MB, MB)
    assert states(bodies) == [ADMITTED, ADMITTED, IN_LINE, IN_LINE], "the last would fit, but was not first"
    assert budget.held == 6 * MB + 2000
    assert budget.short
    bodies[0].send(3 * MB)
    assert bodies[0].hold.state is HELD
    assert not bodies[2].woken, "it is held until it is answered"
    bodies[0].hold.release()
    assert states(bodies[1:]) == [ADMITTED] * 3
    assert (bodies[2].woken, bodies[3].woken, budget.short) == (1, 1, False)


def test_f1_small_bodies_never_wait_and_large_ones_leave_them_an_eighth() -> None:
    """While large uploads waited for each other, requests of 17 bytes were refused."""
    budget = ByteBudget(LIMIT)
    large = started(budget, 4 * MB, 3 * MB + 1)
    assert states(large) == [ADMITTED, IN_LINE]
    small = started(budget, *[SMALL] * 200)
    assert set(states(small)) == {SMALL_BODY}
    for body in small:
        body.send(SMALL)
    assert set(states(small)) == {PLAIN}
    assert budget.held == 4 * MB + 1000 + 200 * SMALL
    large[0].hold.release()
    assert large[1].hold.state is ADMITTED, "alone it fits always, whatever is small"


def test_a_body_as_large_as_the_whole_budget_is_read_alone() -> None:
    budget = ByteBudget(LIMIT)
    bodies = started(budget, MB, LIMIT, MB)
    assert states(bodies) == [ADMITTED, IN_LINE, IN_LINE]
    bodies[0].hold.release()
    assert states(bodies[1:]) == [ADMITTED, IN_LINE]
    bodies[1].hold.release()
    assert bodies[2].hold.state is ADMITTED


def test_who_leaves_the_line_makes_way() -> None:
    budget = ByteBudget(LIMIT)
    bodies = started(budget, 5 * MB, 5 * MB, MB)
    bodies[1].hold.release()
    assert states(bodies) == [ADMITTED, PLAIN, ADMITTED]
    for body in bodies:
        body.hold.release()
    assert budget.held == 0


def test_f1_chunked_bodies_reserve_as_they_grow_and_the_oldest_always_ends() -> None:
    """Each of several growing bodies could hold what the others need."""
    budget = ByteBudget(LIMIT)
    bodies = [Body(budget, -1, 6 * MB) for _ in range(4)]
    for _ in range(30):  # in step
        for body in bodies:
            if body.hold.state is not PAUSED:
                body.send(100_000)
    assert states(bodies) == [ADMITTED, PAUSED, PAUSED, PAUSED]
    ended = 0
    for _ in range(1000):
        for body in bodies:
            if body.hold.state in (PLAIN, SMALL_BODY, ADMITTED) and body.received < body.total:
                body.send(100_000)
            elif body.hold.state is HELD:
                body.hold.release()
                ended += 1
    assert ended == 4
    assert budget.held == 0


def test_a_chunked_body_holds_what_it_took_once_it_is_complete() -> None:
    budget = ByteBudget(LIMIT)
    body = Body(budget, -1, 300_000)
    for _ in range(3):
        assert body.send(100_000)
    assert (body.hold.state, body.hold.size) == (HELD, 300_000)


def test_chunked_bodies_are_expected_to_be_like_the_last_ones() -> None:
    """Otherwise many would be admitted, and pause half-way until one after the other could end."""
    budget = ByteBudget(LIMIT)
    for _ in range(40):
        body = Body(budget, -1, 900_000)
        while body.received < body.total:
            body.send(100_000)
        body.hold.release()
    bodies = [Body(budget, -1, 900_000) for _ in range(20)]
    for body in bodies:
        body.send(100_000)
    admitted = [body for body in bodies if body.hold.state is ADMITTED]
    assert 6 <= len(admitted) <= 9
    for body in admitted:
        while body.received < body.total:
            assert body.send(100_000)


def test_f8_while_others_wait_the_slowest_are_late_first() -> None:
    """Some that sent a byte now and then held the budget against all others."""
    budget = ByteBudget(LIMIT, rate=16_000)
    slow, slower, quick, waits = started(budget, 2 * MB, 2 * MB, 2 * MB, 2 * MB)
    assert waits.hold.state is IN_LINE
    slow.send(32_000, 1.0)
    quick.send(1_000_000, 1.0)
    assert budget.late(GRACE) == []
    assert budget.late(GRACE + 1.0) == [slower.hold]
    assert budget.late(GRACE + 2.5) == [slower.hold, slow.hold]
    budget.late(GRACE + 2.5)[0].reader.overdue(GRACE + 2.5)
    assert slower.refused
    assert waits.hold.state is ADMITTED
    assert waits.hold not in budget.late(1000.0), "it was not read yet"


def test_f42_a_body_has_a_deadline_that_grows_with_what_has_come() -> None:
    """Only silence was limited: a byte a minute kept a connection for ever."""
    budget = ByteBudget(LIMIT, rate=16_000)
    (body,) = started(budget, MB)
    assert body.hold.due(60.0) == 60.0
    body.send(160_000, 5.0)
    assert body.hold.due(60.0) == 70.0
    body.hold.since += 3.0
    assert body.hold.due(60.0) == 73.0
    budget.rate = 0
    assert body.hold.due(60.0) == math.inf


def test_time_in_line_is_not_the_clients_slowness() -> None:
    budget = ByteBudget(LIMIT, rate=16_000)
    first, second = started(budget, 6 * MB, 6 * MB)
    first.hold.release()
    second.send(1000, 500.0)
    assert second.hold.due(60.0) == 560.0


def test_f42_small_bodies_that_trickle_are_late_as_well() -> None:
    budget = ByteBudget(LIMIT, rate=16_000)
    (body,) = started(budget, 50_000)
    assert body.hold.due(GRACE) == GRACE
    assert budget.late(GRACE + 1) == [], "its end gives large bodies no room"
    body.send(50_000)
    assert body.hold.due(GRACE) == math.inf


def test_states_are_told_and_moves_are_checked() -> None:
    budget = ByteBudget(LIMIT)
    bodies = started(budget, 6 * MB, 6 * MB)
    assert repr(bodies[1].hold) == "<Hold IN_LINE 1000 bytes, waits for 6000000>"
    assert repr(budget) == "<ByteBudget 0 bytes small, 6000000 large of 8000000, 0 growing, 1 in line with 1000>"
    with pytest.raises(IllegalMove):
        bodies[1].hold.move(PAUSED)


@given(st.integers(0, 1 << 32), st.integers(2, 40), st.sampled_from([0.0, 0.3, 1.0]))
def test_nobody_starves_and_nothing_is_lost(seed: int, count: int, chunked: float) -> None:
    """Bodies of all sizes that come, are sent in turns, are given up or answered: all end, and the limit holds."""
    rng = random.Random(seed)
    budget = ByteBudget(LIMIT, rate=16_000)
    sizes = [rng.choice([100, SMALL, 200_000, 2 * MB, 7 * MB]) for _ in range(count)]
    bodies = [Body(budget, -1 if rng.random() < chunked else size, size) for size in sizes]
    left = list(bodies)
    served = given_up = 0
    for _ in range(20_000):
        if not left:
            break
        body = rng.choice(left)
        state = body.hold.state
        if state is HELD or (body.received == body.total and state is PLAIN):
            body.hold.release()
            served += 1
            left.remove(body)
        elif rng.random() < 0.0005:
            body.hold.release()
            given_up += 1
            left.remove(body)
        elif state in (PLAIN, SMALL_BODY, ADMITTED):
            body.send(rng.choice([1, 50_000, 250_000]), now=0.0)
        small, large, _ = budget._shares
        growing = max((each.total * 5 // 4 + 250_000 for each in bodies if each.length < 0), default=0)
        assert large <= LIMIT + growing
        assert large <= LIMIT - min(small, LIMIT // 8) + growing or len([b for b in left if b.hold.state >= HELD]) == 1
        assert budget.held == sum(each.hold.size for each in bodies)
    assert not left, (budget, states(left))
    assert budget.held == 0
    assert not budget.short
    assert served + given_up == count
