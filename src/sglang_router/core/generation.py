"""What a client has of one streamed answer, and how another worker's answer is made to go on with it.

    read(events)      first leg: id, model, text, tokens, finish ...      (after a break, or when many have gathered)
    follow()          the rest comes from another worker: what there is now is the base of what comes
    rewrite(event)    following leg: same id, no second beginning, counts that add up

What `rewrite` gives is what one worker alone would have sent, so it is read like everything before it, and a third leg
follows a second as the second followed the first. Events come as the JSON of their data, without `data: `.

There are two kinds of streams:

    core.chunks       chat, completions    each event adds text; usage at the end, or in each event if asked for
    core.cumulative   /generate            each event holds all text so far and its counts (or new text only)

Tokens are counted up to the last event that brought text: what an engine holds back (half a character, what may become
a stop string) the client has not, and the next worker writes it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

Fields = dict[str, msgspec.Raw]

DONE = b"[DONE]"
NULL = msgspec.Raw(b"null")
ABSENT = frozenset((b"null", b"false", b'""', b"[]", b"{}"))
"""Values that say no more than a missing field."""

encode = msgspec.json.Encoder().encode
fields_of = msgspec.json.Decoder(Fields).decode


class Generation:
    """See the module. `most`: bytes of text that are kept at most.

    reason    why it cannot be continued, a key of `core.resume.REASONS`; "" while it can
    text      all text so far
    ids       its tokens where the stream tells them all, else None
    tokens    how many they are, as far as the stream tells
    finished  the engine has told why the text ends
    done      everything is there, the last event too
    """

    def __init__(self, most: int) -> None:
        self.reason = ""
        self.ids: list[int] | None = None
        self.tokens = 0
        self.finished = False
        self.done = False
        self._most = most
        self._prompt: int | None = None  # tokens of the client's own prompt
        self._cached: int | None = None
        self._base = 0  # tokens of the legs before this one

    @property
    def text(self) -> str:
        raise NotImplementedError

    def read(self, events: Sequence[bytes]) -> None:
        """Takes events the client was sent. One that is not understood sets `reason`."""
        if self.reason:
            return
        try:
            self._read(events)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.reason = "unreadable"

    def written(self) -> tuple[str, list[int] | None, int]:
        """The text that the next worker is to go on from, its tokens, and their number."""
        return self.text, self.ids, self.tokens

    def follow(self) -> None:
        """A following leg begins."""
        self._base = self.written()[2]

    def rewrite(self, event: bytes) -> bytes | None:
        """An event of a following leg as the client is to get it; None: not at all.

        Raises: msgspec.MsgspecError when it is not understood.
        """
        raise NotImplementedError

    def ending(self, usage: bool) -> tuple[list[bytes], bool]:
        """The events missing from a text that is complete, and whether a usage belongs between them and DONE which
        only an engine can tell (then DONE is not among them). `usage`: the client asked for it."""
        raise NotImplementedError

    def _read(self, events: Sequence[bytes]) -> None:
        raise NotImplementedError

    def _bound(self, size: int) -> None:
        if size > self._most:
            self.reason = "too_long"
            self.ids = None
