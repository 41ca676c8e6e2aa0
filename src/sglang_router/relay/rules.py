"""The timeouts of the relay, as the options set them."""

from __future__ import annotations

import msgspec


class Timeouts(msgspec.Struct, frozen=True):
    """Timeouts in seconds.

    head        for a request's head, counted from the connection's start or the first byte of a later head
    body        longest silence inside a request's body
    idle        longest time between two requests of a connection
    request     from the complete request to the last byte of its answer
    first_byte  from sending a stream's leg to the first byte of its answer
    chunk       longest silence of a worker inside its answer
    """

    head: float = 30.0
    body: float = 60.0
    idle: float = 75.0
    request: float = 1800.0
    first_byte: float = 300.0
    chunk: float = 300.0
