"""An engine in virtual time: the built-in engine's scheduler, whose passes take no time but are only counted.

    submit ──> queue of the scheduler          begins a pass at once if the engine is idle
    due        when the current pass ends      the simulation calls `advance` then
    advance ─> who got the first token, and who ended; the next pass begins

As long as nothing happens, many passes that only decode are taken as one stretch (`EngineScheduler.alike`). A request
that comes in the middle of a stretch ends it after the pass that runs then, as it would find the engine without
stretches.
"""

from __future__ import annotations

import math
from collections import Counter

from sglang_router.engine.scheduler import BatchStep, EngineRequest, EngineScheduler
from sglang_router.replay.load import UNIT, LoadRequest
from sglang_router.routing.engine_report import EngineReport

_RESOLUTION = 1e-4


class Gaps:
    """The pauses between two tokens of an answer, counted in steps of 0.1 ms."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def __repr__(self) -> str:
        return f"<Gaps {self._counts.total()}>"

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a pause, `count` times."""
        self._counts[round(seconds / _RESOLUTION)] += count

    def quantile(self, share: float) -> float:
        """Return the pause in seconds that this share of all does not exceed; 0.0 without any."""
        wanted, seen = share * self._counts.total(), 0
        for gap, count in sorted(self._counts.items()):
            seen += count
            if seen >= wanted:
                return gap * _RESOLUTION
        return 0.0


class _Unwritten:
    """The source of an answer whose tokens are known already."""

    def next(self) -> tuple[int, str | None]:
        return 0, None


_SOURCE = _Unwritten()


class PagedRequest(EngineRequest):
    """A request whose prompt and answer are known in pages, see `replay.load`.

    first  when its first token came; negative before
    last   when its latest token came
    """

    __slots__ = ("_page", "_pages", "first", "last")

    def __init__(self, ask: LoadRequest, page: int) -> None:
        super().__init__(str(ask.number), b"", _SOURCE, ask.output)
        self.prompt = self.length = ask.prompt
        self.first = self.last = -1.0
        self._pages = ask.pages
        self._page = page

    def packed(self, length: int) -> bytes:
        """Return the units of the whole pages in its first `length` tokens."""
        return self._pages[: length // self._page * UNIT]

    def wrote(self, token: int) -> None:
        """Take one more token, which is known already."""
        self.output += 1
        self.length += 1

    @property
    def certain(self) -> int:
        """Tokens that it will write for sure, besides its last one."""
        return self.limit - self.output - 1

    def write(self, count: int) -> None:
        """Take more tokens."""
        self.output += count
        self.length += count


class SimulatedEngine:
    """See the module.

    name     of its worker
    speed    divides the duration of each pass
    gaps     counts the pauses between tokens
    due      when the current pass or stretch ends; infinity: the engine is idle
    busy     seconds in which it computed
    since    when it started
    stopped  when it stopped; infinity: it runs
    """

    def __init__(self, name: str, scheduler: EngineScheduler, speed: float, gaps: Gaps) -> None:
        self.name = name
        self.scheduler = scheduler
        self.speed = speed
        self.gaps = gaps
        self.due = math.inf
        self.busy = 0.0
        self.since = 0.0
        self.stopped = math.inf
        self._began = 0.0
        self._step: BatchStep | None = None
        self._stretch = 0  # passes of the current stretch; 0: a single pass
        self._pace = 0.0  # seconds of each

    def __repr__(self) -> str:
        return f"<SimulatedEngine due at {self.due:.3f}, {self.scheduler!r}>"

    def submit(self, request: PagedRequest, now: float) -> None:
        """Queue a request. Raises: TooLongError, when its prompt does not fit into the cache."""
        ahead = len(self.scheduler.waiting)
        self.scheduler.submit(request)
        if self.due == math.inf:
            self._begin(now)
        elif self._stretch and not ahead:  # behind others it changes nothing before they are admitted
            passes = max(1, math.ceil((now - self._began) / self._pace))
            if passes < self._stretch:
                self._stretch = passes
                self.due = self._began + passes * self._pace

    def advance(self) -> tuple[list[EngineRequest], list[EngineRequest]]:
        """End what is due, and begin the next pass; return who got a first token, and who ended."""
        now = self.due
        self.busy += now - self._began
        first: list[EngineRequest] = []
        ended: list[EngineRequest] = []
        if self._stretch:
            self._end_stretch(now)
        elif self._step is not None:
            first, ended = self._end_step(self._step, now), self._step.finished
        self._begin(now)
        return first, ended

    def report(self) -> EngineReport:
        """Return what it says of itself, at its last pass or the beginning of the current stretch."""
        scheduler = self.scheduler
        return EngineReport(
            model="simulated",
            capacity_tokens=scheduler.kv.capacity,
            running=scheduler.active,
            queued=len(scheduler.waiting),
            used_tokens=scheduler.kv.locked + scheduler.kv.private,
            load_tokens=scheduler.load_tokens,
        )

    def stop(self, now: float) -> None:
        """Stop computing for good: the process ends."""
        self.due = math.inf
        self.stopped = now

    def _begin(self, now: float) -> None:
        scheduler = self.scheduler
        self._began = now
        self._step = None
        self._stretch = scheduler.alike()
        if self._stretch:
            self._pace = scheduler.cost.duration(0, len(scheduler.running)) / self.speed
            self.due = now + self._stretch * self._pace
            return
        self._step = step = scheduler.step()
        self.due = math.inf if step is None else now + step.duration / self.speed

    def _end_stretch(self, now: float) -> None:
        passes, running, first = self._stretch, self.scheduler.running, self._began + self._pace
        self.scheduler.decode(passes)
        for request in running:
            assert isinstance(request, PagedRequest)
            self.gaps.add(first - request.last)
            request.last = now
        if passes > 1:
            self.gaps.add(self._pace, (passes - 1) * len(running))

    def _end_step(self, step: BatchStep, now: float) -> list[EngineRequest]:
        first: list[EngineRequest] = []
        for request in step.advanced:
            assert isinstance(request, PagedRequest)
            if request.first < 0.0:
                request.first = now
                first.append(request)
            else:
                self.gaps.add(now - request.last)
            request.last = now
        return first
