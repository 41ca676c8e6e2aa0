"""The parts of a log line: its time, and text of which nothing can end the line or be read as another field."""

from __future__ import annotations

import json
import time
from typing import Final

LONGEST_MESSAGE: Final = 16384  # characters
_LONGEST_VALUE: Final = 1024  # characters


class Stamp:
    """UTC time in ISO 8601 with milliseconds. The last text is kept: under load many lines share its millisecond."""

    __slots__ = ("_from", "_second", "_second_text", "_text", "_until")

    def __init__(self) -> None:
        self._from = self._until = -1.0  # when _text is right, seconds since 1970
        self._text = ""
        self._second = -1
        self._second_text = ""

    def __call__(self, now: float) -> str:
        """Return the text of a moment; `now` is in seconds since 1970."""
        if not self._from <= now < self._until:
            self._renew(int(now * 1000))
        return self._text

    def _renew(self, millisecond: int) -> None:
        second, rest = divmod(millisecond, 1000)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        self._from, self._until = millisecond / 1000, (millisecond + 1) / 1000
        self._text = f"{self._second_text}.{rest:03d}Z"


def escaped(text: str) -> str:
    """Return a message on one line: characters that do not print become escapes as in JSON."""
    text = cut(text, LONGEST_MESSAGE)
    return text if text.isprintable() else json.dumps(text)[1:-1].replace('\\"', '"')


def plain(text: str) -> bool:
    """Whether a text needs no quotes after `key=`: it cannot be read as more than one value."""
    return text.isprintable() and " " not in text and '"' not in text and 0 < len(text) <= _LONGEST_VALUE


def value(item: object) -> str:
    """Return a value for `key=value`, quoted as JSON where it must be."""
    text = str(item)
    return text if plain(text) else json.dumps(cut(text))


def on_one_line(text: str) -> str:
    """Return JSON text of which no character ends a line for any reader, or moves a terminal's cursor.

    msgspec leaves some of these unescaped, such as U+0085 and U+007F.
    """
    if (text.isascii() and "\x7f" not in text) or text.isprintable():  # the first is quick
        return text
    return json.dumps(json.loads(text), separators=(",", ":"))


def cut(text: str, longest: int = _LONGEST_VALUE) -> str:
    """Return a text of bounded length."""
    return text if len(text) <= longest else text[:longest] + "..."
