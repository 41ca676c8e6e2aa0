"""What tests of the prefix tree share: filling one, reading it as plain sets, and checking every promise it makes."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_router.routing.prefix_tree.node import Node, Use
from sglang_router.routing.prefix_tree.slot import find_use, owned_below
from sglang_router.routing.prefix_tree.tree import Tree

BIG = 1 << 30
Prefix = tuple[bytes, bytes]  # namespace, text


def put(tree: Tree, slot: int, text: bytes, now: float = 0.0, namespace: bytes = b"m") -> int:
    return tree.insert(tree.match(namespace, text), slot, now)


def walk(tree: Tree) -> Iterator[tuple[Prefix, Node]]:
    """Every node but the roots, with the namespace and the whole text down to its end."""
    stack = [(namespace, b"", root) for namespace, root in tree._roots.items()]
    while stack:
        namespace, above, node = stack.pop()
        for child in (node.children or {}).values():
            text = above + child.edge
            stack.append((namespace, text, child))
            yield (namespace, text), child


def held(tree: Tree, slot: int) -> set[Prefix]:
    """Every prefix that the slot holds, one for each byte."""
    return {
        (namespace, text[: len(text) - cut])
        for (namespace, text), node in walk(tree)
        if node.owners >> slot & 1
        for cut in range(len(node.edge))
    }


def ring(tree: Tree, slot: int) -> list[Use]:
    """The slot's uses, oldest first; both directions agree."""
    sentinel = tree._slots[slot].ring
    uses, use = [], sentinel.newer
    while use is not sentinel:
        assert use.newer.older is use
        uses.append(use)
        use = use.newer
    assert sentinel.newer.older is sentinel
    return uses


def shape(tree: Tree) -> list[tuple[bytes, int]]:
    """Text and owners of each node, sorted: what the examples compare."""
    return sorted((text, node.owners) for (_, text), node in walk(tree))


def check(tree: Tree) -> None:
    """All that the head of routing/prefix_tree/tree.py promises of the structure."""
    nodes = attached = total = 0
    for _, node in walk(tree):
        nodes += 1
        total += len(node.edge)
        check_node(tree, node)
        attached += (node.use is not None) + len(node.uses or {})
    assert (tree.nodes, tree.held) == (nodes, total)
    for root in tree._roots.values():
        assert root.children
        assert (root.parent, root.owners, root.use, root.uses) == (None, 0, None, None)
    for slot in tree._slots:
        check_slot(tree, slot.number)
        attached -= slot.entries
    assert attached == 0
    dead = sum(slot.size for slot in tree._slots if not slot.bit & tree.alive)
    assert tree.retired_size == dead


def check_node(tree: Tree, node: Node) -> None:
    parent = node.parent
    assert parent is not None
    assert parent.children is not None
    assert parent.children[node.edge[0]] is node
    assert node.owners
    assert node.owners < 1 << len(tree._slots)
    assert len(node.edge) <= tree.max_edge
    assert parent.parent is None or node.owners & ~parent.owners == 0
    assert node.children is None or node.children
    if node.children is not None and len(node.children) == 1:
        (child,) = node.children.values()
        long = len(node.edge) + len(child.edge) > tree.max_edge
        assert long or child.owners != node.owners or node.use or node.uses, "a chain that should be one node"


def check_slot(tree: Tree, slot: int) -> None:
    books, uses = tree._slots[slot], ring(tree, slot)
    assert books.entries == len(uses)
    assert [use.time for use in uses] == sorted(use.time for use in uses)
    used = set(uses)
    for use in uses:
        assert use.slot == slot
        assert use.node.owners & books.bit
        assert find_use(use.node, slot) is use
    for _, node in walk(tree):
        if node.owners & books.bit and not owned_below(node, books.bit):
            assert find_use(node, slot) in used, "a leaf without a use could never be evicted"
    # The same as the number of its prefixes: `check_node` has shown that no two nodes are the end of the same text.
    assert books.size == sum(len(node.edge) for _, node in walk(tree) if node.owners & books.bit)
    if books.bit & tree.alive:
        assert books.size <= tree.max_size + tree.max_text
        assert books.entries <= tree.max_entries
