"""Prompts of the tiny model whose tokens can be counted without a tokenizer.

It knows the 256 bytes and a few pairs of small letters. A text of digits, capitals and spaces is therefore as many
tokens as it has characters, and two texts share as many tokens as they share characters.
"""

from __future__ import annotations

import random
import string

LETTERS = string.ascii_uppercase + string.digits
CHAT_HEAD = 5
"""Tokens that every chat begins with: <|im_start|>, `u`, `s`, `er`, and a newline."""


def document(seed: str, length: int) -> str:
    """`length` characters that are the same for the same seed, in words."""
    lot = random.Random(seed)
    return "".join(" " if n % 8 == 7 else lot.choice(LETTERS) for n in range(length))
