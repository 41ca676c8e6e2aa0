"""How many prompts a request has: completions and /generate take lists of them."""

from __future__ import annotations

import re
from typing import Final

from sglang_router.routing.facts import Facts

_TAKE_LISTS: Final = ("completions", "generate")
_LIST_OF: Final = re.compile(rb'\[[ \t\r\n]*(["\[])')


def batch_size(facts: Facts) -> int:
    """Return how many prompts a list of prompts has; 0 for a single prompt, be it text or tokens.

    Quotes or brackets are counted, at memory speed: a list may have hundreds of thousands of entries. One of which the
    routing text has further fields has at most so many; of one that is cut, those before the cut are counted.
    """
    text = facts.text
    if facts.endpoint.name not in _TAKE_LISTS or (first := _LIST_OF.match(text)) is None:
        return 0
    if first[1] == b"[":
        return max(text.count(b"[") - 1, 1)
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    return (text.count(b'"') + 1) // 2
