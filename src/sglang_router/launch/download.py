"""Download a small model once, for users who gave none, and show the progress.

fetching SmolLM2-135M-Instruct  [############------------]  46 of 93 MB      on a terminal: redrawn in place
fetching SmolLM2-135M-Instruct  25 % of 93 MB                                elsewhere: one line for each quarter
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sglang_router.engine.models import SMOLLM2, fetch_smollm2

_WIDTH = 24
_MB = 1_000_000


class TextStream(Protocol):
    """The methods used of a text stream such as standard error."""

    def isatty(self) -> bool: ...
    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...


class ProgressBar:
    """The progress of a download. Call it as often as you like: it writes only when the text changes."""

    def __init__(self, what: str, stream: TextStream) -> None:
        self._what = what
        self._stream = stream
        self._drawn = ""
        self._text = self._bar if stream.isatty() else self._line

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes have arrived."""
        text = self._text(done, total)
        if text != self._drawn:
            self._drawn = text
            self._stream.write(text)
            self._stream.flush()

    def close(self) -> None:
        """End the line if a bar is drawn."""
        if self._drawn.startswith("\r"):
            self._stream.write("\n")

    def _bar(self, done: int, total: int) -> str:
        filled = _WIDTH * done // total
        bar = "#" * filled + "-" * (_WIDTH - filled)
        return f"\r{self._what}  [{bar}]  {done // _MB} of {total // _MB} MB"

    def _line(self, done: int, total: int) -> str:
        return f"{self._what}  {4 * done // total * 25} % of {total // _MB} MB\n"


def fetch_model(stream: TextStream) -> Path:
    """Return the path of the small model in the user's cache folder; download it if needed. Raises: ConfigError."""
    bar = ProgressBar(f"fetching {SMOLLM2.name.partition('.')[0]}", stream)
    try:
        return fetch_smollm2(bar)
    finally:
        bar.close()
