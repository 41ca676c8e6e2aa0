"""Prompts for the tiny model whose tokens can be counted without a tokenizer.

Its vocabulary is the 256 bytes and a few pairs of lower-case letters. A text of digits, capitals and spaces therefore
has as many tokens as characters, and two texts share as many tokens as characters.
"""

from __future__ import annotations

import random
import string

LETTERS = string.ascii_uppercase + string.digits
CHAT_HEAD = 5
"""Tokens at the beginning of every chat: <|im_start|>, `u`, `s`, `er`, and a newline."""


def document(seed: str, length: int) -> str:
    """Return `length` characters in words, the same for the same seed."""
    lot = random.Random(seed)
    return "".join(" " if n % 8 == 7 else lot.choice(LETTERS) for n in range(length))
