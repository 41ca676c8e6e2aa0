"""A match of the prefix tree, corrected by what is known otherwise of the workers' caches.

    tree.match(namespace, text) -> Match --+
    index.match(tokens)         -> Held  --|--> Informed.inform(match, facts) -> InformedMatch: best, owners, length
    shared.match(chain)         -> levels -'

*By their own word* (`routing.kv_index`). For a worker whose events are followed from the beginning, the index alone
counts. One whose events were followed from the middle on may hold more than the index knows: the longer of both counts.
So it does for what lies beyond the tokens that were looked up. Tokens become bytes in proportion.

*By the word of other routers* (`routing.shared.prefixes`), for all other workers: the longest of what this router and
the others placed there counts.

The tree's lengths are bytes of routing text. The tree still gets every prompt: it answers again as soon as a stream of
events is cut. Of a cache that other routers fill, too, it remembers only this router's part.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from sglang_router.routing.facts import Facts
from sglang_router.routing.kv_blocks import Holder
from sglang_router.routing.kv_index import Held, KVIndex
from sglang_router.routing.prefix_tree.tree import Match
from sglang_router.routing.prompt_tokens import Encode, Prompt, prompt_of
from sglang_router.routing.roster import Roster, seat_of
from sglang_router.routing.shared.agreement import Agreement
from sglang_router.routing.shared.cache_life import CacheLife
from sglang_router.routing.shared.prefixes import SharedPrefixes

_COMPARED: Final = 3
"""Workers that are compared for a text that nobody has."""


class KVCaches:
    """What is known of the workers' KV caches besides what this router sent there.

    index   by events; None: they are not followed
    encode  the tokenizer; None: there is none
    shared  by other routers; None: there are none
    """

    __slots__ = ("encode", "index", "shared")

    def __init__(
        self, index: KVIndex | None, encode: Encode | None = None, shared: SharedPrefixes | None = None
    ) -> None:
        self.index = index
        self.encode = encode
        self.shared = shared

    def __repr__(self) -> str:
        return f"<KVCaches {self.index!r}, {self.shared!r}>"

    def for_shadow(self) -> KVCaches | None:
        """Return what a policy may know that is not obeyed: it must not tell others what it would have placed."""
        return None if self.index is None else KVCaches(self.index, self.encode)


class InformedMatch(Match):
    """See the module. Sets are of slots.

    levels  (length in bytes, slots) by the index and by other routers, the longest first
    told    slots for which the tree does not count
    held    what the index said; None: nothing
    chain   names of the beginnings of the text, see `routing.shared.secret`
    agreed  the slot that every router would choose; -1: nobody asked
    """

    __slots__ = ("agreed", "chain", "held", "levels", "told")

    def __init__(
        self, match: Match, levels: list[tuple[int, int]], told: int, held: Held | None, chain: list[int]
    ) -> None:
        super().__init__(match.tree, match.namespace, match.text, match.node, match.start, match.end)
        self.levels = levels
        self.told = told
        self.held = held
        self.chain = chain
        self.agreed = -1

    def best(self, mask: int) -> tuple[int, int]:
        """Return the length of the longest prefix that a live slot of `mask` holds, and the mask of the slots with
        it."""
        length, owners = super().best(mask & ~self.told)
        mask &= self.tree.alive
        for known, slots in self.levels:
            if known < length:
                break
            if found := slots & mask:
                return known, found | (owners if known == length else 0)
        return length, owners

    def owners(self, mask: int, most: int) -> list[tuple[int, int]]:
        """Return the live slots of a mask that hold a prefix of the text, as (length in bytes, slots), the longest
        first; the work ends once at least `most` slots are found."""
        lengths = dict(super().owners(mask & ~self.told, most))
        mask &= self.tree.alive
        for length, slots in self.levels:
            if slots & mask:
                lengths[length] = lengths.get(length, 0) | (slots & mask)
        found: list[tuple[int, int]] = []
        seen = 0
        for length in sorted(lengths, reverse=True):
            if new := lengths[length] & ~seen:
                found.append((length, new))
                seen |= new
                if seen.bit_count() >= most:
                    break
        return found


class Informed:
    """What is known otherwise of the workers of one tree, by slot."""

    def __init__(self, caches: KVCaches) -> None:
        self._index, self._encode, self._shared = caches.index, caches.encode, caches.shared
        self._names: dict[int, str] = {}  # holders by slot
        self._seen = -1  # the version of the index when the following was worked out
        self._live: dict[int, Holder] = {}  # by slot
        self._told = 0
        self._slots: dict[int, int] = {}  # sets of one slot by bit of a holder
        self._lives: dict[int, CacheLife] = {}  # as other routers tell of them, by slot
        self._agreement = Agreement()

    def __repr__(self) -> str:
        return f"<Informed of {len(self._live)} of {len(self._names)} workers>"

    def add(self, slot: int, name: str, url: str, size: int) -> None:
        """Take note of a worker, by the name of its holder and its URL; its cache is believed to hold `size` bytes."""
        self._names[slot] = name
        self._seen = -1
        if self._shared is not None:
            life = self._lives[slot] = self._shared.life(self._shared.secret.worker(url))
            life.bit, life.owner, life.capacity = 1 << slot, self, size // self._shared.grain
            self._agreement.add(slot, life.name)

    def remove(self, slot: int) -> None:
        """Forget a worker."""
        del self._names[slot]
        self._seen = -1
        life = self._lives.pop(slot, None)
        if life is not None:
            self._agreement.remove(slot)
            if life.owner is self:
                life.bit, life.owner = 0, None

    def renamed(self, life: CacheLife) -> None:
        """Take note that a worker has another name."""
        slot = life.bit.bit_length() - 1
        self._agreement.remove(slot)
        self._agreement.add(slot, life.name)

    def inform(self, match: Match, facts: Facts) -> Match:
        """Return a match that says what is known better; the same match when nothing is."""
        levels: list[tuple[int, int]] = []
        told, held, chain = 0, None, list[int]()
        index, shared = self._index, self._shared
        if index is not None:
            if index.version != self._seen:
                self._look(index)
            prompt = prompt_of(facts, self._encode) if self._live else None
            if prompt is not None:
                adapter = prompt.adapter or _adapter_in(prompt.model, index.adapters)
                held = index.match(prompt.tokens, adapter, prompt.salt, prompt.whole)
                levels = self._levels(held, prompt)
                told = self._told & ~self._set(held.beyond)
        if shared is not None:
            chain = shared.secret.chain(match.namespace, match.text)
            if chain and (found := shared.match(chain, self)):
                boundaries = shared.secret.boundaries
                levels += [(boundaries[place], slots & ~told) for place, slots in found]
                if held is not None:
                    levels.sort(reverse=True)
        return match if held is None and not chain else InformedMatch(match, levels, told, held, chain)

    def promise(self, match: Match, slot: int) -> int:
        """Take note that the request of this match goes to a worker; return how many beginnings of its text it was
        believed to have, by the word of all routers."""
        if not isinstance(match, InformedMatch):
            return 0
        holder = self._live.get(slot)
        if holder is not None and match.held is not None and self._index is not None:
            self._index.promise(holder, match.held)
        if not match.chain or self._shared is None:
            return 0
        self._shared.agreed += slot == match.agreed
        return self._shared.note(self._lives[slot], match.chain)

    def unread(self, namespace: bytes, text: bytes, slot: int, noted: int, taken: int) -> None:
        """Take note that a worker did not read a text that was promised to it; the others are told.

        noted  what `promise` returned
        taken  bytes at its end that the tree did not believe the worker to have, and no other request has used since
        """
        if self._shared is not None:
            chain, boundaries = self._shared.secret.chain(namespace, text), self._shared.secret.boundaries
            stays = max(noted, bisect_right(boundaries, len(text) - taken))
            if stays < len(chain):
                self._shared.take_back(self._lives[slot], chain, stays)

    def part(self, slot: int, size: int) -> int:
        """Return how much of a cache that holds so many bytes of text is filled by this router."""
        if self._shared is None:
            return size
        life = self._lives[slot]
        life.capacity = size // self._shared.grain
        return int(size * life.share)

    # -- what nobody has -----------------------------------------------------------------------------------------------

    def emptiest(self, match: Match, mask: int) -> int:
        """Return the slots, of some of a set, to which all routers together have sent the least; 0: nobody knows.

        Every router knows the same of the others, and that a little late: if each took the emptiest of all, all would
        send what is new to the same worker until they hear of it. The text says which ones are compared.
        """
        shared = self._shared
        if shared is None or not shared.connected or not isinstance(match, InformedMatch) or not match.chain:
            return 0
        lot, count, lives = match.chain[-1], mask.bit_count(), self._lives
        least, found = -1, 0
        for left in range(count, max(count - _COMPARED, 0), -1):
            lot, number = divmod(lot, left)
            slot = seat_of(mask, number)
            bit = 1 << slot
            mask ^= bit
            filled = lives[slot].filled
            if filled == least:
                found |= bit
            elif filled < least or least < 0:
                least, found = filled, bit
        return found

    def agree(self, match: Match | None, mask: int, roster: Roster) -> list[int]:
        """Return some slots of a set in the order in which every router would choose them for a text that nobody has;
        [] when any may be chosen, as it is while the routers can tell each other.

        Slots are seats. One that has more requests in flight than a quarter more than the mean, and one, is left out.
        """
        if self._shared is None or not self._shared.agrees or not isinstance(match, InformedMatch) or not match.chain:
            return []
        chain = match.chain
        key = chain[min(self._shared.known(chain), len(chain) - 1)]
        most = 1.25 * roster.running(mask) / mask.bit_count() + 1.0
        if roster.high > most:
            mask &= ~roster.at_least(int(most) + 1)
        order = self._agreement.order(key, mask)
        match.agreed = order[0] if order else -1
        return order

    # -- by their own word ---------------------------------------------------------------------------------------------

    def _look(self, index: KVIndex) -> None:
        """Work out which slots have live holders."""
        self._live, self._slots, self._told = {}, {}, 0
        for slot, name in self._names.items():
            holder = index.holders.get(name)
            if holder is not None and holder.live:
                self._live[slot] = holder
                self._slots[holder.bit] = 1 << slot
                if holder.whole and holder.size:  # else promises cannot be noted
                    self._told |= 1 << slot
        self._seen = index.version

    def _levels(self, held: Held, prompt: Prompt) -> list[tuple[int, int]]:
        """Return what is held, in bytes and by slots."""
        count, size = len(prompt.tokens), prompt.size
        return [(size * tokens // count, slots) for tokens, bits in held.levels if (slots := self._set(bits))]

    def _set(self, bits: int) -> int:
        """Return the slots of live holders."""
        found = 0
        while bits:
            bit = bits & -bits
            found |= self._slots.get(bit, 0)
            bits ^= bit
        return found


def _adapter_in(model: str, adapters: set[str]) -> str:
    """Return the LoRA adapter that a model's name means: vLLM's "adapter", SGLang's "model:adapter"; "" for none."""
    if not adapters:
        return ""
    if model in adapters:
        return model
    suffix = model.rpartition(":")[2]
    return suffix if suffix in adapters else ""
