"""Which worker has which beginnings of prompts, as all routers tell it: the replica of placements.

    chain = secret.chain(namespace, text)        names of the beginnings, see `routing.shared.secret`
    match(chain, owner)                          which workers have the longest of them, and the shorter ones
    note(life, chain)                            this router sends such a prompt to a worker: told with the next flush
    take_back(life, chain, known)                the worker did not read it: told, too
    hear(life, grown, hashes)                    another router sent one; unhear: and its worker did not read it

    #a -> (worker 3, 1040)        a beginning that one worker has; 1040: bytes placed there when it was used last
    #b -> (3, 1040), (5, 977)     one that several have

*What still counts.* An engine evicts what was used least recently. So a beginning is believed to be there until as many
bytes as the cache holds have been placed at the worker after its last use, by all routers together. That is LRU, by
distance instead of by order: no list is kept, nothing is moved, and placements may be heard in any order. A beginning
in use is noted anew when an eighth of the cache has passed.

*Lives.* A worker whose cache is emptied gets a new number, so that no entry of before means anything. Entries of dead
numbers, and those that no longer count, go when they are met.

*Bounds.* At most `most` entries, in two generations: what is used goes into the young one; when that is full, the old
one is dropped (in slices: `reclaim`) and the young one becomes old. An entry takes about 130 bytes, and 8 for each
further worker, of which it has at most `_MOST_OWNERS`: the one noted first leaves. The tables are divided, because a
large one takes milliseconds to grow.

Names are 64 bits. Two beginnings with the same one would lead to a bad choice of worker, no more.
"""

from __future__ import annotations

from typing import Any, Final

from sglang_router.routing.shared.cache_life import BEGIN, CacheLife
from sglang_router.routing.shared.packing import numbers, packed
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.untold import MOST_GROWN, MOST_HASHES, MOST_HEADS, Prompts, Untold

_STAMP_BITS: Final = 42
_STAMP: Final = (1 << _STAMP_BITS) - 1
_LAST: Final = _STAMP - (1 << 36)
"""Grains after which a life ends: hundreds of terabytes."""
_MOST_LIVES: Final = (1 << 22) - 1
_GRAINS: Final = 8
"""Parts of a step in which bytes are counted."""
_MOST_OWNERS: Final = 64
_ENOUGH: Final = 16
"""Workers with a beginning of a text that are looked for."""
_DENSE: Final = 16
"""Beginnings below the longest one that are all looked at; of the others each that is so much of the way shorter."""
_REFRESH: Final = 8
"""A beginning is noted anew after this part of a cache."""
_PARTS: Final = 16
_RECLAIMED: Final = 2
"""Dropped entries that are freed with each new one: so those of one generation wait at most."""
_ENTRY: Final = 130

Parts = list[dict[int, Any]]


class SharedPrefixes:
    """See the module.

    grain  bytes in which placements are counted
    told   prompts that were noted; heard: of other routers; crowded: hashes that were too many to be told
    turn   at which policies begin that take equal workers in turn: another one at each router
    agrees what nobody has goes where every router would send it: while they cannot tell each other, and when so much
           is placed that this table forgets it, because that is where it may have been before
    agreed strangers that were placed where every router would place them
    """

    __slots__ = (
        *("_dropped", "_half", "_lives", "_names", "_numbers", "_old", "_sent", "_size", "_unread", "_young"),
        *("_forgets", "agreed", "connected", "crowded", "grain", "heard", "secret", "told", "turn"),
    )

    def __init__(self, secret: Secret, most: int, turn: int = 0) -> None:
        self.secret = secret
        self.turn = turn
        self.connected = False
        self._forgets = False
        self.grain = max(1, secret.step // _GRAINS)
        self.told = self.heard = self.crowded = self.agreed = 0
        self._half = max(_PARTS, most // 2)
        self._young: Parts = [{} for _ in range(_PARTS)]
        self._old: Parts = [{} for _ in range(_PARTS)]
        self._dropped: Parts = []
        self._size = 0  # entries of the young ones
        self._lives: dict[int, CacheLife] = {}  # by number
        self._names: dict[int, CacheLife] = {}
        self._numbers = 0
        self._sent, self._unread = Untold(), Untold()

    def __repr__(self) -> str:
        return f"<SharedPrefixes of {len(self._lives)} lives, {len(self)} entries>"

    def __len__(self) -> int:
        """Return the number of entries."""
        return sum([len(part) for parts in (self._young, self._old) for part in parts])

    @property
    def agrees(self) -> bool:
        return self._forgets or not self.connected

    @property
    def size(self) -> int:
        """About how many bytes the entries take."""
        return _ENTRY * len(self)

    # -- workers -------------------------------------------------------------------------------------------------------

    def life(self, name: int) -> CacheLife:
        """Return the life of a worker, by its name; a new one if there is none."""
        life = self._names.get(name)
        if life is None:
            life = self._names[name] = CacheLife(name, self._next())
            self._lives[life.number] = life
        return life

    def empty(self, life: CacheLife) -> None:
        """Forget what a worker has: its cache is empty."""
        del self._lives[life.number]
        life.number = self._next()
        life.placed = BEGIN
        life.recent = life.own = life.untold = 0
        life.past = -1
        self._lives[life.number] = life

    def forget(self, name: int) -> None:
        """Forget a worker that is none of this router's."""
        life = self._names.pop(name, None)
        if life is not None:
            del self._lives[life.number]

    def rename(self, names: dict[int, int]) -> None:
        """Begin anew, with other names of workers, by their old ones: those of others, and of texts, mean nothing any
        more."""
        self._sent, self._unread = Untold(), Untold()
        lives = [life for name, life in self._names.items() if name in names]
        self._names, self._lives = {}, {life.number: life for life in lives}
        for life in lives:
            life.name = names[life.name]
            self._names[life.name] = life
            self.empty(life)
            life.past = 0
            if life.owner is not None:
                life.owner.renamed(life)

    def _next(self) -> int:
        """Return the number of a new life: of far too many, one that nearly all entries have forgotten."""
        self._numbers = self._numbers % _MOST_LIVES + 1
        while self._numbers in self._lives:
            self._numbers = self._numbers % _MOST_LIVES + 1
        return self._numbers

    def _place(self, life: CacheLife, grown: int, own: bool) -> int:
        """Count bytes that were placed; return the stamp of what was placed with them."""
        if life.placed > _LAST:
            self.empty(life)
        return life.place(min(grown, MOST_GROWN) // self.grain, own)

    # -- questions -----------------------------------------------------------------------------------------------------

    def match(self, chain: list[int], owner: object) -> list[tuple[int, int]]:
        """Return which workers have which beginnings, as (place in the chain, slots), the longest first.

        Only those of an owner's prefix tree. Of those far shorter than the longest one fewer and fewer are looked at.
        """
        found: list[tuple[int, int]] = []
        seen, last = 0, None
        number = longest = len(chain) - 1
        while number >= 0:
            entry = self._entry(chain[number])
            if entry is not None and entry != last:  # what was noted at once is the same
                last = entry
                if new := self._slots(entry, owner) & ~seen:
                    if not found:
                        longest = number
                    found.append((number, new))
                    seen |= new
                    if seen.bit_count() >= _ENOUGH:
                        break
            below = max((longest - number) // _DENSE, 1) if found else 1
            number = max(number - below, 0) if number else -1
        return found

    def known(self, chain: list[int]) -> int:
        """Return how many of a chain's beginnings, from the shortest on, any worker may have."""
        number = len(chain)
        while number and self._entry(chain[number - 1]) is None:
            number -= 1
        return number

    def _entry(self, key: int) -> Any:
        part = key & (_PARTS - 1)
        entry = self._young[part].get(key)
        return self._old[part].get(key) if entry is None else entry

    def _slots(self, entry: Any, owner: object) -> int:
        """Return the slots of an entry's workers that still have it."""
        lives = self._lives
        if isinstance(entry, int):
            life = lives.get(entry >> _STAMP_BITS)
            if life is None or life.owner is not owner or life.placed - (entry & _STAMP) > life.capacity:
                return 0
            return life.bit
        found = 0
        for each in numbers(entry):
            life = lives.get(each >> _STAMP_BITS)
            if life is not None and life.owner is owner and life.placed - (each & _STAMP) <= life.capacity:
                found |= life.bit
        return found

    # -- what this router places ---------------------------------------------------------------------------------------

    def note(self, life: CacheLife, chain: list[int]) -> int:
        """Take note that a prompt goes to a worker; what of that is new there is told with the next flush. Return how
        many of its beginnings the worker was believed to have.

        The longest beginning that was noted a short time ago ends the search: the shorter ones were noted with it.
        """
        placed, boundaries = life.placed, self.secret.boundaries
        fresh = placed - life.capacity // _REFRESH
        number, known = len(chain), 0
        while number:
            stamp = self._stamp(chain[number - 1], life.number)
            if not known and stamp >= placed - life.capacity:
                known = number
            if stamp >= fresh:
                break
            number -= 1
        grown = boundaries[len(chain) - 1] - (boundaries[known - 1] if known else 0)
        life.untold += grown
        placed = self._place(life, grown, own=True)
        new = chain[number:]
        if not new:
            return known
        for key in new:
            self._enter(key, life.number, placed)
        if self._sent.add(life.name, life.untold, new):
            self.told += 1
            life.untold = 0
        else:
            self.crowded += len(new)
        return known

    def take_back(self, life: CacheLife, chain: list[int], known: int) -> None:
        """Take note that a worker did not read a prompt that was noted: of its beginnings it has only the first
        `known`."""
        gone, boundaries = self._leave(chain[known:], life.number), self.secret.boundaries
        if not gone:
            return
        grown = boundaries[len(chain) - 1] - (boundaries[known - 1] if known else 0)
        life.take_back(grown // self.grain, own=True)
        if not self._unread.add(life.name, grown, gone):
            self.crowded += len(gone)

    def _leave(self, keys: list[int], number: int) -> list[int]:
        """Enter that a life has not these beginnings; return those that it had."""
        found = []
        for key in keys:
            place = key & (_PARTS - 1)
            young = self._young[place]
            part = young if key in young else self._old[place]
            entry = part.get(key)
            if entry is None:
                continue
            owners = [entry] if isinstance(entry, int) else numbers(entry)
            others = [each for each in owners if each >> _STAMP_BITS != number]
            if len(others) == len(owners):
                continue
            found.append(key)
            if others:
                part[key] = others[0] if len(others) == 1 else packed(others)
            else:
                del part[key]
                self._size -= part is young
        return found

    def _stamp(self, key: int, number: int) -> int:
        """Return when a life was given a beginning last; -1: never, as far as is known."""
        entry = self._entry(key)
        if entry is None:
            return -1
        if isinstance(entry, int):
            return entry & _STAMP if entry >> _STAMP_BITS == number else -1
        for each in numbers(entry):
            if each >> _STAMP_BITS == number:
                return each & _STAMP
        return -1

    def _enter(self, key: int, number: int, stamp: int) -> None:
        """Enter that a life was given a beginning."""
        place = key & (_PARTS - 1)
        young = self._young[place]
        entry = young.get(key)
        if entry is None:
            entry = self._old[place].pop(key, None)
            self._size += 1
            if self._dropped:
                self.reclaim(_RECLAIMED)
        new = number << _STAMP_BITS | stamp
        if entry is None or (isinstance(entry, int) and entry >> _STAMP_BITS == number):
            young[key] = new
        else:
            lives = self._lives
            others = []
            for each in (entry,) if isinstance(entry, int) else numbers(entry):
                life = lives.get(each >> _STAMP_BITS)
                if life is None or life.number == number:
                    continue
                if not life.capacity or life.placed - (each & _STAMP) <= life.capacity:
                    others.append(each)
            if others:
                young[key] = packed([*others[1 - _MOST_OWNERS :], new])
            else:
                young[key] = new
        if self._size > self._half:
            self._turn()

    def _turn(self) -> None:
        """Drop the old generation; let the young one become old."""
        dropped = [part for part in self._old if part]
        self._forgets = bool(dropped)
        self._dropped += dropped
        self._old = self._young
        self._young = [{} for _ in range(_PARTS)]
        self._size = 0

    def reclaim(self, budget: int) -> bool:
        """Free up to `budget` entries that were dropped; return whether there are more."""
        dropped = self._dropped
        while dropped and budget > 0:
            part = dropped[-1]
            for _ in range(min(budget, len(part))):
                part.popitem()
                budget -= 1
            if not part:
                dropped.pop()
        return bool(dropped)

    # -- what is told, and heard ---------------------------------------------------------------------------------------

    def gather(self) -> tuple[Prompts, Prompts]:
        """Return the prompts to be told, as much as fits into a message: those that were sent, and those of before that
        were not read. It is not told again."""
        sent = self._sent.take(MOST_HEADS, MOST_HASHES)
        if len(self._sent):  # one of these may not have been read: that comes after it
            return sent, ([], [])
        return sent, self._unread.take(MOST_HEADS - len(sent[0]), MOST_HASHES - len(sent[1]))

    def hear(self, life: CacheLife, grown: int, keys: list[int], old: bool) -> None:
        """Take note that another router sent a prompt to a worker.

        grown  bytes of it that were new there; keys: beginnings of it
        old    that was before all that is known; call it for the latest first
        """
        if not old:
            placed = self._place(life, grown, own=False)
            for key in keys:
                self._enter(key, life.number, placed)
        elif life.past >= 0:
            for key in keys:
                if self._stamp(key, life.number) < 0:
                    self._enter(key, life.number, BEGIN - life.past)
            life.past = min(life.past + grown // self.grain, BEGIN)

    def unhear(self, life: CacheLife, grown: int, keys: list[int], old: bool) -> None:
        """Take note that a worker did not read a prompt that another router had sent there. The same as for `hear`."""
        if not old:
            if self._leave(keys, life.number):
                life.take_back(grown // self.grain, own=False)
        elif life.past >= 0:
            for key in keys:
                if self._stamp(key, life.number) < 0:
                    self._enter(key, life.number, 0)  # so long ago that it does not count
            life.past = max(life.past - grown // self.grain, 0)
