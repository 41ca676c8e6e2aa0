"""The tree as records: out and in again is the same tree, also when it changed meanwhile; in is sound or refused."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_trees import BIG, check, held, put, ring, shape, walk
from sglang_router.routing.prefix_tree.image import NAMESPACE, Builder, Walk
from sglang_router.routing.prefix_tree.node import Record
from sglang_router.routing.prefix_tree.tree import MAX_EDGE, Tree

texts = st.text("abc", max_size=7).map(str.encode)
steps = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([b"m", b"n"]), texts), max_size=25)


def tree_of(steps: list[tuple[int, bytes, bytes]], size: int = BIG, slots: int = 3) -> Tree:
    tree = Tree(size)
    for _ in range(slots):
        tree.add_slot()
    play(tree, steps)
    return tree


def play(tree: Tree, steps: list[tuple[int, bytes, bytes]], since: int = 0) -> None:
    for now, (slot, namespace, text) in enumerate(steps, since):
        put(tree, slot, text, float(now), namespace)


def told(tree: Tree, records: int = 3) -> list[Record]:
    walk = Walk(tree)
    return [record for bite in iter(lambda: walk.bite(records, BIG), []) for record in bite]


def built(records: list[Record], size: int = BIG, slots: int = 3) -> Tree:
    tree = Tree(size)
    builder = Builder(tree, {slot: tree.add_slot() for slot in range(slots)})
    for record in records:
        builder.add(record)
    builder.finish()
    return tree


def everything(tree: Tree) -> object:
    """What two trees of the same content have in common."""
    nodes = sorted((prefix, node.owners) for prefix, node in walk(tree))
    uses = [[(use.time, use.node.edge) for use in ring(tree, slot.number)] for slot in tree._slots]
    return nodes, uses, tree.sizes, tree.held, tree.nodes


def test_records_are_as_the_picture_shows() -> None:
    tree = Tree(BIG)
    for _ in range(3):
        tree.add_slot()
    put(tree, 0, b"Hello", 3.1)
    put(tree, 1, b"You are a cook", 9.0)
    put(tree, 0, b"You are the sea", 17.2)
    put(tree, 2, b"You are the sea", 40.9)

    assert told(tree) == [
        Record(NAMESPACE, b"m", []),
        Record(0, b"Hello", [(0, 3.1)]),
        Record(0, b"You are ", []),
        Record(8, b"a cook", [(1, 9.0)]),
        Record(8, b"the sea", [(2, 40.9), (0, 17.2)]),
    ]


@given(steps, st.integers(1, 4), st.integers(1, 30))
def test_out_and_in_again_is_the_same_tree(steps: list[tuple[int, bytes, bytes]], bite: int, size: int) -> None:
    tree = tree_of(steps, size)
    again = built(told(tree, bite), size)
    check(again)
    assert everything(again) == everything(tree)


@given(steps, steps, st.integers(0, 2), st.integers(1, 3))
def test_what_was_there_all_the_time_is_told(
    before: list[tuple[int, bytes, bytes]], meanwhile: list[tuple[int, bytes, bytes]], retired: int, bite: int
) -> None:
    """One insertion after each bite, and a worker that leaves in the middle."""
    tree = tree_of(before)
    old = {slot: held(tree, slot) for slot in range(3)}
    walk = Walk(tree)
    records: list[Record] = []
    for now, step in enumerate(meanwhile, len(before)):
        records += walk.bite(bite, BIG)
        if now == len(before) + 8:
            tree.retire(retired)
            tree.reclaim(BIG)
            tree.add_slot()
            old[retired] = set()
        play(tree, [step], now)
    while more := walk.bite(bite, BIG):
        records += more

    again = built(records)
    check(again)
    for slot in set(range(3)) - {retired}:
        assert old[slot] <= held(again, slot) <= held(tree, slot)


@given(steps, st.integers(1, 12))
def test_a_smaller_bound_is_kept(steps: list[tuple[int, bytes, bytes]], size: int) -> None:
    again = built(told(tree_of(steps)), size)
    check(again)


def test_the_newest_texts_survive_a_smaller_bound() -> None:
    again = built(told(tree_of([(0, b"m", b"aaaa"), (0, b"m", b"bbbb"), (0, b"m", b"cccc")])), 8)
    assert shape(again) == [(b"bbbb", 1), (b"cccc", 1)]


def test_slots_are_renumbered_and_strangers_left_out() -> None:
    tree = tree_of([(0, b"m", b"abc"), (1, b"m", b"abd"), (2, b"m", b"xyz"), (2, b"n", b"alone")])
    again = Tree(BIG)
    again.add_slot()
    builder = Builder(again, {1: again.add_slot(), 0: 0})
    for record in told(tree):
        builder.add(record)
    builder.finish()
    check(again)
    assert shape(again) == [(b"ab", 0b11), (b"abc", 0b01), (b"abd", 0b10)]


def test_the_smallest_slot_is_right_although_it_was_asked_for_before() -> None:
    tree = tree_of([(slot, b"m", b"%02d" % slot + b"x" * slot) for slot in range(12)], slots=12)
    again = Tree(BIG)
    builder = Builder(again, {slot: again.add_slot() for slot in range(12)})
    assert again.smallest(again.alive) == again.alive
    for record in told(tree):
        builder.add(record)
    builder.finish()
    assert again.smallest(again.alive) == 0b1
    assert again.smallest(again.alive ^ 0b11) == 0b100


def test_times_are_shifted_but_never_into_the_future() -> None:
    again = Tree(BIG)
    builder = Builder(again, {0: again.add_slot()}, shift=-100.0, now=-92.0)
    for record in [*told(tree_of([(0, b"m", b"a"), (0, b"m", b"b")])), Record(0, b"c", [(0, 50.0)])]:
        builder.add(record)
    builder.finish()
    assert [use.time for use in ring(again, 0)] == [-100.0, -99.0, -92.0]


def test_a_long_text_comes_in_pieces() -> None:
    tree = tree_of([(0, b"m", bytes(range(256)) * 3000)])
    records = told(tree)
    assert max(len(record.text) for record in records) == MAX_EDGE
    assert len(records) > 3
    assert everything(built(records)) == everything(tree)


def test_a_piece_that_is_too_long_for_one_edge_is_several() -> None:
    tree = tree_of([(0, b"m", bytes(range(256)) * 3000)])
    whole = [Record(NAMESPACE, b"m", []), Record(0, bytes(range(256)) * 3000, [(0, 0.0)])]
    assert everything(built(whole)) == everything(tree)


def test_a_bite_ends_at_its_size() -> None:
    tree = tree_of([(0, b"m", bytes([n]) * 100) for n in range(50)])
    assert len(Walk(tree).bite(1000, 450)) == 6


record = st.one_of(
    st.builds(Record, st.just(NAMESPACE), texts, st.just([])),
    st.builds(Record, st.integers(-2, 8), texts, st.lists(st.tuples(st.integers(-1, 4), st.floats()), max_size=2)),
)


@given(st.lists(record, max_size=12))
@settings(max_examples=300)
def test_any_records_make_a_sound_tree_or_are_refused(records: list[Record]) -> None:
    tree = Tree(20)
    builder = Builder(tree, {slot: tree.add_slot() for slot in range(3)})
    try:
        for record in records:
            builder.add(record)
    except ValueError:
        builder.give_up()
        assert tree.nodes == tree.held == 0
    else:
        builder.finish()
    check(tree)
    put(tree, 0, b"abc", sys.float_info.max)
    check(tree)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([Record(0, b"a", [])], "without a place"),
        ([Record(-1, b"m", []), Record(0, b"", [])], "without a place"),
        ([Record(-1, b"m", []), Record(1, b"a", [])], "without a place"),
        ([Record(-1, b"m", []), Record(0, b"b", [(0, 1.0)]), Record(0, b"a", [])], "not in order"),
        ([Record(-1, b"m", []), Record(0, b"b", [(0, 1.0)]), Record(0, b"b", [])], "not in order"),
        ([Record(-1, b"m", []), Record(0, b"b", [(0, 1.0)]), Record(-1, b"m", [])], "comes twice"),
        ([Record(-1, b"m", []), Record(0, b"b", [(0, float("nan"))])], "a time"),
    ],
)
def test_records_out_of_place_are_refused(records: list[Record], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        built(records)


def test_only_an_empty_tree_can_be_filled() -> None:
    with pytest.raises(ValueError, match="empty"):
        Builder(tree_of([(0, b"m", b"a")]), {})
