"""Messages of placements: what is told of prompts, sessions and emptied caches, and what is made of what others tell.

A worker's cache that one router finds empty (its engine restarted, or was flushed) is empty for all: the others forget
its prefixes. What is placed there afterwards comes after that in the stream, so it counts. A router that had lost the
worker when it hears of that finds the same itself when the worker is back: that is no news, and not told. A router that
says so again and again, because its own network fails, is not listened to: four times for one worker at first, then
every 30 s, whoever says it. What could not be written is told again, for 30 s: later it would take from the others what
they have placed there since.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sglang_router.routing.fleet import Fleet
from sglang_router.routing.shared.homes import SharedHomes
from sglang_router.routing.shared.members import Member, Members
from sglang_router.routing.shared.packing import numbers, packed
from sglang_router.routing.shared.peers import Numbers
from sglang_router.routing.shared.prefixes import SharedPrefixes
from sglang_router.routing.shared.records import FORM, PlacementsMessage

_NEWS: Final = 30.0
"""Seconds for which it is news that a cache was found empty."""
_MOST_EMPTIED: Final = 256
"""Emptied caches of one message."""
_PLACE: Final = (1 << 16) - 1


class _Prompts:
    """Prompts of a message. heads, keys: their records and the hashes of all, as it has them; workers: names.

    Raises: ValueError, for those without sense.
    """

    __slots__ = ("_heads", "_keys")

    def __init__(self, heads: bytes, keys: bytes, workers: list[int]) -> None:
        self._heads, self._keys = numbers(heads), numbers(keys)
        if any(head & _PLACE >= len(workers) for head in self._heads):
            raise ValueError("a place without a worker")
        if sum([head >> 16 & _PLACE for head in self._heads]) != len(self._keys):
            raise ValueError("hashes of no prompt")

    def __len__(self) -> int:
        return len(self._heads)

    def each(self, backwards: bool) -> Iterator[tuple[int, int, list[int]]]:
        """Give place of the worker, bytes that were new there, and hashes of each, in their order or backwards."""
        keys, start, end = self._keys, 0, len(self._keys)
        for head in reversed(self._heads) if backwards else self._heads:
            count = head >> 16 & _PLACE
            part = keys[end - count : end] if backwards else keys[start : start + count]
            start, end = start + count, end - count
            yield head & _PLACE, head >> 32, part


class Placements:
    """See the module."""

    __slots__ = ("_emptied", "_fleet", "_homes", "_members", "_numbers", "_prefixes", "_telling")

    def __init__(self, members: Members, prefixes: SharedPrefixes, homes: SharedHomes, fleet: Fleet) -> None:
        self._members = members
        self._prefixes = prefixes
        self._homes = homes
        self._fleet = fleet
        self._numbers = Numbers()
        self._emptied: dict[int, float] = {}  # names of workers, to be told, and when that was found
        self._telling: dict[int, float] = {}  # those that were given away since the last look

    def __repr__(self) -> str:
        return f"<Placements in {self._prefixes!r}>"

    # -- told ----------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Find the caches that were emptied since the last look."""
        self._telling = {}
        for member in self._members.here:
            worker = member.worker
            if worker is not None and worker.caches != member.caches:
                member.caches = worker.caches
                if not member.expected:
                    self._emptied[member.name] = member.emptied_at = now
                    self._prefixes.empty(self._prefixes.life(member.name))
                member.expected = False
        if self._emptied:
            self._emptied = {name: at for name, at in self._emptied.items() if now - at <= _NEWS}

    def missed(self) -> None:
        """Take note that what was given away since the last look could not be written."""
        self._emptied = self._telling | self._emptied
        self._telling = {}

    def joined(self, member: Member) -> None:
        """Take note of a worker that is registered here: under a new id it is believed to be another engine."""
        worker = member.worker
        if worker is not None:
            if member.identity not in ("", worker.id):
                self._prefixes.empty(self._prefixes.life(member.name))
            member.identity, member.caches = worker.id, worker.caches

    def gather(self, router: bytes, number: int) -> PlacementsMessage | None:
        """Return the next message; None when there is nothing to tell."""
        (heads, keys), (back, gone) = self._prefixes.gather()
        homes = self._homes.gather()
        if not heads and not back and not homes and not self._emptied:
            return None
        emptied = list(self._emptied)[:_MOST_EMPTIED]
        for name in emptied:
            self._telling[name] = self._emptied.pop(name)
        places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _, _ in heads + back))}
        sent, unread = [
            packed([places[name] | hashes << 16 | grown << 32 for name, hashes, grown in prompts])
            for prompts in (heads, back)
        ]
        return PlacementsMessage(
            *(FORM, router, number, packed(places), packed(emptied), sent, packed(keys), packed(homes)),
            back=unread,
            gone=packed(gone),
        )

    # -- heard ---------------------------------------------------------------------------------------------------------

    def hear(self, message: PlacementsMessage, old: bool, own: bool, now: float) -> Iterator[int]:
        """Apply a message in pieces; yield the number of hashes in each.

        own  it is of this router: only the order in which homes were told is learnt from it

        Raises: ValueError, for one without sense.
        """
        if not old and not self._numbers.is_next(message.router, message.number):
            return  # somebody wrote it once more
        homes = numbers(message.homes)
        if len(homes) % 2:
            raise ValueError("a session without a home")
        for place in range(0, len(homes), 2):
            self._homes.hear(homes[place], homes[place + 1], old, now)
        if own:
            return
        workers, emptied = numbers(message.workers), numbers(message.emptied)
        sent, unread = _Prompts(message.heads, message.hashes, workers), _Prompts(message.back, message.gone, workers)
        if not old:
            self._found_empty(emptied, old, now)
        members, lives = [], []
        for name in workers:  # each life right after its member: a later one may be the one too many
            members.append(self._members.find(name))
            lives.append(self._prefixes.life(name))
        done = 0
        for prompts in (unread, sent) if old else (sent, unread):
            for place, grown, part in prompts.each(backwards=old):
                if prompts is unread:
                    self._prefixes.unhear(lives[place], grown, part, old)
                else:
                    self._prefixes.hear(lives[place], grown, part, old)
                    worker = members[place].worker
                    if not old and worker is not None:
                        worker.work.reads(grown)
                done += len(part) + 1
                if done >= 64:
                    yield done
                    done = 0
        self._prefixes.heard += len(sent)
        if old:
            self._found_empty(emptied, old, now)

    def _found_empty(self, names: list[int], old: bool, now: float) -> None:
        """Forget what workers had in their caches."""
        for name in names:
            member = self._members.find(name)
            if old:
                self._prefixes.life(name).past = -1
            elif not member.words.take(now):
                member.emptied_at = now
                self._prefixes.empty(self._prefixes.life(name))
                worker = member.worker
                if worker is not None:
                    member.expected = worker.gone_silent
                    self._fleet.found_empty(worker)
                    member.caches = worker.caches
