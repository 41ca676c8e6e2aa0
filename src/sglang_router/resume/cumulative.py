"""Read and continue streams of SGLang's /generate, where each event holds the whole text and its counts.

    {"text": "all so far", "output_ids": [...], "meta_info": {"id", "completion_tokens": 3, "finish_reason": null, ...}}

An engine started with `--stream-output` sends only the new part as `text` and `output_ids`. The counts are of all
tokens there too, which tells the two kinds apart. See `resume.generation` for the interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sglang_router.resume.generation import ABSENT, DONE, NULL, Generation, encode, fields_of


class _Meta(msgspec.Struct):
    """`meta_info` of an event; counts in tokens."""

    id: msgspec.Raw = NULL
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: msgspec.Raw = NULL


class _Snapshot(msgspec.Struct):
    """One event."""

    meta_info: _Meta
    text: str | None = None
    output_ids: list[int] | None = None
    index: int = 0


_snapshot = msgspec.json.Decoder(_Snapshot).decode


class Snapshots(Generation):
    """A stream of /generate.

    A single event does not show whether the next one will repeat its text. So when a stream breaks after its first
    event, the next worker starts from the beginning, and the part that the client has is not sent again.
    """

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._text = ""
        self._id = b""
        self._last = b""  # the latest event
        self._whole: bool | None = None  # whether each event holds the whole text; None: not known yet
        self._before: tuple[str, list[int] | None] = ("", None)  # text and token ids of the legs before this one
        self._again = 0  # tokens at the start of this leg that the client already has

    @property
    def text(self) -> str:
        """All text so far."""
        return self._text

    def _read(self, events: Sequence[bytes]) -> None:
        if events and events[-1] == DONE:
            self.done = True
            events = events[:-1]
        first = 0
        while first < len(events) and not self._whole:
            self._take(_snapshot(events[first]))
            first += 1
        if first < len(events):  # the last event holds the whole text; find the first one with the same text
            last = at = len(events) - 1
            text = _snapshot(events[last]).text
            while at > first and _snapshot(events[at - 1]).text == text:
                at -= 1
            for event in (events[at], events[last]):
                self._take(_snapshot(event))
        if events:
            self._last = events[-1]
        self._bound(len(self._text) + 8 * len(self.ids or ()))

    def _take(self, event: _Snapshot) -> None:
        meta, text, ids = event.meta_info, event.text or "", event.output_ids
        if event.index:
            self.reason = "choices"
        count = meta.completion_tokens
        if not self._id:
            self._id = bytes(meta.id)
            self._prompt, self._cached = meta.prompt_tokens, meta.cached_tokens
        elif self._whole is None:
            self._whole = len(ids) >= count if ids is not None else text.startswith(self._text)
        if self._whole is False:
            shown = bool(text) or event.text is None
            text = self._text + text
            ids = None if ids is None else [*(self.ids or ()), *ids]
        else:
            shown = text != self._text or event.text is None
        if shown:
            self.tokens, self._text = count, text
        # Ids of tokens whose text has not arrived are kept only where each event holds just the new part.
        self.ids = ids if ids is None or self._whole is False else ids[: self.tokens]
        if bytes(meta.finish_reason) not in ABSENT:
            self.finished = True

    # -- the continuation ----------------------------------------------------------------------------------------------

    def written(self) -> tuple[str, list[int] | None, int]:
        """Return the text to continue; nothing while the kind of the stream is not known."""
        return ("", None, 0) if self._whole is None else super().written()

    def follow(self) -> None:
        """Start a following leg; remember what is put before its text."""
        super().follow()
        if self.ids is not None:
            self.ids = self.ids[: self.tokens]
        self._before = self.written()[:2]
        self._again = self.tokens if self._whole is None else 0

    def rewrite(self, event: bytes) -> bytes | None:
        """Put the earlier text and ids before an event's own, give it the first leg's id, and add up the counts."""
        if event == DONE or not self._id:
            return event
        fields: dict[str, Any] = fields_of(event)
        meta: dict[str, Any] = fields_of(fields["meta_info"])
        theirs = _snapshot(event)
        if theirs.meta_info.completion_tokens <= self._again and bytes(theirs.meta_info.finish_reason) in ABSENT:
            return None
        if self._whole is not False:
            text, ids = self._before
            if theirs.text is not None:
                fields["text"] = text + theirs.text
            if ids is not None and theirs.output_ids is not None:
                fields["output_ids"] = [*ids, *theirs.output_ids]
        meta["id"] = msgspec.Raw(self._id)
        meta["prompt_tokens"] = self._prompt
        meta["completion_tokens"] = self._base + theirs.meta_info.completion_tokens
        if "cached_tokens" in meta and self._cached is not None:
            meta["cached_tokens"] = self._cached
        reason = meta.get("finish_reason", NULL)
        if bytes(reason).startswith(b"{"):
            why = msgspec.json.decode(reason, type=dict[str, Any])
            if isinstance(why.get("length"), int):
                meta["finish_reason"] = why | {"length": self._base + why["length"]}
        fields["meta_info"] = meta
        return encode(fields)

    def ending(self, usage: bool) -> tuple[list[bytes], bool]:
        """Return the missing events: the last event again, with a finish reason, and DONE. It holds the usage."""
        if self.done:
            return [], False
        if self.finished:
            return [DONE], False
        fields: dict[str, Any] = fields_of(self._last) if self._last else {}
        meta: dict[str, Any] = fields_of(fields["meta_info"]) if "meta_info" in fields else {}
        meta["finish_reason"] = {"type": "length", "length": self.tokens}
        meta["completion_tokens"] = self.tokens
        if self._whole is False:
            fields |= {"text": "", "output_ids": []}
        self.finished = True
        return [encode(fields | {"meta_info": meta}), DONE], False
