"""What the page hears of the router: the last events, and what each worker answered in the last seconds.

    events      added, health, breaker, outlier, draining, role, reload ...: always, in a ring of the last 200
    figures     requests, TTFT and tokens of each worker: only while somebody looks; else a batch of ends costs one test

The figures are kept by second, in as many tables as a figure is a mean of; only workers that answered are in a table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from sglang_router.admin.figures import rounded, share
from sglang_router.routing.events import Finished, Listener, Quarantined, WorkerChanged
from sglang_router.words import counted

_KEPT = 200
_SECONDS = 10
"""A worker's figures are of the last so many seconds."""
_LONGEST_WHY = 300


class Event(msgspec.Struct):
    """Something that happened.

    number  1 for the first since the start of the router
    at      seconds since 1970
    what    "added", "removed", "health", "breaker", "outlier", "draining" ..., "quarantined" or "reload"
    worker  its URL; "" for none
    old     state of the worker before, and new
    why     for people; "" when nothing is known
    """

    number: int
    at: float
    what: str
    worker: str = ""
    old: str = ""
    new: str = ""
    why: str = ""


class AnswerSums:
    """What one worker answered in some seconds; `figures` is of several of these."""

    __slots__ = ("cached", "completion", "first_bytes", "prompt", "requests", "ttft")

    def __init__(self) -> None:
        self.requests = self.first_bytes = 0
        self.ttft = 0.0
        self.prompt = self.cached = self.completion = 0

    def add(self, other: AnswerSums) -> None:
        """Add those of another second."""
        self.requests += other.requests
        self.first_bytes += other.first_bytes
        self.ttft += other.ttft
        self.prompt += other.prompt
        self.cached += other.cached
        self.completion += other.completion


Figures = tuple[float, "float | None", float, "float | None"]
"""Requests a second, mean TTFT in seconds, tokens of answers a second, cached share of the prompts."""
_NOTHING: Figures = (0.0, None, 0.0, None)


class Witness(Listener):
    """See the module. wall: gives seconds since 1970."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self.events: deque[Event] = deque(maxlen=_KEPT)
        self.number = 0
        self._wall = wall
        self._seconds: deque[dict[str, AnswerSums]] = deque(maxlen=_SECONDS)  # empty while nobody looks

    def __repr__(self) -> str:
        return f"<Witness of {counted(self.number, 'event')}{', watched' * self.watched}>"

    # -- events --------------------------------------------------------------------------------------------------------

    def note(self, what: str, worker: str = "", old: str = "", new: str = "", why: str = "") -> None:
        """Keep an event."""
        self.number += 1
        at = round(self._wall(), 1)
        self.events.append(Event(self.number, at, what, worker, old, new, why[:_LONGEST_WHY]))

    def between(self, after: int, last: int) -> list[Event]:
        """Return the events after one and up to another one, the oldest first, as far as they are kept."""
        return [event for event in self.events if after < event.number <= last]

    def worker_changed(self, event: WorkerChanged) -> None:
        """Keep the change, and why."""
        worker, why = event.worker, ""
        if event.what == "updating":  # its row shows that; so many would leave no room for others
            return
        if event.what == "outlier":
            why = worker.ejected
        elif event.what == "breaker" and event.new == "open":
            why = f"{counted(worker.circuit.failures, 'failure')} in a row; open for {worker.circuit.open_for:g} s"
        elif event.what == "health":
            why = worker.reason
        self.note(event.what, worker.url, event.old, event.new, why)

    def quarantined(self, event: Quarantined) -> None:
        """Keep that a request breaks workers."""
        why = f"request {event.tag.id} broke {counted(event.workers, 'worker')}: it is refused for a while"
        self.note("quarantined", why=why)

    # -- what workers answer -------------------------------------------------------------------------------------------

    @property
    def watched(self) -> bool:
        """Whether somebody looks."""
        return bool(self._seconds)

    def look(self) -> None:
        """Begin another second; somebody looks."""
        self._seconds.append({})

    def look_away(self) -> None:
        """Forget all figures: nobody looks any more."""
        self._seconds.clear()

    def figures(self, worker_id: str) -> Figures:
        """Return the figures of a worker; the second that has just begun does not count."""
        found: AnswerSums | None = None
        for second in self._seconds:
            answers = second.get(worker_id)
            if answers is not None:
                found = found or AnswerSums()
                found.add(answers)
        if found is None:
            return _NOTHING
        seconds = max(len(self._seconds) - 1, 1)
        ttft = rounded(found.ttft / found.first_bytes) if found.first_bytes else None
        cached = share(found.cached, found.prompt)
        return round(found.requests / seconds, 1), ttft, round(found.completion / seconds, 1), cached

    def finished(self, event: Finished) -> None:
        """Count what a worker answered, if somebody looks."""
        self.finished_all((event,))

    def finished_all(self, events: Sequence[Finished]) -> None:
        """Count what workers answered, if somebody looks."""
        if not self._seconds:
            return
        table = self._seconds[-1]
        for event in events:
            leg, answer = event.leg, event.answer
            if leg is None:
                continue
            if leg.partner is not None:
                _of(table, leg.partner.target.worker_id).requests += 1
            answers = _of(table, leg.target.worker_id)
            answers.requests += 1
            if answer.first_byte >= 0.0:
                answers.first_bytes += 1
                answers.ttft += answer.first_byte
            usage = answer.usage
            if usage is None:
                continue
            answers.completion += max(usage.completion, 0)
            if usage.prompt > 0 <= usage.cached:
                answers.prompt += usage.prompt
                answers.cached += usage.cached


def _of(table: dict[str, AnswerSums], worker_id: str) -> AnswerSums:
    found = table.get(worker_id)
    if found is None:
        found = table[worker_id] = AnswerSums()
    return found
