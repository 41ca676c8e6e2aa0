"""A small model for who has none at hand, fetched once, with a bar that shows how far it is.

fetching SmolLM2-135M-Instruct  [############------------]  46 of 93 MB      a terminal: redrawn in place
fetching SmolLM2-135M-Instruct  25 % of 93 MB                                else a line for each quarter
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sglang_router.engine.models import SMOLLM2, fetch_smollm2

_WIDTH = 24
_MB = 1_000_000


class Stream(Protocol):
    """What is needed of a text stream such as standard error."""

    def isatty(self) -> bool: ...
    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...


class Bar:
    """How far a download is. Called often; writes when there is something new to show."""

    def __init__(self, what: str, stream: Stream) -> None:
        self._what = what
        self._stream = stream
        self._drawn = ""
        self._shows = self._draw if stream.isatty() else self._tell

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes are here."""
        text = self._shows(done, total)
        if text != self._drawn:
            self._drawn = text
            self._stream.write(text)
            self._stream.flush()

    def close(self) -> None:
        """Leaves the line, if one is drawn."""
        if self._drawn.startswith("\r"):
            self._stream.write("\n")

    def _draw(self, done: int, total: int) -> str:
        filled = _WIDTH * done // total
        bar = "#" * filled + "-" * (_WIDTH - filled)
        return f"\r{self._what}  [{bar}]  {done // _MB} of {total // _MB} MB"

    def _tell(self, done: int, total: int) -> str:
        return f"{self._what}  {4 * done // total * 25} % of {total // _MB} MB\n"


def fetch_model(stream: Stream) -> Path:
    """The file of the small model, in the user's cache folder. Raises: ConfigError."""
    bar = Bar(f"fetching {SMOLLM2.name.partition('.')[0]}", stream)
    try:
        return fetch_smollm2(bar)
    finally:
        bar.close()
