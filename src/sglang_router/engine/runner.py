"""The engine in real time: one task that drives the scheduler, and the answers as clients see them.

    start(jobs) ─> EngineScheduler.submit                an `EngineGeneration` is one answer as its client sees it:
    run():  step ─> wait its duration ─> deliver ─┐      its text and counts change only at the end of a pass
            ^─────────────────────────────────────┘

All of it runs on one event loop, and there is no await between reading and changing the scheduler. So it needs no
locks.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram

from sglang_router.engine.kv import pack
from sglang_router.engine.scheduler import BatchStep, EngineRequest, EngineScheduler
from sglang_router.engine.text import AnswerWriter


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One prompt to answer. `limit` is the most tokens to write; 0 computes the prompt only."""

    prompt: Sequence[int]
    limit: int
    rid: str = ""
    namespace: str = ""
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0


class EngineError(Exception):
    """An error answer with a status; `kind` is its type in OpenAI's vocabulary."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class EngineGeneration:
    """One answer in progress. `wake` is set whenever it has changed; several answers may share it."""

    __slots__ = (
        "ended",
        "finish",
        "first",
        "index",
        "request",
        "settled",
        "shown",
        "started",
        "streamed",
        "wake",
        "writer",
    )

    def __init__(
        self, index: int, request: EngineRequest, writer: AnswerWriter, wake: asyncio.Event, streamed: bool
    ) -> None:
        self.index = index
        self.request = request
        self.writer = writer
        self.wake = wake
        self.streamed = streamed
        self.shown = 0
        self.settled = 0
        self.finish: str | None = None
        self.started = self.first = self.ended = 0.0

    @property
    def text(self) -> str:
        """The text that can be sent now."""
        return self.writer.text[: self.settled]

    @property
    def latency(self) -> float:
        """Seconds from the start to the end; to the last pass while it runs."""
        return self.ended - self.started

    @property
    def finish_reason(self) -> dict[str, object] | None:
        """Why it ended, in SGLang's format."""
        if self.finish == "length":
            return {"type": "length", "length": self.shown}
        if self.finish == "abort":
            return {"type": "abort", "message": "The request was aborted."}
        return None if self.finish is None else {"type": "stop", "matched": self.writer.matched}


class EngineLatencies:
    """The latency metrics, in seconds of the wall clock. Only the runner can measure them."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def histogram(name: str, about: str, top: float) -> Histogram:
            buckets = [top * share for share in (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)]
            family = Histogram(name, about, ["model_name"], registry=registry, buckets=buckets)
            return family.labels(model)

        self.first_token = histogram("sglang:time_to_first_token_seconds", "Time to first token.", 20)
        self.per_token = histogram("sglang:time_per_output_token_seconds", "Time per output token after the first.", 2)
        self.whole = histogram("sglang:e2e_request_latency_seconds", "Time of a whole request.", 200)


class Engine:
    """Owns the scheduler and the running answers. `speed` divides every duration; 0 does not wait at all."""

    def __init__(
        self, scheduler: EngineScheduler, latencies: EngineLatencies, speed: float, context: int, seed: int = 0
    ) -> None:
        self.scheduler = scheduler
        self.context = context
        self._latencies = latencies
        self._speed = speed
        self._seed = seed
        self._live: dict[str, EngineGeneration] = {}
        self._work = asyncio.Event()
        self._passed = asyncio.Event()

    def start(self, jobs: Iterable[EngineJob], *, streamed: bool = False) -> list[EngineGeneration]:
        """Submit `jobs` as one request; the answers share one `wake`. Raises `EngineError` if one is refused."""
        wake = asyncio.Event()
        now = time.monotonic()
        started = [self._make(index, job, wake, streamed) for index, job in enumerate(jobs)]
        if len({generation.request.rid for generation in started} - self._live.keys()) < len(started):
            raise EngineError(400, "Another running request uses this rid.")
        for generation in started:
            generation.started = generation.ended = now
            self._live[generation.request.rid] = generation
            self.scheduler.submit(generation.request)
        self._work.set()
        return started

    def _make(self, index: int, job: EngineJob, wake: asyncio.Event, streamed: bool) -> EngineGeneration:
        size = len(job.prompt)
        if not size:
            raise EngineError(400, "The prompt is empty.")
        if size + job.limit > self.context or (not job.limit and size > self.context):
            raise EngineError(
                400,
                f"{size} tokens of prompt and {job.limit} of answer exceed the context of {self.context}.",
            )
        packed = pack(job.prompt)
        writer = AnswerWriter(
            packed,
            job.prompt[-2:],
            job.limit,
            seed=self._seed ^ job.seed,
            stop=job.stop,
            stop_tokens=job.stop_tokens,
            ignore_eos=job.ignore_eos,
        )
        request = EngineRequest(job.rid or uuid.uuid4().hex, packed, writer, job.limit, job.namespace)
        return EngineGeneration(index, request, writer, wake, streamed)

    async def complete(self, generations: Sequence[EngineGeneration]) -> None:
        """Wait until all of `generations`, which share one `wake`, have ended."""
        wake = generations[0].wake
        while any(generation.finish is None for generation in generations):
            await wake.wait()
            wake.clear()

    # -- the driver ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the scheduler until cancelled."""
        due = time.monotonic()
        while True:
            step = self.scheduler.step()
            if step is None:
                self._work.clear()
                await self._work.wait()
                due = time.monotonic()
                continue
            # Add the durations up from a fixed start, so that the time that Python needs for a pass is not added.
            due = max(due + step.duration / self._speed, time.monotonic()) if self._speed else due
            await asyncio.sleep(due - time.monotonic() if self._speed else 0)
            self._deliver(step, time.monotonic())
            self._pulse()

    def _pulse(self) -> None:
        """Wake the tasks that wait for the batch to change."""
        self._passed.set()
        self._passed.clear()

    def _deliver(self, step: BatchStep, now: float) -> None:
        for request in step.advanced:
            generation = self._live.get(request.rid)
            if generation is None:
                continue
            generation.settled = generation.writer.settled
            generation.shown = request.output
            generation.ended = now
            if not generation.first:
                generation.first = now
                self._latencies.first_token.observe(now - generation.started)
            if generation.streamed:
                generation.wake.set()
        for request in step.finished:
            generation = self._live.get(request.rid)
            if generation is not None:
                self._end(generation, request.finish or "stop", now)

    def _end(self, generation: EngineGeneration, reason: str, now: float) -> None:
        del self._live[generation.request.rid]
        generation.finish = reason
        generation.ended = now
        generation.wake.set()
        self._latencies.whole.observe(generation.latency)
        if generation.shown > 1:
            self._latencies.per_token.observe((now - generation.first) / (generation.shown - 1))

    # -- control -------------------------------------------------------------------------------------------

    def abort(self, rid: str) -> bool:
        """Abort the requests whose ids begin with `rid`, as SGLang does. Return False if there are none."""
        found = [generation for live, generation in self._live.items() if live.startswith(rid)]
        self.drop(found)
        return bool(found)

    def abort_all(self) -> None:
        """Abort all queued and running requests."""
        self.drop(list(self._live.values()))

    def drop(self, generations: Iterable[EngineGeneration]) -> None:
        """Abort those of `generations` that have not ended."""
        now = time.monotonic()
        for generation in generations:
            if generation.finish is None and self.scheduler.abort(generation.request):
                self._end(generation, "abort", now)
        self._work.set()
        self._pulse()

    def pause(self, mode: str = "abort") -> None:
        """Stop computing until `resume`.

        "abort" aborts all requests first, "retract" moves them back to the queue, "in_place" leaves them in the batch.
        """
        if mode == "abort":
            self.abort_all()
        elif mode == "retract":
            self.scheduler.retract_all()
        self.scheduler.paused = True

    def resume(self) -> None:
        """Undo `pause`."""
        self.scheduler.paused = False
        self._work.set()

    async def update(self, *, flush: bool = True) -> None:
        """Pretend to load new weights: wait for the batch to end, empty the cache, then admit queued requests again."""
        self.scheduler.holding = True
        try:
            while self.scheduler.active and not self.scheduler.paused:
                await self._passed.wait()
            if flush:
                self.scheduler.kv.reset()
        finally:
            self.scheduler.holding = False
            self._work.set()
