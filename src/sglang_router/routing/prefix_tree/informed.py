"""A match of the prefix tree, corrected by what workers themselves say they hold (`routing.kv_index`).

    tree.match(namespace, text) -> Match --+
                                           |--> Informed.inform(match, facts) -> InformedMatch: best, owners, length
    index.match(tokens)         -> Held  --'

For a worker whose events are followed from the beginning, the index alone counts. One whose events were followed from
the middle on may hold more than the index knows: the longer of both counts. So it does for what lies beyond the tokens
that were looked up. For all other workers, and for a prompt whose tokens are not known, nothing changes.

The tree's lengths are bytes of routing text; tokens become bytes in proportion. The tree still gets every prompt: it
answers again as soon as a stream of events is cut.
"""

from __future__ import annotations

from sglang_router.routing.facts import Facts
from sglang_router.routing.kv_blocks import Holder
from sglang_router.routing.kv_index import Held, KVIndex
from sglang_router.routing.prefix_tree.tree import Match
from sglang_router.routing.prompt_tokens import Encode, Prompt, prompt_of


class KVCaches:
    """What is known of the workers' KV caches by events. encode: the tokenizer; None: there is none."""

    __slots__ = ("encode", "index")

    def __init__(self, index: KVIndex, encode: Encode | None = None) -> None:
        self.index = index
        self.encode = encode

    def __repr__(self) -> str:
        return f"<KVCaches {self.index!r}>"


class InformedMatch(Match):
    """See the module. Sets are of slots.

    levels  (length in bytes, slots) by the index, the longest first
    told    slots for which the tree does not count
    held    what the index said
    """

    __slots__ = ("held", "levels", "told")

    def __init__(self, match: Match, levels: list[tuple[int, int]], told: int, held: Held) -> None:
        super().__init__(match.tree, match.namespace, match.text, match.node, match.start, match.end)
        self.levels = levels
        self.told = told
        self.held = held

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
    """What the index says of the workers of one tree, by slot."""

    def __init__(self, caches: KVCaches) -> None:
        self._caches = caches
        self._names: dict[int, str] = {}  # holders by slot
        self._seen = -1  # the version of the index when the following was worked out
        self._live: dict[int, Holder] = {}  # by slot
        self._told = 0
        self._slots: dict[int, int] = {}  # sets of one slot by bit of a holder

    def __repr__(self) -> str:
        return f"<Informed of {len(self._live)} of {len(self._names)} workers>"

    def add(self, slot: int, name: str) -> None:
        """Take note of a worker, by the name of its holder."""
        self._names[slot] = name
        self._seen = -1

    def remove(self, slot: int) -> None:
        """Forget a worker."""
        del self._names[slot]
        self._seen = -1

    def inform(self, match: Match, facts: Facts) -> Match:
        """Return a match that says what the index knows better; the same match when it knows nothing."""
        index = self._caches.index
        if index.version != self._seen:
            self._look(index)
        if not self._live:
            return match
        prompt = prompt_of(facts, self._caches.encode)
        if prompt is None:
            return match
        adapter = prompt.adapter or _adapter_in(prompt.model, index.adapters)
        held = index.match(prompt.tokens, adapter, prompt.salt, prompt.whole)
        return InformedMatch(match, self._levels(held, prompt), self._told & ~self._set(held.beyond), held)

    def promise(self, match: Match, slot: int) -> None:
        """Take note that the request of this match goes to a worker."""
        holder = self._live.get(slot)
        if holder is not None and isinstance(match, InformedMatch):
            self._caches.index.promise(holder, match.held)

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
