"""Outlier detection: workers that do much worse than the others are ejected for a while; never all workers.

    heard(worker, ...)     each answer, into the slots of the current window   a few additions
    judge(workers, now)    once a second: which workers are ejected, and why

             bad in its window                    time is up
    kept ----------------------------> ejected ---------------> back, with an empty window
      ^                        30 s, then 60, 120 ... 300 s       |
      '--- good for as long as it was last ejected ---------------'   otherwise the next time is twice as long

There are two ways to be bad. For both, a worker needs `min_volume` answers to be judged at all.

*Failures.* At least half of its answers, and three times the rate of the others: the median of theirs. So what makes
all workers fail (a client's requests, a shared disk) ejects nobody, and a few workers that fail fast and so draw all
traffic do not pass for the norm.

*Slowness.* The first byte comes three times later than from the others *in like circumstances*, and more than a second
later. Time to first byte depends less on the worker than on what it is asked: a healthy worker with too many requests
answers late, and ejecting it would only move its crowd to the next. So only like is compared with like. The *bucket*
of a request (`bucket_of`) is made at the moment when it is sent, from

    - the power of two of its uncached bytes: what must be read before the first byte
    - how many requests await their first byte at that worker, up to 15: behind more, nothing is measured
    - the power of two of the requests that run there: they share the engine, and may hold all its seats

Only streams have one: the first byte of a whole answer comes when all is generated, and tells of its length.

    bucket     1k,1,4   2k,1,4   2k,3,8   4k,1,4
    worker         40       12       25        3     answers, and the sums of the logarithms of their times
    others        300       90        0        2
                 '-- compared --'  '- left out: too few of the others were in this bucket

A worker that is always in other buckets than the rest is not judged. That spares the worker to which an unlucky hash
sends all the work. It misses a slow worker that a policy blind to load floods: there, timeouts make it a failing one.
What may deceive is a worker that gets all the requests with long answers and has no seat free for long. Times are
averaged as logarithms, so that one request that met a compiling kernel does not condemn a worker, and a worker must be
slower by twice the standard error.

At most `max_share` of the workers are ejected, and never the last one: the failing ones first, then the slow ones, the
slowest first. When more fail than that, the cause is not the workers: all are let in (panic), because a worker that
answers now and then is better than none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Hashable
from typing import Final, Generic, NamedTuple, TypeVar

from sglang_router.routing.rules import OutlierRules

T = TypeVar("T", bound=Hashable)

_SLOTS: Final = 6
_FEW: Final = 5
"""Answers of the others that a comparison needs."""
_MOST_WAITING: Final = 15
_ERRORS: Final = 2.0
"""Standard errors by which a worker must exceed the allowed value."""
_LEAST: Final = 1e-4
"""Seconds; a faster first byte counts as this one."""


class Ejection(Generic[T]):
    """One worker is ejected. `judge` gives the same object until it is over.

    until   when the worker may come back, seconds of the caller's clock
    cause   "failures" or "latency"
    degree  rate of failures, or how many times later than the others
    reason  one sentence with figures, for logs
    """

    __slots__ = ("cause", "degree", "reason", "until", "worker")

    def __init__(self, worker: T, until: float, cause: str, degree: float, reason: str) -> None:
        self.worker = worker
        self.until = until
        self.cause = cause
        self.degree = degree
        self.reason = reason

    def __repr__(self) -> str:
        return f"<Ejection of {self.worker} until {self.until:.3f}: {self.cause}, {self.degree:.3g}>"


class _Counts:
    """The answers of a worker over some time. `cells`: by bucket, [answers, sum of log seconds, sum of squares]."""

    __slots__ = ("answers", "cells", "failures")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all answers."""
        self.answers = self.failures = 0
        self.cells: dict[int, list[float]] = {}


class _Slot(_Counts):
    """One slot of time; a window is made of several. `number` counts them from time 0."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        super().__init__()
        self.number = -1


class _Record(_Counts, Generic[T]):
    """The window of one worker, kept as a sum; the slots it is made of; and how the worker was ejected."""

    __slots__ = ("back_at", "ejection", "last", "slots")

    def __init__(self) -> None:
        super().__init__()
        self.slots = tuple(_Slot() for _ in range(_SLOTS))
        self.ejection: Ejection[T] | None = None
        self.last = 0.0  # seconds of the last ejection; 0: forgiven, the next one is short again
        self.back_at = 0.0  # when the worker came back from it

    @property
    def rate(self) -> float:
        """The share of failures, with one failure and one success added: a few answers do not make a rate of zero."""
        return (self.failures + 1) / (self.answers + 2)


class _Slowness(NamedTuple):
    """answers: how many could be compared; own, others: mean seconds; error: standard error of log(own / others)."""

    answers: int
    own: float
    others: float
    error: float


class Outliers(Generic[T]):
    """Finds the outliers among the workers of a pool; any hashable key stands for a worker.

    panic  too many workers fail, so none is ejected
    """

    __slots__ = ("_number", "_pool", "_records", "_slot", "_until", "_width", "panic", "rules")

    def __init__(self, rules: OutlierRules | None = None) -> None:
        self.rules = rules or OutlierRules()
        self.panic = False
        self._records: dict[T, _Record[T]] = {}
        self._pool: dict[int, list[float]] = {}  # the sum of all records' cells
        self._width = self.rules.window / _SLOTS
        self._number = 0  # of the newest slot, counted from time 0
        self._slot = 0  # index of the newest slot in each record
        self._until = -math.inf  # when the newest slot ends

    def heard(self, worker: T, failed: bool, first_byte: float, bucket: int, now: float) -> None:
        """Count one answer, or a missing one. Do not report back-pressure and clients that disconnected.

        failed      it counts against the worker
        first_byte  seconds from sending to the first byte; not read in bucket 0
        bucket      what `bucket_of` returned when it was sent; 0: its time is not compared
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
        elif bucket:
            time = math.log(first_byte if first_byte > _LEAST else _LEAST)
            _count(slot.cells, bucket, time)
            _count(record.cells, bucket, time)
            _count(self._pool, bucket, time)

    def judge(self, workers: Collection[T], now: float) -> tuple[Ejection[T], ...]:
        """Return which of these are ejected now. `workers` are all that would get requests if none were ejected."""
        if now >= self._until:
            self._advance(now)
        self._settle(now)
        self._find(workers, now)
        most = min(int(self.rules.max_share * len(workers)), len(workers) - 1)
        bad = [record.ejection for record in map(self._records.get, workers) if record and record.ejection]
        failing = [ejection for ejection in bad if ejection.cause == "failures"]
        self.panic = bool(bad) and len(failing) > most
        if self.panic:
            return ()
        bad.sort(key=lambda ejection: (ejection.cause != "failures", -ejection.degree))
        return tuple(bad[: max(most, 0)])

    def _advance(self, now: float) -> None:
        self._number = math.floor(now / self._width)
        self._slot = self._number % _SLOTS
        self._until = (self._number + 1) * self._width

    def _expire(self, record: _Record[T], slot: _Slot) -> None:
        """Subtract a slot that is too old from all sums, and clear it."""
        record.answers -= slot.answers
        record.failures -= slot.failures
        for cells in (record.cells, self._pool):
            for bucket, (count, time, square) in slot.cells.items():
                cell = cells[bucket]
                cell[0] -= count
                cell[1] -= time
                cell[2] -= square
                if not cell[0]:
                    del cells[bucket]
        slot.clear()

    def _settle(self, now: float) -> None:
        """Update the windows, end ejections whose time is up, forgive old ones, and drop empty records."""
        oldest = self._number - _SLOTS
        empty: list[T] = []
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
                    empty.append(worker)
        for worker in empty:
            del self._records[worker]

    def _find(self, workers: Collection[T], now: float) -> None:
        """Eject the bad workers among those that are not ejected."""
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
            self._eject(worker, record, *bad, now)

    def _eject(self, worker: T, record: _Record[T], cause: str, degree: float, reason: str, now: float) -> None:
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
        found, rules = _slowness(record.cells, self._pool), self.rules
        if found is None or found.answers < rules.min_volume:
            return None
        factor = found.own / found.others
        sure = factor * math.exp(-_ERRORS * found.error)
        if sure < rules.latency_factor or found.own - found.others <= rules.latency_above:
            return None
        reason = (
            f"The first byte came after {found.own:.2f} s where the others need {found.others:.2f} s"
            f" in like circumstances ({factor:.1f} times as long; {found.answers} answers in {rules.window:g} s)."
        )
        return "latency", factor, reason


def bucket_of(size: int, waiting: int, load: int) -> int:
    """Return the bucket of a stream that is sent now; 0: its first byte is not compared.

    size     bytes of routing text that are not cached there
    waiting  requests at that worker without a first byte, including this one
    load     requests running there, including this one
    """
    if waiting > _MOST_WAITING:
        return 0
    return size.bit_length() << 16 | waiting << 8 | load.bit_length()


def _count(cells: dict[int, list[float]], bucket: int, time: float) -> None:
    cell = cells.get(bucket)
    if cell is None:
        cells[bucket] = [1.0, time, time * time]
    else:
        cell[0] += 1.0
        cell[1] += time
        cell[2] += time * time


def _median_without(ordered: list[float], value: float) -> float:
    """Return the median of all but one of these, which is `value`; 0.0 when there are no others."""
    most = len(ordered) - 1
    if most == 0:
        return 0.0
    own = bisect_left(ordered, value)
    low, high = (most - 1) // 2, most // 2
    return (ordered[low + (low >= own)] + ordered[high + (high >= own)]) / 2


def _slowness(own: dict[int, list[float]], pool: dict[int, list[float]]) -> _Slowness | None:
    """Compare a worker's times with those of the other workers in the same buckets; `pool` includes its own."""
    answers = mine = theirs = scatter = others = 0.0
    for bucket, (count, time, _) in own.items():
        all_count, all_time, all_square = pool[bucket]
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
