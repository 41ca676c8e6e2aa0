"""How many prompts a request has: completions and /generate take lists of them."""

from __future__ import annotations

from typing import Final

import msgspec

from sglang_router.routing.facts import Facts

_TAKE_LISTS: Final = ("completions", "generate")
_LIST: Final = b"["
_LIST_OF: Final = b'["'
_LOOKED_AT: Final = 64
_decode: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


def batch_size(facts: Facts) -> int:
    """Return how many prompts a list of prompts has; 0 for a single prompt, be it text or tokens.

    A list that cannot be read, because the routing text is cut or has further fields, has at most so many.
    """
    text = facts.text
    if facts.endpoint.name not in _TAKE_LISTS or not text.startswith(_LIST):
        return 0
    first = text[1:_LOOKED_AT].lstrip()[:1]
    if not first or first not in _LIST_OF:
        return 0
    try:
        return len(_decode(text + b"]"))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return text.count(b",") + 1
