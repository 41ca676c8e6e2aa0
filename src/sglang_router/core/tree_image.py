"""The prefix tree as a list of records: out of a tree that is in use, bite by bite, and into an empty one.

    record = (shared, text, uses)

    ("m")                            (-1, "m", [])                             a namespace begins
      +-- "You are "                 ( 0, "You are ", [])                      the first text of it
      |     +-- "a cook"   slot 1    ( 8, "a cook",   [(1, 9.0)])              8 bytes as in the text before
      |     +-- "the sea"  slot 0    ( 8, "the sea",  [(0, 17.2), (2, 40.9)])
      +-- "Hello"          slot 0    ( 0, "Hello",    [(0, 3.1)])

Texts come in the order of their bytes, each as the length it shares with the one before and the rest. Owners are not
written: a slot holds what leads to one of its uses (invariant 3 of `core.tree`).

Between two bites the tree may change at will, for a walk keeps no node: it finds its place again by the text it told
last, and goes on with what comes behind that. So no text is told twice, and one that was there all the time is told.
What was split, merged or extended meanwhile comes out a little differently, never wrongly.

The way in takes any list of records: it builds a sound tree of it or raises ValueError. Both reach into the tree's
own fields; nobody else does.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from sglang_router.core.tree_node import Node, common_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sglang_router.core.tree import Tree

NAMESPACE = -1
_PIECE = 1 << 18
"""Bytes of text in one record; a longer edge comes in several, so that a bite stays small."""


class Record(NamedTuple):
    """See the head of this file. `uses`: a slot and when it last used the text that ends here, in the tree's time."""

    shared: int
    text: bytes
    uses: list[tuple[int, float]]


# -- out -----------------------------------------------------------------------------------------------------------


class Walk:
    """Tells a tree's texts in bites. Namespaces that come while it lasts are left out."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._namespaces = list(reversed(tree._roots))
        self._path: bytearray | None = None  # the text told last; None before the first of a namespace
        self._namespace = b""
        self._version = -1
        self._levels: list[tuple[int, list[Node]]] = []  # where a node on the path ends; its children still to come
        self._inside: tuple[Node, int, int] | None = None  # next: an edge, from where, after how much of the path

    def bite(self, records: int, size: int) -> list[Record]:
        """The next records, until there are so many or their texts have `size` bytes. Empty: that was all."""
        told: list[Record] = []
        if self._version != self._tree.version and self._path is not None:
            self._find_again(self._path)
        self._version = self._tree.version
        while len(told) < records and size > 0:
            record = self._next()
            if record is None:
                break
            told.append(record)
            size -= len(record.text)
        return told

    def _next(self) -> Record | None:
        path = self._path
        while path is not None:
            if self._inside is not None:
                node, at, end = self._inside
                self._inside = None
                return self._tell(path, end, node, at)
            if not self._levels:
                break
            end, children = self._levels[-1]
            if not children:
                self._levels.pop()
                continue
            node = children.pop()
            if node.owners & self._tree.alive:
                return self._tell(path, end, node, 0)
        return self._begin()

    def _begin(self) -> Record | None:
        """The next namespace that is still there."""
        while self._namespaces:
            self._namespace = self._namespaces.pop()
            root = self._tree._roots.get(self._namespace)
            if root is not None:
                self._path, self._levels = bytearray(), [(0, _in_order(root))]
                return Record(NAMESPACE, self._namespace, [])
        self._path = None
        return None

    def _tell(self, path: bytearray, end: int, node: Node, at: int) -> Record:
        """What follows the first `end` bytes of the path: the node's edge from `at` on, or as much as one record
        takes."""
        text = node.edge[at : at + _PIECE]
        path[end:] = text
        if at + len(text) < len(node.edge):
            self._inside = (node, at + len(text), len(path))
            return Record(end, text, [])
        self._levels.append((len(path), _in_order(node)))
        uses = list(node.uses.values()) if node.uses is not None else []
        if node.use is not None:
            uses.append(node.use)
        alive = self._tree.alive
        return Record(end, text, [(use.slot, use.time) for use in uses if alive >> use.slot & 1])

    def _find_again(self, path: bytearray) -> None:
        """Its place in a tree that has changed: the first text behind `path`."""
        self._levels, self._inside = [], None
        node = self._tree._roots.get(self._namespace)
        at = 0
        while node is not None:
            if at == len(path):
                self._levels.append((at, _in_order(node)))
                return
            child = (node.children or {}).get(path[at])
            self._levels.append((at, _in_order(node, path[at] + 1)))
            if child is None:
                return
            same = common_prefix(child.edge, path, at)
            at += same
            if same < len(child.edge):
                if (at == len(path) or child.edge[same] > path[at]) and child.owners & self._tree.alive:
                    self._inside = (child, same, at)
                return
            node = child


def _in_order(node: Node, first: int = 0) -> list[Node]:
    """The children whose text begins with a byte of at least `first`, the last one first."""
    children = node.children
    if children is None:
        return []
    return [children[byte] for byte in sorted(children, reverse=True) if byte >= first]


# -- in ------------------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    node: Node
    end: int


class Builder:
    """Makes a tree of records. The tree must hold nothing, and is not to be used before `finish` or `give_up`.

    slots  which live slot each slot of the records is now; what others held is left out
    shift  from the time of the records to that of the tree; what comes to lie behind `now` was used now
    """

    def __init__(self, tree: Tree, slots: Mapping[int, int], shift: float = 0.0, now: float = math.inf) -> None:
        if tree._roots:
            raise ValueError("only an empty tree can be filled")
        self._tree = tree
        self._slots = slots
        self._shift = shift
        self._now = now
        self._path = bytearray()
        self._levels: list[_Level] = []  # from a root down to where the last text ends
        self._used: dict[int, list[tuple[float, Node]]] = {slot: [] for slot in slots.values()}

    def add(self, record: Record) -> None:
        """Takes the next record.

        Raises: ValueError when no walk can have told it in this place.
        """
        shared, text, uses = record
        if shared == NAMESPACE:
            self._begin(text)
            return
        path = self._path
        if not self._levels or not text or not 0 <= shared <= len(path):
            raise ValueError("a text without a place")
        if shared < len(path) and text[0] <= path[shared]:
            raise ValueError("texts are not in order")
        self._rise(shared)
        del path[shared:]
        path += text
        parent = self._levels[-1].node
        node = Node(text, 0, parent)
        if parent.children is None:
            parent.children = {}
        parent.children[text[0]] = node
        self._tree.nodes += 1
        self._levels.append(_Level(node, len(path)))
        self._note(node, uses)

    def _begin(self, namespace: bytes) -> None:
        self._rise(NAMESPACE)
        if namespace in self._tree._roots:
            raise ValueError("a namespace comes twice")
        root = self._tree._roots[namespace] = Node(namespace, 0, None, {})
        self._levels.append(_Level(root, 0))
        self._path.clear()

    def _note(self, node: Node, uses: list[tuple[int, float]]) -> None:
        for number, time in uses:
            if not math.isfinite(time):
                raise ValueError("a time that is none")
            slot = self._slots.get(number)
            if slot is not None and not node.owners >> slot & 1:
                node.owners |= 1 << slot  # until it is complete: those whose texts end here
                self._used[slot].append((min(time + self._shift, self._now), node))

    def _rise(self, shared: int) -> None:
        """Completes the nodes that end behind `shared`, and has one end there."""
        while self._levels and self._levels[-1].end > shared:
            node = self._levels.pop().node
            parent = node.parent
            begin = self._levels[-1].end if self._levels else NAMESPACE
            if parent is not None and begin < shared:
                upper = self._tree._split(node, shared - begin)
                upper.owners = 0
                self._levels.append(_Level(upper, shared))
                parent = upper
            self._complete(node, parent)

    def _complete(self, node: Node, parent: Node | None) -> None:
        """All below is there, and complete: who owns the node is known."""
        tree = self._tree
        if parent is None:
            if not node.children:
                del tree._roots[node.edge]
            return
        children = list(node.children.values()) if node.children is not None else []
        ends, below = node.owners, 0
        for child in children:
            below |= child.owners
        node.owners |= below
        if not node.owners:
            assert parent.children is not None
            del parent.children[node.edge[0]]
            tree.nodes -= 1
            if not parent.children:
                parent.children = None if parent.parent is not None else {}
        elif not ends and len(children) == 1:
            self._join(node, children[0], parent)

    def _join(self, node: Node, child: Node, parent: Node) -> None:
        """A node of nobody's end with one child is one with it."""
        assert parent.children is not None
        child.edge = node.edge + child.edge
        child.parent = parent
        parent.children[child.edge[0]] = child
        node.parent = node.children = None
        self._tree.nodes -= 1

    def finish(self) -> None:
        """Links the uses in their order, and evicts what is above the bounds of this tree."""
        tree = self._tree
        self._rise(NAMESPACE)
        for slot, used in self._used.items():
            books = tree.books(slot)
            used.sort(key=itemgetter(0))
            for time, node in used:
                books.touch(node, time)
        for node in _below_roots(tree):
            size = len(node.edge)
            tree.held += size
            owners = node.owners
            while owners:
                low = owners & -owners
                tree.books(low.bit_length() - 1).size += size
                owners ^= low
        tree.version += 1
        for slot in self._used:
            books = tree.books(slot)
            while books.size > tree.max_size or books.entries > tree.max_entries:
                tree._evict_oldest(books)

    def give_up(self) -> None:
        """Leaves the tree empty, with no cycle of references behind. Not after `finish`."""
        for node in list(_below_roots(self._tree)):
            node.parent = node.children = None
        self._tree._roots.clear()
        self._tree.nodes = 0
        self._levels.clear()
        self._used.clear()


def _below_roots(tree: Tree) -> Iterator[Node]:
    waiting = list(tree._roots.values())
    while waiting:
        for child in (waiting.pop().children or {}).values():
            yield child
            waiting.append(child)
