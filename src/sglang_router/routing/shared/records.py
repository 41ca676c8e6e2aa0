"""What routers write for each other, the rules of it, and what can be read of it: records, without logic.

A message is packed by msgspec as an array, in this order, and sealed (`routing.shared.secret`). Lists of numbers are
bytes: 64 bits each, little-endian. A name of a worker, a session or a client is a keyed hash of 64 bits.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

FORM: Final = 1
"""The version of the messages. Routers of different forms ignore each other, and say so."""


class SharedTopic(enum.Enum):
    """What a message is about; the name of its stream.

    PLACEMENTS  which prefixes went to which worker, where sessions are at home, whose cache is empty: worth keeping
    LOADS       what is in flight at workers now: worthless after seconds
    ORDERS      what an operator wants of workers: the order of the stream counts, and all of it is worth keeping
    """

    PLACEMENTS = "placements"
    LOADS = "loads"
    ORDERS = "orders"


class SharedRules(msgspec.Struct, frozen=True):
    """How a router shares what it knows.

    key       secret of the fleet, 32 bytes: whoever has it can write messages, and test whether a prompt was placed
    router    name of this router among the others, 8 random bytes
    blocks    most entries of the replica of placements, about 150 bytes each
    step      bytes of text between two boundaries of a chain, see `routing.shared.secret`
    expiry    seconds after its last message after which nothing of another router's load counts any more
    whole     seconds between two messages that hold all loads, not only those that changed
    waiting   most bytes of messages that wait to be applied
    place     of this machine, or container, alone: workers at its loopback addresses are others than those of another
    fleet     name of the fleet: what another one with the same key has written is as foreign as with another key
    """

    key: bytes
    router: bytes
    blocks: int = 1 << 18
    step: int = 512
    expiry: float = 3.0
    whole: float = 1.0
    waiting: int = 1 << 23
    place: bytes = b""
    fleet: bytes = b""


class AnyMessage(msgspec.Struct, frozen=True, array_like=True):
    """What messages of all forms begin with. Within a form, fields are added at the end only: who does not know them
    skips them."""

    form: int


class LoadsMessage(msgspec.Struct, frozen=True, array_like=True):
    """What is in flight at workers, as this router's requests make it. All figures replace those told before.

    number  rises with each message of this router
    whole   of workers from `low` to `high`, what is not named here is zero: there may be too many for one message
    left    the router ends: nothing of it counts any more
    names   of workers
    states  of each: requests in flight (16 bits), how many were sent so far (8, the rest of that), flags (8),
            milliseconds until its prompts are read (32)
    meters  names of clients and models with limits; all_meters: of those from `first` to `last` that are not named
            here, nothing is in flight
    spent   of each: requests in flight (32 bits), requests begun since the last message (32); then tokens since then
    first   with `all_meters`: of which name on that counts; last: up to which one
    debts   with `all_meters`, of each: milliseconds until all its requests may come at once again (32 bits), and its
            tokens (32)
    held    with `whole`: requests that this router holds because no worker is ready
    """

    form: int
    router: bytes
    number: int
    whole: bool = False
    left: bool = False
    names: bytes = b""
    states: bytes = b""
    meters: bytes = b""
    spent: bytes = b""
    all_meters: bool = False
    low: int = 0
    high: int = 0
    first: int = 0
    last: int = 0
    debts: bytes = b""
    held: int = 0


class PlacementsMessage(msgspec.Struct, frozen=True, array_like=True):
    """Where prompts went, in the order in which they are to be read: the emptied workers first.

    number   rises with each message of this router
    workers  names
    emptied  names of workers whose caches are empty; what was placed there before counts no more
    heads    of each prompt: place of its worker in `workers` (16 bits), number of its hashes (16), bytes of its text
             that the worker had not cached (32)
    hashes   of all prompts, one after the other: those of the boundaries that are new at the worker
    homes    of sessions: name of the session, then name of its worker, by turns
    back     of prompts that were told before, but not read by their workers: the same as `heads`
    gone     their hashes, which these workers do not have
    """

    form: int
    router: bytes
    number: int
    workers: bytes = b""
    emptied: bytes = b""
    heads: bytes = b""
    hashes: bytes = b""
    homes: bytes = b""
    back: bytes = b""
    gone: bytes = b""


class OrderMessage(msgspec.Struct, frozen=True, array_like=True):
    """What an operator said of workers at one router. number: rises with each message of this router.

    draining   names of workers that get no new requests
    resumed    names of workers that get requests again
    left       names of workers that are removed at this router, and drained until then
    instances  which instance of each of `draining`, then of each of `left`: its keyed hash; 0: nobody knows
    added      descriptions of workers that an operator adds at all routers, see `routing.shared.workers`
    removed    names of workers that he removes at all routers
    named      names of the workers that `added` describes
    """

    form: int
    router: bytes
    number: int
    draining: bytes = b""
    resumed: bytes = b""
    left: bytes = b""
    instances: bytes = b""
    added: tuple[bytes, ...] = ()
    removed: bytes = b""
    named: bytes = b""


class PeerReading(msgspec.Struct, frozen=True):
    """Another router, as far as this one heard of it. age: seconds since its last message; running: its requests in
    flight at the workers of this router."""

    router: str
    age: float
    running: int


class SharedReading(msgspec.Struct, frozen=True):
    """What metrics, page and control plane show of sharing. Counts are since the start.

    connected  the store can be reached
    peers      the other routers that count now
    entries    of the replica of placements; size: about their bytes
    homes      sessions of which it is known where they are at home
    agreed     strangers that were placed where every router would place them
    waiting    bytes of messages that are not applied yet
    told       prompts whose placement was told; heard: those heard of
    dropped    messages, or parts, that were lost, by reason
    """

    connected: bool
    peers: tuple[PeerReading, ...]
    entries: int
    size: int
    homes: int
    agreed: int
    waiting: int
    told: int
    heard: int
    dropped: dict[str, int]
