"""What a worker refused, or never had, leaves no trace in the prefix tree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Bench
from prefix_trees import check
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.prefix_tree.tree import Tree

PROMPT = b"a prompt that is long enough to count, and then some more of it"
UNREAD = [Outcome.REJECTED, Outcome.BUSY, Outcome.FAILED, Outcome.REFUSED]


def tree_of(b: Bench) -> Tree:
    assert isinstance(b.policy, CacheAware)
    return b.policy.tree


@pytest.mark.parametrize("outcome", UNREAD)
def test_f12_a_prompt_that_was_refused_leaves_the_tree_as_it_was(outcome: Outcome) -> None:
    """A prompt that its engine refused was believed to be in the engine's cache."""
    b = Bench(1, "cache_aware")
    b.serve(PROMPT)
    tree = tree_of(b)
    before = tree.size(0), tree.entries(0), tree.nodes, tree.held
    attempt = b.route(PROMPT + b" and a question", now=1.0)
    assert tree.size(0) > before[0], "until then the next request with this prefix goes to the same worker"
    attempt.end(outcome, 2.0)
    assert (tree.size(0), tree.entries(0), tree.nodes, tree.held) == before
    check(tree)
    b.serve(b"another", now=3.0)
    b.route(b"something else", now=4.0).end(outcome, 5.0)
    assert tree.match(b"", b"something else").best(-1)[0] == 0
    check(tree)


def test_f12_what_a_retry_left_behind_is_at_the_worker_that_served() -> None:
    b = Bench(2, "cache_aware")
    following = b.route(PROMPT).retry(Outcome.FAILED, 1.0, 500)
    assert following is not None
    following.end(now=2.0)
    sizes = {worker: tree_of(b).size(worker.slot) for worker in b.workers}
    assert sizes == {following.worker: len(PROMPT), b.workers[1 - b.number(following.worker)]: 0}


def test_f12_what_another_request_used_since_stays() -> None:
    for text in (PROMPT, PROMPT + b" and more", PROMPT[:40]):
        b = Bench(1, "cache_aware")
        refused = b.route(PROMPT)
        b.serve(text, now=1.0)
        refused.end(Outcome.REJECTED, 2.0)
        assert tree_of(b).match(b"", PROMPT).length(0) >= min(len(text), len(PROMPT))
        check(tree_of(b))


@pytest.mark.parametrize("event", ["remove", "emptied"])
def test_f12_the_worker_may_be_gone_or_emptied_meanwhile(event: str) -> None:
    b = Bench(2, "cache_aware")
    attempt = b.route(PROMPT)
    b.fleet.remove(attempt.worker) if event == "remove" else b.fleet.emptied(attempt.worker)
    attempt.end(Outcome.REJECTED, 1.0)
    check(tree_of(b))


TEXT = st.binary(min_size=1, max_size=12).map(lambda text: bytes(byte % 3 + 97 for byte in text))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(TEXT, st.integers(0, 2)), max_size=12), TEXT, st.integers(0, 2), st.sampled_from([3, 1 << 16])
)
def test_f12_inserting_and_forgetting_leaves_what_was_there(
    texts: list[tuple[bytes, int]], text: bytes, slot: int, edge: int
) -> None:
    tree = Tree(1000, max_edge=edge)
    for _ in range(3):
        tree.add_slot()
    for now, (each, number) in enumerate(texts):
        tree.insert(tree.match(b"", each), number, float(now))
    held = {each: tree.match(b"", each).length(slot) for each, _ in [*texts, (text, 0)]}
    sizes = tree.sizes
    added = tree.insert(tree.match(b"", text), slot, 99.0)
    assert tree.forget(b"", text, slot, added, 99.0) == added
    assert tree.sizes == sizes
    assert {each: tree.match(b"", each).length(slot) for each in held} == held
    check(tree)
