"""What engines say of their KV caches, and what is known of one: the records of `routing.kv_index`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

DEVICE: Final = 1
"""The tier of the memory in which the engine computes; lower tiers are other bits."""


class Stored:
    """An engine has cached blocks, each of which follows the one before.

    hashes   the engine's names of the blocks
    parent   the block before the first; None: they begin a prompt
    tokens   of all blocks, `size` of each
    tier     where they are: a bit
    adapter  name of the LoRA adapter; "": none
    salt     what keeps them apart from equal prompts; "": nothing
    marks    for each block what else belongs to it, such as a picture: only None can be found; None: nothing anywhere
    """

    __slots__ = ("adapter", "hashes", "marks", "parent", "salt", "size", "tier", "tokens")

    def __init__(
        self,
        hashes: Sequence[Any],
        parent: Any,
        tokens: Sequence[int],
        size: int,
        tier: int = DEVICE,
        adapter: str = "",
        salt: str = "",
        marks: Sequence[Any] | None = None,
    ) -> None:
        self.hashes = hashes
        self.parent = parent
        self.tokens = tokens
        self.size = size
        self.tier = tier
        self.adapter = adapter
        self.salt = salt
        self.marks = marks

    def __repr__(self) -> str:
        return f"<Stored {len(self.hashes)} blocks of {self.size} after {self.parent!r}>"


class Removed:
    """An engine has removed blocks from a tier."""

    __slots__ = ("hashes", "tier")

    def __init__(self, hashes: Sequence[Any], tier: int = DEVICE) -> None:
        self.hashes = hashes
        self.tier = tier

    def __repr__(self) -> str:
        return f"<Removed {len(self.hashes)} blocks>"


class Cleared:
    """An engine has removed all blocks."""

    __slots__ = ()


class Holder:
    """One KV cache. Only the index changes it, the counters apart, which belong to whoever follows its events.

    name       of the worker, its id
    bit        its set of one holder
    live       its events are followed: what the index says of it counts
    whole      nothing was missed since the cache was empty; else it may hold more than the index knows
    size       tokens of a block; 0: not known yet
    blocks     own hashes by the engine's
    orphans    blocks that follow one which is not known
    refused    blocks that were too many
    events     events that were applied
    unread     events that could not be read
    gaps       how often batches were missing
    resyncs    how often all was forgotten and learnt anew, the first time not counted
    """

    __slots__ = (
        "bit",
        "blocks",
        "doubled",
        "events",
        "gaps",
        "live",
        "name",
        "orphans",
        "refused",
        "resyncs",
        "size",
        "tiers",
        "unread",
        "whole",
    )

    def __init__(self, name: str, bit: int) -> None:
        self.name = name
        self.bit = bit
        self.live = False
        self.whole = False
        self.size = 0
        self.blocks: dict[Any, int] = {}
        self.tiers: dict[Any, int] = {}  # of the blocks that are not in the device's memory alone
        self.doubled: dict[int, int] = {}  # own hashes that several of the engine's lead to: how many more
        self.orphans = 0
        self.refused = 0
        self.events = 0
        self.unread = 0
        self.gaps = 0
        self.resyncs = 0

    def __repr__(self) -> str:
        state = "live" if self.live else "lost"
        return f"<Holder {self.name}: {state}{'' if self.whole else ', in part'}, {len(self.blocks)} blocks>"
