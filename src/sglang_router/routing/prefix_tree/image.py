"""The prefix tree as a list of records: read from a tree in use, bite by bite, and built into an empty tree.

    record = (shared, text, uses)

    ("m")                            (-1, "m", [])                             a namespace begins
      +-- "You are "                 ( 0, "You are ", [])                      the first text of it
      |     +-- "a cook"   slot 1    ( 8, "a cook",   [(1, 9.0)])              8 bytes as in the text before
      |     +-- "the sea"  slot 0    ( 8, "the sea",  [(0, 17.2), (2, 40.9)])
      +-- "Hello"          slot 0    ( 0, "Hello",    [(0, 3.1)])

Texts come in the order of their bytes, each as the length that it shares with the one before, and the rest. Owners are
not written: a slot holds what leads to one of its uses (invariant 3 of `routing.prefix_tree.tree`).

The tree may change at will between two bites: a walk finds its position again by the text that it gave last, and
continues behind that. So no text is given twice, and a text that was there all the time is given. What was split,
merged or extended meanwhile comes out a little differently, never wrongly.

The builder takes any list of records: it builds a sound tree of it or raises ValueError. Both classes use the private
fields of the tree; no other code does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Final, NamedTuple

from sglang_router.routing.prefix_tree.node import Node, Record
from sglang_router.routing.prefix_tree.slot import common_prefix
from sglang_router.routing.prefix_tree.tree import Tree

NAMESPACE: Final = -1


# -- out -----------------------------------------------------------------------------------------------------------


class Walk:
    """Gives the texts of a tree in bites. Namespaces that are added meanwhile are left out."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._namespaces = list(reversed(tree._roots))
        self._path: bytearray | None = None  # the text given last; None before the first of a namespace
        self._namespace = b""
        self._version = -1
        self._levels: list[tuple[int, list[Node]]] = []  # where a node on the path ends; its children still to come
        self._inside: tuple[Node, int, int] | None = None  # next: an edge, from where, after how much of the path

    def bite(self, records: int, size: int) -> list[Record]:
        """Return the next records, up to so many, or until their texts have `size` bytes. Empty: there are no more."""
        found: list[Record] = []
        if self._version != self._tree.version and self._path is not None:
            self._find_again(self._path)
        self._version = self._tree.version
        while len(found) < records and size > 0:
            record = self._next()
            if record is None:
                break
            found.append(record)
            size -= len(record.text)
        return found

    def _next(self) -> Record | None:
        path = self._path
        while path is not None:
            if self._inside is not None:
                node, at, end = self._inside
                self._inside = None
                return self._give(path, end, node, at)
            if not self._levels:
                break
            end, children = self._levels[-1]
            if not children:
                self._levels.pop()
                continue
            node = children.pop()
            if node.owners & self._tree.alive:
                return self._give(path, end, node, 0)
        return self._begin()

    def _begin(self) -> Record | None:
        """Start with the next namespace that still exists."""
        while self._namespaces:
            self._namespace = self._namespaces.pop()
            root = self._tree._roots.get(self._namespace)
            if root is not None:
                self._path, self._levels = bytearray(), [(0, _in_order(root))]
                return Record(NAMESPACE, self._namespace, [])
        self._path = None
        return None

    def _give(self, path: bytearray, end: int, node: Node, at: int) -> Record:
        """Return a record of what follows `end` bytes of the path: the node's edge from `at` on, or a piece of it."""
        text = node.edge[at:]
        path[end:] = text
        self._levels.append((len(path), _in_order(node)))
        uses = list(node.uses.values()) if node.uses is not None else []
        if node.use is not None:
            uses.append(node.use)
        alive = self._tree.alive
        return Record(end, text, [(use.slot, use.time) for use in uses if alive >> use.slot & 1])

    def _find_again(self, path: bytearray) -> None:
        """Find the position again in a tree that has changed: the first text after `path`."""
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
    """Return the children whose text begins with a byte of at least `first`, the last one first."""
    children = node.children
    if children is None:
        return []
    return [children[byte] for byte in sorted(children, reverse=True) if byte >= first]


# -- in ------------------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    node: Node
    end: int


class Builder:
    """Makes a tree of records. The tree must be empty, and must not be used before `finish` or `give_up`.

    slots  the live slot for each slot of the records; what other slots held is left out
    shift  seconds from the time of the records to that of the tree; a use that would be later than `now` is at `now`
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
        """Add the next record.

        Raises: ValueError, when no walk can have given it at this position.
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
        for at in range(0, len(text), self._tree.max_edge):
            self._append(text[at : at + self._tree.max_edge])
        self._note(self._levels[-1].node, uses)

    def _append(self, edge: bytes) -> None:
        """Add a node below the last one."""
        parent = self._levels[-1].node
        node = Node(edge, 0, parent)
        if parent.children is None:
            parent.children = {}
        parent.children[edge[0]] = node
        self._tree.nodes += 1
        self._path += edge
        self._levels.append(_Level(node, len(self._path)))

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
                node.owners |= 1 << slot  # until the node is complete: the slots whose texts end here
                self._used[slot].append((min(time + self._shift, self._now), node))

    def _rise(self, shared: int) -> None:
        """Complete the nodes that end after `shared`, and make one end there."""
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
        """Set the owners of a node; all nodes below it are complete."""
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
        elif not ends and len(children) == 1 and len(node.edge) + len(children[0].edge) <= tree.max_edge:
            self._join(node, children[0], parent)

    def _join(self, node: Node, child: Node, parent: Node) -> None:
        """Join a node where no text ends to its only child."""
        assert parent.children is not None
        child.edge = node.edge + child.edge
        child.parent = parent
        parent.children[child.edge[0]] = child
        node.parent = node.children = None
        self._tree.nodes -= 1

    def finish(self) -> None:
        """Link the uses in their order, and evict what exceeds the bounds of this tree."""
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
            while books.size > books.max_size or books.entries > tree.max_entries:
                tree._evict_oldest(books)
            tree._resized.add(slot)

    def give_up(self) -> None:
        """Leave the tree empty, without a cycle of references. Not after `finish`."""
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
