"""The workers that may get a request now: what a policy chooses from.

    candidates = pool.candidates(now)
    len(candidates), candidates[2], worker in candidates, [w.url for w in candidates]
    candidates.mask                      the same as a set of seats, see `routing.roster`
    candidates.roster.least_loaded(candidates.mask)
    candidates.at(seat)                  the worker on a seat

The set does not change; the loads in `roster` are always those of now. Use it at once: when workers come and go, the
seats mean others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sglang_router.routing.roster import Roster, seat_of
from sglang_router.routing.states import Breaker
from sglang_router.routing.worker import Worker


class Candidates:
    """See the module. mask: the seats of these workers; roster: those of all able workers of the pool by load."""

    __slots__ = ("_seats", "mask", "roster")

    def __init__(self, seats: dict[int, Worker], roster: Roster, mask: int) -> None:
        self._seats = seats
        self.roster = roster
        self.mask = mask

    def __repr__(self) -> str:
        return f"<Candidates {', '.join(worker.url for worker in self)}>"

    def __len__(self) -> int:
        return self.mask.bit_count()

    def __getitem__(self, number: int) -> Worker:
        """Return a worker by its place among the candidates, from 0. Raises: IndexError."""
        if not 0 <= number < self.mask.bit_count():
            raise IndexError(number)
        return self._seats[seat_of(self.mask, number)]

    def __iter__(self) -> Iterator[Worker]:
        """Iterate in order of seats: the order of registration, except for policies with a memory. O(n)."""
        mask = self.mask
        while mask:
            lowest = mask & -mask
            yield self._seats[lowest.bit_length() - 1]
            mask ^= lowest

    def __contains__(self, worker: Worker) -> bool:
        return self._seats.get(worker.seat) is worker and bool(self.mask >> worker.seat & 1)

    def at(self, seat: int) -> Worker:
        """Return the worker on a seat of `mask`."""
        return self._seats[seat]

    def nth(self, mask: int, number: int) -> Worker:
        """Return a worker by its place in a set of candidates, from 0."""
        return self._seats[seat_of(mask, number)]

    def those(self, mask: int) -> Candidates:
        """Return the candidates that are in a set as well."""
        return Candidates(self._seats, self.roster, self.mask & mask)

    def set_of(self, workers: Iterable[Worker]) -> int:
        """Return the set of those of these workers that are candidates."""
        found = 0
        for worker in workers:
            if worker in self:
                found |= 1 << worker.seat
        return found


def candidates_of(workers: Iterable[Worker]) -> Candidates:
    """Return workers of one pool as candidates, able or not, with their loads as they are now. O(n)."""
    seats = {worker.seat: worker for worker in workers}
    roster = Roster()
    for seat, worker in seats.items():
        roster.add(1 << seat, worker.load)
        if worker.circuit.state is Breaker.HALF_OPEN:
            roster.on_trial |= 1 << seat
    return Candidates(seats, roster, roster.all)
