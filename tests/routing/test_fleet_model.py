"""The fleet beside a model: a state machine of everything that may happen to workers.

The model is the prose of routing/worker.py and routing/fleet.py written down once more, without anything kept for
speed: who may take a request is worked out from scratch after each step.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleets import Log, any_policy, spec
from sglang_router.errors import Conflict, NoWorkers, Unavailable, WorkersStarting
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.lease import Lease
from sglang_router.routing.outcome import Hears, Outcome
from sglang_router.routing.rules import BreakerRules, FleetRules
from sglang_router.routing.worker import Worker

RULES = BreakerRules(threshold=2, successes=2, timeout=10.0, max_timeout=35.0)
STARTUP = 50.0
BAD, GOOD = 3, 2
NAMES = st.sampled_from(["a", "b", "c", "d"])
OUTCOMES = st.sampled_from(Outcome)
PICK = st.integers(0, 1 << 20)


class Model:
    """What one worker should be."""

    def __init__(self, now: float) -> None:
        self.health, self.bad, self.good = "starting", 0, 0
        self.since = now
        self.draining = self.removed = False
        self.breaker, self.failures, self.served = "closed", 0, 0
        self.opened_by = Hears.NOTHING
        self.open_for = self.until = 0.0
        self.probe: Lease | None = None
        self.leases: dict[Lease, bool] = {}  # running: whether it was taken while nobody listened
        self.silent = False
        self.restarts = self.processed = self.elsewhere = 0

    @property
    def passes(self) -> bool:
        return self.breaker == "closed" or (self.breaker == "half_open" and self.probe is None)

    @property
    def unreached(self) -> bool:
        return self.opened_by is Hears.CONTACT_FAILURE and self.breaker != "closed"

    def is_in_rotation(self, health: str) -> bool:
        return not self.removed and not self.draining and self.health == health

    def time(self, now: float) -> None:
        if self.breaker == "open" and self.until <= now:
            self.breaker, self.probe = "half_open", None

    def take(self, lease: Lease) -> None:
        self.leases[lease] = self.silent
        if self.breaker == "half_open" and self.probe is None:
            self.probe = lease

    def close(self, lease: Lease, outcome: Outcome, now: float) -> None:
        in_silence = self.leases.pop(lease)
        probing = self.probe is lease
        if probing:
            self.probe = None
        answered = outcome in (Outcome.SERVED, Outcome.REJECTED)
        self.processed += answered
        if self.removed:
            return
        if outcome in (Outcome.REFUSED, Outcome.LOST):
            self.silent = True
        elif answered and self.silent and in_silence:
            self.back()
        if outcome.hears is Hears.SUCCESS:
            self.success(probing)
        elif outcome.hears is not Hears.NOTHING:
            self.failure(outcome.hears, probing, now)

    def success(self, probing: bool) -> None:
        if self.breaker == "closed":
            self.failures = 0
        elif self.breaker == "half_open" and probing:
            self.served += 1
            if self.served == RULES.successes:
                self.shut()

    def failure(self, kind: Hears, probing: bool, now: float) -> None:
        if self.breaker == "closed":
            self.failures += 1
            self.opened_by = kind
            if self.failures == RULES.threshold:
                self.open(RULES.timeout, now)
        elif self.breaker == "half_open" and probing:
            self.opened_by = kind
            self.open(min(2 * self.open_for, RULES.max_timeout), now)

    def open(self, seconds: float, now: float) -> None:
        self.breaker, self.open_for, self.until, self.served = "open", seconds, now + seconds, 0

    def shut(self) -> None:
        self.breaker, self.failures, self.served, self.probe = "closed", 0, 0, None
        self.opened_by = Hears.NOTHING

    def back(self) -> None:
        self.silent = False
        self.restarts += 1

    def well(self) -> None:
        self.good, self.bad = self.good + 1, 0
        if self.silent:
            self.back()
        if self.opened_by is not Hears.ANSWER_FAILURE and self.breaker != "closed":
            self.shut()
        if self.health == "starting" or self.good >= GOOD:
            self.health = "healthy"

    def ill(self, refused: bool, now: float) -> None:
        self.good, self.bad = 0, self.bad + 1
        self.silent |= refused and self.health != "starting"
        if self.health == "starting":
            if now - self.since > STARTUP:
                self.health = "unhealthy"
        elif self.bad >= BAD:
            self.health = "unhealthy"


class FleetBesideModel(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.log, ids = Log(), itertools.count()
        self.fleet = Fleet(self.log, lambda: f"id{next(ids)}", any_policy, FleetRules(RULES, STARTUP, slow_start=0.0))
        self.now = 0.0
        self.models: dict[Worker, Model] = {}  # removed ones too: their requests go on
        self.running: list[Lease] = []
        self.closed: list[Lease] = []
        for name in ("a", "b"):
            self.add(name)
            self.well(0 if name == "a" else 1)

    def member(self, pick: int) -> Worker | None:
        members = list(self.fleet)
        return members[pick % len(members)] if members else None

    @rule(name=NAMES)
    def add(self, name: str) -> None:
        url = f"http://{name}:1"
        health = {"failure_threshold": BAD, "success_threshold": GOOD}
        if any(not m.removed and w.url == url for w, m in self.models.items()):
            with pytest.raises(Conflict):
                self.fleet.add(spec(name, checked=True, **health), self.now)
        else:
            worker = self.fleet.add(spec(name, checked=True, **health), self.now)
            self.models[worker] = Model(self.now)

    @rule(pick=PICK)
    def remove(self, pick: int) -> None:
        if worker := self.member(pick):
            self.fleet.remove(worker)
            self.models[worker].removed = True

    @rule(pick=PICK, draining=st.booleans())
    def drain_or_resume(self, pick: int, draining: bool) -> None:
        if worker := self.member(pick):
            self.fleet.set_draining(worker, draining)
            self.models[worker].draining = draining

    @rule(seconds=st.sampled_from([0.0, 0.5, 5.0, 10.0, 20.0, 35.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for model in self.models.values():
            if not model.removed:
                model.time(self.now)

    @rule(pick=PICK, again=st.integers(1, 3))
    def well(self, pick: int, again: int = 1) -> None:
        if worker := self.member(pick):
            for _ in range(again):
                self.fleet.probed(worker, None, self.now)
                self.models[worker].well()

    @rule(pick=PICK, again=st.integers(1, 3), refused=st.booleans())
    def ill(self, pick: int, again: int, refused: bool) -> None:
        if worker := self.member(pick):
            for _ in range(again):
                self.fleet.probed(worker, "down", self.now, refused=refused)
                self.models[worker].ill(refused, self.now)

    @precondition(lambda self: any(model.removed for model in self.models.values()))
    @rule(error=st.sampled_from([None, "down"]))
    def late_check(self, error: str | None) -> None:
        for worker, model in self.models.items():
            if model.removed:
                self.fleet.probed(worker, error, self.now, refused=error is not None)

    @rule(pick=PICK)
    def take(self, pick: int) -> None:
        candidates = self.fleet.candidates(self.now)
        if candidates:
            worker = candidates[pick % len(candidates)]
            lease = self.fleet.lease(worker)
            self.models[worker].take(lease)
            self.running.append(lease)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, outcome=OUTCOMES)
    def close(self, pick: int, outcome: Outcome) -> None:
        lease = self.running.pop(pick % len(self.running))
        lease.close(outcome, self.now)
        self.models[lease.worker].close(lease, outcome, self.now)
        self.closed.append(lease)

    @rule(pick=PICK, outcome=OUTCOMES, times=st.integers(1, 4))
    def take_and_close(self, pick: int, outcome: Outcome, times: int) -> None:
        for _ in range(times):
            running = len(self.running)
            self.take(pick)
            if len(self.running) > running:
                self.close(running, outcome)

    @rule(pick=PICK, outcome=st.sampled_from([Outcome.FAILED, Outcome.REFUSED]))
    def wreck(self, pick: int, outcome: Outcome) -> None:
        candidates = self.fleet.candidates(self.now)
        if candidates:
            worker = candidates[pick % len(candidates)]
            for _ in range(RULES.threshold):
                if worker not in self.fleet.candidates(self.now):
                    break
                self.take(self.fleet.candidates(self.now).index(worker))
                self.close(len(self.running) - 1, outcome)

    @rule(pick=PICK, elsewhere=st.integers(0, 5))
    def share(self, pick: int, elsewhere: int) -> None:
        if worker := self.member(pick):
            self.fleet.share(worker, elsewhere)
            self.models[worker].elsewhere = elsewhere

    @rule(pick=PICK)
    def doubt(self, pick: int) -> None:
        if worker := self.member(pick):
            self.fleet.doubt(worker, self.now)
            model = self.models[worker]
            if model.breaker == "closed":
                model.failures = max(model.failures, RULES.threshold - 1)

    @precondition(lambda self: self.closed)
    @rule(pick=PICK, outcome=OUTCOMES)
    def close_again(self, pick: int, outcome: Outcome) -> None:
        events = len(self.log.changes)
        self.closed[pick % len(self.closed)].close(outcome, self.now)
        assert len(self.log.changes) == events

    @invariant()
    def candidates_are_those_of_the_definition(self) -> None:
        well, ill = self.standing("healthy"), self.standing("unhealthy")
        assert list(self.fleet.candidates(self.now)) == (well or ill)
        if not well and not ill:
            self.check_refusal()

    @invariant()
    def the_roster_has_the_load_of_each_candidate(self) -> None:
        able = self.fleet.pools.default.able(self.now)
        loads = [len(self.models[worker].leases) + self.models[worker].elsewhere for worker in able]
        assert [worker.load for worker in able] == loads
        levels = {load: sum(worker.bit for worker in able if worker.load == load) for load in loads}
        assert able.roster.levels == levels
        half_open = [worker for worker, model in self.models.items() if model.breaker == "half_open"]
        assert able.roster.on_trial == sum(1 << worker.seat for worker in half_open if not worker.removed)

    def standing(self, health: str) -> list[Worker]:
        """Those that are there; of them at most half are out for their breakers, those that opened for longest."""
        those = {worker: model for worker, model in self.models.items() if model.is_in_rotation(health)}
        there = [worker for worker, model in those.items() if not model.unreached]
        out = [(those[w].open_for, those[w].until, -w.order, w) for w in there if not those[w].passes]
        stay_out = {worker for *_, worker in sorted(out, reverse=True)[: len(there) // 2]}
        stay_out |= {worker for worker, model in those.items() if model.unreached and not model.passes}
        return [worker for worker in those if worker not in stay_out]

    def check_refusal(self) -> None:
        members = [model for model in self.models.values() if not model.removed]
        rotation = [model for model in members if not model.draining]
        error = self.fleet.unavailable(self.now)
        assert error.retry_after is not None
        assert error.retry_after > 0
        if not members:
            assert type(error) is NoWorkers
        elif rotation and all(model.health == "starting" for model in rotation):
            assert type(error) is WorkersStarting
        else:
            assert type(error) is Unavailable
            ends = [model.until - self.now for model in rotation if model.breaker == "open"]
            assert error.retry_after <= min(ends, default=5.0)

    @invariant()
    def workers_are_as_the_model_says(self) -> None:
        for worker, model in self.models.items():
            assert (worker.own_load, worker.processed) == (len(model.leases), model.processed)
            assert worker.elsewhere == model.elsewhere
            assert self.log.whats(worker).count("restarted") == model.restarts
            if model.removed:
                assert self.log.whats(worker)[-1] == "removed"
            else:
                assert (worker.breaker.value, worker.health.value) == (model.breaker, model.health)
        assert list(self.fleet) == [worker for worker, model in self.models.items() if not model.removed]

    @invariant()
    def events_tell_every_step(self) -> None:
        for worker, model in self.models.items():
            if not model.removed:
                for what, first, last in (
                    ("breaker", "closed", model.breaker),
                    ("health", "starting", model.health),
                    ("draining", "active", "draining" if model.draining else "active"),
                ):
                    steps = [(c.old, c.new) for c in self.log.changes if c.worker is worker and c.what == what]
                    assert [old for old, _ in steps] == [first, *(new for _, new in steps[:-1])][: len(steps)]
                    assert (steps[-1][1] if steps else first) == last

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            while self.running:
                self.close(0, Outcome.ABANDONED)
            for worker in self.models:
                self.fleet.share(worker, 0)
            assert all(worker.load == 0 for worker in self.models)


TestFleetBesideModel = FleetBesideModel.TestCase
TestFleetBesideModel.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)
