"""Which worker's KV cache holds which blocks of tokens, as the engines themselves tell it by their events.

An engine divides a prompt into blocks of tokens and names each block by a hash that only it can compute. Its events say
"block 77 follows block 31 and holds these tokens". So the index gives each block a hash of its own, over the tokens
and the block before, back to the beginning of the prompt, and the engine's hashes only lead to those:

    event: stored 31 after nothing [1, 2], 77 after 31 [3, 4]      holder "w0", bit 0

    holder w0   blocks  {31: #a, 77: #b}             #a = hash(seed, 1, 2)   seed: block size, adapter, salt
    index       owners  {#a: 0b1, #b: 0b1}           #b = hash(#a, 3, 4)

Two workers with the same prompt have the same #a, whatever their engines call it, so one walk over a prompt's blocks
finds what each of them holds: `match`. A holder counts as far as it has every block from the beginning on, as the
engine itself does.

*Tiers.* A block may be in the memory of the device and in a lower tier at once; it is gone when it has left all.

*Promises.* An engine tells of a block when it has computed it. Until then the next request with the same prefix would
find nothing, and each of a burst would go to another worker. So `promise` notes what was just sent where; that counts
like an event until the engine tells of the block, for 10 to 20 seconds at most (`turn` drops the older half). Of a long
prompt 256 blocks are noted.

*Bounds.* A holder has at most `most_blocks` blocks: what exceeds is not learnt (`refused`). A walk looks at
`MOST_BLOCKS` blocks. Nothing takes long: events are applied in pieces (`store`), and what a holder had when it was
cleared leaves in slices (`reclaim`), while its bit counts for nothing any more.

A hash is 64 bits of Python's own, seeded with a random value at each start; two prompts with the same one would lead to
a bad choice of worker, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sglang_router.routing.kv_blocks import DEVICE, Holder, Stored

MOST_BLOCKS: Final = 4096
"""Blocks of a prompt that are looked up: 1 to 2 ms."""
_PROMISED: Final = 256
"""Blocks of a prompt that are promised, at equal distances."""
_MOST_PROMISES: Final = 1 << 14
"""Promises in one half; more make the halves turn sooner."""
_MOST_ADAPTERS: Final = 1 << 12


class _Left:
    """What a holder had when it was cleared, until it is reclaimed."""

    __slots__ = ("bit", "blocks")

    def __init__(self, bit: int, blocks: dict[Any, int]) -> None:
        self.bit = bit
        self.blocks = blocks


class Held:
    """How much of a prompt the holders have.

    levels  (tokens, set of holders), the most tokens first; a holder in several counts in the first
    beyond  holders that have all that was looked up of a prompt which is longer
    tokens  the prompt; chains: its own hashes by the size of blocks, as far as they were needed; for `promise`
    """

    __slots__ = ("beyond", "chains", "levels", "tokens")

    def __init__(self, tokens: Sequence[int]) -> None:
        self.levels: list[tuple[int, int]] = []
        self.beyond = 0
        self.tokens = tokens
        self.chains: dict[int, list[int]] = {}

    def __repr__(self) -> str:
        return f"<Held {', '.join(f'{tokens}: {holders:b}' for tokens, holders in self.levels)}>"


class KVIndex:
    """See the module. Not for several threads.

    holders   by name
    adapters  names of LoRA adapters that events told
    version   rises when a holder comes, goes, is cleared, or changes in anything but its blocks
    """

    def __init__(self, most_blocks: int = 1 << 18) -> None:
        self.most_blocks = most_blocks
        self.holders: dict[str, Holder] = {}
        self.adapters: set[str] = set()
        self.version = 0
        self._owners: dict[int, int] = {}
        self._sizes: dict[int, int] = {}  # holders by the sizes of their blocks
        self._young: dict[int, int] = {}  # promises
        self._old: dict[int, int] = {}
        self._left: list[_Left] = []
        self._free: list[int] = []  # bits
        self._bits = 0

    def __repr__(self) -> str:
        return f"<KVIndex of {len(self.holders)} holders, {len(self._owners)} blocks>"

    def __len__(self) -> int:
        """Return the number of different blocks."""
        return len(self._owners)

    # -- holders -------------------------------------------------------------------------------------------------------

    def join(self, name: str) -> Holder:
        """Return a new, empty holder."""
        holder = self.holders[name] = Holder(name, self._new_bit())
        self.version += 1
        return holder

    def leave(self, name: str) -> None:
        """Forget a holder; do nothing if there is none of that name."""
        holder = self.holders.pop(name, None)
        if holder is not None:
            self._retire(holder)
            self.version += 1

    def clear(self, holder: Holder) -> None:
        """Forget what a holder has."""
        self._retire(holder)
        holder.blocks = {}
        holder.tiers = {}
        holder.doubled = {}
        holder.bit = self._new_bit()
        if holder.size:
            self._sizes[holder.size] = self._sizes.get(holder.size, 0) | holder.bit
        self.version += 1

    def settle(self, holder: Holder, live: bool, whole: bool) -> None:
        """Say whether a holder's events are followed, and whether from the beginning."""
        if (holder.live, holder.whole) != (live, whole):
            holder.live, holder.whole = live, whole
            self.version += 1

    def reclaim(self, budget: int) -> bool:
        """Free up to `budget` blocks of holders that were cleared or left; return whether there are more."""
        while self._left and budget > 0:
            left = self._left[-1]
            bit, blocks = left.bit, left.blocks
            for _ in range(min(budget, len(blocks))):
                _, own = blocks.popitem()
                self._disown(own, bit)
                budget -= 1
            if not blocks:
                self._left.pop()
                self._free.append(bit)
        return bool(self._left)

    def _new_bit(self) -> int:
        if self._free:
            return self._free.pop()
        self._bits += 1
        return 1 << (self._bits - 1)

    def _retire(self, holder: Holder) -> None:
        """Let a holder's bit mean nothing. What remembers promises has to forget it before it is used again."""
        bit = holder.bit
        self._young = {own: left for own, bits in self._young.items() if (left := bits & ~bit)}
        self._old = {own: left for own, bits in self._old.items() if (left := bits & ~bit)}
        self._sizes = {size: left for size, bits in self._sizes.items() if (left := bits & ~bit)}
        if holder.blocks:
            self._left.append(_Left(bit, holder.blocks))
        else:
            self._free.append(bit)

    # -- events --------------------------------------------------------------------------------------------------------

    def store(self, holder: Holder, stored: Stored, start: int, budget: int) -> int:
        """Apply a part of an event: the blocks from number `start` on, at most `budget` of them. Return the number
        from which to go on; it is that of the blocks when there is nothing left to do."""
        hashes, tokens, size, marks = stored.hashes, stored.tokens, stored.size, stored.marks
        count = len(hashes)
        blocks = holder.blocks
        before: int | None
        if start:
            before = blocks.get(hashes[start - 1])
        elif stored.parent is None:
            before = self._seed(size, stored.adapter, stored.salt)
            if stored.adapter and len(self.adapters) < _MOST_ADAPTERS:
                self.adapters.add(stored.adapter)
        else:
            before = blocks.get(stored.parent)
        if before is None:
            holder.orphans += count - start
            return count
        if size != holder.size:
            holder.size = size
            self._sizes[size] = self._sizes.get(size, 0) | holder.bit
            self.version += 1
        end = min(count, start + budget)
        for number in range(start, end):
            key = hashes[number]
            if key not in blocks and len(blocks) >= self.most_blocks:
                holder.refused += count - number
                return count
            part = tokens[number * size : (number + 1) * size]
            mark = None if marks is None else marks[number]
            own = hash((before, *part)) if mark is None else hash((before, repr(mark), *part))
            self._hold(holder, key, own, stored.tier)
            before = own
        return end

    def remove(self, holder: Holder, key: Any, tier: int = DEVICE) -> None:
        """Take a block, by the engine's name, out of a tier. One that is not known is no error."""
        if key not in holder.blocks:
            return
        left = holder.tiers.get(key, DEVICE) & ~tier
        if not left:
            self._drop(holder, key)
        elif left == DEVICE:
            holder.tiers.pop(key, None)
        else:
            holder.tiers[key] = left

    def _seed(self, size: int, adapter: str, salt: str) -> int:
        return hash((b"seed", size, adapter, salt))  # the bytes bring in what is random

    def _hold(self, holder: Holder, key: Any, own: int, tier: int) -> None:
        """Note one block of a holder."""
        known = holder.blocks.get(key)
        if known is not None and known != own:  # the engine gave its name to another block
            self._drop(holder, key)
            known = None
        if known is None:
            holder.blocks[key] = own
            bits = self._owners.get(own, 0)
            if bits & holder.bit:
                holder.doubled[own] = holder.doubled.get(own, 0) + 1
            else:
                self._owners[own] = bits | holder.bit
                if self._young or self._old:
                    self._keep_promise(own, holder.bit)
        else:
            tier |= holder.tiers.get(key, DEVICE)
        if tier != DEVICE:
            holder.tiers[key] = tier

    def _drop(self, holder: Holder, key: Any) -> None:
        own = holder.blocks.pop(key)
        holder.tiers.pop(key, None)
        more = holder.doubled.get(own, 0)
        if more > 1:
            holder.doubled[own] = more - 1
        elif more:
            del holder.doubled[own]
        else:
            self._disown(own, holder.bit)

    def _disown(self, own: int, bit: int) -> None:
        bits = self._owners.get(own, 0) & ~bit
        if bits:
            self._owners[own] = bits
        else:
            self._owners.pop(own, None)

    # -- questions -----------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], adapter: str = "", salt: str = "", whole: bool = True) -> Held:
        """Return how much of a prompt the holders have, live or not. whole: the tokens are the whole prompt."""
        found: dict[int, int] = {}
        held = Held(tokens)
        for size, holders in self._sizes.items():
            chain = held.chains[size] = [self._seed(size, adapter, salt)]
            having = self._walk(tokens, size, holders, chain, found)
            if not whole or len(tokens) // size > MOST_BLOCKS:
                held.beyond |= having
        held.levels = sorted(found.items(), reverse=True)
        return held

    def _walk(self, tokens: Sequence[int], size: int, holders: int, chain: list[int], found: dict[int, int]) -> int:
        """Find how far each of the holders with blocks of this size has the tokens; return those that have all.
        chain: the seed; the blocks' hashes are added."""
        owners, young, old = self._owners, self._young, self._old
        own = chain[0]
        promises = bool(young or old)
        promised: list[tuple[int, int]] = []
        having = holders
        count = min(len(tokens) // size, MOST_BLOCKS)
        for number in range(count):
            own = hash((own, *tokens[number * size : (number + 1) * size]))
            chain.append(own)
            if having:
                still = having & owners.get(own, 0)
                if still != having:
                    if number:
                        found[number * size] = found.get(number * size, 0) | (having ^ still)
                    having = still
            if promises:
                bits = (young.get(own, 0) | old.get(own, 0)) & holders
                if bits:
                    promised.append((number + 1, bits))
            elif not having:
                return 0
        if having and count:
            found[count * size] = found.get(count * size, 0) | having
        seen = 0
        for number, bits in reversed(promised):
            if new := bits & ~seen:
                seen |= new
                found[number * size] = found.get(number * size, 0) | new
                if number == count:
                    having |= new
        return having

    # -- promises ------------------------------------------------------------------------------------------------------

    def promise(self, holder: Holder, held: Held) -> None:
        """Note that a prompt that was looked up goes to a holder, whose engine will have its blocks soon."""
        if len(self._young) >= _MOST_PROMISES:
            self.turn()
        young, bit, tokens = self._young, holder.bit, held.tokens
        for size, chain in held.chains.items():
            if not self._sizes.get(size, 0) & bit:
                continue
            count = min(len(tokens) // size, MOST_BLOCKS)
            for number in range(len(chain) - 1, count):
                chain.append(hash((chain[number], *tokens[number * size : (number + 1) * size])))
            every = max(1, count // _PROMISED)
            for number in range(count, 0, -every):  # always the last one
                own = chain[number]
                if not self._owners.get(own, 0) & bit:
                    young[own] = young.get(own, 0) | bit

    def _keep_promise(self, own: int, bit: int) -> None:
        """Forget the promise of a block that the engine has told of: from now on its events count."""
        for promises in (self._young, self._old):
            bits = promises.get(own, 0)
            if bits & bit:
                if bits == bit:
                    del promises[own]
                else:
                    promises[own] = bits ^ bit

    def turn(self) -> None:
        """Forget the older half of the promises. Called every ten seconds."""
        self._old, self._young = self._young, {}
