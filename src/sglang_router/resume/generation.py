"""What a client was sent of one streamed answer, and how another worker's answer is rewritten to continue it.

    read(events)      first leg: id, model, text, tokens, finish ...      (after a break, or when many have gathered)
    follow()          the rest comes from another worker, and is added to what was read so far
    rewrite(event)    following leg: same id, no second beginning, counts that add up

`rewrite` returns what a single worker would have sent, so its result is read like everything before it, and a third leg
follows the second as the second followed the first. Events are passed as the JSON of their data, without `data: `.

There are two kinds of streams:

    resume.chunks       chat, completions    each event adds text; usage at the end, or in each event if requested
    resume.cumulative   /generate            each event holds all text so far and its counts (or new text only)

Tokens are counted up to the last event with text. What an engine had not sent yet (half a character, a possible
beginning of a stop string) is not counted, and the next worker writes it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

Fields = dict[str, msgspec.Raw]

DONE = b"[DONE]"
NULL = msgspec.Raw(b"null")
ABSENT = frozenset((b"null", b"false", b'""', b"[]", b"{}"))
"""Values that mean the same as a missing field."""

encode = msgspec.json.Encoder().encode
fields_of = msgspec.json.Decoder(Fields).decode


class Generation:
    """One streamed answer; see the module. most: bytes of text that are kept at most.

    reason    why the answer cannot be continued, a key of `resume.continuation.REASONS`; "" while it can
    text      all text so far
    ids       ids of the text's tokens, where the stream contains all of them; else None
    tokens    number of the text's tokens, as far as the stream tells
    finished  the engine has sent a finish reason
    done      the answer is complete, including the last event
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
        """All text so far."""
        raise NotImplementedError

    def read(self, events: Sequence[bytes]) -> None:
        """Read events that were sent to the client. An event that cannot be parsed sets `reason`."""
        if self.reason:
            return
        try:
            self._read(events)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.reason = "unreadable"

    def written(self) -> tuple[str, list[int] | None, int]:
        """Return the text that the next worker continues, the ids of its tokens (or None), and their number."""
        return self.text, self.ids, self.tokens

    def follow(self) -> None:
        """Start a following leg: its counts are added to those so far."""
        self._base = self.written()[2]

    def rewrite(self, event: bytes) -> bytes | None:
        """Return an event of a following leg as the client gets it; None: it is not sent.

        Raises: msgspec.MsgspecError, UnicodeDecodeError, RecursionError or KeyError, when it cannot be parsed.
        """
        raise NotImplementedError

    def ending(self, usage: bool) -> tuple[list[bytes], bool]:
        """Return the events that are missing after a complete text, and whether a usage is missing too.

        usage  the client asked for a usage

        A usage is missing when only an engine can tell it; then DONE is not among the events.
        """
        raise NotImplementedError

    def _read(self, events: Sequence[bytes]) -> None:
        raise NotImplementedError

    def _bound(self, size: int) -> None:
        if size > self._most:
            self.reason = "too_long"
            self.ids = None
