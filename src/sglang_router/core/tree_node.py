"""What the prefix tree (`core.tree`) is made of: nodes, uses, slots, and the comparing of bytes.

        parent ^   | children, by first byte
               |   v
             +-------+  use   +-----+  newer / older
             | Node  |------->| Use |<---------------->  the other uses of the same slot
             +-------+<-------+-----+
               edge, owners   slot, time

Structs made with `gc=False`, and dicts that hold nothing else, are invisible to the cyclic collector: a hundred
thousand nodes do not lengthen its pauses. In return each cycle must be cut by hand, so that reference counts free
what leaves: a node that goes is taken out of its parent's children, a use out of its node and its ring.
"""

from __future__ import annotations

import math

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


class Slot:
    """What one slot holds. `ring` is a sentinel: `ring.newer` is the oldest use, `ring.older` the newest."""

    __slots__ = ("bit", "entries", "evicted_bytes", "evictions", "number", "ring", "size")

    def __init__(self, number: int) -> None:
        self.number = number
        self.bit = 1 << number
        self.ring = Use(Node(b"", 0, None), number, math.inf)
        self.ring.older = self.ring.newer = self.ring
        self.size = 0  # bytes of the edges it owns
        self.entries = 0  # uses in the ring
        self.evictions = 0
        self.evicted_bytes = 0

    def touch(self, node: Node, now: float) -> None:
        """Puts the use of the node, a new one if there is none, at the new end of the ring."""
        ring = self.ring
        use = find_use(node, self.number)
        if use is None:
            use = Use(node, self.number, now)
            attach(use, node)
            self.entries += 1
        else:
            use.time = now
            use.older.newer = use.newer
            use.newer.older = use.older
        newest = ring.older
        use.older = newest
        use.newer = ring
        newest.newer = ring.older = use

    def forget(self, node: Node) -> None:
        """Ends the use of the node, if any: a text that goes on below it has just been used."""
        use = find_use(node, self.number)
        if use is not None:
            detach(use)
            self.unlink(use)

    def unlink(self, use: Use) -> None:
        """Takes a use out of the ring."""
        use.older.newer = use.newer
        use.newer.older = use.older
        self.entries -= 1


def owned_below(node: Node, bit: int) -> bool:
    """Whether a child belongs to the slot: at most 256 to ask, and the first yes ends it."""
    if node.children is not None:
        for child in node.children.values():
            if child.owners & bit:
                return True
    return False


# Hardly any node ends the texts of several slots: the first use is a plain field, the dict a rare extra.


def find_use(node: Node, slot: int) -> Use | None:
    """The slot's use of just this node."""
    use = node.use
    if use is not None and use.slot == slot:
        return use
    return None if node.uses is None else node.uses.get(slot)


def attach(use: Use, node: Node) -> None:
    """Makes the node know a use that refers to it."""
    if node.use is None:
        node.use = use
    elif node.uses is None:
        node.uses = {use.slot: use}
    else:
        node.uses[use.slot] = use


def detach(use: Use) -> None:
    """Makes the use's node forget it. The use itself is left as it is."""
    node = use.node
    if node.use is use:
        node.use = None
        return
    assert node.uses is not None
    del node.uses[use.slot]
    if not node.uses:
        node.uses = None


def common_prefix(edge: bytes, text: bytes | bytearray, at: int) -> int:
    """How many bytes of `edge` equal those of `text` from `at` on.

    Python compares long slices at memory speed but does not say where they differ. Growing steps find the
    stretch, halving narrows it to 128 bytes, and the highest bit of their exclusive or is the place.
    """
    end = min(len(edge), len(text) - at)
    low, high = 0, 64
    while high < end and text.startswith(edge[low:high], at + low):
        low, high = high, high * 8
    high = min(high, end)
    while high - low > 128:
        middle = (low + high) >> 1
        if text.startswith(edge[low:middle], at + low):
            low = middle
        else:
            high = middle
    differing = int.from_bytes(edge[low:high], "big") ^ int.from_bytes(text[at + low : at + high], "big")
    return high - ((differing.bit_length() + 7) >> 3)
