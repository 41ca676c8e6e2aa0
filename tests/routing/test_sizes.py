"""Slots by size: against looking at all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.routing.prefix_tree.tree import Tree


def some_of(data: st.DataObject, slots: list[int]) -> list[int]:
    return data.draw(st.lists(st.sampled_from(slots), min_size=1, unique=True))


def check(tree: Tree, some: list[int]) -> None:
    least = min(tree.size(each) for each in some)
    expected = sum(1 << each for each in some if tree.size(each) == least)
    assert tree.smallest(sum(1 << each for each in some)) == expected


@settings(max_examples=50)
@given(st.data())
def test_the_smallest_slots_are_those_that_looking_at_all_finds(data: st.DataObject) -> None:
    tree = Tree(40)
    slots = [tree.add_slot() for _ in range(data.draw(st.integers(1, 20)))]
    for now in range(data.draw(st.integers(1, 25))):
        step = data.draw(st.sampled_from(("insert", "insert", "insert", "expire", "forget", "retire", "add")))
        slot = data.draw(st.sampled_from(slots))
        text = data.draw(st.binary(min_size=1, max_size=30))
        if step == "insert":
            tree.insert(tree.match(b"", text), slot, float(now))
        elif step == "expire":
            tree.expire(float(now - 5), 3)
        elif step == "forget":
            tree.forget(b"", text, slot, tree.insert(tree.match(b"", text), slot, float(now)), float(now))
        elif step == "add":
            slots.append(tree.add_slot())
        elif len(slots) > 1:
            slots.remove(slot)
            tree.retire(slot)
        check(tree, some_of(data, slots))
    while tree.reclaim(100):
        pass


def forget(tree: Tree, slot: int) -> None:
    assert tree.forget(b"", b"newest", slot, len(b"newest"), 4.0) == len(b"newest")


def expire(tree: Tree, slot: int) -> None:
    assert tree.expire(1.5, 1) == 1


def trim(tree: Tree, slot: int) -> None:
    tree.bound(slot, 60)
    assert tree.trim(1) == 1


def come_back(tree: Tree, slot: int) -> None:
    tree.retire(slot)
    while tree.reclaim(1):
        pass
    assert tree.add_slot() == slot


@pytest.mark.parametrize("change", [forget, expire, trim, come_back])
def test_whatever_changes_a_size_is_noticed_at_the_next_question(change: Callable[[Tree, int], None]) -> None:
    """Of so many slots the smallest is found by what was noted of them when it was asked for last."""
    tree = Tree(100)
    slots = [tree.add_slot() for _ in range(20)]
    one, *others = slots
    for size, slot in enumerate(others, 60):
        tree.insert(tree.match(b"", b"%d" % size + b"x" * (size - 2)), slot, 2.0)
    for now, text in ((1.0, b"o" * 50), (3.0, b"middle")):
        tree.insert(tree.match(b"", text), one, now)
    assert tree.smallest(tree.alive) == 1 << one
    tree.insert(tree.match(b"", b"newest"), one, 4.0)
    assert tree.smallest(tree.alive) == 1 << others[0]
    change(tree, one)
    assert tree.smallest(tree.alive) == 1 << one
    for slot in slots:
        tree.retire(slot)
    while tree.reclaim(100):
        pass
