"""Messages of placements: what is told of prompts, sessions and emptied caches, and what is made of what others tell.

A worker's cache that one router finds empty (its engine restarted, or was flushed) is empty for all: the others forget
its prefixes, unless they did so a short time ago, for the same reason. What is placed there afterwards comes after that
in the stream, so it counts.
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

_AGAIN: Final = 30.0
"""Seconds after a cache was found empty in which another router's word for that says nothing new."""
_MOST_EMPTIED: Final = 256
"""Emptied caches of one message."""
_PLACE: Final = (1 << 16) - 1


class Placements:
    """See the module."""

    __slots__ = ("_emptied", "_fleet", "_homes", "_members", "_numbers", "_prefixes")

    def __init__(self, members: Members, prefixes: SharedPrefixes, homes: SharedHomes, fleet: Fleet) -> None:
        self._members = members
        self._prefixes = prefixes
        self._homes = homes
        self._fleet = fleet
        self._numbers = Numbers()
        self._emptied: list[int] = []  # names of workers, to be told

    def __repr__(self) -> str:
        return f"<Placements in {self._prefixes!r}>"

    # -- told ----------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Find the caches that were emptied since the last look."""
        for member in self._members.here:
            worker = member.worker
            if worker is not None and worker.caches != member.caches:
                member.caches = worker.caches
                if now - member.emptied_at > _AGAIN:
                    self._emptied.append(member.name)
                    self._prefixes.empty(self._prefixes.life(member.name))
                member.emptied_at = now

    def joined(self, member: Member) -> None:
        """Take note of a worker that is registered here: under a new id it is believed to be another engine."""
        worker = member.worker
        if worker is not None:
            if member.identity not in ("", worker.id):
                self._prefixes.empty(self._prefixes.life(member.name))
            member.identity, member.caches = worker.id, worker.caches

    def gather(self, router: bytes, number: int) -> PlacementsMessage | None:
        """Return the next message; None when there is nothing to tell."""
        heads, keys = self._prefixes.gather()
        homes = self._homes.gather()
        if not heads and not homes and not self._emptied:
            return None
        emptied = self._emptied[:_MOST_EMPTIED]
        del self._emptied[:_MOST_EMPTIED]
        places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _, _ in heads))}
        packs = [places[name] | hashes << 16 | grown << 32 for name, hashes, grown in heads]
        return PlacementsMessage(
            FORM, router, number, packed(places), packed(emptied), packed(packs), packed(keys), packed(homes)
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
        workers, heads, keys = numbers(message.workers), numbers(message.heads), numbers(message.hashes)
        if any(head & _PLACE >= len(workers) for head in heads):
            raise ValueError("a place without a worker")
        if sum([head >> 16 & _PLACE for head in heads]) != len(keys):
            raise ValueError("hashes of no prompt")
        emptied = numbers(message.emptied)
        if not old:
            self._found_empty(emptied, old, now)
        members, lives = [], []
        for name in workers:  # each life right after its member: a later one may be the one too many
            members.append(self._members.find(name))
            lives.append(self._prefixes.life(name))
        start = done = 0
        order = reversed(heads) if old else heads
        end = len(keys)
        for head in order:
            count = head >> 16 & _PLACE
            part = keys[end - count : end] if old else keys[start : start + count]
            start, end = start + count, end - count
            self._prefixes.hear(lives[head & _PLACE], head >> 32, part, old)
            worker = members[head & _PLACE].worker
            if not old and worker is not None:
                worker.work.reads(head >> 32)
            done += count + 1
            if done >= 64:
                yield done
                done = 0
        self._prefixes.heard += len(heads)
        if old:
            self._found_empty(emptied, old, now)

    def _found_empty(self, names: list[int], old: bool, now: float) -> None:
        """Forget what workers had in their caches."""
        for name in names:
            member = self._members.find(name)
            if old:
                self._prefixes.life(name).past = -1
            elif now - member.emptied_at > _AGAIN:
                member.emptied_at = now
                self._prefixes.empty(self._prefixes.life(name))
                worker = member.worker
                if worker is not None:
                    self._fleet.found_empty(worker)
                    member.caches = worker.caches
