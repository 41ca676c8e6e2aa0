"""The breaker: the table in the head of routing/breaker.py, and each of its moves as in life.

In life means through leases, health checks and time, by a fleet of two workers: breakers never take out the last one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import sglang_router
from fleets import Log, any_policy, spec
from sglang_router.routing.breaker import TABLE, Circuit
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.lease import Lease
from sglang_router.routing.outcome import Hears, Outcome
from sglang_router.routing.rules import BreakerRules, FleetRules
from sglang_router.routing.states import Breaker, BreakerEvent

ANSWER_FAILURES = (Outcome.FAILED, Outcome.INVALID, Outcome.TIMEOUT)
CONTACT_FAILURES = (Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.LOST, Outcome.BROKEN, Outcome.CUT)
"""With breaks: a passed check disproves both."""
FAILURES = ANSWER_FAILURES + CONTACT_FAILURES
SILENT = (Outcome.REJECTED, Outcome.BUSY, Outcome.STALE, Outcome.GONE, Outcome.ABANDONED)


class One:
    """A worker that passed its first check, beside one that gets no request, and a clock that moves when told."""

    def __init__(self, threshold: int = 2, successes: int = 1, *, enabled: bool = True) -> None:
        self.log = Log()
        rules = BreakerRules(threshold, successes, timeout=10.0, max_timeout=60.0, enabled=enabled)
        self.fleet = Fleet(self.log, lambda: "id", any_policy, FleetRules(breaker=rules, slow_start=0.0))
        self.worker = self.fleet.add(spec("w", checked=True), 0.0)
        self.fleet.add(spec("other"), 0.0)
        self.now = 0.0
        self.fleet.probed(self.worker, None, 0.0)
        self.log.changes.clear()

    def leg(self, *outcomes: Outcome) -> One:
        """Legs one after the other, as far as the breaker lets them pass."""
        for outcome in outcomes:
            self.take().close(outcome, self.now)
        return self

    def take(self) -> Lease:
        assert self.passes
        return self.fleet.lease(self.worker)

    def after(self, seconds: float) -> One:
        self.now += seconds
        self.fleet.candidates(self.now)
        return self

    def probe(self, error: str | None = None) -> One:
        self.fleet.probed(self.worker, error, self.now)
        return self

    @property
    def passes(self) -> bool:
        """Whether it may get a request now."""
        return self.worker in self.fleet.candidates(self.now)

    @property
    def state(self) -> str:
        return self.worker.breaker.value

    @property
    def open_for(self) -> float:
        """How long from now until a request may pass, found by asking for candidates alone."""
        assert not self.passes
        return self.worker.circuit.reopen_at - self.now


def opened(failure: Outcome, successes: int = 1) -> One:
    return One(successes=successes).leg(failure, failure)


def half_open(failure: Outcome, successes: int = 1) -> One:
    return opened(failure, successes).after(10.0)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_in_the_head_of_the_module_is_true() -> None:
    source = Path(sglang_router.__file__).with_name("routing") / "breaker.py"  # compiled modules have no docstring
    lines = [line.strip() for line in (ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "").splitlines()]
    head = next(line for line in lines if line.startswith("success"))
    events = [BreakerEvent(name) for name in re.split(r"  +", head)]
    table = {}
    for line in lines:
        state, *actions = re.split(r"  +", line)
        if state in Breaker.__members__:
            for event, action in zip(events, actions, strict=True):
                table[Breaker[state], event] = action
    named = {key: re.sub("[- ]", "_", action) for key, action in table.items() if action != "-"}
    assert events == list(BreakerEvent)
    assert named == {key: action.__name__ for key, action in TABLE.items()}


@pytest.mark.parametrize("state", Breaker)
@pytest.mark.parametrize("event", BreakerEvent)
def test_an_event_that_cannot_happen_is_refused_by_name(state: Breaker, event: BreakerEvent) -> None:
    circuit = Circuit()
    circuit.state = state
    if (state, event) in TABLE:
        circuit.hear(event, BreakerRules(), 0.0)
    else:
        with pytest.raises(RuntimeError, match=f"'{event.value}' while it is {state.value}"):
            circuit.hear(event, BreakerRules(), 0.0)


def test_a_circuit_shows_its_state() -> None:
    circuit = Circuit()
    circuit.hear(BreakerEvent.FAILURE, BreakerRules(threshold=1), 5.0, Hears.ANSWER_FAILURE)
    assert repr(circuit) == "<Circuit open, 1 failures, 0 successes>"
    assert (circuit.reopen_at, circuit.open_for, circuit.opened_by) == (15.0, 10.0, Hears.ANSWER_FAILURE)


# -- the breaker: CLOSED -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", FAILURES)
def test_closed_opens_at_the_threshold(failure: Outcome) -> None:
    one = One(threshold=3).leg(failure, failure)
    assert one.state == "closed"
    one.leg(failure)
    assert one.state == "open"
    assert one.open_for == 10.0
    assert one.log.moves("breaker") == [("closed", "open")]


def test_closed_counts_consecutive_failures_of_any_kind() -> None:
    one = One(threshold=3).leg(Outcome.FAILED, Outcome.REFUSED, Outcome.SERVED, Outcome.CUT, Outcome.TIMEOUT)
    assert one.state == "closed"
    assert one.leg(Outcome.BROKEN).state == "open"


@pytest.mark.parametrize("quiet", SILENT)
def test_what_the_breaker_does_not_hear_neither_counts_nor_clears(quiet: Outcome) -> None:
    one = One(threshold=2).leg(*[quiet] * 10)
    assert one.state == "closed"
    assert one.leg(Outcome.FAILED, quiet, Outcome.FAILED).state == "open"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413, 422, 429])
def test_a_clients_mistakes_never_open(status: int) -> None:
    one = One(threshold=1).leg(*[Outcome.of_status(status, False)] * 20)
    assert one.state == "closed"


def test_back_pressure_never_opens() -> None:
    assert One(threshold=1).leg(*[Outcome.of_status(503, True)] * 20).state == "closed"
    assert One(threshold=1).leg(Outcome.of_status(503, False)).state == "open"


@pytest.mark.parametrize("failure", FAILURES)
def test_closed_remembers_failures_at_a_healthy_probe(failure: Outcome) -> None:
    assert One(threshold=2).leg(failure).probe().leg(failure).state == "open"


# -- OPEN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", Outcome)
def test_open_is_not_disturbed_by_late_outcomes(late: Outcome) -> None:
    one = One()
    old = one.take()
    one.leg(Outcome.FAILED, Outcome.FAILED)
    one.now = 5.0
    old.close(late, one.now)
    assert one.state == "open"
    assert one.open_for == 5.0
    assert one.after(5.0).state == "half_open"


def test_open_becomes_half_open_when_its_time_is_up_and_not_before() -> None:
    one = opened(Outcome.FAILED).after(9.999)
    assert one.state == "open"
    assert one.after(0.001).state == "half_open"
    assert one.log.moves("breaker") == [("closed", "open"), ("open", "half_open")]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("state", [opened, half_open])
def test_a_healthy_probe_closes_what_contact_failures_opened(failure: Outcome, state: Callable[[Outcome], One]) -> None:
    one = state(failure)
    before = one.state
    one.probe()
    if failure in CONTACT_FAILURES:
        assert one.state == "closed"
        assert one.passes
        assert one.leg(failure).state == "closed", "the count begins anew"
    else:
        assert one.state == before


def test_what_opened_it_counts_not_what_came_before() -> None:
    assert One(threshold=2).leg(Outcome.REFUSED, Outcome.FAILED).probe().state == "open"


def test_a_bad_probe_does_not_move_the_breaker() -> None:
    one = One(threshold=1)
    for _ in range(10):
        one.probe("down")
    assert one.state == "closed"


# -- HALF_OPEN ---------------------------------------------------------------------------------------------------------


def test_half_open_lets_one_request_through_at_a_time() -> None:
    one = half_open(Outcome.FAILED)
    lease = one.take()
    assert not one.passes
    assert not one.after(1000.0).passes
    lease.close(Outcome.GONE, one.now)
    assert one.passes


def test_half_open_closes_when_a_request_is_served() -> None:
    one = half_open(Outcome.FAILED).leg(Outcome.SERVED)
    assert one.state == "closed"
    assert one.log.moves("breaker")[-1] == ("half_open", "closed")
    assert one.leg(Outcome.FAILED).state == "closed", "the count begins anew"


def test_half_open_wants_as_many_successes_as_the_rules_say() -> None:
    one = half_open(Outcome.FAILED, successes=3).leg(Outcome.SERVED, Outcome.SERVED)
    assert one.state == "half_open"
    assert one.leg(Outcome.SERVED).state == "closed"


def test_half_open_wants_its_successes_in_a_row() -> None:
    one = half_open(Outcome.FAILED, successes=2).leg(Outcome.SERVED, Outcome.FAILED)
    assert one.state == "open"
    assert one.after(20.0).leg(Outcome.SERVED).state == "half_open"
    assert one.leg(Outcome.SERVED).state == "closed"


@pytest.mark.parametrize("quiet", SILENT)
def test_half_open_stays_when_the_request_tells_nothing(quiet: Outcome) -> None:
    one = half_open(Outcome.FAILED).leg(quiet, quiet, quiet)
    assert one.state == "half_open"
    assert one.leg(Outcome.SERVED).state == "closed"


@pytest.mark.parametrize("failure", FAILURES)
def test_half_open_opens_for_twice_as_long_up_to_the_most(failure: Outcome) -> None:
    one = opened(Outcome.FAILED)
    seen = []
    for _ in range(6):
        seen.append(one.open_for)
        one.after(one.open_for).leg(failure)
    assert seen == [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


def test_after_it_closed_the_first_time_is_short_again() -> None:
    one = half_open(Outcome.FAILED).leg(Outcome.FAILED)
    assert one.open_for == 20.0
    one.after(20.0).leg(Outcome.SERVED, Outcome.FAILED, Outcome.FAILED)
    assert one.open_for == 10.0


def test_what_fails_last_says_whether_a_probe_may_close() -> None:
    assert half_open(Outcome.FAILED).leg(Outcome.REFUSED).probe().state == "closed"
    assert half_open(Outcome.REFUSED).leg(Outcome.FAILED).probe().state == "open"


@pytest.mark.parametrize("late", Outcome)
def test_half_open_is_not_disturbed_by_late_outcomes(late: Outcome) -> None:
    one = One()
    old = one.take()
    one.leg(Outcome.FAILED, Outcome.FAILED).after(10.0)
    probe = one.take()
    old.close(late, one.now)
    assert one.state == "half_open"
    assert not one.passes, "its one request is still in flight"
    probe.close(Outcome.SERVED, one.now)
    assert one.state == "closed"


@pytest.mark.parametrize("late", Outcome)
def test_the_probe_of_an_earlier_half_open_time_is_a_late_outcome_too(late: Outcome) -> None:
    one = half_open(Outcome.REFUSED)
    old = one.take()
    one.probe()  # closes the breaker over the head of that request
    one.leg(Outcome.FAILED, Outcome.FAILED).after(10.0)
    probe = one.take()
    old.close(late, one.now)
    assert one.state == "half_open"
    assert not one.passes
    probe.close(Outcome.FAILED, one.now)
    assert one.open_for == 20.0


def test_a_probe_that_a_health_check_overtook_counts_as_any_request() -> None:
    one = half_open(Outcome.REFUSED)
    old = one.take()
    one.probe()
    old.close(Outcome.FAILED, one.now)
    assert one.state == "closed"
    assert one.leg(Outcome.FAILED).state == "open"


def test_a_disabled_breaker_never_opens() -> None:
    one = One(threshold=1, enabled=False)
    one.leg(*[outcome for outcome in Outcome for _ in range(20)])
    assert one.state == "closed"
    assert one.log.moves("breaker") == []
