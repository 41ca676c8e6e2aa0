"""The records that the prefix tree (`routing.prefix_tree.tree`) is made of: nodes and uses in memory, `Record` on disk.

        parent ^   | children, by first byte
               |   v
             +-------+  use   +-----+  newer / older
             | Node  |------->| Use |<---------------->  the other uses of the same slot
             +-------+<-------+-----+
               edge, owners   slot, time

Structs made with `gc=False`, and dicts that hold nothing else, are invisible to the cyclic collector: a hundred
thousand nodes do not lengthen its pauses. In return each cycle must be cut by hand, so that reference counts free
what is removed: a node is taken out of its parent's children, a use out of its node and its ring.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Node(msgspec.Struct, gc=False, eq=False):
    """One edge of the tree and what hangs below. A root's edge is its namespace, never compared with text."""

    edge: bytes
    owners: int  # bit mask of slots, dead ones included until they are reclaimed
    parent: Node | None
    children: dict[int, Node] | None = None  # None for leaves: an empty dict would cost 64 bytes on each
    use: Use | None = None
    uses: dict[int, Use] | None = None  # by slot: for the second and later slots whose texts end here


class Use(msgspec.Struct, gc=False, eq=False):
    """`slot` last used the text that ends at `node` at `time`: a link of the slot's ring."""

    node: Node
    slot: int
    time: float
    older: Use = None  # type: ignore[assignment]  # linked before anyone looks
    newer: Use = None  # type: ignore[assignment]


class Record(NamedTuple):
    """One piece of text, as it is written, see `routing.prefix_tree.image`.

    shared  bytes that it has in common with the text before
    text    the bytes behind those
    uses    each slot whose text ends here, and when it last used it, in the tree's time
    """

    shared: int
    text: bytes
    uses: list[tuple[int, float]]
