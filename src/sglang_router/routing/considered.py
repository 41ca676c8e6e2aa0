"""What a decision looked at: one line for each candidate, as a policy sees it."""

from __future__ import annotations

import msgspec


class Considered(msgspec.Struct, gc=False):
    """A worker that a request could have gone to, or one that was no candidate. None: the policy has no such figure.

    worker    its name: the URL, with "@" and the rank for a rank
    matched   bytes of the routing text that it is believed to have cached
    backlog   seconds until it could begin with this request
    cost      what the policy compares; the least is the best
    load      requests in flight there
    excluded  why it was no candidate, a key of `routing.excluded.REASONS`; "" for a candidate
    """

    worker: str
    matched: int = 0
    backlog: float | None = None
    cost: float | None = None
    load: int = 0
    excluded: str = ""
