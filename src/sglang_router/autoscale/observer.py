"""Makes the `Reading` of the fleet from which a scaling decision is made.

    fleet       ready, starting, leaving and failed workers; their load; the queues that their engines report
    unanswered  requests without a byte of an answer, and those queued because no worker is ready
    elsewhere   those that other routers hold because no worker is ready: only one router of a fleet starts workers
    Finished    the time to the first byte of each stream that ended, in a sliding window

A time to first token was measured with the number of workers of its time. So the window is emptied when that number
changes: otherwise the wait for a new worker would count against the new number, and ask for one more worker.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from sglang_router.autoscale.scaler import Flow, Reading
from sglang_router.relay.clients import Unanswered
from sglang_router.routing.events import Finished, Listener
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker

_WINDOW = 60.0
"""Seconds for which a time to first token counts."""
_MOST_SAMPLES = 1024
_FEWEST_SAMPLES = 10
"""With fewer streams, the slowest one in ten means nothing."""
_BYTES_PER_TOKEN = 4
_BY_HEALTH = {
    Health.STARTING: "coming",
    Health.HEALTHY: "ready",
    Health.UNHEALTHY: "failed",
    Health.DOWN: "failed",
}


class Observer(Listener):
    """See the module. Add it to the listeners. `clock` is the clock of `unanswered` and of all moments here.

    held       requests of this router that were queued at the last reading
    elsewhere  returns how many other routers hold; set it where there are some
    """

    def __init__(self, fleet: Fleet, unanswered: Callable[[], Unanswered], clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._unanswered = unanswered
        self._clock = clock
        self._flow = Flow()
        self._ended = 0  # all requests so far
        self.held = 0
        self.elsewhere: Callable[[], int] = lambda: 0
        self._ready = 0
        self._since = clock()  # when the number of ready workers last changed
        self._busy_at = self._since  # when a request was last known of
        # The end of each stream, and its time to first byte
        self._samples: deque[tuple[float, float]] = deque(maxlen=_MOST_SAMPLES)

    def finished(self, event: Finished) -> None:
        """Count a relayed request, and keep the time to first token of a served stream."""
        tag, answer = event.tag, event.answer
        if not tag.route.endpoint:  # the control plane's requests are no work for workers
            return
        now = self._busy_at = self._clock()
        self._ended += 1
        if tag.streaming and answer.status == 200 and answer.first_byte >= 0.0 and now - answer.duration >= self._since:
            self._samples.append((now, answer.first_byte))

    def read(self, now: float) -> Reading:
        """Return the reading of this moment."""
        states = Counter(map(_state, self._fleet))
        ready = states["ready"]
        self._notice(ready, now)
        own, others = self._unanswered(), self.elsewhere()
        self.held = own.held
        waiting = own.with_others(Unanswered(others, others, 0, 0.0))
        load = sum(worker.load for worker in self._fleet) + waiting.held
        paused = sum(bool(worker.paused) for worker in self._fleet)
        if load or paused:
            self._busy_at = now
        return Reading(
            ready=ready,
            coming=states["coming"],
            leaving=states["leaving"],
            paused=paused,
            failed=states["failed"],
            load=load,
            held=waiting.held,
            queue=self._queue(waiting),
            tokens=waiting.size // _BYTES_PER_TOKEN,
            ttft=self._ttft(waiting, now),
            inflow=self._flow.say(ready, self._ended, load, now),
            idle=now - self._busy_at,
        )

    def _notice(self, ready: int, now: float) -> None:
        """Empty the window when the number of ready workers has changed."""
        if ready > self._ready:
            self._busy_at = now  # a new worker is not idle before a whole cool-down
        if ready != self._ready:
            self._ready = ready
            self._since = now
            self._samples.clear()

    def _queue(self, waiting: Unanswered) -> int:
        """Return the queued requests: as the engines report if all ready ones do, else those without an answer yet."""
        reported = [worker.report.queued for worker in self._fleet if _state(worker) == "ready"]
        known = [queued for queued in reported if queued is not None]
        return sum(known) + waiting.held if known and len(known) == len(reported) else waiting.requests

    def _ttft(self, waiting: Unanswered, now: float) -> float | None:
        """Return the time that one stream in ten exceeds.

        The oldest request without an answer counts, too, unless such requests are fewer than one in ten.
        """
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
    """Return what a worker counts as: ready, coming, leaving or failed."""
    if worker.draining:
        return "coming" if worker.returning else "leaving"
    return "leaving" if worker.withheld else _BY_HEALTH[worker.health]
