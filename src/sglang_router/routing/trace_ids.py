"""The ids of a request's trace, made anew wherever they are needed: they follow from what every process knows of it.

    W3C traceparent of the client        a trace goes on: its id, its parent, and whether it is recorded
    none                                 a trace begins: its id is a keyed hash of the request, `ratio` of them recorded
    span of the request, spans of legs   keyed hashes of the request, and of the number of the leg's lease

So a relay process writes the id of a leg's span into the head that it sends, the deciding process tells the same id
when the request has ended, and neither keeps or sends anything for it.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Final

from sglang_router.routing.plan import RequestTag

_TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE: Final = b"0" * 32
_NO_SPAN: Final = b"0" * 16
_LOW: Final = (1 << 64) - 1
_TRACESTATE: Final = b"tracestate"


class TraceContext:
    """What a request belongs to.

    trace    id of the trace, 32 hexadecimal digits
    parent   id of the client's span, 16 digits; b"" when the trace begins here
    sampled  whether the trace is recorded
    """

    __slots__ = ("parent", "sampled", "trace")

    def __init__(self, trace: bytes, parent: bytes, sampled: bool) -> None:
        self.trace = trace
        self.parent = parent
        self.sampled = sampled

    def __repr__(self) -> str:
        return f"<TraceContext {self.trace.decode()}{' sampled' * self.sampled}>"


def context_of(traceparent: bytes) -> TraceContext | None:
    """Read a traceparent (W3C Trace Context, level 1); None for one that is not valid."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace, parent, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None) or trace == _NO_TRACE or parent == _NO_SPAN:
        return None
    return TraceContext(trace, parent, int(flags, 16) & 1 == 1)


class TraceIds:
    """See the module.

    key    of the hashes, at most 64 bytes: another one for each router, the same in all of its processes
    ratio  which part of the traces that begin here is recorded, from 0 to 1
    """

    __slots__ = ("_below", "_key")

    def __init__(self, key: bytes, ratio: float) -> None:
        self._key = key
        self._below = round(ratio * (1 << 64))

    def context(self, tag: RequestTag) -> TraceContext:
        """Return the trace of a request. A traceparent that is not valid counts as none."""
        given = tag.named[2]
        known = context_of(given) if given else None
        if known is not None:
            return known
        made = self._hash(tag, b"t", 16)
        # As the SDK's sampler decides by the trace's id, so that all who use it decide alike.
        return TraceContext(made.hex().encode(), b"", int.from_bytes(made, "big") & _LOW < self._below)

    def request(self, tag: RequestTag) -> bytes:
        """Return the id of the span of a request, 16 hexadecimal digits."""
        return self._hash(tag, b"s", 8).hex().encode()

    def leg(self, tag: RequestTag, lease: int) -> bytes:
        """Return the id of the span of a leg."""
        return self._hash(tag, b"l%d" % lease, 8).hex().encode()

    def decision(self, tag: RequestTag, lease: int) -> bytes:
        """Return the id of the span of the decision for a leg."""
        return self._hash(tag, b"d%d" % lease, 8).hex().encode()

    def fields(self, tag: RequestTag, lease: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Return the header lines that a leg is sent with: traceparent, and the client's tracestate.

        headers  of the client's request
        """
        context = self.context(tag)
        state = [b"tracestate: %s\r\n" % value for name, value in headers if context.parent and name == _TRACESTATE]
        if not context.sampled and context.parent:  # nobody records a span of ours: the client's is the parent
            return b"traceparent: %s\r\n%s" % (tag.named[2], b"".join(state))
        span, flags = self.leg(tag, lease), b"01" if context.sampled else b"00"
        return b"traceparent: 00-%s-%s-%s\r\n%s" % (context.trace, span, flags, b"".join(state))

    def _hash(self, tag: RequestTag, kind: bytes, size: int) -> bytes:
        seed = b"%s/%s/%s" % (kind, tag.start.hex().encode(), tag.raw_id)
        return blake2b(seed, digest_size=size, key=self._key).digest()
