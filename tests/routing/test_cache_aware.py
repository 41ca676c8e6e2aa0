"""cache_aware, rule by rule; what its tree holds is the matter of test_tree.py."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleets import Bench, facts
from sglang_router.routing.candidates import candidates_of
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.worker import Worker

POEM = b"You are a poet. Write four lines about the sea, and none about the moon. "
CLERK = b"You, clerk, copy this letter in a fair hand and send it to all it concerns. "


def aware(count: int, **settings: Any) -> Bench:
    return Bench(count, "cache_aware", **settings)


def tree_size(b: Bench, worker: Worker) -> int:
    assert isinstance(b.policy, CacheAware)
    return b.policy.tree.size(worker.slot)


def held(b: Bench, worker: Worker, text: bytes, namespace: bytes = b"") -> int:
    """How many bytes of the text the policy believes the worker to hold."""
    assert isinstance(b.policy, CacheAware)
    return b.policy.tree.match(namespace, text).length(worker.slot)


def place(b: Bench, text: bytes, *numbers: int) -> None:
    """Serves a text once on each of these workers, by taking the others out of rotation meanwhile."""
    for number in numbers:
        for other in b.workers:
            b.fleet.set_draining(other, other is not b.workers[number])
        assert b.serve(text).worker is b.workers[number]
    for worker in b.workers:
        b.fleet.set_draining(worker, False)


def at(b: Bench, choice: Choice) -> tuple[int, str]:
    return b.number(choice.worker), choice.branch


# -- hit or miss -------------------------------------------------------------------------------------------------------


def test_a_known_beginning_goes_where_it_is_known() -> None:
    b = aware(3)
    place(b, POEM, 1)
    plan = b.serve(POEM + b"Blue.")
    assert (b.number(plan.worker), plan.branch) == (1, "hit")
    assert (plan.matched, plan.total) == (len(POEM), len(POEM) + 5)


def test_the_share_that_must_match_is_more_than_the_threshold() -> None:
    known = b"k" * 100
    for unknown, branch in ((99, "hit"), (100, "miss"), (101, "miss")):
        b = aware(2, cache_threshold=0.5)
        place(b, known, 0)
        plan = b.serve(known + b"u" * unknown)
        assert (plan.branch, plan.matched if branch == "hit" else 100) == (branch, 100)
        assert b.number(plan.worker) == (0 if branch == "hit" else 1)


@pytest.mark.parametrize(("threshold", "branch"), [(0.0, "hit"), (0.2, "hit"), (0.3, "miss"), (1.0, "miss")])
def test_the_threshold_is_an_option(threshold: float, branch: str) -> None:
    b = aware(2, cache_threshold=threshold)
    place(b, b"k" * 25, 0)
    assert b.serve(b"k" * 25 + b"u" * 75).branch == branch


def test_at_threshold_one_nothing_hits() -> None:
    b = aware(2, cache_threshold=1.0)
    assert [b.serve(POEM).branch for _ in range(4)] == ["miss"] * 4


def test_the_longest_match_wins_whatever_the_load() -> None:
    b = aware(3)
    place(b, POEM, 0)
    place(b, POEM + b"Waves, waves, waves.", 2)
    b.load(0, 0, 9)
    assert at(b, b.choose(text=POEM + b"Waves, waves.")) == (2, "hit")


def test_of_several_owners_the_least_loaded_then_each_in_turn() -> None:
    b = aware(4)
    place(b, POEM, 0, 1, 3)
    b.load(2, 1, 0, 3)
    assert at(b, b.choose(text=POEM)) == (1, "hit")
    b = aware(4)
    place(b, POEM, 0, 1, 3)
    turns = [b.number(b.serve(POEM).worker) for _ in range(6)]
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 3]


def test_when_the_owner_is_no_candidate_the_next_best_on_the_path_is() -> None:
    b = aware(3)
    place(b, POEM, 1)
    place(b, POEM + b"Waves, waves, waves.", 0)
    text = POEM + b"Waves, waves, waves."
    assert at(b, b.choose(text=text)) == (0, "hit")
    choice = b.choose(1, 2, text=text)
    assert (at(b, choice), choice.matched) == ((1, "hit"), len(POEM))
    assert b.choose(2, text=text).branch == "miss"


def test_what_was_chosen_is_remembered_at_once() -> None:
    b = aware(3)
    first = b.route(POEM)  # still running
    assert b.route(POEM).worker is first.worker


def test_a_few_bytes_in_common_are_no_reason_unless_they_are_all() -> None:
    b = aware(2)
    place(b, b"Question 1", 0)
    assert b.serve(b"Question 2").branch == "miss"
    assert b.serve(b"Question 1").branch == "hit"
    place(b, b"Question number 1", 0)
    assert b.serve(b"Question number 2").branch == "hit"


def test_the_scaffold_neither_matches_nor_counts() -> None:
    b = aware(2)
    scaffold = b'[{"role":"user","content":'
    one = facts(scaffold + b'"Why is the sky blue?"}]', scaffold=len(scaffold))
    other = facts(scaffold + b'"Name a river."}]', scaffold=len(scaffold))
    b.send(one)
    stranger = b.send(other)
    assert (stranger.branch, stranger.matched, stranger.total) == ("miss", 0, len(other.text) - len(scaffold))
    again = b.send(one)
    assert (again.branch, again.matched) == ("hit", len(one.text) - len(scaffold))


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_a_stranger_goes_to_the_smallest_tree() -> None:
    b = aware(3)
    place(b, b"a" * 30, 0)
    place(b, b"b" * 20, 1)
    place(b, b"c" * 25, 2)
    b.load(0, 5, 0)
    assert at(b, b.choose(text=b"z" * 10)) == (1, "miss")


def test_among_trees_of_one_size_the_least_loaded_then_in_turn() -> None:
    for least in range(3):
        b = aware(3)
        b.load(*[1 if n == least else 2 for n in range(3)])
        assert at(b, b.choose(text=b"z" * 10)) == (least, "miss")
    firsts = set()
    for turns in range(3):
        b = aware(3)
        for _ in range(turns):
            b.serve()
        firsts.add(b.number(b.choose(text=b"a stranger").worker))
    assert firsts == {0, 1, 2}


@pytest.mark.parametrize("prompt", ["prompt %d", "%d", "Question %d: what is the sum of one and two?", "%d says " * 9])
def test_strangers_one_at_a_time_spread_evenly(prompt: str) -> None:
    b = aware(3)
    texts = [prompt.replace("%d", str(n)).encode() for n in range(300)]
    plans = [b.serve(text, now=float(n)) for n, text in enumerate(texts)]
    counts = b.spread(plans)
    assert max(counts) - min(counts) <= 6, counts


@given(sizes=st.lists(st.integers(1, 2000), min_size=30, max_size=120))
def test_strangers_of_any_sizes_fill_the_trees_evenly(sizes: list[int]) -> None:
    b = aware(3)
    for n, size in enumerate(sizes):
        b.serve(b"%d:" % n + b"x" * size)
    trees = [tree_size(b, worker) for worker in b.workers]
    assert max(trees) - min(trees) <= max(sizes) + 6


def test_strangers_with_nothing_in_common_spread_evenly() -> None:
    b = aware(3)
    assert b.spread([b.serve(blake2b(b"%d" % n).hexdigest().encode()) for n in range(300)]) == [100, 100, 100]


def test_a_burst_of_strangers_at_once_spreads() -> None:
    b = aware(4)
    assert b.spread([b.route(b"%08d, and more that nobody has seen" % n) for n in range(100)]) == [25, 25, 25, 25]


def test_groups_stay_together_and_groups_spread() -> None:
    b = aware(3)
    homes: dict[int, Worker] = {}
    for round_ in range(5):
        for group in range(12):
            plan = b.serve(b"%d: " % group * 50 + b"question %d" % round_, now=float(round_))
            assert homes.setdefault(group, plan.worker) is plan.worker
    assert sorted([*homes.values()].count(worker) for worker in b.workers) == [4, 4, 4]


# -- imbalance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "branch"),
    [
        ((32, 0), "hit"),
        ((33, 0), "imbalance"),
        ((132, 100), "hit"),
        ((133, 100), "imbalance"),
    ],
)
def test_imbalance_is_more_than_the_absolute_threshold(loads: tuple[int, int], branch: str) -> None:
    b = aware(2)
    place(b, POEM, 0)
    b.load(*loads)
    choice = b.choose(text=POEM)
    assert at(b, choice) == (0 if branch == "hit" else 1, branch)


@pytest.mark.parametrize(("loads", "branch"), [((6, 3), "hit"), ((7, 3), "imbalance"), ((1, 0), "imbalance")])
def test_and_more_than_the_relative_one(loads: tuple[int, int], branch: str) -> None:
    b = aware(2, balance_abs_threshold=0, balance_rel_threshold=2.0)
    place(b, POEM, 0)
    b.load(*loads)
    assert b.choose(text=POEM).branch == branch


def test_both_must_be_exceeded() -> None:
    b = aware(2, balance_abs_threshold=5, balance_rel_threshold=1.5)
    place(b, POEM, 0)
    b.load(4, 0)
    assert b.choose(text=POEM).branch == "hit", "many times as much, but little"
    b.load(16, 20)
    assert b.choose(text=POEM).branch == "hit", "much, but not many times as much"
    b = aware(2, balance_abs_threshold=5, balance_rel_threshold=1.5)
    place(b, POEM, 0)
    b.load(16, 10)
    assert b.choose(text=POEM).branch == "imbalance"


def test_in_imbalance_the_shortest_queue_serves_and_learns() -> None:
    b = aware(3, balance_abs_threshold=2)
    place(b, POEM, 0)
    b.load(5, 2, 1)
    choice = b.choose(text=POEM)
    assert (at(b, choice), choice.matched, choice.total) == ((2, "imbalance"), 0, len(POEM))
    assert held(b, b.workers[2], POEM) == len(POEM)


def test_of_equally_short_queues_the_longest_prefix_then_in_turn() -> None:
    b = aware(4, balance_abs_threshold=2)
    place(b, POEM, 2)
    b.load(0, 0, 0, 9)
    choice = b.choose(text=POEM + b"x")
    assert (at(b, choice), choice.matched) == ((2, "imbalance"), len(POEM))
    place(b, CLERK, 3)
    seen = [b.number(b.choose(text=b"%d stranger" % n).worker) for n in range(6)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


def test_only_the_loads_of_candidates_count() -> None:
    b = aware(3)
    place(b, POEM, 0)
    b.load(1, 0, 99)
    assert at(b, b.choose(0, 1, text=POEM)) == (0, "hit")
    assert b.choose(text=POEM).branch == "imbalance"


def test_a_hot_prompt_that_floods_its_home_overflows_to_others() -> None:
    b = aware(3, balance_abs_threshold=8)
    plans = [b.route(POEM) for _ in range(60)]
    counts = b.spread(plans)
    assert max(counts) - min(counts) <= 10
    assert {plan.branch for plan in plans} == {"miss", "hit", "imbalance"}


# -- no text -----------------------------------------------------------------------------------------------------------


def test_without_text_the_least_loaded_in_turn_and_nothing_is_learnt() -> None:
    b = aware(3)
    b.load(1, 0, 0)
    seen = [at(b, b.choose()) for _ in range(4)]
    assert sorted(seen[:2]) == sorted(seen[2:]) == [(1, "no_text"), (2, "no_text")]
    assert b.policy.choose(facts(b"[{", scaffold=2), candidates_of(b.workers), 0.0).branch == "no_text"
    assert [tree_size(b, worker) for worker in b.workers] == [0, 0, 0]


# -- what a worker's coming and going does to what it holds ------------------------------------------------------------


def test_a_worker_that_is_away_keeps_its_tree() -> None:
    b = Bench(2, "cache_aware", checked=True)
    for worker in b.workers:
        b.fleet.probed(worker, None, 0.0)
    home = b.serve(POEM).worker
    for error in ("slow", "slow", "slow"):
        b.fleet.probed(home, error, 1.0)
    away = b.serve(POEM + b"Blue.")
    assert away.worker is not home
    for _ in range(2):
        b.fleet.probed(home, None, 2.0)
    b.fleet.set_draining(home, True)
    b.fleet.set_draining(home, False)
    for _ in range(4):
        b.fleet.lease(home).close(Outcome.FAILED, 3.0)
    b.fleet.candidates(13.0)
    b.fleet.lease(home).close(Outcome.SERVED, 13.0)
    assert held(b, home, POEM) == len(POEM)
    b.fleet.lease(away.worker)
    assert (b.route(POEM, now=14.0).worker, b.log.decisions[-1].leg.branch) == (home, "hit")


def test_a_worker_that_restarted_has_lost_it() -> None:
    b = aware(2)
    home = b.serve(POEM).worker
    b.fleet.lease(home).close(Outcome.REFUSED, 1.0)
    assert held(b, home, POEM) == len(POEM), "perhaps it was a moment's trouble"
    b.fleet.probed(home, None, 2.0)
    assert (held(b, home, POEM), tree_size(b, home)) == (0, 0)
    assert b.serve(POEM).branch == "miss"


def test_a_flushed_worker_has_lost_it() -> None:
    b = aware(2)
    place(b, POEM, 0, 1)
    b.policy.emptied(b.workers[0])
    assert at(b, b.choose(text=POEM)) == (1, "hit")
    assert [tree_size(b, worker) for worker in b.workers] == [0, len(POEM)]


def test_a_removed_worker_has_lost_it_and_its_successor_does_not_inherit() -> None:
    b = aware(2)
    place(b, POEM, 0)
    place(b, CLERK, 1)
    b.fleet.remove(b.workers[0])
    assert b.choose(1, text=POEM).branch == "miss"
    while b.policy.tidy(0.0, 16):
        pass
    b.workers[0] = b.fleet.add(b.workers[0].spec, 1.0)
    assert (held(b, b.workers[0], POEM), tree_size(b, b.workers[0])) == (0, 0)
    assert at(b, b.choose(text=CLERK)) == (1, "hit")


def test_the_end_of_a_removed_workers_last_request_changes_nothing() -> None:
    b = aware(2)
    running = b.route(POEM)
    b.fleet.lease(running.worker).close(Outcome.REFUSED, 0.0)
    again = b.fleet.lease(running.worker)
    b.fleet.remove(running.worker)
    again.close(Outcome.SERVED, 1.0)
    running.end(now=1.0)
    other = b.serve(CLERK).worker
    assert held(b, other, CLERK) == len(CLERK)


def test_candidates_are_looked_at_anew_when_they_change() -> None:
    b = aware(3)
    place(b, POEM, 0)
    place(b, CLERK, 1)
    for _ in range(3):
        b.fleet.emptied(b.workers[0])
        assert b.serve(CLERK).worker is b.workers[1]
        place(b, POEM, 0)
        assert b.serve(POEM).worker is b.workers[0]


def test_namespaces_are_apart_but_fill_the_same_cache() -> None:
    b = aware(2)
    first = b.serve(POEM, namespace=b"a")
    other = b.serve(POEM, namespace=b"b")
    assert (other.branch, other.matched) == ("miss", 0)
    assert other.worker is not first.worker
    assert b.serve(POEM, namespace=b"a").worker is first.worker
    assert b.serve(POEM, namespace=b"b").worker is other.worker


def test_a_tree_is_bounded() -> None:
    b = aware(1, max_tree_size=1000)
    for n in range(50):
        b.serve(b"%02d" % n * 60)
        assert tree_size(b, b.workers[0]) <= 1000
    assert b.serve(b"49" * 60).branch == "hit"
    assert b.serve(b"00" * 60).branch == "miss"


def test_what_rests_too_long_is_forgotten_a_little_at_a_time() -> None:
    b = aware(1, max_idle=100.0)
    for n in range(5):
        b.serve(b"%d" % n * 20, now=float(n))
    assert b.policy.tidy(100.0, 4) is False
    assert b.policy.tidy(103.5, 3) is True
    assert b.policy.tidy(103.5, 3) is False
    assert [held(b, b.workers[0], b"%d" % n * 20) > 0 for n in range(5)] == [False] * 4 + [True]
