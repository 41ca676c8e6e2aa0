"""The prefix tree beside a model by brute force, driven by Hypothesis.

The model knows nothing of nodes. For each slot it keeps every prefix that the slot holds, byte by byte, and when it
was last used: a text of n bytes is n prefixes, so the size of a slot is how many there are. Which prefixes an
eviction takes is the tree's choice; the model checks that the choice was least recent first, no more than needed,
and, for an expiry, exact. After each step `prefix_trees.check` holds the structure against its promises.
"""

from __future__ import annotations

import sys

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefix_trees import BIG, Prefix, check, held, ring, walk
from sglang_router.routing.prefix_tree.node import Node, Use
from sglang_router.routing.prefix_tree.slot import owned_below
from sglang_router.routing.prefix_tree.tree import Tree

letters = st.lists(st.sampled_from(["a", "b", "é", "è", "水", "氷", "😀", "😁"]), max_size=4)
texts = st.one_of(st.just(b""), letters.map(lambda parts: "".join(parts).encode()))
cuts = st.sampled_from([0, 0, 1, 2, 3, 7])  # may end a text inside a character
namespaces = st.sampled_from([b"m", b"n"])
picks = st.integers(0, 1 << 16)


def prefixes(namespace: bytes, text: bytes) -> set[Prefix]:
    return {(namespace, text[:n]) for n in range(1, len(text) + 1)}


class TreeBesideModel(RuleBasedStateMachine):
    """`held[slot]` says when each prefix was last used, `ended[slot]` where texts ended. Live slots only."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.held: dict[int, dict[Prefix, int]] = {}
        self.ended: dict[int, set[Prefix]] = {}
        self.seen = [b"a"]

    @initialize(
        size=st.integers(1, 40),
        entries=st.one_of(st.none(), st.integers(1, 6)),
        text=st.one_of(st.none(), st.integers(1, 40)),
        edge=st.sampled_from([1, 2, 3, 5, 64]),
        evictions=st.sampled_from([1, 2, 64]),
        slots=st.integers(1, 3),
    )
    def begin(self, size: int, entries: int | None, text: int | None, edge: int, evictions: int, slots: int) -> None:
        self.tree = Tree(size, max_text=text, max_entries=entries, max_edge=edge, evictions_per_insert=evictions)
        # Few entries, little work allowed: even a mark just made may have to go, so the order is not exact.
        self.few, self.exact = entries is not None, entries is None or evictions == 64
        for _ in range(slots):
            self.add_slot()

    def pick(self, number: int) -> int:
        return sorted(self.held)[number % len(self.held)]

    def some_text(self, text: bytes, base: int, cut: int) -> bytes:
        """A text that continues, or shortens, one seen before: else hardly two would ever share anything."""
        old = self.seen[-1 - base % min(len(self.seen), 6)]
        return old[: len(old) - cut] + text

    # -- rules ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.held) < 4)
    @rule()
    def add_slot(self) -> None:
        slot = self.tree.add_slot()
        assert slot not in self.held
        assert not any(node.owners >> slot & 1 for _, node in walk(self.tree)), "a number with leftovers"
        self.held[slot], self.ended[slot] = {}, set()

    @precondition(lambda self: len(self.held) > 1)
    @rule(which=picks)
    def retire(self, which: int) -> None:
        slot = self.pick(which)
        self.tree.retire(slot)
        del self.held[slot], self.ended[slot]

    @rule(budget=st.sampled_from([1, 3, BIG]))
    def reclaim(self, budget: int) -> None:
        done = self.tree.reclaim(budget)
        assert done <= budget
        assert done == budget or self.tree.retired_size == 0

    @precondition(lambda self: self.held)
    @rule(steps=st.lists(st.tuples(picks, namespaces, texts, picks, cuts), min_size=2, max_size=12))
    def insert(self, steps: list[tuple[int, bytes, bytes, int, int]]) -> None:
        for which, namespace, text, base, cut in steps:
            self.insert_one(self.pick(which), namespace, self.some_text(text, base, cut))
            self.agrees()

    def insert_one(self, slot: int, namespace: bytes, text: bytes) -> None:
        self.seen.append(text)
        self.now += 1
        match = self.tree.match(namespace, text)
        evictions = self.tree.evictions(slot)
        grown = self.tree.insert(match, slot, self.now)

        before = set(self.held[slot])
        text = text[: self.tree.max_text]
        inserted = prefixes(namespace, text)
        self.held[slot].update(dict.fromkeys(inserted, self.now))
        if text:
            self.ended[slot].add((namespace, text))
        after = held(self.tree, slot)
        assert grown == len(inserted & after - before)
        assert self.tree.evictions(slot) - evictions <= self.tree.evictions_per_insert
        self.note_evicted(slot, after, may_shorten=inserted - before)

    @precondition(lambda self: self.held)
    @rule(namespace=namespaces, text=texts, base=picks, cut=cuts, mask=st.integers(0, 63))
    def match(self, namespace: bytes, text: bytes, base: int, cut: int, mask: int) -> None:
        self.compare(namespace, self.some_text(text, base, cut), mask)

    @rule(age=st.integers(0, 30), budget=st.sampled_from([1, 3, BIG]))
    def expire(self, age: int, budget: int) -> None:
        before = self.now - age
        done = self.tree.expire(before, budget)
        assert done <= budget
        for slot, times in self.held.items():
            idle = {prefix for prefix, time in times.items() if time < before}
            lost = set(times) - held(self.tree, slot)
            assert not self.exact or (lost == idle if done < budget else lost <= idle)
            self.drop(slot, lost)

    @rule(budget=st.sampled_from([1, 3, BIG]))
    def trim(self, budget: int) -> None:
        done = self.tree.trim(budget)
        assert done <= budget
        if done < budget:
            assert all(size <= self.tree.max_size for size in self.tree.sizes.values())
        for slot, times in self.held.items():
            self.drop(slot, set(times) - held(self.tree, slot))

    @precondition(lambda self: self.now > 30)
    @rule()
    def empty(self) -> None:
        """Nothing is left of an emptied tree, and nobody but this list still knows its nodes and uses."""
        things: list[Node | Use] = [node for _, node in walk(self.tree)]
        for books in self.tree._slots:  # newest first: a use that has left still refers to the next newer one
            things += reversed(ring(self.tree, books.number))
        for slot in list(self.held):
            self.tree.retire(slot)
            del self.held[slot], self.ended[slot]
        self.tree.reclaim(BIG)
        assert (self.tree.nodes, self.tree.held, self.tree._roots, self.tree.retired_size) == (0, 0, {}, 0)
        self.now = 0
        while things:
            thing = things.pop()
            assert sys.getrefcount(thing) == 2

    # -- what is compared ----------------------------------------------------------------------------------------------

    def compare(self, namespace: bytes, text: bytes, mask: int) -> None:
        """A match says of each slot what the model says."""
        lengths = {
            slot: max((n for n in range(1, len(text) + 1) if (namespace, text[:n]) in times), default=0)
            for slot, times in self.held.items()
        }
        match = self.tree.match(namespace, text)

        def longest(slots: int) -> tuple[int, int]:
            among = {slot: n for slot, n in lengths.items() if slots >> slot & 1}
            most = max(among.values(), default=0)
            return most, sum(1 << slot for slot, n in among.items() if n == most and n)

        assert match.best(-1) == longest(-1)
        assert match.best(mask) == longest(mask)
        assert {slot: match.length(slot) for slot in lengths} == lengths

    def note_evicted(self, slot: int, after: set[Prefix], may_shorten: set[Prefix]) -> None:
        """Holds what an insertion evicted against the order of use, then takes it over into the model."""
        times = self.held[slot]
        assert after <= set(times)
        lost = set(times) - after
        shortened = lost & may_shorten
        assert not shortened or self.tree.evictions_per_insert < 64
        most = self.tree.max_size + self.tree.max_text
        assert not shortened or self.few or len(after) == most, "it lost more than it had to"
        evicted = lost - may_shorten
        if evicted and self.exact:
            newest = max(times[prefix] for prefix in evicted)
            oldest = min((times[prefix] for prefix in after), default=newest)
            assert newest <= oldest, "a younger one went first"
            last = sum(times[prefix] == newest for prefix in evicted)
            needed = len(after) + len(shortened) + last > self.tree.max_size
            assert needed or self.few, "it would have fitted without the last eviction"
        self.drop(slot, lost)

    def drop(self, slot: int, lost: set[Prefix]) -> None:
        for prefix in lost:
            del self.held[slot][prefix]
        self.ended[slot] -= lost

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tree"):
            return
        check(self.tree)
        assert self.tree.sizes == {slot: len(times) for slot, times in self.held.items()}
        where = {id(node): prefix for prefix, node in walk(self.tree)}
        for slot, times in self.held.items():
            assert held(self.tree, slot) == set(times)
            self.compare(b"m", self.seen[-1 - slot % len(self.seen)], 1 << slot)
            bit = 1 << slot
            for use in ring(self.tree, slot):
                prefix = where[id(use.node)]
                assert use.time <= times[prefix]
                if owned_below(use.node, bit):
                    assert prefix in self.ended[slot] or self.tree.evictions_per_insert < 64
                elif self.exact:
                    assert use.time == times[prefix]


TestTreeBesideModel = TreeBesideModel.TestCase
TestTreeBesideModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)
