"""The allowed moves between the states of client connections, of exchanges and of holds, as tables.

A row lists the states that may follow. Each state machine checks its own moves; an illegal move is a bug of the router,
and the error names the move and the whole state. `may` turns a row into one number with a bit for each state, so that
the check, which every request makes several times, takes two integer operations.

    from / to   IDLE   READING   BUSY   LINGERING   CLOSING
    IDLE                  x       x         x          x
    READING               x       x         x          x       READING to READING: another deadline
    BUSY          x                         x          x
    LINGERING                               x                  closed by the client, or aborted
    CLOSING                                            x       the same

    from / to   NEW   QUEUED   ROUTED   ANSWERING   DONE
    NEW                 x        x                    x       refused: NEW to DONE
    QUEUED              x        x                    x       another reason to wait: QUEUED to QUEUED
    ROUTED                       x          x         x       a retry: ROUTED to ROUTED
    ANSWERING                                         x       a stream that another worker continues stays ANSWERING
    DONE

The table of holds, which count bytes of requests, is drawn in `relay.budget`.
"""

from __future__ import annotations

from typing import Final

from sglang_router.relay.states import (
    ADMITTED,
    ANSWERING,
    BUSY,
    CLOSING,
    DONE,
    HELD,
    IDLE,
    IN_LINE,
    LINGERING,
    PAUSED,
    PLAIN,
    QUEUED,
    READING,
    ROUTED,
    SMALL_BODY,
)


class IllegalMove(Exception):
    """A move that the table does not allow."""


def may(*states: int) -> int:
    """Return a row of a table from the states that may follow."""
    return sum(1 << state for state in states)


CLIENT_MOVES: Final = (
    may(READING, BUSY, LINGERING, CLOSING),  # IDLE: the first bytes, a whole request, a refusal, the idle timeout
    may(READING, BUSY, LINGERING, CLOSING),  # READING: more bytes
    may(IDLE, LINGERING, CLOSING),  # BUSY: the answer is written; the next request begins in IDLE
    may(LINGERING),  # LINGERING
    may(CLOSING),  # CLOSING
)

EXCHANGE_MOVES: Final = (
    may(QUEUED, ROUTED, DONE),  # NEW
    may(QUEUED, ROUTED, DONE),  # QUEUED: another reason to wait, a plan, or the end
    may(ROUTED, ANSWERING, DONE),  # ROUTED: a retry, the head, or the end
    may(DONE),  # ANSWERING
    may(),  # DONE
)

HOLD_MOVES: Final = (
    may(SMALL_BODY, IN_LINE, ADMITTED),  # PLAIN: a part of a small body; a large body waits, or is admitted
    may(PLAIN, IN_LINE, ADMITTED),  # SMALL_BODY: complete, or a chunked body has become large
    may(PLAIN, ADMITTED),  # IN_LINE: given up, or admitted
    may(PLAIN),  # HELD: the answer is written
    may(PLAIN, PAUSED, HELD),  # ADMITTED: given up, a chunked body outgrew what was reserved, or complete
    may(PLAIN, ADMITTED),  # PAUSED: given up, or there is room
)
