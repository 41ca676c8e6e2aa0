"""The simulated engines as workers, of each router: they join, leave, break down and come back, and are checked.

    join      registered, and found well at once, as an engine that was warmed up before it was named
    leave     removed, as by DELETE /workers; what it computes it finishes
    restart   its process dies: what it computed is lost, and connections are refused until a new one with an empty
              cache listens. Nobody tells the router: it learns from failed requests and from health checks

Health checks are made while a worker is not well, with the intervals of the router's options, and at once when the
router asks for one. Every --engine-report-interval-secs each engine reports how busy it is, as SGLang does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_router.replay.engine import Gaps, SimulatedEngine
from sglang_router.replay.load import UNIT
from sglang_router.replay.result import EngineRun
from sglang_router.replay.setup import FleetChange, Setup
from sglang_router.replay.timeline import Timeline
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker


class SimulatedWorkers:
    """See the module.

    engines  all that ran at any time, in the order of their start
    died     called with the name of a worker whose process died
    """

    def __init__(self, setup: Setup, fleets: Sequence[Fleet], timeline: Timeline, gaps: Gaps) -> None:
        self.engines: list[SimulatedEngine] = []
        self.died: Callable[[str], None] = lambda name: None
        self._setup = setup
        self._fleets = fleets
        self._of: dict[Worker, Fleet] = {}
        self._timeline = timeline
        self._gaps = gaps
        self._survey_every = setup.args.engine_report_interval_secs
        self._listening: dict[str, SimulatedEngine] = {}
        self._numbers: dict[str, int] = {}
        self._left: dict[str, float] = {}  # when workers left
        self._watched: set[Worker] = set()  # workers that are checked periodically
        self._asked: set[Worker] = set()  # workers for which a check is planned now

    def __repr__(self) -> str:
        return f"<SimulatedWorkers {list(self._listening)}>"

    def listening(self, name: str) -> SimulatedEngine | None:
        """Return the engine of a worker; None when nobody listens there."""
        return self._listening.get(name)

    def runs(self) -> list[EngineRun]:
        """Return how busy each engine was until now."""
        now = self._timeline.now
        return [
            EngineRun(
                engine.name,
                engine.speed,
                engine.busy,
                min(engine.stopped, self._left.get(engine.name, now)) - engine.since,
                engine.scheduler.kv.evicted,
                engine.scheduler.totals.retracted,
            )
            for engine in self.engines
        ]

    def start(self) -> None:
        """Let the first ones join, and plan what happens later."""
        for _ in range(self._setup.workers):
            self._join()
        happens = {"join": self._joins, "leave": self._leaves, "restart": self._restarts}
        for change in self._setup.changes:
            self._timeline.background(change.at, happens[change.kind], change)

    def _join(self) -> None:
        number = len(self._numbers)
        name = f"http://engine{number}"
        self._numbers[name] = number
        self._listen(name)
        for fleet in self._fleets:
            worker = fleet.add(WorkerSpec(url=name, health=self._setup.health), self._timeline.now)
            self._of[worker] = fleet
            fleet.probed(worker, None, self._timeline.now)
            worker.work.count_in(UNIT / self._setup.page)  # texts have one unit for each page
            if self._survey_every:
                self._report(worker)
                self._timeline.background(self._timeline.now + worker.phase * self._survey_every, self._survey, worker)

    def _listen(self, name: str) -> None:
        setup = self._setup
        engine = SimulatedEngine(name, setup.scheduler(), setup.speed(self._numbers[name]), self._gaps)
        engine.since = self._timeline.now
        self._listening[name] = engine
        self.engines.append(engine)

    # -- what happens ----------------------------------------------------------------------------------------------

    def _joins(self, change: FleetChange) -> None:
        self._join()

    def _leaves(self, change: FleetChange) -> None:
        for worker in self._workers(change):
            self._of[worker].remove(worker)
            self._left[worker.url] = self._timeline.now

    def _restarts(self, change: FleetChange) -> None:
        workers = self._workers(change)
        engine = self._listening.pop(workers[0].url, None) if workers else None
        if engine is None:
            return
        engine.stop(self._timeline.now)
        self.died(engine.name)
        self._timeline.background(self._timeline.now + change.down, self._listen, engine.name)
        for worker in workers:
            if worker not in self._watched:
                self._watched.add(worker)
                first = worker.phase * worker.spec.health.interval
                self._timeline.background(self._timeline.now + first, self._check_on, worker)

    def _workers(self, change: FleetChange) -> list[Worker]:
        """Return the worker of a change, as each router knows it."""
        found = [fleet.by_url(f"http://engine{change.worker}") for fleet in self._fleets]
        return [worker for worker in found if worker is not None]

    # -- health checks ---------------------------------------------------------------------------------------------

    def check_now(self, worker: Worker) -> None:
        """Check a worker after the current event."""
        if worker not in self._asked:
            self._asked.add(worker)
            self._timeline.background(self._timeline.now, self._check_asked, worker)

    def _check_asked(self, worker: Worker) -> None:
        self._asked.discard(worker)
        self._check(worker)

    def _check(self, worker: Worker) -> None:
        up = worker.url in self._listening
        self._of[worker].probed(worker, None if up else "connection refused", self._timeline.now, refused=not up)

    def _check_on(self, worker: Worker) -> None:
        """Check a worker, and again later until it is there and well."""
        self._check(worker)
        well = worker.health is Health.HEALTHY
        if worker.removed or (well and worker.url in self._listening):
            self._watched.discard(worker)
            return
        pause = worker.spec.health.interval if well else self._setup.args.worker_startup_check_interval
        self._timeline.background(self._timeline.now + pause, self._check_on, worker)

    # -- what engines report ---------------------------------------------------------------------------------------

    def _survey(self, worker: Worker) -> None:
        """Let a worker's engine report, and again later."""
        if not worker.removed:
            self._report(worker)
            self._timeline.background(self._timeline.now + self._survey_every, self._survey, worker)

    def _report(self, worker: Worker) -> None:
        engine = self._listening.get(worker.url)
        well = engine is not None and worker.health is Health.HEALTHY
        self._of[worker].reported(worker, engine.report() if engine and well else worker.report.without_load())
