"""What the router needs of a store: streams, a key that all share, and the leadership for a time.

A `Store` is a Valkey or Redis; `sharing.valkey_store` has the one that the client library makes. Whatever goes wrong
with it is a `StoreFailed`, which says in one word what it is (`Trouble`) and in a sentence what to do about it.

A position in a stream is the id of its last entry that was read, as two numbers: milliseconds of the store's clock,
and a number. (0, 0) is before the first one. Positions are compared with one another only, never with a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Final, NamedTuple, Protocol

Position = tuple[int, int]

START: Final[Position] = (0, 0)


class Trouble(Enum):
    """What is wrong with a store.

    UNREACHABLE  no connection: down, elsewhere, TLS refused
    SLOW         it does not answer in time: frozen, or a network that loses everything
    DENIED       password, user or their rights are wrong
    FULL         it takes nothing any more: out of memory
    READ_ONLY    a replica, or a server that cannot write its disk
    FOREIGN      a key of the prefix holds something else
    REFUSED      another refusal
    """

    UNREACHABLE = "unreachable"
    SLOW = "slow"
    DENIED = "denied"
    FULL = "full"
    READ_ONLY = "read_only"
    FOREIGN = "foreign"
    REFUSED = "refused"


class StoreFailed(Exception):
    """A store did not do what it was asked for. The text is a sentence, without secrets."""

    def __init__(self, trouble: Trouble, text: str) -> None:
        super().__init__(text)
        self.trouble = trouble


class LeaderHold(Enum):
    """What became of the wish to lead.

    OTHER      somebody else leads
    KEPT       this holder led, and goes on
    PASSED_ON  this holder leads from now on: the one before gave it back
    NEW        this holder is the only one the store knows; the store may have forgotten another one, who still acts
    """

    OTHER = 0
    KEPT = 1
    PASSED_ON = 2
    NEW = 3


class StreamEntry(NamedTuple):
    """An entry of a stream. payload: None when it is none of ours."""

    position: Position
    payload: bytes | None


class Appended(NamedTuple):
    """What is appended to a stream. most: about how many entries stay."""

    stream: str
    payload: bytes
    most: int


class Store(Protocol):
    """See the module. Each of these raises StoreFailed."""

    async def append(self, batch: Sequence[Appended]) -> list[Position | StoreFailed]:
        """Append entries in one round trip; return the position of each, or why it was not taken."""

    async def follow(self, positions: Mapping[str, Position], most: int, wait: float) -> dict[str, list[StreamEntry]]:
        """Return up to `most` entries of each stream after a position; wait some seconds while there is none."""

    async def older(self, stream: str, newest: Position, most: int) -> list[StreamEntry]:
        """Return up to `most` entries, newest first: from `newest` back."""

    async def ends(self, streams: Sequence[str]) -> dict[str, Position]:
        """Return the positions of the last entries that streams ever had."""

    async def shared_key(self, own: bytes) -> bytes:
        """Return the key that is kept in the store; keep `own` there if there is none."""

    async def tidy(self, kept: Mapping[str, tuple[float, float | None]]) -> None:
        """Let streams live on for so many seconds without a router; drop entries older than so many seconds."""

    async def hold(self, holder: str, seconds: float) -> LeaderHold:
        """Take the leadership, or keep it, for some seconds. Nobody keeps it longer without asking again."""

    async def resign(self, holder: str) -> None:
        """Give the leadership back, if this holder has it: the next one gets it as PASSED_ON."""

    async def close(self) -> None:
        """Close the connections. Raises nothing."""
