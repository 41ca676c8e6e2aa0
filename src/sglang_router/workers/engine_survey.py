"""The engine survey: asks engines what they are and how busy they are, and gives the fleet their reports.

    health checks: a process is well for the first time --> introduce(worker)   name, version, context, capacity, ranks;
                                                                                then the load
    start(worker) --> pause --> load --> pause --> ...      while it is healthy, until the worker is removed;
                                                            now and then also the names, for adapters come and go

Engines have different endpoints, so each topic has a list of questions, and the first answer that says something
counts (`workers.engine_answers` reads it). An endpoint that answers 404 is not asked again before the next
introduction, because another process may have it; one that has no endpoint for the load is asked for its names only.
One question at a time is in flight per worker, and the workers are asked at different moments of the interval
(`workers.rhythm`).

A missing answer is no fault: the report has a hole then. Only the health checks decide about health.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.engine_report import NOTHING
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.model_names import NO_NAMES, names_of
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers import engine_answers, ranks
from sglang_router.workers.engine_answers import Reader, ReportFields, Sample
from sglang_router.workers.fetch import Fetched, FetchError, fetch
from sglang_router.workers.rhythm import pause_to_step

_MAX_METRICS = 8 << 20
"""Bytes of one engine's metrics; vLLM's have some 200 kB."""
_MAX_JSON = 1 << 20
"""Bytes of any other answer."""
_NOT_THERE = frozenset((404, 405, 501))
"""Statuses of an endpoint that the engine does not have, or does not serve by its options."""
_NAMES_EVERY = 30.0
"""Least seconds between two questions for the names of a worker."""


class Question(NamedTuple):
    """One endpoint, and the reader of its answer."""

    path: bytes
    read: Reader
    is_text: bool = False  # in Prometheus' format, not JSON


class Topic(NamedTuple):
    """Questions of which one answer is enough. Not asked when all its fields are known already."""

    fields: frozenset[str]
    questions: tuple[Question, ...]


SERVER_INFO = (
    Question(b"/server_info", engine_answers.server_info),
    Question(b"/get_server_info", engine_answers.server_info),
)
NAMES = Topic(frozenset(("model", "context_length")), (Question(b"/v1/models", engine_answers.models),))
FACTS = (
    NAMES,
    Topic(
        frozenset(("version", "ranks", "capacity_tokens")),
        SERVER_INFO,
    ),
    Topic(
        frozenset(("model",)),
        (
            Question(b"/model_info", engine_answers.model_info),
            Question(b"/get_model_info", engine_answers.model_info),
        ),
    ),
    Topic(
        frozenset(("version",)),
        (Question(b"/version", engine_answers.version), Question(b"/props", engine_answers.props)),
    ),
)
"""What an engine is, in the order in which it is asked."""
TOKENS = (Question(b"/v1/loads", engine_answers.loads), Question(b"/get_load", engine_answers.get_load))
"""The endpoints that tell the load in tokens."""
LOAD = (
    *TOKENS,
    Question(b"/metrics", engine_answers.metrics, is_text=True),
    Question(b"/load", engine_answers.server_load),
)
"""How busy an engine is."""


class _Interview:
    """What the survey keeps for one worker.

    introduced  this process answered all questions in time
    names_at    when it was asked for its names last; seconds of the router's clock
    not_there   paths that it does not have
    lock        held while a question is in flight
    """

    __slots__ = ("introduced", "lock", "names_at", "not_there")

    def __init__(self) -> None:
        self.introduced = False
        self.names_at = 0.0
        self.not_there: set[bytes] = set()
        self.lock = asyncio.Lock()


class EngineSurvey:
    """See the module. `interval`: seconds between two questions for the load; with 0 only the model's name is asked
    for, and what ranks depend on."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fleet: Fleet,
        pool: ConnectionPool,
        clock: Callable[[], float],
        interval: float,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._pool = pool
        self._clock = clock
        self._interval = interval
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._interviews: dict[Worker, _Interview] = {}

    def start(self, worker: Worker) -> None:
        """Ask for a worker's load from now on. Does nothing if it is being asked."""
        if self._interval and worker not in self._tasks:
            self._tasks[worker] = self._loop.create_task(self._run(worker))

    def stop(self, worker: Worker) -> None:
        """Ask a worker nothing more, from this moment on."""
        self._interviews.pop(worker, None)
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End all questions."""
        tasks = list(self._tasks.values())
        for worker in list(self._tasks):
            self.stop(worker)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def introduce(self, worker: Worker) -> None:
        """Ask a worker what it is, once its process was found well. May take twice the timeout of a health check."""
        interview = self._interview(worker)
        timeout = worker.spec.health.timeout
        async with interview.lock:
            interview.not_there.clear()
            interview.introduced = await _within(timeout, self._ask_facts(worker, interview))
            if self._asks_everything(worker):
                await _within(timeout, self._ask_load(worker, interview))
        if worker.removed:
            self._interviews.pop(worker, None)
        ranks.follow(self._fleet, worker, self._clock())

    def _interview(self, worker: Worker) -> _Interview:
        return self._interviews.setdefault(worker, _Interview())

    def _asks_everything(self, worker: Worker) -> bool:
        return self._interval > 0 or worker.spec.dp_aware

    async def _ask_facts(self, worker: Worker, interview: _Interview) -> None:
        """Renew the report, answer by answer: if the time ends, what came before counts."""
        self._fleet.reported(worker, NOTHING)
        interview.names_at = self._clock()
        names = NO_NAMES
        for topic in FACTS if self._asks_everything(worker) else FACTS[:1]:
            if not topic.fields <= worker.report.known().keys():
                found = await self._ask(worker, topic.questions, interview)
                names = found.pop("names", names)
                self._fleet.reported(worker, worker.report.updated({**found, **worker.report.known()}), counted=False)
            names = names if names.bases else names_of([worker.report.model])
            if names.bases:
                self._fleet.announced(worker, names)
        if not names.bases:  # another process may have announced some
            self._fleet.announced(worker, NO_NAMES)

    async def _ask_names(self, worker: Worker, interview: _Interview) -> None:
        """Ask again for the names: adapters are loaded and unloaded, and another engine may answer at this URL."""
        interview.names_at = self._clock()
        found = await self._ask(worker, NAMES.questions, interview)
        names = found.pop("names", NO_NAMES)
        if names.bases:
            self._fleet.reported(worker, worker.report.updated(found), counted=False)
            self._fleet.announced(worker, names)

    async def _ask_role(self, worker: Worker, interview: _Interview) -> None:
        """Ask an engine that told its role before whether it has another one now: idle ones can be switched."""
        found = await self._ask(worker, SERVER_INFO, interview)
        if "role" in found:
            self._fleet.reported(worker, worker.report.updated(found), counted=False)

    async def _run(self, worker: Worker) -> None:
        await asyncio.sleep(worker.phase * self._interval)
        while worker in self._tasks and not worker.removed:
            if worker.health is not Health.HEALTHY:
                self._fleet.reported(worker, worker.report.without_load())
            elif not (interview := self._interview(worker)).introduced:
                await self.introduce(worker)  # it was too slow the first time, or is being introduced now
            else:
                async with interview.lock:
                    await self._ask_load(worker, interview)
                    if self._clock() - interview.names_at >= _NAMES_EVERY:
                        await self._ask_names(worker, interview)
                    if worker.told_role:
                        await self._ask_role(worker, interview)
            await asyncio.sleep(pause_to_step(self._loop.time(), self._pause(worker), self._interval))

    def _pause(self, worker: Worker) -> float:
        """Return the seconds until a worker is asked again: less often if it has nothing to tell of load or role."""
        interview = self._interviews.get(worker)
        asked = (
            interview is None or worker.told_role or any(question.path not in interview.not_there for question in LOAD)
        )
        return self._interval if asked else max(self._interval, _NAMES_EVERY)

    async def _ask_load(self, worker: Worker, interview: _Interview) -> None:
        found = await self._ask(worker, LOAD, interview)
        self._fleet.reported(worker, worker.report.without_load().updated(found), counted=bool(found))

    async def _ask(self, worker: Worker, questions: tuple[Question, ...], interview: _Interview) -> ReportFields:
        return await ask(self._pool, worker, questions, worker.spec.health.timeout, interview.not_there)


async def _within(seconds: float, questions: Awaitable[None]) -> bool:
    """Whether the questions were all asked in time."""
    try:
        await asyncio.wait_for(questions, seconds)
    except asyncio.TimeoutError:
        return False
    return True


async def ask(
    pool: ConnectionPool,
    worker: Worker,
    questions: tuple[Question, ...],
    timeout: float,
    not_there: set[bytes] | None = None,
) -> ReportFields:
    """Return what the first answer says that says anything; nothing, if none does within `timeout` seconds each.

    `not_there`: paths not to ask. Those that the engine does not have are added.
    """
    skipped = set() if not_there is None else not_there
    for question in questions:
        if question.path in skipped:
            continue
        try:
            most = _MAX_METRICS if question.is_text else _MAX_JSON
            answer = await fetch(pool, worker.target, b"GET", question.path, timeout=timeout, max_bytes=most)
        except FetchError:
            continue
        if answer.status in _NOT_THERE:
            skipped.add(question.path)
        elif answer.ok and (found := question.read(_content(question, answer), worker.dp_rank)):
            return found
    return {}


def _content(question: Question, answer: Fetched) -> Any:
    """Decode an answer. One that cannot be decoded becomes None or an empty list, in which every reader finds
    nothing."""
    try:
        return _samples(answer.body) if question.is_text else _value(answer.body)
    except (ValueError, RecursionError):  # of the decoders, of UTF-8 and of the parser of metrics
        return [] if question.is_text else None


def _value(body: bytes) -> Any:
    """Decode JSON as tolerantly as Python engines write it: NaN, and half of a surrogate pair in one of many names."""
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return json.loads(body)


_READ = tuple(name.encode() for name in engine_answers.METRICS)


def _samples(exposition: bytes) -> list[Sample]:
    """Parse the samples that are read. The parser takes 16 us a line, so it gets no other lines."""
    lines = b"\n".join(line for line in exposition.split(b"\n") if line.startswith(_READ))
    families = text_string_to_metric_families(lines.decode() + "\n")
    return [Sample(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
