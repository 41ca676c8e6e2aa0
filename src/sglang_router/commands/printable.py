"""Write what others chose so that a terminal may print it. No I/O."""

from __future__ import annotations

import msgspec


def shown(text: str) -> str:
    """Return a text as a terminal may print it."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def pretty(content: bytes) -> str:
    """Return JSON with indentation, as a terminal may print it."""
    return escaped(msgspec.json.format(content, indent=2).decode())


def escaped(text: str) -> str:
    """Return JSON text with escapes in place of what a terminal would not print, but newlines."""
    return "".join([char if char.isprintable() or char == "\n" else _escape(char) for char in text])


def _escape(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join([f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)])
