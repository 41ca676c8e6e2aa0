"""The router beside a model: a state machine of all that clients, workers and time do to queued and routed requests.

The model knows of each request only what its client would know: that it waits, that it has a plan, or that it is over.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fleets import Asked, Bench, by_model, facts
from sglang_router.errors import QueueFull, RequestBreaksWorkers, RouterError, TooManyWaiting, Unavailable
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.facts import Facts
from sglang_router.routing.models import Serving
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, Wait
from sglang_router.routing.pools import one_pool
from sglang_router.routing.queue import ROOM, START
from sglang_router.routing.rules import BreakerRules, FleetRules, HealthRules, QueueRules, RetryRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

PICK = st.integers(0, 1 << 20)
NAMES = st.sampled_from(["a1", "a2", "b1", "any", "any"])
MODELS = st.sampled_from([b'"A"', b'"A"', b'"B"', b'"B"', b'"C"'])
OUTCOMES = st.sampled_from(Outcome)
ENDS = st.sampled_from([Outcome.SERVED, Outcome.SERVED, Outcome.BROKEN, Outcome.GONE])


class RouterBesideModel(RuleBasedStateMachine):
    """waiting, running: requests by what their clients know of them; `over` are those that got their last answer."""

    @initialize(
        places=st.sampled_from([None, 1, 2, 3]),
        size=st.integers(0, 4),
        most_load=st.sampled_from([0, 1, 2]),
        elastic=st.booleans(),
        several=st.booleans(),
        threshold=st.sampled_from([1, 2]),
        checked=st.booleans(),
    )
    def begin(
        self,
        places: int | None,
        size: int,
        most_load: int,
        elastic: bool,
        several: bool,
        threshold: int,
        checked: bool,
    ) -> None:
        fleet = FleetRules(
            breaker=BreakerRules(threshold=threshold, timeout=10.0),
            slow_start=20.0 if checked else 0.0,
            most_load=most_load,
            elastic=elastic,
            startup_timeout=30.0,
        )
        queue = QueueRules(max_concurrent=places, queue_size=size, start_timeout=12.0, most_starting=5)
        self.bench = Bench(
            0, rules=fleet, queue=queue, retries=RetryRules(total=3), assign=by_model if several else one_pool
        )
        self.router, self.fleet = self.bench.router, self.bench.fleet
        self.places, self.size = places, size
        self.longest = max(size, min(5, size + (places or 5)))
        self.now = 0.0
        self.everybody: list[Worker] = []
        self.waiting: list[Asked] = []
        self.running: list[Asked] = []
        self.over: list[Asked] = []
        for name in ("a1", "a2", "b1"):
            self.add(name, checked)

    # -- what the model knows ------------------------------------------------------------------------------------------

    def pool(self, asked: Asked) -> Serving:
        pools = self.fleet.pools
        return pools.only or pools.find(asked.facts.model)

    def hear(self) -> None:
        """Looks what those that wait were told meanwhile. Of one pool nobody was overtaken."""
        still = []
        for asked in self.waiting:
            last = asked.answers[-1]
            if isinstance(last, Wait):
                still.append(asked)
                continue
            assert all(isinstance(answer, Wait) for answer in asked.answers[:-1])
            assert isinstance(last, (Plan, RouterError))
            assert isinstance(last, Plan) or not self.pool(asked).candidates(self.now)
            (self.running if isinstance(last, Plan) else self.over).append(asked)
            earlier = [other for other in still if self.pool(other) is self.pool(asked)]
            assert not earlier, "it was overtaken"
        self.waiting = still

    def pick(self, among: list[Asked], pick: int) -> Asked | None:
        return among[pick % len(among)] if among else None

    def finish(self, asked: Asked, among: list[Asked]) -> None:
        among.remove(asked)
        self.over.append(asked)

    # -- clients -------------------------------------------------------------------------------------------------------

    @rule(models=st.lists(MODELS, min_size=1, max_size=4), streaming=st.booleans())
    def ask(self, models: list[bytes], streaming: bool) -> None:
        for model in models:
            self.ask_once(facts(model=model, streaming=streaming))

    def ask_once(self, request: Facts) -> None:
        before = len(self.router.queue), self.router.leases
        try:
            asked = self.bench.ask(request, self.now)
        except QueueFull:
            assert before[0] >= self.size
        except TooManyWaiting:
            assert before[0] >= min(5, self.size + (self.places or 5))
        except RequestBreaksWorkers:
            assert self.router.quarantine.broken
        except Unavailable:
            pools = self.fleet.pools
            assert not (pools.only or pools.find(request.model)).candidates(self.now)
        else:
            waits = asked.waits
            (self.waiting if waits else self.running).append(asked)
            assert waits is None or waits[1] == self.now + (12.0 if waits[0] == START else 60.0)
            return
        assert (len(self.router.queue), self.router.leases) == before, "a refused request leaves nothing behind"

    @rule(pick=PICK, outcome=ENDS)
    def end(self, pick: int, outcome: Outcome) -> None:
        if asked := self.pick(self.running, pick):
            asked.attempt.end(outcome, self.now)
            self.finish(asked, self.running)

    @rule(pick=PICK, outcome=OUTCOMES)
    def retry(self, pick: int, outcome: Outcome) -> None:
        if (asked := self.pick(self.running, pick)) and asked.attempt.retry(outcome, self.now) is None:
            self.finish(asked, self.running)

    @rule(pick=PICK, what=st.sampled_from(["withdraw", "first byte", "end again"]))
    def others(self, pick: int, what: str) -> None:
        """A client leaves the queue; a stream begins; an end is told again, which changes nothing."""
        if what == "withdraw" and (asked := self.pick(self.waiting, pick)):
            self.router.withdraw(asked.tag)
            self.finish(asked, self.waiting)
        elif what == "first byte" and (asked := self.pick(self.running, pick)):
            self.router.began(asked.attempt.leg, self.now)
        elif what == "end again" and (asked := self.pick(self.over, pick)) and isinstance(asked.answers[-1], Plan):
            asked.attempt.end(Outcome.BROKEN, self.now)

    # -- time ----------------------------------------------------------------------------------------------------------

    @rule()
    def settle(self) -> None:
        self.bench.settle(self.now)
        self.hear()

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0, 40.0]))
    def time(self, seconds: float) -> None:
        """Time passes, and the periodic jobs do what is due: first the deadlines, then the queue."""
        self.settle()
        self.now += seconds
        for asked in list(self.waiting):
            waits = asked.waits
            if waits and waits[1] <= self.now:
                error = self.router.expired(asked.tag, self.now)
                assert error.status in (408, 503)
                self.finish(asked, self.waiting)
        self.look()

    def look(self) -> None:
        self.router.look(self.now)
        self.hear()

    # -- workers -------------------------------------------------------------------------------------------------------

    @rule(name=NAMES, checked=st.booleans())
    def add(self, name: str, checked: bool) -> None:
        url = f"http://{name}:1"
        if self.fleet.by_url(url) is None:
            health = HealthRules(failure_threshold=1, success_threshold=1, enabled=checked)
            model = None if name == "any" else name[0].upper()
            self.everybody.append(self.fleet.add(WorkerSpec(url=url, model_id=model, health=health), self.now))

    @rule(
        pick=PICK,
        what=st.sampled_from(["well", "well", "ill", "gone", "drain", "resume", "lost", "down", "remove", "replace"]),
    )
    def change(self, pick: int, what: str) -> None:
        """Something happens to a worker."""
        members = list(self.fleet)
        if not members:
            return
        fleet, worker = self.fleet, members[pick % len(members)]
        match what:
            case "well":
                fleet.probed(worker, None, self.now)
            case "ill" | "gone":
                fleet.probed(worker, "it is slow", self.now, refused=what == "gone")
            case "drain" | "resume":
                fleet.set_draining(worker, what == "drain", returning=pick % 2 == 0)
            case "lost":
                fleet.lost(worker, self.now)
            case "down":
                fleet.down(worker, "it does not start")
            case "remove" | "replace":
                fleet.remove(worker)
                if what == "replace":
                    self.everybody.append(fleet.add(worker.spec, self.now))

    @rule(model=st.sampled_from(["", "A", "C"]))
    def report(self, model: str) -> None:
        """An engine says what it serves, so that its worker may go to another pool; the next sweep sees it."""
        worker = self.fleet.by_url("http://any:1")
        if worker is not None:
            self.fleet.reported(worker, EngineReport(model=model))
            self.look()

    # -- always --------------------------------------------------------------------------------------------------------

    @invariant()
    def loads_are_the_open_leases(self) -> None:
        loads = [worker.load for worker in self.everybody]
        assert min(loads) >= 0
        assert sum(loads) == self.router.leases == len(self.running)
        assert all(0 <= worker.waiting <= worker.load for worker in self.everybody)

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert len(self.router.queue) == len(self.waiting) <= self.longest
        assert [queued.number for queued in self.router.queue] == [asked.tag.number for asked in self.waiting]
        if self.places is not None:
            assert self.router.queue.running == len(self.running) <= self.places

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if self.bench.soon:
            return
        has_place = self.router.queue.has_place
        for queued, asked in zip(self.router.queue, self.waiting, strict=True):
            if has_place:
                assert asked.waits == (queued.why, queued.until)
                pool = self.pool(asked)
                assert not pool.candidates(self.now), "it could begin"
                assert queued.why == self.reason(pool)

    def reason(self, pool: Serving) -> str:
        return {"workers_full": ROOM, "workers_starting": START}[pool.unavailable(self.now).code]

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.settle()
        for asked in list(self.waiting):
            self.router.withdraw(asked.tag)
        for asked in self.running:
            asked.attempt.end(Outcome.SERVED, self.now)
        self.bench.settle(self.now)
        assert (self.router.leases, len(self.router.queue), self.router.queue.running) == (0, 0, 0)
        assert not any(worker.load or worker.waiting for worker in self.everybody)
        assert not self.router._trails


TestRouterBesideModel = RouterBesideModel.TestCase
TestRouterBesideModel.settings = settings(max_examples=200, stateful_step_count=50)
