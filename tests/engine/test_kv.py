"""The KV cache compared with a brute-force oracle, and some examples.

The oracle keeps every node as the whole token sequence from the root to its end, in a plain dict, and searches all of
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_router.engine.kv import WIDTH, CacheHandle, CacheNode, KVCache, pack, unpack

Tokens = tuple[int, ...]
Place = tuple[str, Tokens]


def longest_common(first: Tokens, second: Tokens) -> int:
    return next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))  # noqa: B905


@dataclass
class OracleHandle:
    namespace: str
    path: Tokens
    length: int


class Oracle:
    """Nodes with the time of their last use; handles with the path they lock."""

    def __init__(self, capacity: int, page: int) -> None:
        self.page = page
        self.capacity = capacity // page * page
        self.ends: dict[Place, int] = {}
        self.handles: list[OracleHandle] = []
        self.clock = 0

    def match(self, namespace: str, tokens: Tokens) -> Tokens:
        self.clock += 1
        best = max((longest_common(end, tokens) for space, end in self.ends if space == namespace), default=0)
        path = tokens[: best // self.page * self.page]
        if path:
            self.ends[namespace, path] = self.clock
        for space, end in self.ends:
            if space == namespace and path[: len(end)] == end:
                self.ends[space, end] = self.clock
        return path

    def parent_length(self, place: Place) -> int:
        space, tokens = place
        return max(
            (len(end) for s, end in self.ends if s == space and len(end) < len(tokens) and tokens[: len(end)] == end),
            default=0,
        )

    def is_locked(self, place: Place) -> bool:
        return any(h.namespace == place[0] and h.path[: len(place[1])] == place[1] for h in self.handles)

    def is_leaf(self, place: Place) -> bool:
        space, tokens = place
        below = [end for s, end in self.ends if s == space and len(end) > len(tokens)]
        return not any(end[: len(tokens)] == tokens for end in below)

    def tokens_in(self, places: list[Place]) -> int:
        return sum(len(place[1]) - self.parent_length(place) for place in places)

    @property
    def tree(self) -> int:
        return self.tokens_in(list(self.ends))

    @property
    def locked(self) -> int:
        return self.tokens_in([place for place in self.ends if self.is_locked(place)])

    def private_of(self, handle: OracleHandle) -> int:
        return -(-handle.length // self.page) * self.page - len(handle.path)

    @property
    def private(self) -> int:
        return sum(map(self.private_of, self.handles))

    def grow(self, handle: OracleHandle, tokens: int) -> bool:
        before = self.private
        handle.length += tokens
        if self.private + self.locked > self.capacity:
            handle.length -= tokens
            return False
        assert self.private >= before
        while self.tree + self.private > self.capacity:
            leaves = [place for place in self.ends if self.is_leaf(place) and not self.is_locked(place)]
            del self.ends[min(leaves, key=lambda place: self.ends[place])]
        return True

    def commit(self, handle: OracleHandle, tokens: Tokens) -> None:
        whole = tokens[: len(tokens) // self.page * self.page]
        if len(whole) <= len(handle.path):
            return
        if self.match(handle.namespace, whole) != whole:
            self.clock += 1
            self.ends[handle.namespace, whole] = self.clock
        handle.path = whole


class CacheAgainstOracle(RuleBasedStateMachine):
    """A tiny alphabet and a tiny pool, so that collisions, splits and evictions happen all the time."""

    @initialize(capacity=st.integers(8, 40), page=st.integers(1, 4))
    def start(self, capacity: int, page: int) -> None:
        self.cache = KVCache(capacity, page)
        self.oracle = Oracle(capacity, page)
        self.open: list[tuple[CacheHandle, OracleHandle, Tokens]] = []

    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=24).map(tuple),
        namespace=st.sampled_from(["", "lora"]),
        extra=st.lists(st.integers(0, 2), min_size=30, max_size=30).map(tuple),
    )
    def acquire(self, tokens: Tokens, namespace: str, extra: Tokens) -> None:
        handle = self.cache.acquire(pack(tokens), namespace)
        path = self.oracle.match(namespace, tokens)
        assert handle.matched == len(path)
        twin = OracleHandle(namespace, path, len(path))
        self.oracle.handles.append(twin)
        self.open.append((handle, twin, tokens + extra))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), tokens=st.integers(1, 12))
    def grow(self, which: int, tokens: int) -> None:
        handle, twin, sequence = self.open[which % len(self.open)]
        tokens = min(tokens, len(sequence) - twin.length)
        assert handle.grow(tokens) == self.oracle.grow(twin, tokens)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), back=st.integers(0, 3))
    def commit(self, which: int, back: int) -> None:
        handle, twin, sequence = self.open[which % len(self.open)]
        computed = sequence[: max(twin.length - back, 0)]
        handle.commit(pack(computed))
        self.oracle.commit(twin, computed)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100))
    def close(self, which: int) -> None:
        handle, twin, _ = self.open.pop(which % len(self.open))
        handle.close()
        self.oracle.handles = [other for other in self.oracle.handles if other is not twin]

    @rule()
    def reset(self) -> None:
        assert self.cache.reset() == (not self.open)
        if not self.open:
            self.oracle.ends.clear()

    @invariant()
    def same_nodes_and_sizes(self) -> None:
        assert set(ends_of(self.cache)) == set(self.oracle.ends)
        sizes = (self.cache.tree, self.cache.locked, self.cache.private)
        assert sizes == (self.oracle.tree, self.oracle.locked, self.oracle.private)
        assert self.cache.tree + self.cache.private <= self.cache.capacity
        assert self.cache.available == self.cache.capacity - self.cache.private - self.cache.locked

    @invariant()
    def lengths(self) -> None:
        assert [handle.length for handle, _, _ in self.open] == [twin.length for _, twin, _ in self.open]


def ends_of(cache: KVCache) -> Iterator[Place]:
    """Return the end of every node of the real tree."""

    def walk(node: CacheNode, space: str, tokens: Tokens) -> Iterator[Place]:
        for edge, child in node.children.items():
            below = edge[0] if isinstance(edge, tuple) else space
            path = tokens + tuple(unpack(child.key))
            assert child.parent is node
            assert child.key
            yield below, path
            yield from walk(child, below, path)

    yield from walk(cache._root, "", ())


CacheAgainstOracle.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCacheAgainstOracle = CacheAgainstOracle.TestCase


def put(cache: KVCache, tokens: list[int], namespace: str = "") -> int:
    """Compute `tokens` and leave them in the cache; return how many were cached already."""
    handle = cache.acquire(pack(tokens), namespace)
    assert handle.grow(len(tokens) - handle.length)
    handle.commit(pack(tokens))
    handle.close()
    return handle.matched


def test_a_prefix_is_found_token_by_token() -> None:
    cache = KVCache(100)
    assert put(cache, [1, 2, 3, 4]) == 0
    assert put(cache, [1, 2, 3, 9]) == 3
    assert put(cache, [1, 2, 3, 4, 5]) == 4
    assert repr(cache) == "<KVCache 6 cached (0 locked), 0 private, of 100>"


def test_pages_are_found_whole() -> None:
    cache = KVCache(100, page_size=4)
    put(cache, list(range(10)))
    assert cache.tree == 8
    assert put(cache, list(range(10))) == 8
    assert put(cache, [0, 1, 2, 3, 4, 5, 99]) == 4


def test_adapters_do_not_share() -> None:
    cache = KVCache(100)
    put(cache, [1, 2, 3], "lora-a")
    assert put(cache, [1, 2, 3]) == 0
    assert put(cache, [1, 2, 3], "lora-a") == 3


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = KVCache(9)
    put(cache, [1, 1, 1])
    put(cache, [2, 2, 2])
    put(cache, [3, 3, 3])
    put(cache, [1, 1, 1])
    put(cache, [4, 4, 4])
    assert {tokens[0] for _, tokens in ends_of(cache)} == {1, 3, 4}
    assert cache.evicted == 3


def test_nothing_in_use_is_evicted() -> None:
    cache = KVCache(6)
    put(cache, [1, 2, 3])
    held = cache.acquire(pack([1, 2, 3]))
    other = cache.acquire(pack([7, 7, 7, 7]))
    assert not other.grow(4)
    assert other.grow(3)
    assert held.length == 3
    assert not cache.reset()
    held.close()
    assert other.grow(1)  # evicts what was held
    assert cache.tree == 0


def test_what_two_computed_at_once_is_kept_once() -> None:
    cache = KVCache(20)
    tokens = [5, 6, 7, 8]
    first, second = cache.acquire(pack(tokens)), cache.acquire(pack(tokens))
    for handle in (first, second):
        assert handle.grow(4)
    assert cache.private == 8
    first.commit(pack(tokens))
    second.commit(pack(tokens))
    assert (cache.tree, cache.private, cache.locked) == (4, 0, 4)


@pytest.mark.parametrize(("capacity", "page"), [(0, 1), (3, 4), (10, 0)])
def test_a_cache_without_room_for_a_page_is_refused(capacity: int, page: int) -> None:
    with pytest.raises(ValueError, match="page"):
        KVCache(capacity, page)


def test_packing() -> None:
    assert unpack(pack([0, 1, 0xFFFFFFFF])) == [0, 1, 0xFFFFFFFF]
    assert len(pack([1, 2])) == 2 * WIDTH
