"""The timeouts of the relay and the limits on WebSockets, as the options set them."""

from __future__ import annotations

import msgspec


class TunnelRules(msgspec.Struct, frozen=True):
    """The limits on WebSockets.

    most     open, or being opened, at once
    idle     seconds without a byte from either side
    longest  seconds for which one may be open; 0.0: any
    half     seconds without a byte from the other side when one has ended its sending: it may be a process that is gone
    """

    most: int = 1024
    idle: float = 300.0
    longest: float = 0.0
    half: float = 30.0


class Timeouts(msgspec.Struct, frozen=True):
    """Timeouts in seconds.

    head        for a request's head, counted from the connection's start or the first byte of a later head
    body        longest silence inside a request's body; the whole body may take that and what its least rate allows
    room        longest wait of a body for the request-body budget
    idle        longest time between two requests of a connection
    linger      for the client to read the last answer, while what it sends is discarded
    request     from the complete request to the last byte of its answer
    first_byte  from sending a stream's leg to the first byte of its answer
    chunk       longest silence of a worker inside its answer
    send        longest time in which a client takes nothing of its answer
    """

    head: float = 30.0
    body: float = 60.0
    room: float = 60.0
    idle: float = 75.0
    linger: float = 2.0
    request: float = 1800.0
    first_byte: float = 300.0
    chunk: float = 300.0
    send: float = 60.0
