"""What is kept of decisions, how much of it, and that nothing is left of requests that ended."""

from __future__ import annotations

from typing import Any

import pytest

from fleets import Attempt, Bench, facts
from pairs import Pairs, chat
from sglang_router.explain import lines
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.considered import Considered
from sglang_router.routing.decision_record import DecisionRecord
from sglang_router.routing.events import Answered, Finished, Retried
from sglang_router.routing.excluded import REASONS, reason
from sglang_router.routing.facts import Facts
from sglang_router.routing.model_names import Names
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import RequestTag, Route
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.recorder import LINES_PER_RECORD, MOST_CONSIDERED, MOST_RUNNING, Recorder
from sglang_router.routing.rules import BreakerRules, FleetRules
from sglang_router.routing.states import Health
from sglang_router.routing.trail import Trail
from sglang_router.routing.usage import Usage


class Desk(Bench):
    """A bench whose router has a recorder; requests are ended as the relay does it."""

    def __init__(
        self, count: int, policy: str | type[Policy] = "cache_aware", most: int = 100, every: int = 1, **more: Any
    ) -> None:
        super().__init__(count, policy, **more)
        rules: FleetRules = more.get("rules") or FleetRules()
        self.faults: list[Exception] = []
        self.recorder = self.router.recorder = Recorder(
            self.policy.label, most, every, rules.most_load, lambda: 1000.0, self.faults.append
        )

    def finish(self, attempt: Attempt, outcome: Outcome = Outcome.SERVED, usage: Usage | None = None) -> DecisionRecord:
        """End a request; return its record."""
        attempt.end(outcome)
        answer = Answered(200, "", outcome, 0.5, 0.25, 10, attempt.retries, usage=usage)
        self.recorder.finished(Finished(attempt.asked.tag, attempt.leg, answer))
        return self.recorder.ended()[0]

    def again(self, attempt: Attempt, outcome: Outcome) -> Attempt:
        """Retry a request, and tell of it."""
        failed = attempt.leg
        following = attempt.retry(outcome)
        assert following is not None
        self.recorder.retried(Retried(attempt.asked.tag, failed, outcome, following.delay))
        return following

    def running(self) -> list[DecisionRecord]:
        return list(self.recorder.running(self.router.open_leases(), 2.0))

    @property
    def left(self) -> tuple[int, int, int]:
        """What is kept of requests in flight."""
        recorder = self.recorder
        return len(recorder._noted), len(recorder._failed), len(recorder._texts)


def test_the_oldest_go_first() -> None:
    b = Desk(2, most=3)
    for _ in range(5):
        b.finish(b.route(b"text"))
    assert [each.id for each in b.recorder.ended()] == ["r5", "r4", "r3"]
    assert repr(b.recorder) == "<Recorder 3 records, 6 lines, 0 noted>"


def test_the_lines_of_all_tables_are_bounded() -> None:
    b = Desk(40, most=10)
    for _ in range(10):
        b.finish(b.route(b"text"))
    kept = b.recorder.ended()
    with_table = 10 * LINES_PER_RECORD // MOST_CONSIDERED
    assert len(kept) == 10, "a record stays when its table goes"
    assert all(len(each.attempts[0].considered) == MOST_CONSIDERED for each in kept[:with_table])
    assert not any(each.attempts for each in kept[with_table:])
    for _ in range(20):
        b.finish(b.route(b"text"))
    assert repr(b.recorder) == f"<Recorder 10 records, {with_table * MOST_CONSIDERED} lines, 0 noted>"


@pytest.mark.parametrize("most", [1, 2, 7])
def test_the_newest_table_is_kept_however_few_records_are(most: int) -> None:
    b = Desk(40, most=most)
    for _ in range(3 * most):
        assert len(b.finish(b.route(b"text")).attempts) == 1
        assert sum(bool(each.attempts) for each in b.recorder.ended()) == 1
    plain = Desk(40, most=most, every=2)
    for _ in range(3 * most):
        plain.finish(plain.route(b"text"))
        lines = sum(MOST_CONSIDERED for each in plain.recorder.ended() if each.attempts)
        assert repr(plain.recorder).endswith(f" {lines} lines, 0 noted>")


@pytest.mark.parametrize(
    ("text", "name"),
    [('"tiny"', "tiny"), ('"a\\"b\\""', 'a"b"'), ('"a\\\\"', "a\\"), ('"\\ud800"', "\\ud800"), ("5", "5"), ("", "")],
)
def test_a_model_is_called_as_its_client_does(text: str, name: str) -> None:
    b = Desk(1)
    tag = RequestTag(1, b"r", 0.0, Route("POST", "/generate", "generate"))
    tag.model = text
    b.recorder.finished(Finished(tag, None, Answered(503)))
    assert b.recorder.ended()[0].model == name


def test_of_many_candidates_the_least_loaded_are_shown_and_always_the_chosen_one() -> None:
    b = Desk(100, "consistent_hashing")
    for worker in b.workers[:90]:
        b.fleet.lease(worker)
    chosen = set()
    for number in range(30):
        attempt = b.ask(facts(key=b"key-%d" % number)).attempt
        (shown,) = b.finish(attempt).attempts
        names = [each.worker for each in shown.considered]
        chosen.add(attempt.worker.url)
        assert len(set(names)) == len(names) == MOST_CONSIDERED
        assert {attempt.worker.url, *(worker.url for worker in b.workers[90:])} <= set(names)
        assert (shown.candidates, shown.excluded) == (100, [])
    assert len(chosen) > 10


def test_a_table_for_one_of_so_many() -> None:
    b = Desk(2, every=4)
    records = [b.finish(b.route(b"text")) for _ in range(8)]
    assert [each.id for each in records if each.attempts] == ["r4", "r8"]


def test_no_table_when_none_is_wanted_but_for_retries() -> None:
    b = Desk(2, "round_robin", every=0)
    assert not b.finish(b.route()).attempts
    record = b.finish(b.again(b.route(), Outcome.FAILED))
    assert [each.attempt for each in record.attempts] == [2]


def test_each_attempt_with_its_outcome() -> None:
    b = Desk(3, "round_robin")
    record = b.finish(b.again(b.again(b.route(), Outcome.REFUSED), Outcome.BUSY))
    assert [(each.attempt, each.outcome) for each in record.attempts] == [(1, "refused"), (2, "busy"), (3, "served")]
    assert [[worker.excluded for worker in each.excluded] for each in record.attempts] == [
        [],
        ["failed"],
        ["failed"] * 2,
    ]
    assert [each.candidates for each in record.attempts] == [3, 2, 1]
    assert (record.retries, record.worker) == (2, b.workers[2].url)


def test_what_is_in_flight_is_shown_with_the_attempts_so_far() -> None:
    b = Desk(2, "round_robin", every=0)
    first = b.ask(facts(), 0.5).attempt
    second = b.again(b.ask(facts(), 1.0).attempt, Outcome.FAILED)
    newest, oldest = b.running()
    assert (newest.id, newest.outcome, newest.retries, newest.duration) == ("r2", "running", 1, 1.0)
    assert (oldest.id, oldest.at, oldest.retries, oldest.worker) == ("r1", 1000.5, 0, first.worker.url)
    assert [each.attempt for each in newest.attempts] == [2]
    b.finish(first)
    b.finish(second)
    assert b.running() == []


def test_a_record_tells_what_the_engine_was_told_and_by_which_policy() -> None:
    b = Desk(2, "round_robin", assign=None)
    b.router.naming.use({"gpt-4": "tiny"}, {}, False)
    for worker in b.workers:
        b.fleet.announced(worker, Names(("tiny",)))
    renamed, plain = b.ask(facts(model=b'"gpt-4"'), 0.5).attempt, b.ask(facts(model=b'"tiny"'), 1.0).attempt
    assert [each.served_model for each in b.running()] == [None, "tiny"]
    b.recorder.policy_of = lambda worker: "manual" if worker == b.workers[0].url else ""
    of = {each.worker: each.policy for each in b.running()}
    assert of == {b.workers[0].url: "manual", b.workers[1].url: "round_robin"}
    assert (b.finish(renamed).served_model, b.finish(plain).served_model) == ("tiny", None)
    assert {each.worker: each.policy for each in b.recorder.ended()} == of


def test_of_many_in_flight_the_newest_are_shown_and_each_is_found_by_its_id() -> None:
    b = Desk(2, "least_load", every=0)
    for number in range(MOST_RUNNING + 5):
        b.ask(facts(), float(number))
    shown = b.running()
    assert [shown[0].id, shown[-1].id, len(shown)] == [f"r{MOST_RUNNING + 5}", "r6", MOST_RUNNING]
    assert [each.id for each in b.recorder.running(b.router.open_leases(), 0.0, {"r1", "other"})] == ["r1"]


def test_nothing_is_left_of_what_has_ended() -> None:
    b = Desk(3, "round_robin")
    taken: list[tuple[DecisionRecord, str, bytes, bytes]] = []
    b.recorder.sink = lambda *record: taken.append(record)
    b.finish(b.again(b.again(b.route(b"abc", namespace=b"ns"), Outcome.REFUSED), Outcome.BUSY))
    b.finish(b.route(), Outcome.GONE)
    named = (b"r9", b"s" * 100, b"", None, False, None)
    tag = RequestTag(9, b"r9", 0.0, Route("POST", "/generate", "generate"), named=named)
    b.recorder.finished(Finished(tag, None, Answered(503)))
    assert b.left == (0, 0, 0)
    assert [(record.id, *others) for record, *others in taken] == [
        ("r1", "", b"ns", b"abc"),
        ("r2", "", b"", b""),
        ("r9", "s" * 100, b"", b""),
    ]
    assert taken[2][0].session == "s" * 64
    assert (taken[2][0].outcome, taken[2][0].worker, taken[2][0].first_byte) == ("unrouted", None, None)


class Silent(Policy):
    """A policy that cannot explain itself."""

    name = "silent"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        return self.least_loaded(candidates, "silent")

    def consider(self, facts: Facts, candidates: Candidates, now: float) -> list[Considered]:
        raise ValueError("no reason")


def test_a_policy_that_cannot_explain_itself_hurts_no_request() -> None:
    b = Desk(2, Silent)
    records = [b.finish(b.route()) for _ in range(3)]
    assert [(each.worker, each.attempts) for each in records] == [(b.workers[n].url, ()) for n in (1, 0, 1)]
    assert [str(fault) for fault in b.faults] == ["no reason"]


def test_the_control_plane_leaves_no_record() -> None:
    b = Desk(1)
    b.recorder.finished(Finished(RequestTag(1, b"r", 0.0, Route("GET", "/workers")), None, Answered(200)))
    assert len(b.recorder) == 0


def test_tokens_are_told_as_far_as_the_engine_tells_them() -> None:
    b = Desk(1)
    records = [b.finish(b.route(), usage=usage) for usage in (Usage(10, 0, 2), Usage(10, -1, -1), None)]
    told = [(each.prompt_tokens, each.cached_tokens, each.completion_tokens) for each in records]
    assert told == [(10, 0, 2), (10, None, None), (None, None, None)]


def test_texts_are_kept_for_the_log_only() -> None:
    b = Desk(1)
    b.route(b"text")
    assert b.left == (1, 0, 0)


def test_sizes_are_bounded_and_a_model_is_shown_by_its_name() -> None:
    b = Desk(1)
    attempt = b.route()
    tag = attempt.asked.tag
    tag.named = (b"r1", b"s" * 100_000, b"", None, False, None)
    tag.model = '"tiny"'
    record = b.finish(attempt)
    assert (len(record.session), record.model) == (64, "tiny")


# -- why a worker was no candidate -------------------------------------------------------------------------------------


def why(
    b: Bench, number: int = 0, most_load: int = 0, trail: Trail | None = None, now: float = 0.0, held: bool = False
) -> str:
    found = reason(b.workers[number], most_load, trail, now, held)
    assert found in REASONS
    return found


def test_reasons() -> None:
    b = Bench(2, rules=FleetRules(breaker=BreakerRules(threshold=1)))
    worker = b.workers[0]
    assert (why(b), why(b, held=True), why(b, trail=Trail(facts()))) == ("no_room", "elsewhere", "set_aside")
    worker.warm_at = 5.0
    assert (why(b), why(b, held=True), why(b, now=5.0)) == ("slow_start", "elsewhere", "no_room")
    b.fleet.lease(worker)
    assert (why(b, most_load=1), why(b, most_load=2)) == ("full", "slow_start")
    worker.ejected = "late"
    assert why(b) == "ejected"
    lease = b.fleet.lease(worker)
    lease.close(Outcome.BROKEN, 0.0)
    assert why(b) == "breaker_open"
    b.fleet.candidates(worker.circuit.reopen_at)
    assert why(b) == "ejected"
    b.fleet.lease(worker)
    assert why(b) == "breaker_half_open"
    trail = Trail(facts())
    trail.tries[worker] = 1
    assert (why(b, trail=trail), why(b, 1, trail=trail)) == ("failed", "set_aside")
    b.fleet.withhold(worker, "its pod ends")
    assert why(b, trail=trail) == "withheld"
    b.fleet.set_paused(worker, ("generation",))
    assert why(b, trail=trail) == "paused"
    b.fleet.set_draining(worker, True)
    assert why(b, trail=trail) == "draining"


@pytest.mark.parametrize("health", [each for each in Health if each is not Health.HEALTHY])
def test_health_is_a_reason(health: Health) -> None:
    b = Bench(1)
    b.workers[0].health = health
    assert why(b) == health.value


def test_every_reason_can_be_given() -> None:
    told = {each.value for each in Health if each is not Health.HEALTHY}
    others = {"draining", "failed", "breaker_open", "breaker_half_open", "ejected", "full", "slow_start", "set_aside"}
    assert told | others | {"elsewhere", "no_room", "window", "withheld", "paused"} == REASONS.keys()


def test_a_request_that_follows_a_stored_response_says_so_of_the_other_workers() -> None:
    b = Desk(3, "round_robin")
    first = b.route()
    b.router.holds(first.leg, b"resp_1")
    b.finish(first)
    request = facts(b"text")
    request.follows = b"resp_1"
    record = b.finish(b.send(request))
    (attempt,) = record.attempts
    assert (record.worker, record.branch, attempt.candidates) == (first.worker.url, "holder", 1)
    assert [each.excluded for each in attempt.excluded] == ["elsewhere"] * 2


# -- pairs -------------------------------------------------------------------------------------------------------------


def recorded(b: Pairs) -> Recorder:
    b.router.recorder = Recorder("round_robin", 100, 1, 0, lambda: 1000.0, b.faults.append)
    return b.router.recorder


def test_both_workers_of_a_pair_are_in_its_record() -> None:
    b = Pairs(2, 2)
    recorder = recorded(b)
    asked, plan = b.plan(chat())
    (running,) = recorder.running(b.router.open_leases(), 2.0)
    assert (running.prefill_worker, running.worker) == ("http://p0:1", "http://d0:1")
    for leg in plan.legs:
        b.end(asked, leg)
    recorder.finished(Finished(asked.tag, plan.legs[-1], Answered(200, "", Outcome.SERVED, 0.5)))
    (record,) = recorder.ended()
    assert (record.prefill_worker, record.prefill_branch, record.worker) == ("http://p0:1", "turn", "http://d0:1")
    assert [(each.attempt, each.role, each.worker, each.candidates) for each in record.attempts] == [
        (1, "prefill", "http://p0:1", 2),
        (1, "decode", "http://d0:1", 2),
    ]
    shown = "\n".join(lines(record))
    assert "prefill   http://p0:1: turn" in shown
    assert "Attempt 1 (prefill), after" in shown
    assert not b.faults


def test_a_prefill_leg_alone_is_shown_while_it_runs() -> None:
    b = Pairs(1, 1)
    recorder = recorded(b)
    b.plan(chat(b"/v1/embeddings"))
    (running,) = recorder.running(b.router.open_leases(), 2.0)
    assert (running.worker, running.prefill_worker) == ("http://p0:1", None)


def test_a_decode_worker_without_room_is_excluded_for_its_window() -> None:
    b = Pairs(1, 2)
    recorder = recorded(b)
    b.windows(1)
    first, plan = b.plan(chat())
    second, more = b.plan(chat())
    recorder.finished(Finished(second.tag, more.legs[-1], Answered(200, "", Outcome.SERVED, 0.5)))
    (record,) = recorder.ended()
    assert [(each.worker, each.excluded) for each in record.attempts[1].excluded] == [("http://d0:1", "window")]
    assert plan.legs[1].target.name == "http://d0:1"
    assert first.plan is plan
