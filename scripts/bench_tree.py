"""Measure the prefix tree by itself: `python scripts/bench_tree.py [--texts N] [--slots N]`.

Every text is new and shares three quarters with one of 32 stored prefixes, as chats with a few system prompts do. Each
row is measured twice: while the tree fills, and when it is full, so that each insertion also evicts. Then follow the
memory per node, the longest single pause, and the cost of a large tree for the cyclic garbage collector.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
import tracemalloc

from sglang_router.routing.prefix_tree.tree import Tree

SIZES = (200, 1024, 4096, 16384, 65536)
NAMESPACE = b"model"


def make_texts(rng: random.Random, size: int, count: int) -> list[bytes]:
    """Return texts of `size` bytes; three quarters of each are one of 32 shared prefixes."""
    shared = [rng.randbytes(size * 3 // 4) for _ in range(32)]
    return [shared[i % 32] + rng.randbytes(size - size * 3 // 4) for i in range(count)]


def fill(tree: Tree, slots: list[int], texts: list[bytes], start: int = 0) -> tuple[list[int], list[int]]:
    """Match and insert each text; return the nanoseconds of each match and of each insertion."""
    clock = time.perf_counter_ns
    matching, inserting = [], []
    for i, text in enumerate(texts):
        slot = slots[i // 32 % len(slots)]
        begin = clock()
        match = tree.match(NAMESPACE, text)
        middle = clock()
        tree.insert(match, slot, start + i)
        inserting.append(clock() - middle)
        matching.append(middle - begin)
    return matching, inserting


def quantile(nanoseconds: list[int], share: float) -> float:
    """Return a quantile in microseconds."""
    return sorted(nanoseconds)[int(len(nanoseconds) * share)] / 1000


def speed(rng: random.Random, count: int, slot_count: int) -> None:
    print(f"{'microseconds':>16}  {'match':^15} {'insert':^15} {'both':^15} | full: {'insert':^15} {'both':^15}")
    print(f"{'text size':>16}  " + "    p50     p99 " * 3 + "|       " + "    p50     p99 " * 2)
    for size in SIZES:
        cells = []
        for full in (False, True):
            tree = Tree(size * count // 8 // slot_count if full else size * count)
            slots = [tree.add_slot() for _ in range(slot_count)]
            fill(tree, slots, make_texts(rng, size, count))
            matching, inserting = fill(tree, slots, make_texts(rng, size, count), count)
            both = [m + i for m, i in zip(matching, inserting, strict=True)]
            cells += [] if full else [matching]
            cells += [inserting, both]
        shown = [f"{quantile(cell, 0.5):7.2f} {quantile(cell, 0.99):7.2f} " for cell in cells]
        print(f"{size:>16}  {''.join(shown[:3])}|       {''.join(shown[3:])}")


def collection() -> float:
    """Return the milliseconds of a full garbage collection."""
    begin = time.thread_time_ns()
    gc.collect()
    return (time.thread_time_ns() - begin) / 1e6


def space(rng: random.Random, count: int) -> None:
    """Measure short texts under one prefix: memory besides the text, garbage collection, the longest pauses."""
    texts = [b"a system prompt that all share. " + rng.randbytes(32) for _ in range(count)]
    tree = Tree(1 << 30, max_entries=1 << 30)
    slot = tree.add_slot()
    before = collection()
    tracemalloc.start()
    for i, text in enumerate(texts):
        tree.insert(tree.match(NAMESPACE, text), slot, float(i))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"\n{count:,} texts of 64 bytes: {tree.nodes:,} nodes, {(used - tree.held) / count:.0f} bytes a text")
    print(f"a full garbage collection: {before:.1f} ms before, {collection():.1f} ms with the tree")
    tree.retire(slot)
    clock = time.thread_time_ns  # CPU time, so that other processes do not count as pauses of the tree
    moments = [clock()]
    while tree.reclaim(100):
        moments.append(clock())
    slices = [after - before for before, after in itertools.pairwise(moments)]
    print(f"reclaimed 100 at a time: p50 {quantile(slices, 0.5):.0f} us, longest {max(slices) / 1000:.0f} us")
    tree = Tree(count * 16)
    slot = tree.add_slot()
    times = []
    for i, text in enumerate(texts):
        begin = clock()
        tree.insert(tree.match(NAMESPACE, text), slot, i)
        times.append(clock() - begin)
    shares = ", ".join(f"p{share * 100:g} {quantile(times, share):.1f}" for share in (0.5, 0.99, 0.999))
    print(f"{count:,} insertions, half into a full tree: {shares}, longest {max(times) / 1e3:.0f} us of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the prefix tree.")
    parser.add_argument("--texts", type=int, default=2000, help="per row (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=4, help="workers (default: %(default)s)")
    arguments = parser.parse_args()
    rng = random.Random(7)
    gc.collect()
    gc.disable()  # as in the router, which has its own schedule of collections
    speed(rng, arguments.texts, arguments.slots)
    space(rng, 50 * arguments.texts)


if __name__ == "__main__":
    main()
