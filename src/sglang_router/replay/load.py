"""A load: requests with their times, lengths and prefixes. Everything that can be replayed becomes one.

    load.arrivals()         requests that come whatever happens, in the order of time
    load.answered(ask)      the request that the end of another one leads to: the next of a session, after a pause

A prompt is given in *pages* of `Load.page` tokens, and each page by eight bytes, its *unit*: equal units are equal
pages. So a prompt of 127,000 tokens takes 16 kB and not 500 kB, and the same bytes serve as the routing text of the
router and as the key of an engine's KV cache. A unit is the number of a space (a session, a shared prefix, one
request) and the number of a page in it; a space is a text that one prompt or several begin with or go through.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

UNIT = 8
"""Bytes for one page."""
MOST = 1 << 24
"""Tokens that a prompt or an answer may have, and blocks: far more than a cache holds, and no more than fits into
memory."""
_HIGH = 1 << 32


def pages_of(space: int, count: int, start: int = 0) -> bytes:
    """Return the units of `count` pages of a space, from page `start` on. Both numbers have 32 bits."""
    return array("Q", range(start * _HIGH + space, (start + count) * _HIGH + space, _HIGH)).tobytes()


class LoadRequest:
    """One request of a load.

    number   unique in its load
    at       when it is sent, in seconds
    pages    the units of the prompt and, after them, of the answer
    prompt   tokens of the prompt, at least 1
    output   tokens of the answer, at least 1
    session  the session that it belongs to; b"" for none
    stream   it asks for a stream
    """

    __slots__ = ("at", "number", "output", "pages", "prompt", "session", "stream")

    def __init__(
        self,
        number: int,
        at: float,
        pages: bytes,
        prompt: int,
        output: int,
        session: bytes = b"",
        stream: bool = True,
    ) -> None:
        self.number = number
        self.at = at
        self.pages = pages
        self.prompt = prompt
        self.output = output
        self.session = session
        self.stream = stream

    def __repr__(self) -> str:
        return f"<LoadRequest {self.number} at {self.at:.3f}: {self.prompt} + {self.output} tokens>"

    def text(self, page: int, most: int) -> bytes:
        """Return its routing text, at most `most` bytes; for a prompt shorter than one page a text of its own."""
        return self.pages[: min(self.prompt // page * UNIT, most)] or pages_of(_HIGH - 1, 1, self.number)


class Load:
    """See the module.

    name  for people
    page  tokens of a page
    """

    def __init__(self, name: str, page: int) -> None:
        self.name = name
        self.page = page

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the requests that come whatever happens, in the order of time."""
        raise NotImplementedError

    def answered(self, ask: LoadRequest, now: float) -> LoadRequest | None:
        """Return the request that follows from the end of another one; its time is not before `now`."""
        return None
