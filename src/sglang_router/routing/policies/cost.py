"""cost: a request goes where its first token comes soonest, with what that takes from others. All in seconds.

    cost = backlog                     until the prompts that were sent there before are read (`routing.work`)
         + x                           to read what is not cached there of this prompt, at the worker's own pace
         + x taken / own               what the evicted bring back later (`routing.pressure`); 0 while there is room
         + x (2 backlog + x) / gap     what those that come there meanwhile, one every `gap` seconds, wait longer
         + a part of the batch         what the requests in flight there slow this answer down
         all times the worker's `cost`, and 50 / its `priority`

    the cheapest; of those that cost hardly more those with the longest prefix, of these the cheapest, then in turn.
    Where nothing is cached: of those the one whose memory holds the least

    it has the longest prefix of all                            branch "hit"
    another candidate has a longer prefix                       branch "spill"
    another one has a longer prefix, but too many requests      branch "capped", see --cost-load-cap
    none has a prefix that is worth it                          branch "miss"
    no text                                                     branch "no_text"

Nothing is configured: all that stands here is measured. What the workers hold is remembered as by `cache_aware`, in the
same tree; the memory of a worker is as large as its engine's cache, where the engine tells that, so that both evict the
same. docs/routing.md derives the rule and names the sources.

A burst of requests with one new prefix does not read it everywhere: the first one counts as a backlog at its worker and
as a match. So waiting for it costs as much as reading it elsewhere, and what costs the same stays together.

With --shared-state, while the store cannot be reached or too much is placed to be remembered, those that cost the same
where nothing is cached are ranked as every router ranks them: two routers send the same new prompt to the same worker
(`routing.prefix_tree.informed`).

Up to `_ALL` workers are all compared. Of more, the owners of the longest prefixes and the least loaded workers are, and
of those with equal prefixes the least loaded ones: so a decision takes the same time however many workers there are.
"""

from __future__ import annotations

import random
from typing import Final

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.considered import Considered
from sglang_router.routing.facts import Facts
from sglang_router.routing.pace import Paces
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.prefix_tree.memory import TreeMemory
from sglang_router.routing.prefix_tree.slot import Slot, find_use
from sglang_router.routing.prefix_tree.tree import Match
from sglang_router.routing.pressure import Pressure
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

_WORTH: Final = 16
"""Bytes of a match that save an engine something."""
_ALL: Final = 8
"""So many owners of equally long prefixes, or workers without one, are all compared."""
_MOST: Final = 4
"""So many of more than that, the least loaded ones."""
_SURE: Final = 0.5
"""An owner of a prefix that costs less than this share of reading the whole prompt at the mean pace of the pool is not
compared with workers that have nothing of it."""
_NEAR: Final = 0.1
_NEAR_SECONDS: Final = 0.002
"""What costs more than the cheapest by this share of reading the whole prompt, and so many seconds, is near it."""
_SAME: Final = 6
"""Prefixes that differ by less than the total >> _SAME bytes are equally long: behind a fork texts may begin alike."""
_BATCH: Final = 0.1
"""How much a second of the answer counts against one before its first token."""


class Weighed:
    """What a request costs at some workers. The lists are parallel; the longest prefixes come first.

    match    how far its text is known; None without a text
    workers  that were compared
    matched  bytes of the text that each has
    costs    seconds
    """

    __slots__ = ("costs", "match", "matched", "workers")

    def __init__(self, match: Match | None) -> None:
        self.match = match
        self.workers: list[Worker] = []
        self.matched: list[int] = []
        self.costs: list[float] = []

    def __repr__(self) -> str:
        each = zip(self.workers, self.matched, self.costs, strict=True)
        return f"<Weighed {', '.join(f'{worker.url}: {matched} B, {cost:.3f} s' for worker, matched, cost in each)}>"


class Cost(Policy):
    """See the module."""

    name = "cost"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self.memory = self._memory = TreeMemory(settings.max_tree_size, settings.kv_caches)
        self._informed = self._memory.informed
        self.tree = self._memory.tree
        self.pressure = Pressure()
        self.paces = Paces()
        self._longest_text = self.tree.max_text
        self.adjust(settings)
        self._by_slot: dict[int, Worker] = {}
        self._rooms: dict[int, Slot] = {}  # what the tree holds for each slot

    def __repr__(self) -> str:
        return f"<Cost turn {self._turn}, {self.pressure!r}, {self.tree!r}>"

    def adjust(self, settings: PolicySettings) -> None:
        """Follow another cap of the load from now on."""
        super().adjust(settings)
        self._load_cap = settings.cost_load_cap

    # -- the choice ----------------------------------------------------------------------------------------------------

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the cheapest worker; of those near it, one with the longest prefix."""
        mask = candidates.mask if not self._load_cap else self._below_cap(candidates)
        total = self._total(facts)
        weighed = self.weigh(facts, candidates, mask, now)
        costs, matched = weighed.costs, weighed.matched
        near = [0]
        if len(costs) > 1:
            limit = min(costs) + (_NEAR * total * self.paces.prompts.per_unit + _NEAR_SECONDS)
            near = [number for number, cost in enumerate(costs) if cost <= limit]
            if len(near) > 1:
                near = self._best(weighed, candidates, near, total)
        number = near[0] if len(near) == 1 else near[(self._turn + 1) % len(near)]
        held = matched[number]
        choice = Choice(weighed.workers[number], "no_text", held, total, weighed, len(near) > 1)
        if total:
            choice.branch = "hit" if held else "miss"
            if mask != candidates.mask and weighed.match is not None:
                longest = weighed.match.best(candidates.mask)[0] - facts.scaffold
                capped = longest > matched[0]
            else:
                longest, capped = matched[0], False
            if longest - held > max(_WORTH, total >> _SAME):
                choice.branch = "capped" if capped else "spill"
        return choice

    def weigh(self, facts: Facts, candidates: Candidates, mask: int, now: float) -> Weighed:
        """Return what a request costs at some of the candidates: those of a set with the longest prefixes, and the
        least loaded ones. Changes nothing."""
        scaffold, total = facts.scaffold, self._total(facts)
        match = self._match(facts) if total else None
        weighed = Weighed(match)
        if match is not None:
            group = matched = enough = 0
            for length, owners in match.owners(mask, _ALL):
                if group and length < enough:
                    self._add(weighed, candidates, group, matched, total, now)
                    group = 0
                worth = length - scaffold
                if worth < _WORTH and worth != total:
                    break
                matched = worth
                mask ^= owners
                if not group:
                    enough = length - max(_WORTH, total >> _SAME)
                group |= owners
            if group:
                self._add(weighed, candidates, group, matched, total, now)
        if mask:
            prompts, answers = self.paces.prompts, self.paces.answers
            sure = _SURE * (prompts.per_item + total * prompts.per_unit)
            sure += _BATCH * candidates.roster.low * answers.per_request
            if self._informed is not None and not weighed.costs and mask.bit_count() > _ALL:
                mask = self._agreed(weighed, candidates, mask)
            if not weighed.costs or min(weighed.costs) > sure:
                self._add(weighed, candidates, mask, 0, total, now)
        return weighed

    def consider(self, facts: Facts, candidates: Candidates, now: float) -> list[Considered]:
        """Return what the request costs at each of these candidates, and what each has of its text."""
        found, total = super().consider(facts, candidates, now), self._total(facts)
        match = self._match(facts) if total else None
        weighed = Weighed(match)
        for worker, each in zip(candidates, found, strict=True):
            matched = match.length(worker.slot) - facts.scaffold if match is not None else 0
            each.matched = matched if matched >= _WORTH or matched == total else 0
            self._add(weighed, candidates, 1 << worker.seat, each.matched, total, now)
            each.backlog, each.cost = worker.work.backlog(now), weighed.costs[-1]
        return found

    def _match(self, facts: Facts) -> Match:
        """Return how far the text is known, and to whom."""
        match = self.tree.match(facts.namespace, facts.text[: self._longest_text])
        return match if self._informed is None else self._informed.inform(match, facts)

    def _add(self, weighed: Weighed, candidates: Candidates, mask: int, matched: int, total: int, now: float) -> None:
        """Add what the request costs at workers that have so much of it, or at the least loaded ones of these."""
        if mask.bit_count() > _ALL:
            mask = self._least_loaded(candidates, mask)
        rooms, pressure, at = self._rooms, self.pressure, candidates.at
        per_unit = self.paces.prompts.per_unit
        workers, lengths, costs = weighed.workers, weighed.matched, weighed.costs
        uncached = total - matched
        while mask:
            bit = mask & -mask
            mask ^= bit
            seat = bit.bit_length() - 1
            worker = at(seat)
            work = worker.work
            prompts, head, free_at, gap = work.prompts, work.head, work.free_at, work.gap
            if head < now:  # `Work.backlog`, without the call
                backlog = now - head + (free_at - head if free_at > head else 0.0)
            else:
                backlog = free_at - now if free_at > now else 0.0
            if work.elsewhere_until > now + backlog:
                backlog = work.elsewhere_until - now
            read = prompts.per_item + uncached * prompts.per_unit
            if now - work.last > gap:
                gap = now - work.last
            cost = backlog + read + read * (2.0 * backlog + read) / gap
            cost += _BATCH * worker.load * work.answers.per_request
            room = rooms[seat]  # seats are slots
            if room.size + uncached > room.max_size:
                cost += uncached * per_unit * pressure.evicting(now - room.ring.newer.time)
            workers.append(worker)
            lengths.append(matched)
            costs.append(cost * worker.weight)

    def _best(self, weighed: Weighed, candidates: Candidates, near: list[int], total: int) -> list[int]:
        """Return those of the near ones that are as good as each other."""
        costs, matched = weighed.costs, weighed.matched
        longest = matched[near[0]]
        if longest or not total:
            enough = longest - max(_WORTH, total >> _SAME)
            near = [number for number in near if matched[number] >= enough]
            least = min([costs[number] for number in near])
            return [number for number in near if costs[number] == least]
        if self._informed is not None:
            seats = {weighed.workers[number].seat: number for number in near}
            if order := self._informed.agree(weighed.match, sum([1 << seat for seat in seats]), candidates.roster):
                return [seats[order[0]]]
        sizes = [self._rooms[weighed.workers[number].slot].size for number in near]
        smallest = min(sizes)
        return [number for number, size in zip(near, sizes, strict=True) if size == smallest]

    def _total(self, facts: Facts) -> int:
        """Return the bytes of a request's text that count."""
        return max(min(len(facts.text), self._longest_text) - facts.scaffold, 0)

    def _least_loaded(self, candidates: Candidates, mask: int) -> int:
        """Return the least loaded workers of a set with more than are compared; of equal ones others with each turn."""
        levels = candidates.roster.levels
        found, left = 0, _MOST
        for load in sorted(levels):
            level = levels[load] & mask
            count = level.bit_count()
            if count > left:
                first = candidates.nth(level, self._turn % count).seat
                for part in (level >> first << first, level):
                    part &= ~found
                    while part and left:
                        bit = part & -part
                        part ^= bit
                        found |= bit
                        left -= 1
                break
            found |= level
            left -= count
        return found

    def _agreed(self, weighed: Weighed, candidates: Candidates, mask: int) -> int:
        """Return the first workers of a set that every router would choose for a text that nobody has; or the set."""
        order = [] if self._informed is None else self._informed.agree(weighed.match, mask, candidates.roster)
        return sum([1 << seat for seat in order[:_MOST]]) or mask

    def _below_cap(self, candidates: Candidates) -> int:
        """Return the candidates with fewer requests in flight than the cap allows; all when there is none."""
        mask, roster = candidates.mask, candidates.roster
        most = self._load_cap * roster.running(mask) / mask.bit_count()
        return mask if roster.high <= most else mask & ~roster.at_least(int(most) + 1) or mask

    # -- what is remembered --------------------------------------------------------------------------------------------

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Insert the request's text into the tree, as a prefix of the chosen worker, and measure the pressure."""
        self._turn += 1
        weighed: Weighed | None = choice.note
        if weighed is None or (match := weighed.match) is None:
            return
        choice.note = None  # it refers to nodes of the tree, which may go before the request ends
        worker, tree, pressure = choice.worker, self.tree, self.pressure
        slot = worker.slot
        self._bound(worker)
        mine = choice.matched + facts.scaffold if choice.matched else 0
        known = max(mine, weighed.matched[0] + facts.scaffold)
        room = self._rooms[slot]
        filling = room.size << 1 > room.max_size  # until then nothing is evicted, nor will be soon
        if filling and mine and match.node is not None and (use := find_use(match.node, slot)) is not None:
            pressure.used(mine, now - use.time)
        new = choice.learned = tree.insert(match, slot, now)
        choice.learned_at = now
        if self._informed is not None:
            choice.noted = self._informed.promise(match, slot)
        if filling and new:
            pressure.remember(tree.held)
            pressure.inserted(match.namespace, match.text, (mine, known), room.bit, new, now)

    def _bound(self, worker: Worker) -> None:
        """Remember as much of a worker as its engine's cache holds, where the engine tells that."""
        capacity = worker.report.capacity_tokens
        if capacity is not None:
            size = int(capacity * worker.work.bytes_per_token)
        elif self._informed is not None:
            size = self.tree.max_size
        else:
            return
        self.tree.bound(worker.slot, size if self._informed is None else self._informed.part(worker.slot, size))

    def unread(self, choice: Choice, facts: Facts) -> None:
        """Take what the request added out of the tree, as far as no other request has used it."""
        if choice.learned and self._by_slot.get(choice.worker.slot) is choice.worker:
            namespace, slot = facts.namespace, choice.worker.slot
            taken = self.tree.forget(namespace, facts.text, slot, choice.learned, choice.learned_at)
            if taken and self._informed is not None:
                self._informed.unread(namespace, facts.text[: self._longest_text], slot, choice.noted, taken)

    def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
        """Take how long a token is, with which the size of an engine's cache is converted."""
        if usage is not None and usage.prompt > 0:
            choice.worker.work.bytes_per_token = choice.worker.tokens.rate.bytes_per_token

    # -- notices -------------------------------------------------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        """Give a worker a slot in the tree, and the pace of the pool until it has its own."""
        slot = self._memory.add(worker)
        self._by_slot[slot] = worker
        self._rooms[slot] = self.tree.books(slot)
        self.paces = worker.work.join(self.paces)

    def removed(self, worker: Worker) -> None:
        """Free the worker's slot, and with it its prefixes."""
        worker.work.leave()
        slot = self._memory.remove(worker)
        del self._by_slot[slot]
        del self._rooms[slot]

    def emptied(self, worker: Worker) -> None:
        """Forget the worker's prefixes: it gets a new slot."""
        self.removed(worker)
        self.added(worker)

    def tidy(self, now: float, budget: int) -> bool:
        """Free the nodes of removed workers; evict what is too much, then what was unused for `max_idle` seconds."""
        done = self._memory.tidy(now - self.settings.max_idle, budget)
        if done < budget:  # the last call of a clean-up
            for worker in self._by_slot.values():
                worker.work.forget(now)
                self._bound(worker)  # one that gets no requests, too
        return done >= budget
