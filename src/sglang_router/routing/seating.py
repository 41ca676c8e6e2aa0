"""The seats of a pool's workers, and which of them are able: kept up to date change by change.

    place(worker, seat), displace(worker)    a worker gets a seat, or loses it
    changed(worker)                          its health, its breaker or something like it changed
    settle()                                 work out the able workers again: its cost depends on what changed

Able are the healthy workers that stand (`routing.standing`), or if none of these does, the unhealthy ones that stand.
As long as at most half of the workers that are there are judged out, a worker stands or not whatever the others do, so
that a change of one concerns nobody else. When more are, all are compared again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.roster import Roster
from sglang_router.routing.standing import OUT, STANDS, THERE, alone, standing
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker

_HALF_OPEN: Final = Breaker.HALF_OPEN


class _Side:
    """The workers of one health: how many are there, how many of these are out, and the set of those that stand."""

    __slots__ = ("out", "stands", "there")

    def __init__(self) -> None:
        self.there = 0
        self.out = 0
        self.stands = 0

    def count(self, flags: int, bit: int, number: int) -> None:
        """Count a worker (1), or take it out of the count (-1)."""
        if flags & THERE:
            self.there += number
        if flags & OUT:
            self.out += number
        if flags & STANDS:
            self.stands ^= bit

    @property
    def depends(self) -> bool:
        """Whether so many are out that a worker stands or not depending on the others."""
        return self.out > self.there // 2


class Seating:
    """See the module.

    workers    of the pool
    roster     the able ones by load, since `settle`
    unsettled  something has changed since then
    """

    __slots__ = ("_changed", "_counted", "_seats", "_sides", "roster", "unsettled", "workers")

    def __init__(self, workers: Iterable[Worker]) -> None:
        self.workers = workers
        self.roster = Roster()
        self.unsettled = False
        self._seats: dict[int, Worker] = {}
        self._changed: dict[Worker, None] = {}
        self._counted: dict[Worker, tuple[Health, int]] = {}  # as what each worker is counted: health, flags
        self._sides = {Health.HEALTHY: _Side(), Health.UNHEALTHY: _Side()}

    def __repr__(self) -> str:
        return f"<Seating of {len(self._seats)} workers, {self.roster!r}>"

    @property
    def able(self) -> Candidates:
        """The able workers, since `settle`."""
        return Candidates(self._seats, self.roster, self.roster.all)

    def place(self, worker: Worker, seat: int) -> None:
        """Give a worker a seat that is free."""
        worker.seat = seat
        worker.roster = self.roster
        self._seats[seat] = worker
        self.changed(worker)

    def displace(self, worker: Worker) -> None:
        """Take the seat of a worker."""
        self._uncount(worker)
        self._changed.pop(worker, None)
        self._leave(worker)
        self.roster.on_trial &= ~(1 << worker.seat)
        del self._seats[worker.seat]
        worker.seat = -1
        self.unsettled = True

    def changed(self, worker: Worker) -> None:
        """Take note that the state of a worker changed."""
        self._changed[worker] = None
        self.unsettled = True

    def settle(self) -> list[Worker]:
        """Work out the able workers; return those whose state has changed."""
        changed = list(self._changed)
        self._changed.clear()
        self.unsettled = False
        for worker in changed:
            self._uncount(worker)
            self._count(worker)
        able = self._standing(Health.HEALTHY) or self._standing(Health.UNHEALTHY)
        moving = able ^ self.roster.all
        while moving:
            bit = moving & -moving
            moving ^= bit
            worker = self._seats[bit.bit_length() - 1]
            if able & bit:
                worker.bit = bit
                self.roster.add(bit, worker.load)
            else:
                self._leave(worker)
        return changed

    def _standing(self, health: Health) -> int:
        side = self._sides[health]
        if not side.depends:
            return side.stands
        found = 0
        for worker in standing(self.workers, health):
            found |= 1 << worker.seat
        return found

    def _count(self, worker: Worker) -> None:
        bit, flags, side = 1 << worker.seat, alone(worker), self._sides.get(worker.health)
        if side is not None and flags:
            side.count(flags, bit, 1)
            self._counted[worker] = worker.health, flags
        if worker.circuit.state is _HALF_OPEN:
            self.roster.on_trial |= bit
        else:
            self.roster.on_trial &= ~bit

    def _uncount(self, worker: Worker) -> None:
        counted = self._counted.pop(worker, None)
        if counted is not None:
            health, flags = counted
            self._sides[health].count(flags, 1 << worker.seat, -1)

    def _leave(self, worker: Worker) -> None:
        if worker.bit:
            self.roster.remove(worker.bit, worker.load)
            worker.bit = 0
