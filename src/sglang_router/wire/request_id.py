"""Read a request's header once: id, routing key, trace context, content coding, loops, priority, wish to be explained.

The id is the client's own, from the first of the `--request-id-headers` that it sent; without a usable one the router
makes a new id: the endpoint's prefix and 24 hexadecimal digits. This rule is implemented only here.
"""

from __future__ import annotations

import re
from binascii import hexlify
from collections.abc import Callable, Iterable
from typing import Final

from sglang_router.errors import InvalidRequest, LoopDetected, RouterError, UnsupportedMediaType
from sglang_router.wire.request import Headers

REQUEST_ID_HEADERS: Final = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")
"""Headers that may hold the id, in order of preference."""
EXPLAIN: Final = b"x-sglang-router-explain"
"""The header by which a client asks why the worker of its request is chosen."""
PRIORITY: Final = b"x-smg-priority"
"""The header by which a client says how soon its request should begin when it is queued."""
MOST_PRIORITY: Final = 20
"""Priorities are whole numbers from minus this to this; a higher one begins sooner."""
PRIORITIES: Final = {"system": 20, "interactive": 10, "high": 10, "default": 0, "normal": 0, "bulk": -10, "low": -10}
"""Their names; those of the reference are system, interactive, default and bulk."""
_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,2}")
MAX_ID: Final = 256
"""Most bytes of a client's id; a longer id is replaced by a new one."""

_ROUTING_KEY: Final = -1
_CONTENT_ENCODING: Final = -2
_TRACE: Final = -3
_VIA: Final = -4
_EXPLAIN: Final = -5
_PRIORITY: Final = -6


Named = tuple[bytes, bytes, bytes, RouterError | None, bool, int | None]
"""What is read from a header: the request's id; x-smg-routing-key, or b""; traceparent, or b""; why the request cannot
be relayed: its body has a Content-Encoding, or it has been through this router already, or its priority is none;
whether its client asks why the worker is chosen; the priority that it asks for, or None."""


def read_priority(text: str) -> int:
    """Return a priority that somebody has written: a name or a whole number.

    Raises: ValueError, when it is neither.
    """
    word = text.strip().lower()
    named = PRIORITIES.get(word)
    number = int(word) if named is None and _NUMBER.fullmatch(word) else named
    if number is None or not -MOST_PRIORITY <= number <= MOST_PRIORITY:
        raise ValueError
    return number


def _bad_priority() -> InvalidRequest:
    names = ", ".join(PRIORITIES)
    return InvalidRequest(
        f"The header {PRIORITY.decode()} must be a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}, or one of"
        f" {names}.",
        param=PRIORITY.decode(),
    )


class RequestIds:
    """Find or make the ids of requests.

    random_bits  returns an integer of so many random bits
    headers      names of the headers that may hold the id, in order of preference
    mark         what this router writes into the Via field of each leg (`wire.headers`); b"": nothing
    """

    def __init__(
        self, random_bits: Callable[[int], int], headers: Iterable[str] = REQUEST_ID_HEADERS, mark: bytes = b""
    ) -> None:
        self._random_bits = random_bits
        self._mark = mark
        # Header name -> the rank of an id header in the order of preference, or one of the negative marks.
        self._places = {name.lower().encode(): place for place, name in enumerate(headers)}
        self._places[b"x-smg-routing-key"] = _ROUTING_KEY
        self._places[b"content-encoding"] = _CONTENT_ENCODING
        self._places.setdefault(b"traceparent", _TRACE)
        self._places[EXPLAIN] = _EXPLAIN
        self._places[PRIORITY] = _PRIORITY
        if mark:
            self._places[b"via"] = _VIA

    def new(self, prefix: bytes) -> bytes:
        """Make a new id."""
        return prefix + hexlify(self._random_bits(96).to_bytes(12, "big"))

    def read(self, headers: Headers, prefix: bytes) -> Named:
        """Read a header; make an id with this prefix when the client sent no usable one."""
        request_id = routing_key = trace = b""
        fault: RouterError | None = None
        explained = False
        priority: int | None = None
        places = self._places
        best = len(places)
        for name, value in headers:
            place = places.get(name)
            if place is None:
                continue
            if place >= 0:
                if place < best and 0 < len(value) <= MAX_ID:
                    best, request_id = place, value
            elif place == _ROUTING_KEY:
                routing_key = value
            elif place == _TRACE:
                trace = trace + b"," + value if trace else value  # two of them are none: nobody can tell which holds
            elif place == _VIA:
                if self._mark in value.lower():
                    fault = LoopDetected()
            elif place == _EXPLAIN:
                explained = value == b"1"
            elif place == _PRIORITY:
                try:
                    priority = read_priority(value.decode("latin-1"))
                except ValueError:
                    fault = fault or _bad_priority()
            elif value.lower() != b"identity":
                fault = fault or UnsupportedMediaType()
        if not request_id:
            request_id = self.new(prefix)
        return request_id, routing_key, trace, fault, explained, priority
