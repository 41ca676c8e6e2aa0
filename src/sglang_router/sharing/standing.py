"""How sharing goes, for /readiness, the page and `sglang-router status`."""

from __future__ import annotations

import msgspec


class SharedStanding(msgspec.Struct, frozen=True):
    """See the module.

    store    where it is, without user and password
    state    connecting, connected, or what is wrong in one word: `sharing.store.Trouble`
    problem  the same as a sentence; "" for nothing
    peers    other routers that count now
    lag      seconds from writing a message until it was read again; None: not measured yet
    """

    store: str
    state: str
    problem: str
    peers: int
    lag: float | None
