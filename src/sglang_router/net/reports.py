"""Asks engines what they are and how busy they are; `core.report` reads the answers, the fleet keeps them.

    Prober: well for the first time  --> meet(worker)   name, version, context, capacity, ranks; then the load
    start(worker) --> pause --> load --> pause --> ...  while it is healthy, until the worker is removed

Engines differ in what they can be asked, so questions stand in a list and the first answer counts. What an engine
answers with 404 it does not know: that is asked again only after `meet`, for another process may know it. Each worker
has one question under way at most, and workers are asked one after the other in the interval, not all at once.

No answer is no fault: a report has holes then, and health is the affair of `net.probe` alone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sglang_router.core import ranks, report
from sglang_router.core.worker import Health, Worker, WorkerSpec
from sglang_router.net.fetch import Answer, FetchError, fetch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sglang_router.core.fleet import Fleet
    from sglang_router.core.report import Reader, Said
    from sglang_router.net.upstream import Upstream

_MOST = 8 << 20
"""Bytes of one answer; vLLM's metrics have some 200 kB."""
_UNKNOWN = frozenset((404, 405, 501))
"""Statuses of an endpoint that the engine does not have, or has been told not to serve."""
_SPREAD = 0.6180339887
"""Golden ratio: its multiples, less their whole parts, lie far from each other however many there are."""


class Question(NamedTuple):
    """One endpoint, and who reads its answer."""

    path: bytes
    read: Reader
    text: bool = False  # Prometheus' format, not JSON


class Topic(NamedTuple):
    """Questions of which one answer is enough. Not asked when all its fields are known already."""

    fields: frozenset[str]
    questions: tuple[Question, ...]


FACTS = (
    Topic(frozenset(("model", "context_length")), (Question(b"/v1/models", report.models),)),
    Topic(
        frozenset(("version", "ranks", "capacity_tokens")),
        (Question(b"/server_info", report.server_info), Question(b"/get_server_info", report.server_info)),
    ),
    Topic(
        frozenset(("model",)),
        (Question(b"/model_info", report.model_info), Question(b"/get_model_info", report.model_info)),
    ),
    Topic(frozenset(("version",)), (Question(b"/version", report.version), Question(b"/props", report.props))),
)
TOKENS = (Question(b"/v1/loads", report.loads), Question(b"/get_load", report.get_load))
"""Those that tell the load in tokens."""
LOAD = (
    *TOKENS,
    Question(b"/metrics", report.metrics, text=True),
    Question(b"/load", report.server_load),
)


class _Manners:
    """How one engine is asked: whether it has told what it is, the paths it does not know, and whose turn it is."""

    __slots__ = ("met", "turn", "unknown")

    def __init__(self) -> None:
        self.met = False
        self.unknown: set[bytes] = set()
        self.turn = asyncio.Lock()


class Surveyor:
    """See the module. `interval` in seconds; with 0 nothing is asked but the model's name, and what ranks depend on."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fleet: Fleet,
        upstream: Upstream,
        clock: Callable[[], float],
        interval: float = 5.0,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._upstream = upstream
        self._clock = clock
        self._interval = interval
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._manners: dict[Worker, _Manners] = {}

    def start(self, worker: Worker) -> None:
        """Asks for a worker's load from now on. Does nothing when that is so already."""
        if self._interval and worker not in self._tasks:
            self._tasks[worker] = self._loop.create_task(self._run(worker))

    def stop(self, worker: Worker) -> None:
        """Ends that at once."""
        self._manners.pop(worker, None)
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Ends all questions."""
        tasks = list(self._tasks.values())
        for worker in list(self._tasks):
            self.stop(worker)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def meet(self, worker: Worker) -> None:
        """Asks a worker what it is, once its process was found well. May take twice as long as a health check."""
        manners = self._manners.setdefault(worker, _Manners())
        async with manners.turn:
            manners.unknown.clear()
            manners.met = await _within(worker.spec.health.timeout, self._introduce(worker, manners))
            if self._all_of(worker):
                await _within(worker.spec.health.timeout, self._load(worker, manners))
        if worker.removed:
            self._manners.pop(worker, None)
        ranks.follow(self._fleet, worker, self._clock())

    def _all_of(self, worker: Worker) -> bool:
        return self._interval > 0 or worker.spec.dp_aware

    async def _introduce(self, worker: Worker, manners: _Manners) -> None:
        """The report is kept answer by answer: what came in time counts, if the time ends."""
        self._fleet.reported(worker, report.NOTHING)
        for topic in FACTS if self._all_of(worker) else FACTS[:1]:
            if not topic.fields <= worker.report.known().keys():
                said = await self._ask(worker, topic.questions, manners)
                self._fleet.reported(worker, worker.report.told({**said, **worker.report.known()}))
            self._name(worker)

    def _name(self, worker: Worker) -> None:
        """A worker is called by the name its engine gives, unless somebody gave another."""
        model = worker.report.model
        if worker.spec.model_id is None and model is not None:
            spec: WorkerSpec = msgspec.structs.replace(worker.spec, model_id=model)
            self._fleet.amend(worker, spec)

    async def _run(self, worker: Worker) -> None:
        await asyncio.sleep(worker.order * _SPREAD % 1.0 * self._interval)
        while worker in self._tasks and not worker.removed:
            if worker.health is not Health.HEALTHY:
                self._fleet.reported(worker, worker.report.at_rest())
            elif not (manners := self._manners.setdefault(worker, _Manners())).met:
                await self.meet(worker)  # it was too slow the first time, or that is under way
            else:
                async with manners.turn:
                    await self._load(worker, manners)
            await asyncio.sleep(self._interval)

    async def _load(self, worker: Worker, manners: _Manners) -> None:
        said = await self._ask(worker, LOAD, manners)
        self._fleet.reported(worker, worker.report.at_rest().told(said))

    async def _ask(self, worker: Worker, questions: tuple[Question, ...], manners: _Manners) -> Said:
        return await ask(self._upstream, worker, questions, worker.spec.health.timeout, manners.unknown)


async def _within(seconds: float, questions: Awaitable[None]) -> bool:
    """Whether they came to their end in time."""
    try:
        await asyncio.wait_for(questions, seconds)
    except asyncio.TimeoutError:
        return False
    return True


async def ask(
    upstream: Upstream,
    worker: Worker,
    questions: tuple[Question, ...],
    timeout: float,
    unknown: set[bytes] | None = None,
) -> Said:
    """What the first question says that says anything; nothing, if none does within `timeout` seconds each.

    `unknown`: paths not to ask; those the engine does not know are added.
    """
    unknown = set() if unknown is None else unknown
    for question in questions:
        if question.path in unknown:
            continue
        try:
            answer = await fetch(upstream, worker, b"GET", question.path, timeout=timeout, most=_MOST)
        except FetchError:
            continue
        if answer.status in _UNKNOWN:
            unknown.add(question.path)
        elif answer.ok and (said := question.read(_content(question, answer), worker.dp_rank)):
            return said
    return {}


def _content(question: Question, answer: Answer) -> Any:
    """The answer decoded; None, about which every reader says nothing, if it is not what it should be."""
    try:
        return _samples(answer.body) if question.text else msgspec.json.decode(answer.body)
    except (ValueError, RecursionError):  # of msgspec, of UTF-8 and of the parser of metrics
        return [] if question.text else None


_READ = tuple(name.encode() for name in report.METRICS)


def _samples(exposition: bytes) -> list[report.Sample]:
    """The samples that are read. The parser takes 16 us a line, so it gets no others."""
    lines = b"\n".join(line for line in exposition.split(b"\n") if line.startswith(_READ))
    families = text_string_to_metric_families(lines.decode() + "\n")
    return [report.Sample(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
