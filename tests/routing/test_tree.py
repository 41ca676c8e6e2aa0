"""The prefix tree by plain examples, and the bounds of its work and memory (test_tree_model.py has the properties)."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest

from prefix_trees import BIG, check, check_node, put, shape, walk
from sglang_router.routing.prefix_tree.memory import TreeMemory
from sglang_router.routing.prefix_tree.slot import common_prefix
from sglang_router.routing.prefix_tree.tree import MAX_EDGE, Tree

# -- examples ----------------------------------------------------------------------------------------------------------


def test_an_empty_tree_knows_nothing() -> None:
    tree = Tree(100)
    slot = tree.add_slot()
    match = tree.match(b"m", b"hello")
    assert (match.best(-1), match.length(slot)) == ((0, 0), 0)
    assert put(tree, slot, b"") == 0
    assert (tree.nodes, tree.held, len(tree._roots)) == (0, 0, 0)


def test_texts_share_what_they_share() -> None:
    tree = Tree(1000)
    a, b = tree.add_slot(), tree.add_slot()
    assert put(tree, a, b"the sea is blue") == 15
    assert put(tree, b, b"the sea is deep") == 15
    assert put(tree, a, b"the sky") == 2
    assert shape(tree) == [
        (b"the s", 0b11),
        (b"the sea is ", 0b11),
        (b"the sea is blue", 0b01),
        (b"the sea is deep", 0b10),
        (b"the sky", 0b01),
    ]
    assert (tree.size(a), tree.size(b), tree.sizes) == (17, 15, {a: 17, b: 15})
    assert tree.held == 21
    assert repr(tree) == "<Tree slots=2 nodes=5 held=21 namespaces=1 retired_size=0>"
    check(tree)


def test_a_match_ends_inside_an_edge_and_tells_who_holds_how_much() -> None:
    tree = Tree(1000)
    a, b, c = (tree.add_slot() for _ in range(3))
    put(tree, a, b"the sea is blue")
    put(tree, b, b"the sea is deep")
    match = tree.match(b"m", b"the sea is black")
    assert match.best(-1) == (13, 1 << a)
    assert match.best(1 << b) == (11, 1 << b)
    assert match.best(1 << a | 1 << b) == (13, 1 << a)
    assert match.best(1 << c) == (0, 0)
    assert [match.length(slot) for slot in (a, b, c)] == [13, 11, 0]
    shorter = tree.match(b"m", b"the")
    assert shorter.best(-1) == (3, 0b011)


def test_a_match_tells_all_owners_the_longest_first() -> None:
    tree = Tree(BIG)
    one, two, three, four = (tree.add_slot() for _ in range(4))
    for slot, text in ((one, b"abcdef"), (two, b"abcd"), (three, b"abcdef"), (four, b"xyz")):
        put(tree, slot, text)
    match = tree.match(b"m", b"abcdefgh")
    assert match.owners(-1, 9) == [(6, 1 << one | 1 << three), (4, 1 << two)]
    assert match.owners(1 << two | 1 << four, 9) == [(4, 1 << two)]
    assert match.owners(-1, 1) == [(6, 1 << one | 1 << three)]
    put(tree, four, b"abc")
    with pytest.raises(RuntimeError):
        match.owners(-1, 9)


def test_a_slot_may_have_a_smaller_bound_than_the_tree() -> None:
    tree = Tree(100)
    small, large = tree.add_slot(), tree.add_slot()
    tree.bound(small, 20)
    tree.bound(large, 1000)  # not above that of the tree
    for number in range(12):
        for slot in (small, large):
            put(tree, slot, b"%d" % number * 10, float(number))
    assert tree.size(small) <= 20 < 60 < tree.size(large) <= 100
    tree.bound(large, 30)
    while tree.trim(1):
        pass
    assert tree.size(large) <= 30
    tree.bound(small, 5)
    put(tree, small, b"the text that was used last stays", 20.0)
    assert tree.size(small) == 33


def test_a_new_life_of_a_slot_has_the_bound_of_the_tree() -> None:
    tree = Tree(100)
    slot = tree.add_slot()
    tree.bound(slot, 20)
    tree.retire(slot)
    assert tree.books(tree.add_slot()).max_size == 100


def test_matching_changes_nothing() -> None:
    tree = Tree(8)
    slot = tree.add_slot()
    put(tree, slot, b"aaaa", 1)
    put(tree, slot, b"bbbb", 2)
    version = tree.version
    tree.match(b"m", b"aaaa")
    tree.match(b"other", b"aa")
    assert tree.version == version
    put(tree, slot, b"c", 3)
    assert shape(tree) == [(b"bbbb", 1), (b"c", 1)]


def test_namespaces_are_trees_of_their_own() -> None:
    tree = Tree(100)
    slot = tree.add_slot()
    put(tree, slot, b"hello", namespace=b"model-a")
    assert tree.match(b"model-b", b"hello").best(-1)[0] == 0
    assert tree.match(b"model-a", b"hello").best(-1)[0] == 5
    put(tree, slot, b"hello", namespace=b"model-b")
    assert tree.size(slot) == 10


def test_a_conversation_that_grows_stays_one_edge() -> None:
    tree = Tree(1000)
    slot = tree.add_slot()
    for turn in (b"hi", b"hi there", b"hi there, how are you"):
        put(tree, slot, turn)
    assert shape(tree) == [(b"hi there, how are you", 1)]
    assert tree.entries(slot) == 1


def test_strangers_that_leave_do_not_leave_a_path_in_pieces() -> None:
    tree = Tree(100)
    a, b = tree.add_slot(), tree.add_slot()
    put(tree, a, b"one long prompt", 1)
    put(tree, b, b"one long story", 2)
    put(tree, b, b"one log", 3)
    assert len(shape(tree)) == 5
    tree.retire(b)
    tree.reclaim(BIG)
    assert shape(tree) == [(b"one long prompt", 1)]
    check(tree)


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = Tree(12)
    slot = tree.add_slot()
    put(tree, slot, b"aaaa", 1)
    put(tree, slot, b"bbbb", 2)
    put(tree, slot, b"cccc", 3)
    put(tree, slot, b"aaaa", 4)
    put(tree, slot, b"dd", 5)
    assert shape(tree) == [(b"aaaa", 1), (b"cccc", 1), (b"dd", 1)]
    assert (tree.evictions(slot), tree.evicted_bytes(slot), tree.size(slot)) == (1, 4, 10)


def test_a_prompt_in_use_outlives_an_old_continuation_of_it() -> None:
    """Its use is recorded inside the longer edge; with uses at leaves only, both would go together."""
    tree = Tree(12)
    slot = tree.add_slot()
    put(tree, slot, b"prompt and", 1)
    put(tree, slot, b"prompt", 2)
    put(tree, slot, b"xx", 3)
    put(tree, slot, b"y", 4)
    assert shape(tree) == [(b"prompt", 1), (b"xx", 1), (b"y", 1)]
    check(tree)


def test_one_slots_eviction_leaves_the_others_what_they_hold() -> None:
    tree = Tree(10)
    a, b = tree.add_slot(), tree.add_slot()
    put(tree, a, b"shared", 1)
    put(tree, b, b"shared", 1)
    put(tree, a, b"other text", 2)
    assert shape(tree) == [(b"other text", 1 << a), (b"shared", 1 << b)]


def test_entries_are_bounded_too() -> None:
    tree = Tree(1000, max_entries=3)
    slot = tree.add_slot()
    for i in range(10):
        put(tree, slot, bytes([i]), i)
    assert [text for text, _ in shape(tree)] == [b"\x07", b"\x08", b"\x09"]
    assert tree.entries(slot) == 3
    assert Tree(1 << 24).max_entries == 1 << 17


def test_a_text_longer_than_the_bound_is_cut() -> None:
    tree = Tree(10)
    slot = tree.add_slot()
    assert put(tree, slot, b"0123456789abcdef") == 10
    assert tree.match(b"m", b"0123456789abcdef").best(-1)[0] == 10
    assert tree.size(slot) == 10


def test_one_insertion_never_evicts_more_than_its_share_but_loses_its_end() -> None:
    tree = Tree(1000, max_text=900, max_entries=1000, evictions_per_insert=4)
    slot = tree.add_slot()
    for i in range(500):
        put(tree, slot, i.to_bytes(4, "little"), i)
    assert tree.size(slot) > 990
    before = tree.evictions(slot)
    first = put(tree, slot, b"\xfe" * 900, 1000)
    assert first == 899  # its first byte was known; it may be too much for a while
    second = put(tree, slot, b"\xff" * 900, 1001)  # its first byte was known too
    assert tree.evictions(slot) - before <= 8
    assert tree.size(slot) == 1900
    assert 0 < second < 900
    assert tree.match(b"m", b"\xff" * 900).best(-1)[0] == 1 + second
    check(tree)
    while tree.trim(7) == 7:
        check(tree)
    assert tree.size(slot) <= 1000
    check(tree)


def test_a_text_that_found_no_room_counts_as_used_where_it_is_known() -> None:
    """Its end is given back whole, but the part that others share was used, and outlives what was not."""
    tree = Tree(5, max_text=5, evictions_per_insert=1)
    slot = tree.add_slot()
    for now, text in enumerate((b"Pq", b"P", b"Pq", b"Ka", b"b")):
        put(tree, slot, text, now)
    tree.max_size, tree.max_text = 3, 2
    assert put(tree, slot, b"Kz", 5) == 0  # the one eviction it may make is of the mark at P, and frees nothing
    assert shape(tree) == [(b"K", 1), (b"Ka", 1), (b"Pq", 1), (b"b", 1)]
    for now, text in enumerate((b"f", b"gg", b"h"), 6):
        put(tree, slot, text, now)
    assert shape(tree) == [(b"K", 1), (b"f", 1), (b"gg", 1), (b"h", 1)]
    check(tree)


def test_a_shared_text_that_one_slot_continues_is_one_entry_of_it() -> None:
    tree = Tree(100)
    a, b = tree.add_slot(), tree.add_slot()
    put(tree, a, b"turn one", 1)
    put(tree, b, b"turn one", 2)
    put(tree, a, b"turn one, turn two", 3)
    assert (tree.entries(a), tree.entries(b)) == (1, 1)
    check(tree)


def test_a_stale_match_refuses_to_answer_and_is_inserted_all_the_same() -> None:
    tree = Tree(100)
    a, b = tree.add_slot(), tree.add_slot()
    put(tree, a, b"abc")
    stale = tree.match(b"m", b"abcd")
    tree.retire(a)
    tree.reclaim(BIG)
    with pytest.raises(RuntimeError, match="match again"):
        stale.best(-1)
    with pytest.raises(RuntimeError, match="match again"):
        stale.length(b)
    assert tree.insert(stale, b, 1) == 4
    assert shape(tree) == [(b"abcd", 1 << b)]


def test_a_retired_slot_is_gone_at_once_and_its_number_comes_back_when_it_is_reclaimed() -> None:
    tree = Tree(100)
    a, b = tree.add_slot(), tree.add_slot()
    put(tree, a, b"abcdef")
    put(tree, a, b"abcxyz")
    put(tree, b, b"abc")
    tree.retire(a)
    match = tree.match(b"m", b"abcdef")
    assert match.best(-1) == (3, 1 << b)
    assert (tree.sizes, tree.retired_size) == ({b: 3}, 9)
    assert tree.add_slot() == 2
    assert tree.reclaim(2) == 2
    assert tree.retired_size == 3
    assert tree.reclaim(BIG) == 1
    assert tree.reclaim(BIG) == 0
    assert tree.add_slot() == a
    assert shape(tree) == [(b"abc", 1 << b)]
    check(tree)


def test_matching_looks_past_several_levels_that_only_the_dead_hold() -> None:
    tree = Tree(100)
    a, b = tree.add_slot(), tree.add_slot()
    put(tree, b, b"ab")
    for text in (b"abcde", b"abcdefg", b"abcdx", b"abcdefghi"):
        put(tree, a, text)
    tree.retire(a)
    match = tree.match(b"m", b"abcdefghi!")
    assert match.best(-1) == (2, 1 << b)


def test_a_slot_whose_number_comes_back_starts_from_nothing() -> None:
    tree = Tree(3)
    slot = tree.add_slot()
    put(tree, slot, b"abc")
    put(tree, slot, b"xyz")
    assert tree.evictions(slot) == 1
    tree.retire(slot)
    tree.reclaim(BIG)
    assert tree.add_slot() == slot
    assert (tree.size(slot), tree.evictions(slot), tree.evicted_bytes(slot)) == (0, 0, 0)


def test_insertions_reclaim_without_a_timer() -> None:
    tree = Tree(1000)
    a, b = tree.add_slot(), tree.add_slot()
    for i in range(20):
        put(tree, a, bytes([i, 1]))
    tree.retire(a)
    for i in range(10):
        put(tree, b, bytes([i, 2]))
    assert tree.retired_size == 0
    assert all(owners == 1 << b for _, owners in shape(tree))
    check(tree)


@pytest.mark.parametrize("slot", [-1, 1, 7])
def test_slots_that_are_not_in_use_are_refused(slot: int) -> None:
    tree = Tree(100)
    tree.add_slot()
    tree.retire(tree.add_slot())
    with pytest.raises(KeyError):
        put(tree, slot, b"abc")
    with pytest.raises(KeyError):
        tree.size(slot)
    with pytest.raises(KeyError):
        tree.retire(slot)


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_size": 0},
        {"max_size": -5},
        {"max_text": 0},
        {"max_entries": 0},
        {"max_edge": 0},
        {"evictions_per_insert": 0},
    ],
)
def test_bounds_must_be_positive(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Tree(**{"max_size": 1, **bounds})


def test_expiry_takes_what_was_idle_within_its_budget() -> None:
    tree = Tree(1000)
    a, b = tree.add_slot(), tree.add_slot()
    for i in range(5):
        put(tree, a, bytes([i, i]), i)
        put(tree, b, bytes([i, i]), i + 10)
    match = tree.match(b"m", b"\x00")
    assert tree.expire(3, 2) == 2
    with pytest.raises(RuntimeError, match="match again"):
        match.length(b)
    assert tree.expire(3, BIG) == 1
    assert tree.expire(3, BIG) == 0
    assert (tree.size(a), tree.size(b), tree.evictions(a)) == (4, 10, 3)
    check(tree)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 129, 511, 512, 513, 5000, 70000])
def test_common_prefix_finds_the_place_wherever_it_is(length: int) -> None:
    edge = bytes(i * 7 & 255 for i in range(length))
    for place in {0, length // 7, length // 3, length // 2, length - 1}:
        other = edge[:place] + bytes([edge[place] ^ 1]) + edge[place + 1 :]
        assert common_prefix(edge, b"xy" + other, 2) == place
        assert common_prefix(edge, b"xy" + edge[:place], 2) == place
    assert common_prefix(edge, b"xy" + edge + b"more", 2) == length


# -- bounds of work and memory -----------------------------------------------------------------------------------------


def lines_run(tree: Tree, slot: int, text: bytes, now: float) -> int:
    """Matches and inserts; returns how many lines of Python that took, loops counted each time round."""
    lines = 0

    def trace(_frame: Any, event: str, _arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        put(tree, slot, text, now)
    finally:
        sys.settrace(before)
    return lines


def test_insertions_into_a_full_tree_of_any_age_stay_short() -> None:
    """200,000 distinct texts of 20 bytes through 64 kB: one insertion in 20 is counted line by line."""
    tree = Tree(1 << 16, max_entries=1 << 16)
    slot = tree.add_slot()
    longest = worst = 0
    for i in range(200_000):
        text = (i * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8, "big") + b"then the same"
        before = tree.evictions(slot)
        if i % 20 == 0:
            longest = max(longest, lines_run(tree, slot, text, i))
        else:
            put(tree, slot, text, i)
        worst = max(worst, tree.evictions(slot) - before)
    assert worst <= 8
    if inspect.isfunction(Tree.insert):  # compiled code has no lines that could be counted
        assert 50 < longest < 2000
    assert tree.size(slot) > (1 << 16) - 64
    check(tree)


def test_f11_a_long_text_in_a_full_tree_evicts_a_few_entries_only() -> None:
    """One prompt of 16 MiB evicted 131,072 entries in one step of the event loop: 303 ms."""
    tree = Tree(1 << 20, max_text=1 << 17)
    slot = tree.add_slot()
    for i in range(1 << 14):
        put(tree, slot, i.to_bytes(4, "big") * 32, i)
    assert tree.size(slot) > (1 << 20) - (1 << 15)
    for i in range(20):
        before = tree.evictions(slot)
        put(tree, slot, bytes([i]) * (1 << 24), 1 << 20)
        assert tree.evictions(slot) - before <= tree.evictions_per_insert
        assert tree.size(slot) <= (1 << 20) + (1 << 17)
    check(tree)


def test_f12_one_text_takes_an_eighth_of_what_is_remembered_of_a_worker() -> None:
    """One oversized prompt emptied a worker's tree: 1,000 entries became 1."""
    tree = TreeMemory(1 << 20).tree
    slot = tree.add_slot()
    for i in range(1000):
        put(tree, slot, i.to_bytes(4, "big") + bytes(900), i)
    put(tree, slot, b"x" * (1 << 24), 1000)
    while tree.trim(100):
        pass
    assert tree.size(slot) <= 1 << 20
    assert tree.entries(slot) > 850
    assert tree.match(b"m", b"x" * (1 << 24)).best(-1)[0] == 1 << 17


def test_f29_no_edge_is_long_so_that_a_short_text_copies_little() -> None:
    """Each short request that left a long edge copied the rest of it: 14 MiB, 1.4 ms for 11 bytes."""
    tree = Tree(1 << 24)
    slot = tree.add_slot()
    long = bytes(range(256)) * (1 << 14)
    put(tree, slot, long)
    assert max(len(node.edge) for _, node in walk(tree)) == MAX_EDGE
    assert tree.nodes == len(long) // MAX_EDGE
    for cut in (11, 1000, MAX_EDGE - 1, MAX_EDGE, MAX_EDGE + 1, 3 * MAX_EDGE + 7):
        put(tree, slot, long[:cut] + b"!", cut)
    for turn in range(1, 40):  # a conversation that grows stays a chain of few nodes
        put(tree, slot, b"hi" + long[: turn * 5000], 1000 + turn)
    for _, node in walk(tree):
        check_node(tree, node)
    assert tree.match(b"m", long).best(-1) == (len(long), 1 << slot)


def test_emptied_trees_give_their_memory_back() -> None:
    def grow_and_empty() -> Tree:
        tree = Tree(1 << 20)
        slots = [tree.add_slot() for _ in range(4)]
        for i in range(4000):
            text = b"system prompt %d, then user %d" % (i % 7, i * 7919 % 4001)
            put(tree, slots[i % 4], text, i)
            put(tree, slots[i // 4 % 4], text[: len(text) - i % 9], i)
        for slot in slots:
            tree.retire(slot)
        tree.reclaim(BIG)
        return tree

    grow_and_empty()  # whatever the interpreter keeps after a first run is not a leak
    before = sys.getallocatedblocks()
    tree = grow_and_empty()
    assert (tree.nodes, tree.held, tree._roots, tree.retired_size) == (0, 0, {}, 0)
    assert sys.getallocatedblocks() - before < 200
