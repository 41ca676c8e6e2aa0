"""What one slot of the prefix tree holds, how uses and nodes are linked, and the comparing of bytes.

    ring <--> oldest use <--> ... <--> newest use <--> ring         one ring per slot: the order of last use

The records are in `routing.prefix_tree.node`, the tree is in `routing.prefix_tree.tree`.
"""

from __future__ import annotations

import math

from sglang_router.routing.prefix_tree.node import Node, Use


class Slot:
    """What one slot holds. `ring` is a sentinel: `ring.newer` is the oldest use, `ring.older` the newest.

    max_size  bytes above which it evicts
    """

    __slots__ = ("bit", "entries", "evicted_bytes", "evictions", "max_size", "number", "ring", "size")

    def __init__(self, number: int, max_size: int) -> None:
        self.number = number
        self.max_size = max_size
        self.bit = 1 << number
        self.ring = Use(Node(b"", 0, None), number, math.inf)
        self.ring.older = self.ring.newer = self.ring
        self.size = 0  # bytes of the edges it owns
        self.entries = 0  # uses in the ring
        self.evictions = 0
        self.evicted_bytes = 0

    def touch(self, node: Node, now: float) -> None:
        """Put the use of the node, a new one if there is none, at the new end of the ring."""
        ring = self.ring
        use = node.use
        if use is None or use.slot != self.number:
            use = node.uses.get(self.number) if node.uses is not None else None
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
        """End the use of the node, if any: a text that continues below it has just been used."""
        use = find_use(node, self.number)
        if use is not None:
            detach(use)
            self.unlink(use)

    def unlink(self, use: Use) -> None:
        """Take a use out of the ring."""
        use.older.newer = use.newer
        use.newer.older = use.older
        self.entries -= 1


def owned_below(node: Node, bit: int) -> bool:
    """Return whether a child belongs to the slot: at most 256 to check, and the first one ends the search."""
    if node.children is not None:
        for child in node.children.values():
            if child.owners & bit:
                return True
    return False


# Few nodes end the texts of several slots: the first use is a plain field, the dict a rare extra.


def find_use(node: Node, slot: int) -> Use | None:
    """Return the slot's use of this very node."""
    use = node.use
    if use is not None and use.slot == slot:
        return use
    return None if node.uses is None else node.uses.get(slot)


def attach(use: Use, node: Node) -> None:
    """Make the node know a use that refers to it."""
    if node.use is None:
        node.use = use
    elif node.uses is None:
        node.uses = {use.slot: use}
    else:
        node.uses[use.slot] = use


def detach(use: Use) -> None:
    """Make the use's node forget it. The use itself does not change."""
    node = use.node
    if node.use is use:
        node.use = None
        return
    assert node.uses is not None
    del node.uses[use.slot]
    if not node.uses:
        node.uses = None


def common_prefix(edge: bytes, text: bytes | bytearray, at: int) -> int:
    """Return how many bytes of `edge` equal those of `text` from `at` on.

    Python compares long slices at memory speed but does not say where they differ. Growing steps find the stretch,
    halving narrows it to 128 bytes, and the highest bit of their exclusive or is the position.
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
