"""The tokens of a prompt, where they can be known: to be compared with what engines say of their KV caches.

    /generate        "input_ids": [1, 15, 7]     read as they are
    /v1/completions  "prompt": [1, 15, 7]        read as they are
    both             a text                      encoded, if there is a tokenizer
    all others       unknown: the engine renders a chat with a template of its own, and a batch has several prompts

Everything is read from the routing text, when a policy asks for it and not before, and no more than `MOST_TOKENS`
tokens of it, or `MOST_TEXT` bytes of a text: the router must not spend longer on a prompt than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from sglang_router.routing.facts import Facts

Encode = Callable[[str], Sequence[int]]
"""A tokenizer: returns the ids of a text, with the special tokens that an engine puts around it."""

MOST_TOKENS: Final = 1 << 15
"""Tokens that count; reading so many takes a millisecond."""
MOST_IDS: Final = 1 << 18
"""Bytes of a list of ids that count."""
MOST_TEXT: Final = 1 << 13
"""Bytes of a text that are encoded: 2 to 4 ms."""
_ENDPOINTS: Final = frozenset(("generate", "completions"))
_UNSURE: Final = 8
"""Tokens at the place where a text was cut that may be others in the whole text."""
_ESCAPE: Final = 12
"""Bytes of the longest escape sequence in JSON, a surrogate pair."""
_LIST: Final = ord("[")
_QUOTE: Final = ord('"')
_IDS: Final = msgspec.json.Decoder(list[int])
_STRING: Final = msgspec.json.Decoder(str)


class Prompt:
    """The tokens of a prompt.

    tokens   from its beginning
    size     bytes of the routing text that they make up
    whole    they are the whole prompt
    model    the name in the request; "" without one
    adapter  name of the LoRA adapter in the request; "": none, but the model's name may be that of one
    salt     what keeps it apart from equal prompts; "": nothing
    """

    __slots__ = ("adapter", "model", "salt", "size", "tokens", "whole")

    def __init__(self, tokens: Sequence[int], size: int, whole: bool, model: str, adapter: str, salt: str) -> None:
        self.tokens = tokens
        self.size = size
        self.whole = whole
        self.model = model
        self.adapter = adapter
        self.salt = salt

    def __repr__(self) -> str:
        return f"<Prompt {len(self.tokens)} tokens in {self.size} bytes{'' if self.whole else ', its beginning'}>"


def prompt_of(facts: Facts, encode: Encode | None = None) -> Prompt | None:
    """Return the tokens of a request's prompt; None when they are not known. encode: None: texts are not known."""
    text = facts.text
    if not text or facts.endpoint.name not in _ENDPOINTS:
        return None
    kind = text[0]
    if kind == _LIST:
        found = _of_ids(text)
    elif kind == _QUOTE and encode is not None:
        found = _of_text(text, encode)
    else:
        return None
    names = _names(facts)
    if found is None or names is None:
        return None
    tokens, size, whole = found
    if len(tokens) > MOST_TOKENS:
        size, whole = size * MOST_TOKENS // len(tokens), False
        tokens = tokens[:MOST_TOKENS]
    return Prompt(tokens, size, whole, *names) if tokens else None


def _of_ids(text: bytes) -> tuple[Sequence[int], int, bool] | None:
    """Read a list of ids, whose closing bracket is missing: see `routing.facts`."""
    size, whole = len(text), True
    if size > MOST_IDS:
        size, whole = text.rfind(b",", 0, MOST_IDS), False
        text = text[: max(size, 0)]
    try:
        return _IDS.decode(text + b"]"), size, whole
    except msgspec.DecodeError:  # a list of prompts, or something beside the ids
        return None


def _of_text(text: bytes, encode: Encode) -> tuple[Sequence[int], int, bool] | None:
    """Encode a text, whose closing quote is missing."""
    if len(text) <= MOST_TEXT:
        tokens = _encoded(text, encode)
        return None if tokens is None else (tokens, len(text), True)
    for end in range(MOST_TEXT, MOST_TEXT - _ESCAPE, -1):  # the cut may be inside a character
        tokens = _encoded(text[:end], encode)
        if tokens is not None:
            known = max(len(tokens) - _UNSURE, 0)
            return tokens[:known], end * known // max(len(tokens), 1), False
    return None


def _encoded(text: bytes, encode: Encode) -> Sequence[int] | None:
    """Return the tokens of a JSON string without its closing quote; None when it is none: several prompts, a picture
    beside the text, half of a character at the end."""
    try:
        string = _STRING.decode(text + b'"')
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return encode(string)


def _names(facts: Facts) -> tuple[str, str, str] | None:
    """Return model, adapter and salt; None when they cannot be told from the namespace, which is a digest if long."""
    namespace, model = facts.namespace, facts.model
    if namespace == model:
        name = _string(model)
        return None if name is None else (name, "", "")
    parts = namespace.split(b"\0")
    if len(parts) != 4 or parts[0] != model or parts[2]:  # model, path of the adapter, its number, salt
        return None
    name, adapter, salt = _string(model), _string(parts[1]), _string(parts[3])
    return None if name is None or adapter is None or salt is None else (name, adapter, salt)


def _string(value: bytes) -> str | None:
    """Return what a JSON string says; "" without one, None when it is something else."""
    if not value:
        return ""
    try:
        found: Any = _STRING.decode(value)
    except msgspec.DecodeError:
        return None
    return str(found)
