"""What the two engines of a pair must be told to find each other: members that are added to their bodies. Pure.

    SGLang   both at once, tied by a room: a number that the router draws
             prefill, decode   "bootstrap_host":"10.0.0.7","bootstrap_port":8998,"bootstrap_room":N,"rid":"..."
    vLLM     (Nixl) prefill first; its answer holds what decode is given
             prefill           "kv_transfer_params":{"do_remote_decode":true,...},"max_tokens":1,...
             push: both        x-request-id: the request's id, and a mark that no other attempt has

SGLang takes one room for a list of prompts, and counts on from it for the others. With data-parallel ranks it takes
the rank from the room (room % ranks) unless the body names one; both say the same here.

A member that the body has already counts as the last one says, for both engines.
"""

from __future__ import annotations

import json
import random
from typing import Final
from urllib.parse import urlsplit

from sglang_router.routing.outcome import Outcome
from sglang_router.routing.worker import Worker

LEASE: Final = 28.0
"""Seconds for which what a vLLM worker handed over is used; it keeps it for 30 (`kv_lease_duration`)."""
UNREACHED: Final = (Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED, Outcome.STARVED)
"""After these a decode worker never had what was handed over: another one may be given it."""
SGLANG: Final = "sglang"
NIXL: Final = "nixl"
ROOMS: Final = (1 << 63) - (1 << 20)
"""Rooms are below it: a list of prompts takes as many as it is long, and the last one must fit into 63 bits."""
_ANY_RANK: Final = 1
_MOST_NAMED: Final = 256

_PREFILL_ONLY: Final = b'"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false}'
_ONE_TOKEN: Final = {
    "chat": b',"stream":false,"stream_options":null,"max_tokens":1,"max_completion_tokens":1,"min_tokens":0,"n":1',
    "completions": b',"stream":false,"stream_options":null,"max_tokens":1,"min_tokens":0,"n":1',
    "responses": b',"stream":false,"max_output_tokens":1',
}
"""What makes vLLM answer with one token at once, by name of the endpoint; others have no hand-off."""


def hands_off(endpoint: str) -> bool:
    """Return whether vLLM hands a prompt over at this endpoint."""
    return endpoint in _ONE_TOKEN


def nixl_prefill(endpoint: str) -> bytes:
    """Return the members for a vLLM prefill worker: it reads the prompt and keeps what it computed."""
    return _PREFILL_ONLY + _ONE_TOKEN[endpoint]


def mark_of(rng: random.Random) -> bytes:
    """Return what makes a request's id that of one attempt alone (Nixl push).

    A decode worker tells its prefill worker by the id which blocks it waits for. Two clients may have chosen the same
    id, and one of them would be answered with the other's prompt.
    """
    return b"-%016x" % rng.getrandbits(64)


class Meeting:
    """Where the two halves of one attempt meet (SGLang).

    rid   the name of the request at both engines, new for each attempt; see `rids`
    """

    __slots__ = ("_members", "_prefill_rank", "rid")

    def __init__(self, prefill: Worker, rng: random.Random) -> None:
        """Draw a room at a prefill worker."""
        room = rng.randrange(ROOMS)
        rank = prefill.dp_rank
        if rank is not None:
            ranks = max(prefill.report.ranks or _ANY_RANK, rank + 1)
            room += (rank - room) % ranks
        port = prefill.spec.bootstrap_port or prefill.told_port
        self.rid = b"%032x" % rng.getrandbits(128)
        self._prefill_rank = rank
        self._members = b'"bootstrap_host":%b,"bootstrap_port":%b,"bootstrap_room":%d,"rid":"%b"' % (
            json.dumps(host_of(prefill.spec.url)).encode(),
            b"null" if port is None else b"%d" % port,
            room,
            self.rid,
        )

    def __repr__(self) -> str:
        return f"<Meeting {self._members.decode()}>"

    def rids(self, prompts: int) -> bytes:
        """Return the names by which the engines abort it: of a list of prompts, each has one.

        prompts  of such a list, of which the first `_MOST_NAMED` are named; 0: there is one prompt
        """
        if not prompts:
            return self.rid
        return b" ".join([b"%b_%d" % (self.rid, number) for number in range(min(prompts, _MOST_NAMED))])

    @property
    def prefill(self) -> bytes:
        """The members for the prefill worker."""
        return self._members if self._prefill_rank is None else self._members + _rank(self._prefill_rank)

    def decode(self, worker: Worker) -> bytes:
        """Return the members for the decode worker."""
        members = self._members
        if worker.dp_rank is not None:
            members += _rank(worker.dp_rank)
        if self._prefill_rank is not None:
            members += b',"disagg_prefill_dp_rank":%d' % self._prefill_rank
        return members


def _rank(rank: int) -> bytes:
    return b',"routed_dp_rank":%d' % rank


def host_of(url: str) -> str:
    """Return the host of a worker's URL; an IPv6 address in brackets."""
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host
