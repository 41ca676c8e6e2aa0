"""How much of the workers' caches the live sessions need, and where a new one fits.

When more contexts are live than the caches hold, each turn of a session evicts the next turn of another, and every one
costs a whole prefill. So they are spread evenly over the caches once these become scarce. With session admission, new
sessions wait beyond that: a queue of sessions is better than a queue of requests, as those that run finish sooner.

    expected context  = 1.6 x tokens of the first request + what sessions grow by beyond that
    reserved          the larger of what was expected and what its largest request had; it counts until the session was
                      silent for longer than is usual (`routing.session_table`)
    scarce            more than `_SCARCE` of the candidates' caches is reserved
    a single request  of which only the messages say that it could begin a session: its own tokens, until it goes on
    emptiest          of the candidates, by reserved / capacity
    it fits           where reserved + expected <= capacity, and on a worker without any session

The factor and the first guess of the growth (40,000 tokens) come from a trace of 710 coding agents; the growth is
learnt from the sessions that ended. Capacity is what the engine reports, else `--session-capacity-tokens`; where
neither is known, nothing is scarce and everything fits. Tokens are bytes of routing text over `bytes_per_token`.
"""

from __future__ import annotations

import math
from typing import Final

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.session_table import Session, SessionTable
from sglang_router.routing.worker import Worker

_FACTOR: Final = 1.6
_GROWTH: Final = 40_000.0
"""Tokens that a session is expected to grow by, beside the factor, before any has ended."""
_GUESS: Final = 16.0
"""Sessions that the first guess weighs as much as."""
_REMEMBERED: Final = 1.0 / 256
"""Least weight of the latest session in the mean growth."""
_SCARCE: Final = 0.7
"""Share of the caches from which on they are scarce: sessions are not spread perfectly, and others need some, too."""
_EVEN: Final = 0.02
"""Difference of two fillings that does not count."""


class SessionContexts:
    """See the module.

    table            the sessions
    capacity         tokens that a worker's cache holds whose engine does not tell; 0: unknown
    bytes_per_token  of routing text
    growth           tokens that sessions grow by, beside the factor
    """

    __slots__ = ("_capacity", "_ended", "bytes_per_token", "growth", "table")

    def __init__(self, table: SessionTable, capacity: int = 0, bytes_per_token: float = 4.0) -> None:
        self.table = table
        self._capacity = capacity
        self.bytes_per_token = bytes_per_token
        self.growth = _GROWTH
        self._ended = _GUESS

    def __repr__(self) -> str:
        return f"<SessionContexts, sessions grow by {self.growth:.0f} tokens, {self.table!r}>"

    def tokens(self, facts: Facts) -> int:
        """Return the tokens of a request's prompt, about."""
        return int(len(facts.text) / self.bytes_per_token)

    def expected(self, facts: Facts, known: bool) -> int:
        """Return the tokens that a session will have at its end, by its first request. known: it had others before."""
        return int(self.tokens(facts) * (1.0 if known else _FACTOR) + self.growth)

    def capacity(self, worker: Worker) -> float:
        """Return the tokens that a worker's cache holds; infinity: unknown."""
        return worker.report.capacity_tokens or self._capacity or math.inf

    def fitting(self, facts: Facts, candidates: Candidates, known: bool) -> Candidates:
        """Return the candidates on which a session that starts with this request fits."""
        expected, mask = self.expected(facts, known), 0
        for worker in candidates:
            reserved = self.table.share(worker).tokens
            if not reserved or reserved + expected <= self.capacity(worker):
                mask |= 1 << worker.seat
        return candidates if mask == candidates.mask else candidates.those(mask)

    def roomy(self, candidates: Candidates) -> Candidates:
        """Return the candidates on which a new session should start: all, or the emptiest if caches are scarce."""
        workers = list(candidates)
        capacities = [self.capacity(worker) for worker in workers]
        tokens = [self.table.share(worker).tokens for worker in workers]
        if sum(tokens) <= _SCARCE * sum(capacities):
            return candidates
        filled = [each / capacity for each, capacity in zip(tokens, capacities, strict=True)]
        least = min(filled) + _EVEN
        emptiest = [worker for worker, share in zip(workers, filled, strict=True) if share <= least]
        return candidates.those(candidates.set_of(emptiest))

    def reserve(self, session: Session, facts: Facts, starts: bool, certain: bool = True) -> None:
        """Set aside what a session needs at its home, whose next request this is.

        starts   it is new, or was silent
        certain  it is known to be a session: else it is expected to remain a single request
        """
        tokens = self.tokens(facts)
        if starts:
            session.expected = self.expected(facts, session.context > 0) if certain else 0
            session.first = tokens
            session.context = 0
        elif not session.expected:
            session.expected = int(session.first * _FACTOR + self.growth)
        session.context = max(session.context, tokens)
        self.table.reserve(session, max(session.expected, session.context))

    def ended(self, session: Session) -> None:
        """Learn from a session that ended."""
        if session.context and session.expected:  # a single request says nothing of sessions
            grown = max(0.0, session.context - _FACTOR * session.first)
            self._ended += 1.0
            self.growth += (grown - self.growth) * max(1.0 / self._ended, _REMEMBERED)
