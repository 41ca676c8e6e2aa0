"""The states of client connections, exchanges and holds. `relay.moves` has the moves between them, as tables.

Members of an enumeration are named here as constants: looking one up on its class takes as long as a call. Enums have a
module of their own, because mypyc does not compile them (`scripts/compile_rule.py`).
"""

from __future__ import annotations

from enum import IntEnum


class ClientState(IntEnum):
    """The state of a client connection."""

    IDLE = 0  # no part of a request has arrived
    READING = 1  # a part of a request has arrived
    BUSY = 2  # an exchange is in flight
    LINGERING = 3  # the last answer is written; what the client still sends is discarded
    CLOSING = 4  # the last answer is written; the connection closes after it


IDLE, READING, BUSY, LINGERING, CLOSING = ClientState


class ExchangeState(IntEnum):
    """The state of an exchange."""

    NEW = 0  # not decided yet
    QUEUED = 1  # in the decider's queue
    ROUTED = 2  # has a plan; no head of an answer yet
    ANSWERING = 3  # the client has the head
    DONE = 4  # ended; later events are ignored


NEW, QUEUED, ROUTED, ANSWERING, DONE = ExchangeState


class HoldState(IntEnum):
    """The state of what a connection holds of the request-body budget. Its moves: `relay.budget`."""

    PLAIN = 0  # whole requests, or nothing
    SMALL_BODY = 1  # a small body is incomplete
    IN_LINE = 2  # a large body waits, unread, to be admitted
    HELD = 3  # a large body is complete
    ADMITTED = 4  # a large body is incomplete; its bytes are reserved, so that they are not counted when they arrive
    PAUSED = 5  # a chunked body has outgrown what was reserved; it waits, unread, for more


PLAIN, SMALL_BODY, IN_LINE, HELD, ADMITTED, PAUSED = HoldState
