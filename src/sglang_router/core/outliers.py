"""Outliers: workers that do much worse than the others, held off for a while; not all workers, whatever happens.

    heard(worker, ...)     each answer, into the slots of the last window      a few additions
    judge(workers, now)    once a second: who is to be held off, and why

             bad in its window                    time is up
    well ----------------------------> held off --------------> back, with an empty window
      ^                        30 s, then 60, 120 ... 300 s       |
      '------ well for as long as it was held off last -----------'   else the next time is twice as long

Two ways to be bad. Either way it takes `min_volume` answers to be judged at all.

*Failures.* At least half of the answers, and three times the rate of the others: the median of theirs, so that what
makes all fail (a client's requests, a shared disk) is nobody's fault, and some that fail fast and draw all traffic do
not pass for the norm.

*Slowness.* The first byte comes three times later than at the others *in like circumstances*, and more than a second.
Time to first byte depends less on the worker than on what it is asked: a healthy worker that was given too much answers
late, and to hold it off would only pass its crowd on to the next. So only like is compared with like. The place of a
request is, at the moment when it is sent (`place`),

    - the power of two of its uncached bytes: what has to be read before the first byte
    - how many requests wait for their first byte at that worker, up to 15: behind more, nothing is measured
    - the power of two of the requests that run there: they share the engine, and may hold all its seats

and has to be a stream's: the first byte of a whole answer comes when all is generated, and tells of its length.

    place      1k,1,4   2k,1,4   2k,3,8   4k,1,4
    worker         40       12       25        3     answers, and the sums of the logarithms of their times
    others        300       90        0        2
                 '-- compared --'  '- left out: too few of the others were in this place

A worker that is always in other places than the rest is not judged. That spares the one to which an unlucky hash gives
all the work, and misses a slow one that a policy blind to load floods: there, timeouts make it a failing one. What
may deceive is one worker that is given all the requests with long answers, and has no seat free for long. Times are
averaged as logarithms, so that one request that met a compiling kernel does not condemn a worker, and a worker must be
slower by twice the standard error.

No more than `max_share` of the workers are held off, never the last one: the failing ones first, then the slow ones,
the slowest first. When more fail than that, it is not the workers: all are let in (panic), as a worker that answers
now and then is better than none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection

T = TypeVar("T", bound=Hashable)

_SLOTS = 6
_FEW = 5
"""Answers of the others that a comparison needs."""
_MOST_WAITING = 15
_ERRORS = 2.0
"""Standard errors by which a worker must be beyond what is allowed."""
_LEAST = 1e-4
"""Seconds; a first byte sooner than that counts as that late."""


class OutlierRules(msgspec.Struct, frozen=True):
    """window         seconds that are looked back on
    min_volume      answers in a window without which nobody is judged
    failure_rate    share of failures from which on a worker is bad
    failure_factor  and how many times the others' rate that must be
    latency_factor  how many times later than the others' its first byte comes; infinity: latency is not judged
    latency_above   and how many seconds later that must be
    ejection        seconds the first time; doubled each time it follows closely, to max_ejection
    max_share       of the workers that may be held off
    """

    window: float = 30.0
    min_volume: int = 20
    failure_rate: float = 0.5
    failure_factor: float = 3.0
    latency_factor: float = 3.0
    latency_above: float = 1.0
    ejection: float = 30.0
    max_ejection: float = 300.0
    max_share: float = 0.5


class Ejection(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """A worker is held off. The same object at each judgement until it is over.

    until   when it may come back
    cause   "failures" or "latency"
    degree  rate of failures, or times later than the others
    reason  one sentence with figures, for logs
    """

    worker: T
    until: float
    cause: str
    degree: float
    reason: str


class _Counts:
    """What was heard of a worker over some time. `cells`: by place, [answers, sum of log seconds, sum of squares]."""

    __slots__ = ("answers", "cells", "failures")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.answers = self.failures = 0
        self.cells: dict[int, list[float]] = {}


class _Slot(_Counts):
    """One of the slots of time that a window is made of; `number` counts them from time 0."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        super().__init__()
        self.number = -1


class _Record(_Counts, Generic[T]):
    """The window of one worker, kept as a sum, the slots it is made of, and what is held against the worker."""

    __slots__ = ("back_at", "ejection", "last", "slots")

    def __init__(self) -> None:
        super().__init__()
        self.slots = tuple(_Slot() for _ in range(_SLOTS))
        self.ejection: Ejection[T] | None = None
        self.last = 0.0  # seconds of the last ejection, 0 when that is forgiven
        self.back_at = 0.0  # when it came back from it

    @property
    def rate(self) -> float:
        """The share of failures, as if there had been one failure and one success more: what few say is not zero."""
        return (self.failures + 1) / (self.answers + 2)


class _Slowness(msgspec.Struct, frozen=True, gc=False):
    """answers: how many could be compared; own, others: mean seconds; error: standard error of log(own / others)."""

    answers: int
    own: float
    others: float
    error: float


class Outliers(Generic[T]):
    """Finds the outliers among workers, for which any key will do. `panic`: too many fail, so all were let in."""

    __slots__ = ("_fleet", "_number", "_records", "_slot", "_until", "_width", "panic", "rules")

    def __init__(self, rules: OutlierRules | None = None) -> None:
        self.rules = rules or OutlierRules()
        self.panic = False
        self._records: dict[T, _Record[T]] = {}
        self._fleet: dict[int, list[float]] = {}  # the sum of all records' cells
        self._width = self.rules.window / _SLOTS
        self._number = 0  # of the newest slot, counted from time 0
        self._slot = 0  # where that is in each record
        self._until = -math.inf  # when it ends

    def heard(self, worker: T, failed: bool, first_byte: float, place: int, now: float) -> None:
        """Takes one answer, or the lack of one. Back-pressure, and clients that left, are not to be told at all.

        failed      it counts against the worker
        first_byte  seconds from sending to the first byte; of no matter in place 0
        place       what `place` gave when it was sent, or 0
        """
        if now >= self._until:
            self._advance(now)
        record = self._records.get(worker)
        if record is None:
            record = self._records[worker] = _Record()
        elif record.ejection is not None:
            return
        slot = record.slots[self._slot]
        if slot.number != self._number:
            self._expire(record, slot)
            slot.number = self._number
        slot.answers += 1
        record.answers += 1
        if failed:
            slot.failures += 1
            record.failures += 1
        elif place:
            time = math.log(first_byte if first_byte > _LEAST else _LEAST)
            _count(slot.cells, place, time)
            _count(record.cells, place, time)
            _count(self._fleet, place, time)

    def judge(self, workers: Collection[T], now: float) -> tuple[Ejection[T], ...]:
        """Who of these is to be held off now. `workers` are all that would get requests if nobody were held off."""
        if now >= self._until:
            self._advance(now)
        self._settle(now)
        self._eject(workers, now)
        most = min(int(self.rules.max_share * len(workers)), len(workers) - 1)
        held = [record.ejection for record in map(self._records.get, workers) if record and record.ejection]
        failing = [ejection for ejection in held if ejection.cause == "failures"]
        self.panic = bool(held) and len(failing) > most
        if self.panic:
            return ()
        held.sort(key=lambda ejection: (ejection.cause != "failures", -ejection.degree))
        return tuple(held[: max(most, 0)])

    def _advance(self, now: float) -> None:
        self._number = math.floor(now / self._width)
        self._slot = self._number % _SLOTS
        self._until = (self._number + 1) * self._width

    def _expire(self, record: _Record[T], slot: _Slot) -> None:
        """Takes a slot that is too old out of all sums."""
        record.answers -= slot.answers
        record.failures -= slot.failures
        for cells in (record.cells, self._fleet):
            for place, (count, time, square) in slot.cells.items():
                cell = cells[place]
                cell[0] -= count
                cell[1] -= time
                cell[2] -= square
                if not cell[0]:
                    del cells[place]
        slot.clear()

    def _settle(self, now: float) -> None:
        """Brings the windows up to date, lets those back whose time is up, forgives, and forgets the unheard of."""
        oldest = self._number - _SLOTS
        unknown: list[T] = []
        for worker, record in self._records.items():
            for slot in record.slots:
                if slot.number <= oldest and slot.answers:
                    self._expire(record, slot)
            if record.ejection is not None:
                if record.ejection.until <= now:
                    record.ejection = None
                    record.back_at = now
            elif now - record.back_at >= record.last:
                record.last = 0.0
                if not record.answers:
                    unknown.append(worker)
        for worker in unknown:
            del self._records[worker]

    def _eject(self, workers: Collection[T], now: float) -> None:
        """Finds the bad ones among those that are in."""
        volume = self.rules.min_volume
        known = ((worker, self._records.get(worker)) for worker in workers)
        records = [(worker, record) for worker, record in known if record is not None and record.ejection is None]
        rates = sorted(record.rate for _, record in records if record.answers >= min(_FEW, volume))
        found = [
            (worker, record, bad)
            for worker, record in records
            if record.answers >= volume and (bad := self._failing(record, rates) or self._slow(record))
        ]
        for worker, record, bad in found:
            self._hold(worker, record, *bad, now)

    def _hold(self, worker: T, record: _Record[T], cause: str, degree: float, reason: str, now: float) -> None:
        record.last = min(record.last * 2, self.rules.max_ejection) if record.last else self.rules.ejection
        record.ejection = Ejection(worker, now + record.last, cause, degree, reason)
        for slot in record.slots:
            self._expire(record, slot)

    def _failing(self, record: _Record[T], rates: list[float]) -> tuple[str, float, str] | None:
        rate = record.failures / record.answers
        if rate < self.rules.failure_rate:
            return None
        others = _median_without(rates, record.rate)
        if rate < self.rules.failure_factor * others:
            return None
        reason = (
            f"{record.failures} of {record.answers} requests failed in {self.rules.window:g} s ({rate:.0%});"
            f" the others' median is about {others:.0%}."
        )
        return "failures", rate, reason

    def _slow(self, record: _Record[T]) -> tuple[str, float, str] | None:
        found, rules = _slowness(record.cells, self._fleet), self.rules
        if found is None or found.answers < rules.min_volume:
            return None
        factor = found.own / found.others
        sure = factor * math.exp(-_ERRORS * found.error)
        if sure < rules.latency_factor or found.own - found.others <= rules.latency_above:
            return None
        reason = (
            f"The first byte came after {found.own:.2f} s where the others need {found.others:.2f} s in its place"
            f" ({factor:.1f} times as long; {found.answers} answers in {rules.window:g} s)."
        )
        return "latency", factor, reason


def place(size: int, waiting: int, load: int) -> int:
    """Where a stream stands that is sent now; 0: where nothing is measured.

    size     bytes of routing text that are not cached there
    waiting  requests at that worker without a first byte, this one included
    load     requests running there, this one included
    """
    if waiting > _MOST_WAITING:
        return 0
    return size.bit_length() << 16 | waiting << 8 | load.bit_length()


def _count(cells: dict[int, list[float]], place: int, time: float) -> None:
    cell = cells.get(place)
    if cell is None:
        cells[place] = [1, time, time * time]
    else:
        cell[0] += 1
        cell[1] += time
        cell[2] += time * time


def _median_without(ordered: list[float], value: float) -> float:
    """The median of all but one of these, which is `value`; 0.0 when there are no others."""
    most = len(ordered) - 1
    if most == 0:
        return 0.0
    own = bisect_left(ordered, value)
    low, high = (most - 1) // 2, most // 2
    return (ordered[low + (low >= own)] + ordered[high + (high >= own)]) / 2


def _slowness(own: dict[int, list[float]], fleet: dict[int, list[float]]) -> _Slowness | None:
    """A worker's times beside those of the rest of the fleet in the same places; `fleet` holds its own, too."""
    answers = mine = theirs = scatter = others = 0.0
    for place, (count, time, _) in own.items():
        all_count, all_time, all_square = fleet[place]
        rest, rest_time = all_count - count, all_time - time
        if rest >= _FEW:
            answers += count
            others += rest
            mine += time
            theirs += count * rest_time / rest
            scatter += all_square - time * time / count - rest_time * rest_time / rest
    if not answers:
        return None
    error = math.sqrt(max(scatter, 0.0) / (answers + others) * (1.0 / answers + 1.0 / others))
    return _Slowness(int(answers), math.exp(mine / answers), math.exp(theirs / answers), error)
