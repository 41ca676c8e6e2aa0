"""Read and continue streams of /v1/completions and /v1/chat/completions, where each event adds text.

{"id", "created", "model", "choices": [{"index": 0, "text": " and", "finish_reason": null}]}       completions
{"id", "created", "model", "choices": [{"index": 0, "delta": {"content": " and"}, ...}]}           chat
{"id", ..., "choices": [], "usage": {...}}                                                         if requested

See `resume.generation` for the interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sglang_router.resume.generation import ABSENT, DONE, NULL, Fields, Generation, encode, fields_of

_ROLE = b'"role"'  # never part of a text: quotes inside a JSON string are escaped


class _Details(msgspec.Struct):
    """`prompt_tokens_details` of a usage, in tokens."""

    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """The usage of an event, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    """One choice of an event."""

    index: int = 0
    text: str | None = None
    delta: Fields | None = None
    finish_reason: str | None = None
    logprobs: msgspec.Raw = NULL
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    """One event."""

    id: msgspec.Raw = NULL
    created: msgspec.Raw = NULL
    model: msgspec.Raw = NULL
    choices: list[_Choice] = []
    usage: _Usage | None = None


_chunk = msgspec.json.Decoder(_Chunk).decode
_content = msgspec.json.Decoder(str | None).decode


class Chunks(Generation):
    """A stream of /v1/completions, and the base of those of chat."""

    kind = b'"text_completion"'
    last = b'{"index":0,"text":"","logprobs":null,"finish_reason":"length"}'

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._parts: list[str] = []
        self._size = 0
        self._head: dict[str, msgspec.Raw] = {}
        self._unshown: list[int] = []  # ids of tokens whose text has not arrived
        self._all_ids = True  # each event with text had its token ids
        self._continuous = False  # each event contains a usage
        self._told = False  # the final usage has arrived
        self._written = 0  # tokens of the whole text, including the one that ended it
        self._silent = False  # only the usage of this leg is used

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    def _read(self, events: Sequence[bytes]) -> None:
        for event in events:
            if event == DONE:
                self.done = True
                return
            chunk = _chunk(event)
            if not self._head:
                named = (("id", chunk.id), ("created", chunk.created), ("model", chunk.model))
                self._head = {name: msgspec.Raw(bytes(raw)) for name, raw in named}
            if chunk.choices:
                self._take(chunk.choices, chunk.usage)
            elif chunk.usage is not None:
                self._told = True
                self._count(chunk.usage)
        self._bound(self._size)

    def _take(self, choices: list[_Choice], usage: _Usage | None) -> None:
        choice = choices[0]
        if len(choices) > 1 or choice.index:
            self.reason = "choices"
        elif bytes(choice.logprobs) not in ABSENT:
            self.reason = "logprobs"
        text = self._text(choice)
        ids = choice.token_ids
        if ids:
            self._unshown += ids
        if text:
            self._parts.append(text)
            self._size += len(text)
            self._show(usage, ids is not None)
        if usage is not None:
            self._count(usage)
        if choice.finish_reason is not None:
            self.finished = True
            self._told = usage is not None and not self._continuous
            self._written = self.tokens + (choice.finish_reason == "stop" and not text)
            if usage is not None:
                self._written = usage.completion_tokens
        elif usage is not None:
            self._continuous = True

    def _show(self, usage: _Usage | None, with_ids: bool) -> None:
        """Count the tokens of a text that arrived, and keep their ids if each text had its ids."""
        if usage is not None:
            self.tokens = usage.completion_tokens
        else:
            self.tokens += len(self._unshown) if with_ids else 1
        self._all_ids = self._all_ids and with_ids
        if self._all_ids:
            self.ids = [*(self.ids or ()), *self._unshown]
        else:
            self.ids = None
        self._unshown = []

    def _count(self, usage: _Usage) -> None:
        self._prompt = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            self._cached = usage.prompt_tokens_details.cached_tokens

    def _text(self, choice: _Choice) -> str:
        return choice.text or ""

    # -- the continuation ----------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Start a following leg; when the text is finished, only its usage is used."""
        super().follow()
        self._silent = self.finished

    def rewrite(self, event: bytes) -> bytes | None:
        """Give an event the first leg's id, created and model, drop a second role, and add up the usage."""
        if event == DONE:
            return event
        fields: dict[str, Any] = fields_of(event)
        usage = fields.get("usage", NULL)
        told = bytes(usage) not in ABSENT
        if self._silent:
            return self._usage_alone(usage) if told else None
        fields |= {name: raw for name, raw in self._head.items() if name in fields}
        if told:
            fields["usage"] = self._added(usage)
        if self._head and _ROLE in event and not self._begun_before(fields):
            return None
        return encode(fields)

    def _begun_before(self, fields: dict[str, Any]) -> bool:
        """Remove the role, which the client has already; False when the event says nothing else."""
        return True

    def _added(self, usage: msgspec.Raw) -> dict[str, Any]:
        """Return the usage of all legs together, as of one answer."""
        theirs = msgspec.json.decode(usage, type=_Usage)
        prompt = self._prompt if self._prompt is not None else max(0, theirs.prompt_tokens - self._base)
        written = self._written if self._silent else self._base + theirs.completion_tokens
        added: dict[str, Any] = fields_of(usage)
        added |= {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        details = theirs.prompt_tokens_details
        if details is not None and details.cached_tokens is not None:
            cached = self._cached if self._cached is not None else min(details.cached_tokens, prompt)
            added["prompt_tokens_details"] = {**fields_of(added["prompt_tokens_details"]), "cached_tokens": cached}
        return added

    def _usage_alone(self, usage: msgspec.Raw) -> bytes:
        return self._event(b"[]", encode(self._added(usage)))

    def _event(self, choices: bytes, usage: bytes = b"") -> bytes:
        fields = {**self._head, "object": msgspec.Raw(self.kind), "choices": msgspec.Raw(choices)}
        if usage:
            fields["usage"] = msgspec.Raw(usage)
        return encode(fields)

    def ending(self, usage: bool) -> tuple[list[bytes], bool]:
        """Return the missing events: a last chunk, a usage if requested, DONE."""
        if self.done:
            return [], False
        events = []
        if not self.finished:
            events.append(self._event(b"[%s]" % self.last))
            self.finished = True
            self._written = self.tokens
        if usage and not self._told:
            if self._prompt is None:
                return events, True
            theirs = {"prompt_tokens": self._prompt, "completion_tokens": self._written, "total_tokens": 0}
            theirs["total_tokens"] = self._prompt + self._written
            events.append(self._event(b"[]", encode(theirs)))
        return [*events, DONE], False


class ChatChunks(Chunks):
    """A stream of /v1/chat/completions."""

    kind = b'"chat.completion.chunk"'
    last = b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}'

    def _text(self, choice: _Choice) -> str:
        text = ""
        for name, value in (choice.delta or {}).items():
            if name == "content":
                text = _content(value) or ""
            elif name != "role" and bytes(value) not in ABSENT:
                self.reason = "tool_call" if name in ("tool_calls", "function_call") else "other_content"
        return text

    def _begun_before(self, fields: dict[str, Any]) -> bool:
        choices = msgspec.json.decode(fields["choices"], type=list[Fields])
        for choice in choices:
            delta = fields_of(choice.get("delta", b"{}"))
            delta.pop("role", None)
            empty = all(bytes(value) in ABSENT for value in delta.values())
            if empty and bytes(choice.get("finish_reason", NULL)) in ABSENT:
                return False
            choice["delta"] = msgspec.Raw(encode(delta))
        fields["choices"] = choices
        return True
