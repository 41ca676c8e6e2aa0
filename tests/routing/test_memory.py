"""The memory of a policy: the tree's figures by worker, and what it gives to be saved and takes back."""

from __future__ import annotations

import pytest

from fleets import spec
from prefix_trees import check, put, ring, shape
from sglang_router.routing.policies.base import PrefixMemory
from sglang_router.routing.prefix_tree.memory import TreeMemory
from sglang_router.routing.worker import Worker


def memory_of(count: int, size: int = 100) -> tuple[TreeMemory, list[Worker]]:
    memory = TreeMemory(size)
    workers = [Worker(spec(f"w{n}"), f"id{n}", n + 1, 0.0) for n in range(count)]
    for worker in workers:
        assert memory.add(worker) == worker.slot
    return memory, workers


def test_what_it_says_of_a_worker_is_what_the_tree_says_of_its_slot() -> None:
    memory, (one, other) = memory_of(2)
    for n in range(9):
        put(memory.tree, one.slot, bytes([n]) * 20, float(n))
    put(memory.tree, other.slot, bytes([8]) * 20, 9.0)
    seen: PrefixMemory = memory
    assert [seen.size(worker) for worker in (one, other)] == [8 * 12, 12], "of a long text an eighth is remembered"
    assert [seen.entries(worker) for worker in (one, other)] == [8, 1]
    assert (seen.evictions(one), seen.evicted_bytes(one), seen.evictions(other)) == (1, 12, 0)
    assert (seen.nodes, seen.held, seen.retired_size) == (8, 96, 0)


def test_a_removed_worker_has_no_slot_and_what_it_held_is_still_to_be_freed() -> None:
    memory, (one, other) = memory_of(2)
    put(memory.tree, one.slot, b"abc")
    assert memory.remove(one) == 0
    assert (one.slot, memory.retired_size) == (-1, 3)
    with pytest.raises(KeyError):
        memory.size(one)
    assert memory.add(one) == 2, "a number is used again when nothing is left of it"
    assert memory.size(other) == 0


def test_what_is_read_can_be_taken_back_under_other_slots() -> None:
    memory, (one, other) = memory_of(2)
    put(memory.tree, one.slot, b"abc")
    put(memory.tree, other.slot, b"abd", 5.0)
    later, (taken, first, second) = memory_of(3)
    builder = later.builder({one.slot: first.slot, other.slot: second.slot}, 10.0, 12.0)
    for record in memory.walk().bite(100, 1 << 20):
        builder.add(record)
    builder.finish()
    check(later.tree)
    assert shape(later.tree) == [(b"ab", 0b110), (b"abc", 0b010), (b"abd", 0b100)]
    assert [later.size(worker) for worker in (taken, first, second)] == [0, 3, 3]
    times = [use.time for worker in (first, second) for use in ring(later.tree, worker.slot)]
    assert times == [10.0, 12.0], "no use is later than now"
