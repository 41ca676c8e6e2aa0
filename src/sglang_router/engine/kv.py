"""The KV cache of the built-in engine: a radix tree over tokens, with pages, locks and least-recently-used eviction.

Every token that the engine has computed occupies one slot of a pool. Slots of finished requests are not freed but kept
in a tree, so that a later prompt that starts with the same tokens can reuse them:

    root ── [you are a helpful assistant .] ─┬─ [hi] ── [hello !]         a node is a run of tokens
         └─ (lora-7) [you are ...]           └─ [what is the time ?]      each adapter or salt has its own subtree

    capacity = tree (locked + evictable) + private (computed by running requests, not in the tree yet) + free

A running request holds a `CacheHandle`. The handle locks the path that the request uses, so that it is not evicted, and
owns the private slots after it. `grow` takes slots and evicts old leaves if needed, `commit` moves computed tokens into
the tree, where other requests find them at once, and `close` gives everything back. SGLang's `RadixCache` does the same
with real tensors.

Tokens are packed, four bytes each (`pack`), so that comparing a long run is one `memcmp`. All lengths are in tokens.
With `page_size` p, the tree holds whole pages only and a match is a multiple of p, as in SGLang. `page_bytes` says how
many packed bytes stand for one page: by default all its tokens; a replay, which knows pages and no tokens, gives one
number for each. Recency is counted in operations, not in seconds: the cache has no clock.
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
    """Return the token ids that were passed to `pack`."""
    return array("I", packed).tolist()


class CacheNode:
    """A run of tokens, reached through its parent's run. `locks` counts the handles at or below it."""

    __slots__ = ("children", "edge", "key", "locks", "parent", "queued", "used")

    def __init__(self, parent: CacheNode | None, edge: object, key: bytes, used: int) -> None:
        self.parent = parent
        self.edge = edge
        self.key = key
        self.children: dict[object, CacheNode] = {}
        self.locks = 0
        self.used = used
        self.queued = False

    def __repr__(self) -> str:
        return f"<CacheNode {len(self.key) // WIDTH} tokens, {len(self.children)} children, {self.locks} locks>"


class CacheHandle:
    """The part of the cache that one running request holds. It is closed exactly once and holds nothing afterwards.

    `matched` is the number of tokens found in the cache at the start, `length` the number of tokens with slots now.
    """

    __slots__ = ("_cache", "_namespace", "_node", "_private", "_shared", "length", "matched")

    def __init__(self, cache: KVCache, namespace: str, node: CacheNode, matched: int) -> None:
        self._cache = cache
        self._namespace = namespace
        self._node = node
        self._shared = matched
        self._private = 0
        self.matched = matched
        self.length = matched

    def __repr__(self) -> str:
        return f"<CacheHandle {self.length} tokens, {self._shared} of them in the tree>"

    def grow(self, tokens: int) -> bool:
        """Take slots for `tokens` more tokens; evict if needed. Without room, do nothing and return False."""
        cache = self._cache
        wanted = cache.round_up(self.length + tokens) - self._shared - self._private
        if not cache._take(wanted):
            return False
        self._private += wanted
        self.length += tokens
        return True

    def commit(self, packed: bytes) -> None:
        """Move the computed tokens `packed` (all from the first on, at most `length`) into the tree, in whole pages."""
        cache = self._cache
        pages = len(packed) // cache.page_bytes
        whole = pages * cache.page_size
        if whole <= self._shared:
            return
        node = cache._insert(self._node, self._shared, packed[: pages * cache.page_bytes], self._namespace)
        cache._lock(node, self._node)
        self._node = node
        # If another request has put the same tokens into the tree meanwhile, our slots are duplicates: free them.
        cache.private -= whole - self._shared
        self._private -= whole - self._shared
        self._shared = whole

    def close(self) -> None:
        """Unlock the path and free the slots that are not in the tree."""
        cache = self._cache
        cache._unlock(self._node)
        cache.private -= self._private
        cache.handles -= 1
        self._private = self._shared = self.length = 0


class KVCache:
    """A pool of `capacity` token slots, a multiple of `page_size`, and the radix tree over its used ones."""

    def __init__(self, capacity: int, page_size: int = 1, page_bytes: int = 0) -> None:
        if page_size < 1 or capacity < page_size:
            raise ValueError("a KV cache needs a page of at least one token, and room for one page")
        self.page_size = page_size
        self.page_bytes = page_bytes or page_size * WIDTH
        self.capacity = capacity // page_size * page_size
        self.tree = 0
        self.locked = 0
        self.private = 0
        self.handles = 0
        self.evicted = 0
        self._clock = count(1)
        self._root = CacheNode(None, None, b"", 0)
        # Leaves that may be evicted, oldest first. A time in this heap can be too early, because it is not updated on
        # use; when such a leaf comes to the top, it is put back with its current time.
        self._leaves: list[tuple[int, int, CacheNode]] = []
        self._ties = count()

    def __repr__(self) -> str:
        return f"<KVCache {self.tree} cached ({self.locked} locked), {self.private} private, of {self.capacity}>"

    @property
    def available(self) -> int:
        """Slots that are free or can be freed by eviction."""
        return self.capacity - self.private - self.locked

    def round_up(self, tokens: int) -> int:
        """Return `tokens` rounded up to whole pages."""
        return -(-tokens // self.page_size) * self.page_size

    def acquire(self, packed: bytes, namespace: str = "") -> CacheHandle:
        """Lock the longest cached prefix of `packed`. `namespace` separates adapters and salts."""
        node, matched = self._match(self._root, 0, packed, namespace)
        self._lock(node, self._root)
        self.handles += 1
        return CacheHandle(self, namespace, node, matched)

    def reset(self) -> bool:
        """Empty the cache. While a handle is open, do nothing and return False."""
        if self.handles:
            return False
        self._root = CacheNode(None, None, b"", 0)
        self._leaves.clear()
        self.tree = 0
        return True

    # -- the tree ------------------------------------------------------------------------------------------

    def _tokens(self, size: int) -> int:
        """Return how many tokens this many packed bytes of whole pages stand for."""
        return size // self.page_bytes * self.page_size

    def _match(self, node: CacheNode, known: int, packed: bytes, namespace: str) -> tuple[CacheNode, int]:
        """Return the node where the longest cached prefix ends (split if needed), and the prefix's length in tokens.

        The first `known` tokens are known to lead to `node`.
        """
        at, now, page = known // self.page_size * self.page_bytes, next(self._clock), self.page_bytes
        above: CacheNode | None = node
        while above is not None:
            above.used = now
            above = above.parent
        child = node.children.get(self._edge(node, packed, at, namespace))
        while child is not None:
            if packed.startswith(child.key, at):
                at += len(child.key)
            else:
                same = _common_prefix(child.key, packed, at) // page * page
                child = self._split(child, same)
                at += same
            child.used = now
            node = child
            child = node.children.get(packed[at : at + page])
        return node, self._tokens(at)

    def _insert(self, node: CacheNode, known: int, packed: bytes, namespace: str) -> CacheNode:
        """Return the node where `packed` (whole pages) ends; create it if needed. See `_match`."""
        node, matched = self._match(node, known, packed, namespace)
        at = matched // self.page_size * self.page_bytes
        if at == len(packed):
            return node
        edge = self._edge(node, packed, at, namespace)
        leaf = CacheNode(node, edge, packed[at:], next(self._clock))
        node.children[edge] = leaf
        self.tree += self._tokens(len(leaf.key))
        self._offer(leaf)
        return leaf

    def _edge(self, node: CacheNode, packed: bytes, at: int, namespace: str) -> object:
        """Return the key of the child that `packed` continues in: its first page; at the root, with the namespace."""
        page = packed[at : at + self.page_bytes]
        return (namespace, page) if node is self._root else page

    def _split(self, node: CacheNode, at: int) -> CacheNode:
        """Split `node` after `at` bytes and return the new upper part. `node` becomes the lower part, so handles stay
        valid."""
        assert node.parent is not None
        upper = CacheNode(node.parent, node.edge, node.key[:at], node.used)
        upper.locks = node.locks
        node.parent.children[node.edge] = upper
        node.parent = upper
        node.key = node.key[at:]
        node.edge = node.key[: self.page_bytes]
        upper.children[node.edge] = node
        return upper

    # -- locks and eviction --------------------------------------------------------------------------------

    def _lock(self, node: CacheNode, above: CacheNode) -> None:
        """Lock the path from `node` up to a node above it, which itself stays as it is."""
        at: CacheNode | None = node
        while at is not None and at is not above:
            if at.locks == 0:
                self.locked += self._tokens(len(at.key))
            at.locks += 1
            at = at.parent

    def _unlock(self, node: CacheNode) -> None:
        at: CacheNode | None = node
        while at is not None and at is not self._root:
            at.locks -= 1
            if at.locks == 0:
                self.locked -= self._tokens(len(at.key))
                if not at.children:
                    self._offer(at)
            at = at.parent

    def _offer(self, node: CacheNode) -> None:
        """Queue `node` for eviction if it is an unlocked leaf."""
        if not (node.queued or node.children or node.locks):
            node.queued = True
            heapq.heappush(self._leaves, (node.used, next(self._ties), node))

    def _take(self, wanted: int) -> bool:
        """Turn `wanted` slots from free to private; evict the oldest leaves if needed."""
        if wanted > self.available:
            return False
        missing = wanted - (self.capacity - self.private - self.tree)
        while missing > 0:
            missing -= self._evict_one()
        self.private += wanted
        return True

    def _evict_one(self) -> int:
        """Evict the least recently used unlocked leaf; return its length. There is one as long as `available` > 0."""
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
        tokens = self._tokens(len(node.key))
        self.tree -= tokens
        self.evicted += tokens
        return tokens


def _common_prefix(key: bytes, packed: bytes, at: int) -> int:
    """Return how many bytes of `key` match `packed` from `at` on, by binary search: each probe is one `memcmp`."""
    low, high = 0, min(len(key), len(packed) - at)
    ours, theirs = memoryview(key), memoryview(packed)[at:]
    while low < high:
        middle = (low + high + 1) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
