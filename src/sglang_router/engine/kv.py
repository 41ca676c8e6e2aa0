"""The KV cache of the built-in engine: a radix tree over tokens, with pages, locks and least-recently-used
eviction.

Every token an engine has computed occupies one slot of a pool. Slots of finished work are not freed but
kept in a tree, so a later prompt that starts with the same tokens finds them:

    root ── [you are a helpful assistant .] ─┬─ [hi] ── [hello !]         a node is a run of tokens
         └─ (lora-7) [you are ...]           └─ [what is the time ?]      each adapter or salt has its own

    capacity = tree (locked + evictable) + private (computed by running requests, not in the tree yet) + free

A running request holds a `Handle`: it locks the path it uses, so nothing under its feet is evicted, and
owns the private slots behind it. `grow` takes slots (evicting old leaves if it must), `commit` moves
computed tokens into the tree, where others find them at once, and `close` gives everything back. SGLang's
`RadixCache` does the same with the real tensors.

Tokens are packed, four bytes each (`pack`): comparing a long run is then one `memcmp`. All lengths are in
tokens. With `page_size` p the tree holds whole pages only and a match is a multiple of p, as in SGLang.
Recency is counted in operations, not in seconds: the cache knows no clock.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable
from itertools import count

WIDTH = array("I").itemsize


def pack(tokens: Iterable[int]) -> bytes:
    """Token ids (32 bits, unsigned) as bytes, `WIDTH` each."""
    return array("I", tokens).tobytes()


def unpack(packed: bytes) -> list[int]:
    """The token ids that `pack` was given."""
    return array("I", packed).tolist()


class Node:
    """A run of tokens, reached through its parent's run. `locks` counts the handles at or below it."""

    __slots__ = ("children", "edge", "key", "locks", "parent", "queued", "used")

    def __init__(self, parent: Node | None, edge: object, key: bytes, used: int) -> None:
        self.parent = parent
        self.edge = edge
        self.key = key
        self.children: dict[object, Node] = {}
        self.locks = 0
        self.used = used
        self.queued = False

    def __repr__(self) -> str:
        return f"<Node {len(self.key) // WIDTH} tokens, {len(self.children)} children, {self.locks} locks>"


class Handle:
    """What one running request holds of the cache. Closed exactly once; a closed handle holds nothing.

    `matched` is how many tokens were found when it was taken, `length` how many it now has slots for.
    """

    __slots__ = ("_cache", "_namespace", "_node", "_private", "_shared", "length", "matched")

    def __init__(self, cache: KVCache, namespace: str, node: Node, matched: int) -> None:
        self._cache = cache
        self._namespace = namespace
        self._node = node
        self._shared = matched
        self._private = 0
        self.matched = matched
        self.length = matched

    def __repr__(self) -> str:
        return f"<Handle {self.length} tokens, {self._shared} of them in the tree>"

    def grow(self, tokens: int) -> bool:
        """Take slots for `tokens` more, evicting if need be. False, and nothing done, without room."""
        cache = self._cache
        wanted = cache.round_up(self.length + tokens) - self._shared - self._private
        if not cache._take(wanted):
            return False
        self._private += wanted
        self.length += tokens
        return True

    def commit(self, packed: bytes) -> None:
        """Put the computed tokens `packed`, from the first on, at most `length`, into the tree, by pages."""
        cache = self._cache
        whole = len(packed) // WIDTH // cache.page_size * cache.page_size
        if whole <= self._shared:
            return
        node = cache._insert(packed[: whole * WIDTH], self._namespace)
        cache._lock(node)
        cache._unlock(self._node)
        self._node = node
        # Slots of tokens that someone else put into the tree meanwhile are doubles: they become free here.
        cache.private -= whole - self._shared
        self._private -= whole - self._shared
        self._shared = whole

    def close(self) -> None:
        """Unlock the path and free what is not in the tree."""
        cache = self._cache
        cache._unlock(self._node)
        cache.private -= self._private
        cache.handles -= 1
        self._private = self._shared = self.length = 0


class KVCache:
    """A pool of `capacity` token slots, a multiple of `page_size`, and the radix tree over its used ones."""

    def __init__(self, capacity: int, page_size: int = 1) -> None:
        if page_size < 1 or capacity < page_size:
            raise ValueError("a KV cache needs a page of at least one token, and room for one page")
        self.page_size = page_size
        self.capacity = capacity // page_size * page_size
        self.tree = 0
        self.locked = 0
        self.private = 0
        self.handles = 0
        self.evicted = 0
        self._clock = count(1)
        self._root = Node(None, None, b"", 0)
        # Leaves that may be evicted, oldest first. A time in here can be out of date, but only too early:
        # then the leaf is put back with its true time when it comes to the top.
        self._leaves: list[tuple[int, int, Node]] = []
        self._ties = count()

    def __repr__(self) -> str:
        return f"<KVCache {self.tree} cached ({self.locked} locked), {self.private} private, of {self.capacity}>"

    @property
    def available(self) -> int:
        """Slots that are free, or can be made free by evicting."""
        return self.capacity - self.private - self.locked

    def round_up(self, tokens: int) -> int:
        """`tokens` in whole pages."""
        return -(-tokens // self.page_size) * self.page_size

    def acquire(self, packed: bytes, namespace: str = "") -> Handle:
        """Hold the longest cached prefix of `packed`; `namespace` tells adapters and salts apart."""
        node, matched = self._match(packed, namespace)
        self._lock(node)
        self.handles += 1
        return Handle(self, namespace, node, matched)

    def reset(self) -> bool:
        """Forget everything. False, and nothing changed, while a handle is open."""
        if self.handles:
            return False
        self._root = Node(None, None, b"", 0)
        self._leaves.clear()
        self.tree = 0
        return True

    # -- the tree ------------------------------------------------------------------------------------------

    def _match(self, packed: bytes, namespace: str) -> tuple[Node, int]:
        """The node where the longest cached prefix ends (split to end there), and its length in tokens."""
        node, at, now, page = self._root, 0, next(self._clock), self.page_size * WIDTH
        while True:
            child = node.children.get(self._edge(node, packed, at, namespace))
            if child is None:
                return node, at // WIDTH
            if packed.startswith(child.key, at):
                at += len(child.key)
            else:
                same = _common_prefix(child.key, packed, at) // page * page
                child = self._split(child, same)
                at += same
            child.used = now
            node = child

    def _insert(self, packed: bytes, namespace: str) -> Node:
        """The node where `packed`, whole pages, ends; made if it is not there."""
        node, matched = self._match(packed, namespace)
        at = matched * WIDTH
        if at == len(packed):
            return node
        edge = self._edge(node, packed, at, namespace)
        leaf = Node(node, edge, packed[at:], next(self._clock))
        node.children[edge] = leaf
        self.tree += len(leaf.key) // WIDTH
        self._offer(leaf)
        return leaf

    def _edge(self, node: Node, packed: bytes, at: int, namespace: str) -> object:
        """The name of the child that `packed` goes on to: its first page, at the root with the namespace."""
        page = packed[at : at + self.page_size * WIDTH]
        return (namespace, page) if node is self._root else page

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` after `at` bytes; the new upper part. Handles stay right: `node` is the lower part."""
        assert node.parent is not None
        upper = Node(node.parent, node.edge, node.key[:at], node.used)
        upper.locks = node.locks
        node.parent.children[node.edge] = upper
        node.parent = upper
        node.key = node.key[at:]
        node.edge = node.key[: self.page_size * WIDTH]
        upper.children[node.edge] = node
        return upper

    # -- locks and eviction --------------------------------------------------------------------------------

    def _lock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None and at is not self._root:
            if at.locks == 0:
                self.locked += len(at.key) // WIDTH
            at.locks += 1
            at = at.parent

    def _unlock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None and at is not self._root:
            at.locks -= 1
            if at.locks == 0:
                self.locked -= len(at.key) // WIDTH
                self._offer(at)
            at = at.parent

    def _offer(self, node: Node) -> None:
        """Queue `node` for eviction if it is an unlocked leaf."""
        if not (node.queued or node.children or node.locks):
            node.queued = True
            heapq.heappush(self._leaves, (node.used, next(self._ties), node))

    def _take(self, wanted: int) -> bool:
        """Turn `wanted` slots from free to private, evicting the oldest leaves for them."""
        if wanted > self.available:
            return False
        missing = wanted - (self.capacity - self.private - self.tree)
        while missing > 0:
            missing -= self._evict_one()
        self.private += wanted
        return True

    def _evict_one(self) -> int:
        """Drop the least recently used unlocked leaf; its length. There is one, or `available` were 0."""
        while True:
            used, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if used == node.used and not (node.children or node.locks):
                break
            self._offer(node)
        assert node.parent is not None
        del node.parent.children[node.edge]
        if node.parent is not self._root:
            self._offer(node.parent)
        tokens = len(node.key) // WIDTH
        self.tree -= tokens
        self.evicted += tokens
        return tokens


def _common_prefix(key: bytes, packed: bytes, at: int) -> int:
    """How many bytes of `key` are found in `packed` from `at` on, by halving: each probe is one `memcmp`."""
    low, high = 0, min(len(key), len(packed) - at)
    ours, theirs = memoryview(key), memoryview(packed)[at:]
    while low < high:
        middle = (low + high + 1) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
