"""Every policy but cache_aware and manual (which have files of their own), and what holds for all of them."""

from __future__ import annotations

import math
import sys
from collections import Counter
from types import CodeType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from documented import ROOT, blocks
from fleets import Bench, facts, spec
from sglang_router.config import OPTIONS, POLICY_NAMES
from sglang_router.routing.candidates import candidates_of
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.worker import Worker

# -- all of them -------------------------------------------------------------------------------------------------------


def test_the_options_offer_the_policies_there_are() -> None:
    assert sorted(POLICY_NAMES) == sorted(POLICIES)
    assert all(policy.name == name for name, policy in POLICIES.items())
    assert OPTIONS["policy"].choices == POLICY_NAMES


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
def test_the_choice_is_one_of_the_candidates(policy: str, data: st.DataObject) -> None:
    b = Bench(5, policy)
    for _ in range(data.draw(st.integers(1, 8))):
        among = data.draw(st.sets(st.integers(0, 4), min_size=1))
        text, key = data.draw(st.binary(max_size=40)), data.draw(st.sampled_from([b"", b"a", b"b"]))
        choice = b.choose(*sorted(among), text=text, key=key)
        assert b.number(choice.worker) in among
        assert 0 <= choice.matched <= choice.total
        assert choice.branch.isidentifier()
        assert b.policy.tidy(1e9, 1) in (True, False)


def printed(policy: Policy) -> tuple[object, ...]:
    """The state of a policy, as far as it can be printed: its own, its chance, its memory."""
    told = policy.memory.walk().bite(1 << 20, 1 << 30) if policy.memory is not None else []
    return repr(policy), policy.rng.getstate(), told


def said(choice: Choice) -> tuple[object, ...]:
    return choice.worker, choice.branch, choice.matched, choice.total, choice.tied


@pytest.mark.parametrize(
    ("policy", "mode"), [*((policy, "random") for policy in POLICIES), ("manual", "min_load"), ("manual", "min_group")]
)
@settings(max_examples=50)
@given(data=st.data())
def test_choosing_changes_nothing(policy: str, mode: str, data: st.DataObject) -> None:
    """Asked twice it says the same, and nobody can tell afterwards that it was asked."""
    b = Bench(4, policy, assignment_mode=mode)
    for now in range(data.draw(st.integers(1, 8))):
        among = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))
        text, key = data.draw(st.binary(max_size=40)), data.draw(st.sampled_from([b"", b"a", b"b"]))
        asked, workers = facts(text, key=key), candidates_of(b.workers[n] for n in among)
        before = printed(b.policy)
        first, again = (b.policy.choose(asked, workers, float(now)) for _ in range(2))
        assert said(first) == said(again)
        looked_at = b.policy.consider(asked, workers, float(now))
        assert [(each.worker, each.load) for each in looked_at] == [(w.url, w.load) for w in workers]
        assert first.matched <= max(each.matched for each in looked_at)
        assert printed(b.policy) == before
        b.policy.chosen(again, asked, float(now))
        b.fleet.lease(again.worker)


@pytest.mark.parametrize("policy", POLICIES)
def test_who_asks_in_the_shadow_does_not_change_what_follows(policy: str) -> None:
    alone, asked = Bench(3, policy), Bench(3, policy)
    for n in range(100):
        text, key = b"prompt %d, and more of it" % (n % 17), b"%d" % (n % 5)
        asked.policy.choose(facts(b"%d" % n, key=key), asked.pool.candidates(0.0), 0.0)
        one, other = alone.serve(text, key=key), asked.serve(text, key=key)
        assert (alone.number(one.worker), one.branch) == (asked.number(other.worker), other.branch)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_shows_its_state(policy: str) -> None:
    b = Bench(2, policy)
    before = repr(b.policy)
    for n in range(3):
        b.route(b"a prompt, number %d" % n, key=b"%d" % n)
    assert before.startswith(f"<{type(b.policy).__name__} ")
    if policy not in ("consistent_hashing", "prefix_hash", "least_load"):
        assert repr(b.policy) != before


@pytest.mark.parametrize("policy", POLICIES)
def test_strangers_that_come_at_once_are_spread(policy: str) -> None:
    b = Bench(3, policy)
    plans = [b.route(b"%d is my number, who are you?" % n, key=b"%d" % n) for n in range(300)]
    assert min(b.spread(plans)) > 60


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_come_and_go_under_any_policy(policy: str) -> None:
    b = Bench(2, policy)
    for n in range(40):
        b.serve(b"prompt %d" % (n % 7), key=b"%d" % (n % 5))
        if n % 4 == 1:
            b.fleet.remove(b.workers.pop(0))
        if n % 4 == 3:
            b.workers.append(b.fleet.add(spec(f"w{n + 2}"), float(n)))
        while b.policy.tidy(float(n), 8):
            pass
    assert all(worker.load == 0 for worker in b.workers)


def calls(b: Bench, text: bytes, key: bytes) -> int:
    """How many functions one decision calls, Python's and C's."""
    made = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        b.serve(text, key=key)
    finally:
        sys.setprofile(before)
    return made


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("text", [b"", b"a stranger's prompt, %d", b"a prompt that all know well"])
def test_a_decision_among_a_thousand_workers_stays_small(policy: str, text: bytes) -> None:
    made = []
    for count in (10, 1000):
        b = Bench(count, policy)
        for _ in range(3):
            b.serve(b"a prompt that all know well", key=b"key")
        b.serve(text.replace(b"%d", b"1"), key=b"key")
        made.append(calls(b, text.replace(b"%d", b"2"), b"key"))
    assert made[1] <= made[0] + 4 * 1000
    if policy in ("round_robin", "random", "power_of_two", "least_load") or text == b"a prompt that all know well":
        assert made[1] <= made[0] + 40, "looking at loads is one pass in C, not a call for each worker"


# -- random, power_of_two, least_load ----------------------------------------------------------------------------------


def test_random_gives_all_the_same_chance() -> None:
    b = Bench(4, "random")
    assert all(220 < count < 280 for count in b.spread([b.serve() for _ in range(1000)]))


def test_chance_is_an_argument() -> None:
    for policy in ("random", "power_of_two"):
        one, same, other = (
            [b.number(b.serve().worker) for _ in range(50)] for b in (Bench(4, policy, seed=seed) for seed in (1, 1, 2))
        )
        assert one == same
        assert one != other


@given(loads=st.lists(st.integers(0, 5), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_power_of_two_never_takes_the_busiest(loads: list[int], seed: int) -> None:
    b = Bench(len(loads), "power_of_two", seed=seed)
    b.load(*loads)
    load = b.choose().worker.load
    assert load < max(loads) or loads.count(load) > 1


def test_power_of_two_balances_what_stays() -> None:
    b = Bench(10, "power_of_two")
    counts = b.spread([b.route() for _ in range(1000)])
    assert max(counts) - min(counts) <= 8
    assert b.choose(3).branch == "only"


@given(loads=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_least_load_takes_the_least_loaded_in_turn(loads: list[int]) -> None:
    b = Bench(len(loads), "least_load")
    b.load(*loads)
    lowest = [worker for worker in b.workers if worker.load == min(loads)]
    turns = [b.choose().worker for _ in range(2 * len(lowest))]
    assert Counter(turns) == dict.fromkeys(lowest, 2)
    assert set(turns[: len(lowest)]) == set(lowest)


# -- round_robin -------------------------------------------------------------------------------------------------------


def test_round_robin_goes_round() -> None:
    b = Bench(3)
    assert [b.number(b.serve().worker) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_round_robin_takes_a_new_worker_in_its_turn() -> None:
    b = Bench(2)
    b.serve()
    b.workers.append(b.fleet.add(spec("new"), 0.0))
    assert [b.number(b.serve().worker) for _ in range(4)] == [1, 2, 0, 1]


@given(data=st.data())
def test_who_comes_or_goes_shifts_nobody_elses_turn(data: st.DataObject) -> None:
    """Between two turns of one worker every other that was there all the while had exactly one."""
    b = Bench(3)
    away: set[Worker] = set()
    steps: list[tuple[Worker, set[Worker]]] = []  # who was chosen, of whom
    for n in range(data.draw(st.integers(4, 25))):
        event = data.draw(st.sampled_from(["", "", "add", "remove", "drain", "resume"]))
        worker = data.draw(st.sampled_from(b.workers))
        if event == "add":
            b.workers.append(b.fleet.add(spec(f"new{n}"), 0.0))
        elif event in ("remove", "drain") and len(set(b.workers) - away) > 1:
            away.add(worker)
            b.fleet.set_draining(worker, True)
        elif event == "resume":
            away.discard(worker)
            b.fleet.set_draining(worker, False)
        if event == "remove" and worker in away and not worker.removed:
            b.fleet.remove(worker)
            b.workers.remove(worker)
        steps.append((b.serve().worker, set(b.fleet.candidates(0.0))))
    last: dict[Worker, int] = {}
    for now, (worker, _) in enumerate(steps):
        if worker in last:
            between = steps[last[worker] : now + 1]
            always = set.intersection(*(candidates for _, candidates in between))
            turns = Counter(chosen for chosen, _ in between[1:-1])
            if worker in always:
                assert {w: turns[w] for w in always - {worker}} == dict.fromkeys(always - {worker}, 1)
        last[worker] = now


# -- consistent_hashing ------------------------------------------------------------------------------------------------

KEYS = [b"tenant-%d" % n for n in range(1000)]


def homes(b: Bench) -> dict[bytes, str]:
    return {key: b.serve(key=key).worker.url for key in KEYS}


def test_only_the_keys_of_a_removed_worker_move_and_they_return() -> None:
    b = Bench(5, "consistent_hashing")
    before = homes(b)
    gone = b.workers[2]
    b.fleet.remove(gone)
    during = homes(b)
    assert gone.url not in during.values()
    assert {key for key in KEYS if before[key] != during[key]} == {key for key in KEYS if before[key] == gone.url}
    b.fleet.add(spec("w2"), 9.0)
    assert homes(b) == before


def test_keys_of_a_worker_that_is_away_are_shared_among_the_others() -> None:
    b = Bench(5, "consistent_hashing")
    before = homes(b)
    b.fleet.set_draining(b.workers[0], True)
    moved = Counter(url for key, url in homes(b).items() if before[key] == b.workers[0].url)
    assert len(moved) == 4
    b.fleet.set_draining(b.workers[0], False)
    assert homes(b) == before


def test_a_new_worker_takes_its_share_and_nothing_else_moves() -> None:
    b = Bench(4, "consistent_hashing")
    before = homes(b)
    new = b.fleet.add(spec("new"), 1.0)
    moved = {url for key, url in homes(b).items() if before[key] != url}
    assert moved == {new.url}


def test_keys_are_shared_evenly_enough() -> None:
    counts = Counter(homes(Bench(5, "consistent_hashing")).values())
    assert all(140 <= counts[f"http://w{n}:1"] <= 270 for n in range(5)), counts


def test_routers_agree_whatever_the_order_of_registration() -> None:
    one, other = Bench(3, "consistent_hashing"), Bench(0, "consistent_hashing", seed=9)
    for name in ("w2", "w0", "w1"):
        other.fleet.add(spec(name), 0.0)
    assert homes(one) == homes(other)


def test_without_a_key_the_least_loaded_serves() -> None:
    b = Bench(3, "consistent_hashing")
    b.load(2, 1, 2)
    choice = b.choose()
    assert (b.number(choice.worker), choice.branch) == (1, "no_key")
    assert b.choose(key=b"k").branch == "key"


# -- prefix_hash -------------------------------------------------------------------------------------------------------


def test_prompts_with_one_beginning_go_to_one_worker() -> None:
    b = Bench(4, "prefix_hash", prefix_hash_bytes=10)
    workers = {b.serve(b"0123456789" + b"%d" % n).worker for n in range(20)}
    assert len(workers) == 1
    assert len({b.serve(b"%d 3456789" % n).worker for n in range(20)}) == 4
    assert b.choose(text=b"x").branch == "prefix"


def test_namespaces_hash_apart() -> None:
    b = Bench(4, "prefix_hash")
    assert len({b.serve(b"the same", namespace=b"%d" % n).worker for n in range(20)}) == 4


def test_without_text_the_least_loaded_is_taken() -> None:
    b = Bench(3, "prefix_hash")
    b.load(1, 1, 0)
    choice = b.choose()
    assert (b.number(choice.worker), choice.branch) == (2, "no_text")
    scaffold_only = b.policy.choose(facts(b"[{", scaffold=2), candidates_of(b.workers), 0.0)
    assert scaffold_only.branch == "no_text"


def test_a_worker_with_more_than_its_share_is_passed_over_by_the_same_order_each_time() -> None:
    b = Bench(4, "prefix_hash", hash_load_factor=1.0)
    plans = [b.route(b"all the same") for _ in range(4)]
    assert b.spread(plans) == [1, 1, 1, 1]
    assert [plan.branch for plan in plans] == ["prefix", "overflow", "overflow", "overflow"]
    again = Bench(4, "prefix_hash", hash_load_factor=1.0)
    order = [again.number(again.route(b"all the same").worker) for _ in range(4)]
    assert order == [b.number(plan.worker) for plan in plans]


@given(
    count=st.integers(1, 6),
    factor=st.floats(1.0, 3.0),
    steps=st.lists(st.one_of(st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 99)), max_size=40),
)
def test_no_worker_gets_more_than_its_bounded_share(count: int, factor: float, steps: list[Any]) -> None:
    b = Bench(count, "prefix_hash", hash_load_factor=factor)
    running = []
    for step in steps:
        if isinstance(step, bytes):
            running.append(b.route(step))
            assert running[-1].worker.load <= math.ceil(factor * len(running) / count)
        elif running:
            running.pop(step % len(running)).end()


# -- the example of docs/write-a-policy.md -----------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the policy of the page known, as a reader does; return its name."""
    scope: dict[str, Any] = {"__name__": "fair_turn"}
    exec(_of_the_page("src/sglang_router/routing/policies/fair_turn.py"), scope)
    monkeypatch.setitem(POLICIES, scope["FairTurn"].name, scope["FairTurn"])
    return str(scope["FairTurn"].name)


def _of_the_page(title: str) -> CodeType:
    """Return the code of the block with this title."""
    [block] = [each for each in blocks(ROOT / "docs" / "write-a-policy.md") if each.marks.get("title") == title]
    return compile(block.text, block.where, "exec")


def test_the_example_does_what_its_page_says(example: str) -> None:
    scope: dict[str, Any] = {"Bench": Bench}
    exec(_of_the_page("tests/routing/test_policies.py"), scope)
    [written] = [each for name, each in scope.items() if name.startswith("test_")]
    written()


def test_the_example_is_what_every_policy_is(example: str) -> None:
    test_the_choice_is_one_of_the_candidates(policy=example)
    test_choosing_changes_nothing(policy=example, mode="random")
    test_who_asks_in_the_shadow_does_not_change_what_follows(example)
    test_a_policy_shows_its_state(example)
    test_strangers_that_come_at_once_are_spread(example)
    test_a_decision_among_a_thousand_workers_stays_small(example, b"a prompt that all know well")
