"""Slots by size: against looking at all of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.routing.prefix_tree.tree import Tree


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
        some = data.draw(st.sets(st.sampled_from(slots), min_size=1))
        least = min(tree.size(each) for each in some)
        expected = sum(1 << each for each in some if tree.size(each) == least)
        assert tree.smallest(sum(1 << each for each in some)) == expected
    while tree.reclaim(100):
        pass
