"""Numbers in sentences: "1 worker", "2 workers"."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def are(number: int) -> str:
    """Return "is" or "are", as the number wants it."""
    return "is" if number == 1 else "are"
