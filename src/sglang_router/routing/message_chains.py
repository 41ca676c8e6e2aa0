"""Recognise a conversation by its messages: each request repeats all that was said before.

    request 1   [system, user]                         nothing is known of it: a new session, named by its digest, D1
    request 2   [system, user, assistant, user]        at the 2nd boundary the digest is D1: the same session
    request 3   [system, user, assistant, user, ...]   at the 4th boundary the digest is D2: the same session

A boundary is a place between two objects of a list, or the end of the last one. The digest of a boundary is that of
the whole text before it. Only the end of each request is remembered: so a system prompt that all conversations share
joins none of them, and two requests that are equal are a conversation only when one of them has gone on.

The work for one request is bounded: its text is digested once, a megabyte in about a millisecond, and the last
`_MOST_BOUNDARIES` are looked up. They are found from the end, by the characters `},{"` with or without white space
around the comma: inside a string a quote is escaped, so hardly anything else looks like that, and what does, does so
each time. A body that is printed with line breaks inside its objects has no boundaries.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Final

from sglang_router.routing.facts import Facts

_MOST_BOUNDARIES: Final = 64
"""Boundaries of a request that are looked up: a turn adds as many at most as it has messages and calls of tools."""
_MOST_TRIED: Final = 512
"""Places that are tried for a boundary."""
_MOST_ENDS: Final = 1 << 16
"""Ends that are remembered, each of which takes about 200 bytes; the least recently used are forgotten first."""
_LISTS: Final = ("messages", "input")
"""The fields that hold the messages of a conversation."""
MARK: Final = b"\0chain:"
"""How the names of these sessions begin: no client can send such a name."""


class MessageChains:
    """See the module. most: ends that are remembered."""

    __slots__ = ("_ends", "_most")

    def __init__(self, most: int = _MOST_ENDS) -> None:
        self._most = most
        self._ends: OrderedDict[bytes, bytes] = OrderedDict()  # the session by the digest of an end, oldest use first

    def __repr__(self) -> str:
        return f"<MessageChains {len(self._ends)} ends>"

    def session(self, facts: Facts) -> bytes:
        """Return the session that a request continues or begins, and remember its end; b"" when that cannot be told."""
        text, parts = facts.text, facts.endpoint.text
        if not parts or parts[-1] not in _LISTS:
            return b""
        places, whole = boundaries(text)
        if not places:
            return b""
        ends, digests = self._ends, _digests(facts.namespace, text, places)
        last = digests[-1]
        for digest in reversed(digests):
            session = ends.get(digest)
            if session is None:
                continue
            ends.move_to_end(digest)
            if digest == last and whole:
                return b"" if session == MARK + digest else session
            break
        else:
            session = MARK + last if whole else b""
        if whole:
            ends[last] = session
            if len(ends) > self._most:
                ends.popitem(last=False)
        return session


def boundaries(text: bytes) -> tuple[list[int], bool]:
    """Return where the last boundaries of a text are, in order, and whether its end is one: else it is cut off."""
    end = len(text.rstrip()) if text[-1:].isspace() else len(text)
    whole = text.endswith(b"}", 0, end)
    found = [end] if whole else []
    at = end
    for _ in range(_MOST_TRIED):
        at = text.rfind(b'{"', 0, at)
        if at < 0 or len(found) == _MOST_BOUNDARIES:
            break
        before = text[max(0, at - 64) : at].rstrip()
        if before.endswith(b","):
            before = before[:-1].rstrip()
            if before.endswith(b"}"):
                found.append(max(0, at - 64) + len(before))
    found.reverse()
    return found, whole


def _digests(namespace: bytes, text: bytes, places: list[int]) -> list[bytes]:
    """Return the digests of a text up to each of these places, which are in order."""
    whole = blake2b(namespace + b"\0", digest_size=16)
    view = memoryview(text)
    found = []
    begin = 0
    for place in places:
        whole.update(view[begin:place])
        found.append(whole.copy().digest())
        begin = place
    return found
