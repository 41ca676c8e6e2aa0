"""Which worker's KV cache holds which prompt prefix: one radix tree over bytes for all workers of a pool.

Engines keep the keys and values of prompts they have seen and skip the prefill of a prefix they hold. The router cannot
see those caches, so it remembers what it sent where. The memory is approximate (the engine may have evicted more, or
less) and bounded: per worker in bytes and in entries, at every moment. The work of one insertion is bounded too,
whatever the length of the text.

    namespace (model, LoRA, salt) -> root
                                      | "You are a helpful "          owners {0,1,2}
                                      +-- "poet. Write about the "    owners {0,2}
                                      |     +-- "sea"                 owners {0}     use (slot 0, at 17.2)
                                      |     +-- "moon"                owners {2}     use (2, 40.9)
                                      +-- "clerk"                     owners {1,2}   uses (1, 9.0), (2, 3.1)

    slot 2:  oldest  (clerk, 3.1) <-> (moon, 40.9)  newest            one ring per slot: its order of last use

*Slot*: a small integer for one life of one worker. Sets of workers are bit masks of slots, so a node owned by a
thousand costs no more than a node owned by one, and "which candidates hold this" is a single `&`.

What always holds, and tests/routing/test_tree_model.py checks after each step:

1. A child's owners are a subset of its parent's, and every node has an owner. A root has none.
2. A node and its single child with the same owners are one node, unless a text ends between them or together
   they are longer than `max_edge`. So no step copies more than that, and a long text is a chain of few nodes.
3. A slot has a `Use` at each of its leaves (nodes it owns without owning a child), and at inner nodes where
   one of its texts ended. A node was last used at the latest use in its subtree. So the oldest use of a ring
   is either at the least recently used leaf, or at an inner node below which something was used later.
4. `size(slot)`, the sum of the edges it owns, is at most `max_size + max_text`, and its uses are at most
   `max_entries`. What exceeds `max_size`, or the smaller bound of a slot, is evicted by the next insertions, or by
   `trim`.

*Insertion* continues where a match ended: split the last edge, become an owner of the nodes above, append the rest
below, put the use at the new end of the ring, evict from the old end. *Eviction* of a leaf hands its use on to the
parent if that is a leaf now, at the same position in the ring. One insertion evicts at most `evictions_per_insert`
entries. A long text in a tree of short ones would lose its end by that, and with it its next turn, so the slot may hold
`max_text` bytes too many for a while; beyond that the new text does lose its end.

*Retiring* a slot takes effect at once for matching (its bit leaves the mask of live slots); its nodes are reclaimed in
small slices, and its number is used again only after the last one.

Two alternatives lost by measurement. Hashing blocks costs 40 times as much as comparing. An `OrderedDict` per slot for
the order of use is C, but doubling it stops the process for 6 ms at 87,000 entries and 14 ms at 175,000, and the cyclic
collector walks it. The collector sees nothing of this tree (see `routing.prefix_tree.node`), so a tree must be emptied
by `retire` and `reclaim` before it is dropped. Time is an argument; any clock that does not go back will do.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Final

from sglang_router.routing.prefix_tree.node import Node, Use
from sglang_router.routing.prefix_tree.sizes import Sizes
from sglang_router.routing.prefix_tree.slot import Slot, attach, common_prefix, detach, find_use, owned_below

BYTES_PER_ENTRY: Final = 128  # default of max_entries: as many uses as would fill max_size with leaves this small
MAX_EDGE: Final = 1 << 16  # default of max_edge: copying so much takes some microseconds
RECLAIM_PER_INSERT: Final = 4
_FEW_SLOTS: Final = 8
"""Slots of which the smallest is found more quickly by looking at each."""


class Match:
    """How far a text is known, and to whom. Both answers raise RuntimeError once the tree has changed.

    node     where the walk down ended, which dead slots may own alone; None: no such namespace
    start    the offset in the text where the node's edge begins
    end      the offset where it ends or, inside it, where the text departs from it
    version  of the tree, when the match was made
    """

    __slots__ = ("end", "namespace", "node", "start", "text", "tree", "version")

    def __init__(self, tree: Tree, namespace: bytes, text: bytes, node: Node | None, start: int, end: int) -> None:
        self.tree = tree
        self.namespace = namespace
        self.text = text
        self.node = node
        self.start = start
        self.end = end
        self.version = tree.version

    def __repr__(self) -> str:
        return f"<Match {self.end} of {len(self.text)} bytes, version {self.version}>"

    def best(self, mask: int) -> tuple[int, int]:
        """Return the length of the longest prefix that a live slot of `mask` holds, and the mask of the slots with it.

        In bytes; (0, 0) if there is none. A mask of -1 means every live slot.
        """
        tree, node, start, end = self.tree, self.node, self.start, self.end
        if tree.version != self.version:
            raise RuntimeError("the tree has changed since this match was made: match again")
        mask &= tree.alive
        while node is not None and (parent := node.parent) is not None:
            if owners := node.owners & mask:
                return end, owners
            end = start
            start -= len(parent.edge)
            node = parent
        return 0, 0

    def owners(self, mask: int, most: int) -> list[tuple[int, int]]:
        """Return the live slots of a mask that hold a prefix of the text, as (length in bytes, slots), the longest
        first; the work ends once at least `most` slots are found."""
        tree, node, start, end = self.tree, self.node, self.start, self.end
        if tree.version != self.version:
            raise RuntimeError("the tree has changed since this match was made: match again")
        mask &= tree.alive
        found: list[tuple[int, int]] = []
        while mask and node is not None and (parent := node.parent) is not None:
            if owners := node.owners & mask:
                found.append((end, owners))
                most -= owners.bit_count()
                if most <= 0:
                    break
                mask ^= owners
            end = start
            start -= len(parent.edge)
            node = parent
        return found

    def length(self, slot: int) -> int:
        """Return how many bytes of the text the slot holds."""
        return self.best(1 << slot)[0]


class Tree:
    """See the head of this file. Not for several threads.

    `max_size` is in bytes of text per slot, `max_entries` in uses per slot (a node costs some hundred bytes
    besides its text, so bytes alone would not bound memory). `max_text` is in bytes too, by default `max_size`: only
    the beginning of a longer text is kept. `max_edge` bounds the bytes that a split copies, `evictions_per_insert` the
    entries that one insertion evicts. Namespaces are kept as given, one copy each, and not counted: digest long ones.
    """

    def __init__(
        self,
        max_size: int,
        *,
        max_text: int | None = None,
        max_entries: int | None = None,
        max_edge: int = MAX_EDGE,
        evictions_per_insert: int = 64,
    ) -> None:
        given = [bound for bound in (max_text, max_entries) if bound is not None]
        if min(max_size, max_edge, evictions_per_insert, *given) < 1:
            raise ValueError("the bounds of a tree must be positive")
        self.max_size = max_size
        self.max_text = min(max_text or max_size, max_size)
        self.max_entries = max_entries or max(64, max_size // BYTES_PER_ENTRY)
        self.max_edge = max_edge
        self.evictions_per_insert = evictions_per_insert
        # Other classes may only read these.
        self.alive = 0  # mask of the live slots
        self.version = 0  # differs after every change
        self.nodes = 0  # without roots
        self.held = 0  # bytes of text in memory, each edge once, however many own it
        self.retired_size = 0  # bytes that retired slots own and that are still to be reclaimed
        # Owned by this class alone.
        self._roots: dict[bytes, Node] = {}
        self._slots: list[Slot] = []
        self._retired: deque[Slot] = deque()
        self._free: list[int] = []  # a heap: low numbers first keep the masks short
        self._sizes = Sizes()  # of the live slots, but for those that changed since `smallest` was asked
        self._resized: set[int] = set()
        self._looked_at = 0  # a mask, and its slots
        self._looked: list[Slot] = []

    def __repr__(self) -> str:
        return (
            f"<Tree slots={self.alive.bit_count()} nodes={self.nodes} held={self.held}"
            f" namespaces={len(self._roots)} retired_size={self.retired_size}>"
        )

    # -- slots ---------------------------------------------------------------------------------------------------------

    def add_slot(self) -> int:
        """Add an empty slot, with the lowest number that is free."""
        if self._free:
            slot = self._slots[heapq.heappop(self._free)]
            slot.evictions = slot.evicted_bytes = 0
            slot.max_size = self.max_size
        else:
            slot = Slot(len(self._slots), self.max_size)
            self._slots.append(slot)
        self.alive |= slot.bit
        self._resized.add(slot.number)
        return slot.number

    def retire(self, slot: int) -> None:
        """Forget all that a slot holds: at once for matching, in memory step by step. Its number is invalid now."""
        books = self.books(slot)
        self.alive ^= books.bit
        self.version += 1
        self._resized.discard(slot)
        self._sizes.drop(slot)
        if books.entries:
            self.retired_size += books.size
            self._retired.append(books)
        else:
            heapq.heappush(self._free, slot)

    def bound(self, slot: int, max_size: int) -> None:
        """Set the bytes above which a live slot evicts, at most `max_size` of the tree.

        What is too much goes with the next insertions, or by `trim`. The text that was used last stays, however long.
        """
        self.books(slot).max_size = max(1, min(max_size, self.max_size))

    def size(self, slot: int) -> int:
        """Return the bytes of text that a live slot holds."""
        return self.books(slot).size

    def smallest(self, mask: int) -> int:
        """Return those live slots of a mask, of at least one, that hold the fewest bytes."""
        if mask.bit_count() <= _FEW_SLOTS:
            return self._smallest_of(mask)
        if self._resized:
            for number in self._resized:
                self._sizes.put(number, self._slots[number].size)
            self._resized.clear()
        return self._sizes.smallest(mask) or self._smallest_of(mask)

    def _smallest_of(self, mask: int) -> int:
        """Return the smallest slots of a mask by looking at each; the last mask is usually the next one too."""
        if mask != self._looked_at:
            self._looked_at = mask
            self._looked = []
            rest = mask
            while rest:
                lowest = rest & -rest
                self._looked.append(self._slots[lowest.bit_length() - 1])
                rest ^= lowest
        sizes = [slot.size for slot in self._looked]
        least = min(sizes)
        if sizes.count(least) == 1:
            return self._looked[sizes.index(least)].bit
        return sum([slot.bit for slot in self._looked if slot.size == least])

    @property
    def sizes(self) -> dict[int, int]:
        """Return the size of each live slot."""
        return {slot.number: slot.size for slot in self._living()}

    def entries(self, slot: int) -> int:
        """Return how many texts, or remains of texts, a live slot holds: what `max_entries` bounds."""
        return self.books(slot).entries

    def evictions(self, slot: int) -> int:
        """Return how many nodes of a live slot were evicted, for size or age, since it was added."""
        return self.books(slot).evictions

    def evicted_bytes(self, slot: int) -> int:
        """Return the bytes of text of those nodes."""
        return self.books(slot).evicted_bytes

    def books(self, slot: int) -> Slot:
        """Return what a live slot holds, read-only. Raises: KeyError, when there is no such live slot."""
        if slot < 0 or not self.alive >> slot & 1:
            raise KeyError(f"slot {slot} is not in use")
        return self._slots[slot]

    def _living(self) -> Iterator[Slot]:
        return (slot for slot in self._slots if slot.bit & self.alive)

    # -- matching and inserting ----------------------------------------------------------------------------------------

    def match(self, namespace: bytes, text: bytes) -> Match:
        """Walk down as far as the text is known. Change nothing, not even the order of use."""
        node = self._roots.get(namespace)
        start = end = 0
        if node is None:
            return Match(self, namespace, text, None, 0, 0)
        size = len(text)
        while end < size and (children := node.children) is not None:
            child = children.get(text[end])
            if child is None:
                break
            node, start, edge = child, end, child.edge
            if not text.startswith(edge, start):
                end += common_prefix(edge, text, start)
                break
            end += len(edge)
        return Match(self, namespace, text, node, start, end)

    def insert(self, match: Match, slot: int, now: float) -> int:
        """Record that the slot holds the match's text, used `now`; return the bytes it did not hold before.

        It continues where the match ended; if the tree has changed since, it matches the text again. A text longer than
        `max_text` is cut, and one for which the bound of work leaves too little room loses its end.

        Raises: KeyError, when there is no such live slot.
        """
        books, text = self.books(slot), match.text
        if match.version != self.version or len(text) > self.max_text:
            text = text[: self.max_text]
            match = self.match(match.namespace, text)
        if not text:
            return 0
        self.version += 1
        before = books.size
        # Each step is called only where it has something to do: the calls would be a third of the work.
        node = match.node
        long = len(text) > self.max_edge
        if node is None or match.end - match.start != len(node.edge):
            long = long or (node is not None and match.start + len(node.edge) > self.max_edge)
            node = self._end_of(match)
        known = node if node.owners & books.bit else self._own(node, books)
        rest = text[match.end :]
        leaf = self._extend(node, rest, books) if rest else node
        if leaf is not known and (known.use is not None or known.uses is not None):
            books.forget(known)
        books.touch(leaf, now)
        self._resized.add(slot)
        grown = books.size - before
        if books.size > books.max_size or books.entries > self.max_entries:
            grown -= self._make_room(books, grown)
        # Merge last: what is given back must not take along what the slot held before.
        if known.children is not None and len(known.children) == 1:
            self._merge(known)
        if long:
            self._merge_around(node, books)
        if self._retired:
            self.reclaim(RECLAIM_PER_INSERT)
        return grown

    def _end_of(self, match: Match) -> Node:
        """Return the node that ends where the match does: the one it reached, its upper part, or a new root."""
        node = match.node
        if node is None:
            node = self._roots[match.namespace] = Node(match.namespace, 0, None, {})
            return node
        at = match.end - match.start
        if node.parent is None or at == len(node.edge):
            return node
        upper = self._split(node, at)
        self._merge(node)  # it may have been too long to be one with its child
        return upper

    def _merge_around(self, end: Node, slot: Slot) -> None:
        """Merge with its parent what a split made short enough: the node at the match's end, and at the text's end."""
        newest: Node = slot.ring.older.node
        for node in (end, newest):
            if node.parent is not None:
                self._merge(node.parent)

    def _own(self, node: Node, slot: Slot) -> Node:
        """Make the slot own the node and all above it; return the lowest one that needed no change."""
        bit = slot.bit
        while (parent := node.parent) is not None and not node.owners & bit:
            node.owners |= bit
            slot.size += len(node.edge)
            node = parent
        return node

    def _extend(self, node: Node, rest: bytes, slot: Slot) -> Node:
        """Append the rest of a text below what it shares with others; a leaf of this slot alone just grows."""
        size = len(rest)
        self.held += size
        slot.size += size
        children = node.children
        if children is None and node.owners == slot.bit and len(node.edge) + size <= self.max_edge:
            node.edge += rest
            return node
        if size > self.max_edge:
            return self._chain(node, rest, slot)
        self.nodes += 1
        leaf = Node(rest, slot.bit, node)
        if children is None:
            node.children = {rest[0]: leaf}
        else:
            children[rest[0]] = leaf
        return leaf

    def _chain(self, node: Node, rest: bytes, slot: Slot) -> Node:
        """Append a long text in several nodes; return the last one."""
        for at in range(0, len(rest), self.max_edge):
            below = Node(rest[at : at + self.max_edge], slot.bit, node)
            if node.children is None:
                node.children = {rest[at]: below}
            else:
                node.children[rest[at]] = below
            self.nodes += 1
            node = below
        return node

    def forget(self, namespace: bytes, text: bytes, slot: int, added: int, time: float) -> int:
        """Take back what an insertion added, as far as nothing used it since; return how many bytes.

        added  what `insert` returned
        time   of that insertion
        """
        books = self.books(slot)
        node = self.match(namespace, text).node
        while node is not None and not node.owners & books.bit:
            node = node.parent
        use = find_use(node, slot) if node is not None else None
        if use is None or use.time != time:
            return 0
        self.version += 1
        self._resized.add(slot)
        left = added
        while left > 0 and find_use(use.node, slot) is use and not owned_below(use.node, books.bit):
            if left < len(use.node.edge):
                self._split(use.node, len(use.node.edge) - left)
            left -= self._evict(use, books)
        if (parent := use.node.parent) is not None:
            self._merge(parent)  # what is left may be short enough to be one edge now
        return added - left

    # -- giving up -----------------------------------------------------------------------------------------------------

    def expire(self, before: float, budget: int) -> int:
        """Evict what was last used before a time, at most `budget` entries; return how many."""
        done = 0
        for slot in self._living():
            while done < budget and slot.ring.newer.time < before:
                self._evict_oldest(slot)
                self._resized.add(slot.number)
                done += 1
        self.version += done
        return done

    def reclaim(self, budget: int) -> int:
        """Free what retired slots left, at most `budget` entries; return how many. 0: nothing is left."""
        done = 0
        while self._retired and done < budget:
            slot = self._retired[0]
            self.retired_size -= self._evict_oldest(slot)
            done += 1
            if not slot.entries:
                self._retired.popleft()
                heapq.heappush(self._free, slot.number)
        self.version += done
        return done

    def trim(self, budget: int) -> int:
        """Evict what exceeds `max_size` since long texts came, at most `budget` entries; return how many."""
        done = 0
        for slot in self._living():
            while done < budget and slot.size > slot.max_size and slot.entries > 1:
                self._evict_oldest(slot)
                self._resized.add(slot.number)
                done += 1
        self.version += done
        return done

    def _make_room(self, slot: Slot, grown: int) -> int:
        """Evict until the slot or the work is at its bound; return the bytes of the new text given back."""
        for _ in range(self.evictions_per_insert):
            if slot.entries == 1:
                return 0
            self._evict_oldest(slot)
            if slot.size <= slot.max_size and slot.entries <= self.max_entries:
                return 0
        if slot.size <= self.max_size + self.max_text and slot.entries <= self.max_entries:
            return 0
        return self._give_back(slot, grown)

    def _give_back(self, slot: Slot, grown: int) -> int:
        """Take back the end of the newest text, as far as it is too much and was added; return how many bytes."""
        before = slot.size
        excess = grown if slot.entries > self.max_entries else before - self.max_size - self.max_text
        while excess > 0:
            use = slot.ring.older
            if excess < len(use.node.edge):
                self._split(use.node, len(use.node.edge) - excess)
            excess -= self._evict(use, slot, hand_on=True)
        if slot.entries > self.max_entries:
            self._evict(slot.ring.older, slot)  # what is left of the text was held before: only the mark goes
        return before - slot.size

    def _evict_oldest(self, slot: Slot) -> int:
        freed = self._evict(slot.ring.newer, slot)
        if freed:
            slot.evictions += 1
            slot.evicted_bytes += freed
        return freed

    def _evict(self, use: Use, slot: Slot, *, hand_on: bool = False) -> int:
        """End a use and, if it was a leaf's, the slot's hold on that leaf; return the bytes given up.

        The use passes to the parent if that is a leaf now, for nothing below it was used later; or by `hand_on`.
        """
        node, bit = use.node, slot.bit
        detach(use)
        if owned_below(node, bit):
            slot.unlink(use)
            self._merge(node)
            return 0
        parent = node.parent
        assert parent is not None  # roots have no uses
        freed = len(node.edge)
        slot.size -= freed
        node.owners ^= bit
        if not node.owners:
            self._remove(node, parent)
            node = parent
        if parent.parent is None or (
            not hand_on and (find_use(parent, slot.number) is not None or owned_below(parent, bit))
        ):
            slot.unlink(use)
        else:
            use.node = parent
            attach(use, parent)
        self._merge(node)
        return freed

    # -- the shape -----------------------------------------------------------------------------------------------------

    def _split(self, node: Node, at: int) -> Node:
        """Cut an edge; return the new upper part. The lower part stays the same object: uses refer to it."""
        edge, parent = node.edge, node.parent
        assert parent is not None
        assert parent.children is not None
        upper = Node(edge[:at], node.owners, parent, {edge[at]: node})
        parent.children[edge[0]] = upper
        node.edge = edge[at:]
        node.parent = upper
        self.nodes += 1
        return upper

    def _merge(self, node: Node) -> None:
        """Join the node to its only child if both have the same owners, no text ends between them, and they are short.

        Without it the path of a popular prompt would be cut into smaller and smaller pieces by other texts.
        """
        children, parent = node.children, node.parent
        if children is None or len(children) != 1 or parent is None:
            return
        (child,) = children.values()
        if child.owners != node.owners or node.use is not None or node.uses is not None:
            return
        if len(node.edge) + len(child.edge) > self.max_edge:
            return
        assert parent.children is not None
        child.edge = node.edge + child.edge
        child.parent = parent
        parent.children[child.edge[0]] = child
        node.parent = node.children = None
        self.nodes -= 1

    def _remove(self, node: Node, parent: Node) -> None:
        """Remove a node without owners (so it has no children), and its root if that is empty now."""
        children = parent.children
        assert children is not None
        del children[node.edge[0]]
        self.nodes -= 1
        self.held -= len(node.edge)
        if not children:
            parent.children = None
            if parent.parent is None:
                del self._roots[parent.edge]
