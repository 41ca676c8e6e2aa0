"""What the decision about scaling is made from: a `Reading` of the fleet, whenever it is asked for.

    fleet     ready, coming, leaving and failed workers; their load; what their engines say of their queues
    service   requests without a byte of an answer, and those held because no worker is ready
    Finished  the time to the first byte of each stream that ended, in a sliding window

Times to first token tell of the number of workers there was when they came about. So the window begins anew when that
number changes: else the wait for a new worker would be held against it, and ask for the next one.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from sglang_router.core.events import Finished, Listener
from sglang_router.core.scaling import Flow, Reading
from sglang_router.core.worker import Health, Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_router.core.fleet import Fleet
    from sglang_router.net.service import Unanswered

_WINDOW = 60.0
"""Seconds for which a time to first token counts."""
_MOST_SAMPLES = 1024
_FEWEST_SAMPLES = 10
"""Of fewer streams it means little that one in ten waits longer."""
_BYTES_PER_TOKEN = 4
_BY_HEALTH = {
    Health.STARTING: "coming",
    Health.HEALTHY: "ready",
    Health.UNHEALTHY: "failed",
    Health.DOWN: "failed",
}


class Observer(Listener):
    """See the module. To be added to the listeners; `clock` is that of `unanswered` and of all moments here."""

    def __init__(self, fleet: Fleet, unanswered: Callable[[], Unanswered], clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._unanswered = unanswered
        self._clock = clock
        self._flow = Flow()
        self._ended = 0  # requests, in all
        self._ready = 0
        self._since = clock()  # when the number of ready workers changed last
        self._busy_at = self._since  # the last moment a request was known of
        self._samples: deque[tuple[float, float]] = deque(maxlen=_MOST_SAMPLES)  # end of the stream, first byte after

    def finished(self, event: Finished) -> None:
        if not event.endpoint:  # the control plane's: no work for workers
            return
        now = self._busy_at = self._clock()
        self._ended += 1
        if event.streaming and event.status == 200 and event.first_byte >= 0.0 and now - event.duration >= self._since:
            self._samples.append((now, event.first_byte))

    def read(self, now: float) -> Reading:
        """The fleet at this moment."""
        states = Counter(map(_state, self._fleet))
        ready = states["ready"]
        self._look(ready, now)
        waiting = self._unanswered()
        load = sum(worker.load for worker in self._fleet) + waiting.held
        if load:
            self._busy_at = now
        return Reading(
            ready=ready,
            coming=states["coming"],
            leaving=states["leaving"],
            failed=states["failed"],
            load=load,
            held=waiting.held,
            queue=self._queue(waiting),
            tokens=waiting.size // _BYTES_PER_TOKEN,
            ttft=self._ttft(waiting, now),
            inflow=self._flow.say(ready, self._ended, load, now),
            idle=now - self._busy_at,
        )

    def _look(self, ready: int, now: float) -> None:
        """Whether the number of ready workers is another one now."""
        if ready > self._ready:
            self._busy_at = now  # the new one has a whole cool-down to be of use
        if ready != self._ready:
            self._ready = ready
            self._since = now
            self._samples.clear()

    def _queue(self, waiting: Unanswered) -> int:
        """The engines' own figures where every one tells; the router sees only that there is no answer yet."""
        told = [worker.report.queued for worker in self._fleet if _state(worker) == "ready"]
        known = [queued for queued in told if queued is not None]
        return sum(known) + waiting.held if known and len(known) == len(told) else waiting.requests

    def _ttft(self, waiting: Unanswered, now: float) -> float | None:
        """What one stream in ten exceeds. The oldest that waits counts too, unless it is less than one in ten."""
        samples = self._samples
        while samples and samples[0][0] < now - _WINDOW:
            samples.popleft()
        found: list[float] = []
        if len(samples) >= _FEWEST_SAMPLES:
            times = sorted(first_byte for _, first_byte in samples)
            found.append(times[len(times) * 9 // 10])
        here = waiting.requests - waiting.held
        if here * 10 > len(samples) + here:
            found.append(min(waiting.oldest, now - self._since))
        return max(found, default=None)


def _state(worker: Worker) -> str:
    """What a worker counts as."""
    if worker.draining:
        return "coming" if worker.returning else "leaving"
    return _BY_HEALTH[worker.health]
