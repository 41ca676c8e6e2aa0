"""Ask engines for the usage of streams whose clients have not asked (`--inject-usage`), and hide it from those again.

    wanted(facts, body)    a stream of chat or text completions without `stream_options`
    with_ask(members)      what its body gets at its end
    UsageHider             drops the one event that tells the usage, and nothing else
                           (`relay.whole_events.hide` lets the events of an answer pass through it, or a body handler)

Engines tell what a stream took only if they are asked to, in one more event before `[DONE]`:

    data: {"id": ..., "choices": [], "usage": {"prompt_tokens": 455, ...}}

A client that has set `stream_options`, whatever to, gets what it has asked for, and nothing is changed. A body above
LARGE bytes, or in UTF-16, is not searched, and passes as it is.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from sglang_router.routing.facts import LARGE, Facts
from sglang_router.routing.tolerant import in_utf8
from sglang_router.wire.gathering import Body
from sglang_router.wire.sse import payloads

_ASK: Final = b'"stream_options":{"include_usage":true}'

_ENDPOINTS: Final = frozenset(("chat", "completions"))
_NAME: Final = b'"stream_options"'
_ESCAPED: Final = re.compile(rb"\\u00(?:4[1-9A-Fa-f]|5[0-9AaFf]|6[1-9A-Fa-f]|7[0-9Aa])")
"""A letter that need not be escaped: it may hide the name. Nobody writes so, but the client must have the last word."""
_MARKS: Final = (b'"choices":[]', b'"choices": []')


def wanted(facts: Facts, body: Body) -> bool:
    """Return whether the usage of this request's stream is to be asked for."""
    if facts.endpoint.name not in _ENDPOINTS or len(body) > LARGE or _NAME in body or in_utf8(body) is not body:
        return False
    return b"\\u00" not in body or _ESCAPED.search(body) is None


def with_ask(members: bytes) -> bytes:
    """Return what is added to a body, with the question for the usage."""
    return members + b"," + _ASK if members else _ASK


class UsageHider:
    """See the module. hidden: the event that was dropped; b"": none so far."""

    __slots__ = ("hidden",)

    def __init__(self) -> None:
        self.hidden = b""

    def __repr__(self) -> str:
        return f"<UsageHider {'has' if self.hidden else 'waits for'} the usage>"

    def feed(self, events: bytes) -> bytes:
        """Return events without the one that tells the usage. Whole ones, but one that is too long comes in parts."""
        if not any(mark in events for mark in _MARKS):
            return events
        passed = []
        end = 0
        for event, data in payloads(events):
            end += len(event)
            if _tells_usage(data):
                self.hidden = event
            else:
                passed.append(event)
        passed.append(events[end:])  # a part of an event that is too long to be kept
        return b"".join(passed)

    def last(self, rest: bytes) -> bytes:
        """Return what is left at the end of a stream, perhaps an event without its empty line, unless that tells it."""
        return rest if self.feed(rest.rstrip(b"\r\n") + b"\n\n") else b""


def _tells_usage(data: bytes) -> bool:
    """Return whether an event tells the usage, and nothing else."""
    if not any(mark in data for mark in _MARKS):
        return False
    try:
        event = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(event, dict) and event.get("choices") == [] and isinstance(event.get("usage"), dict)
