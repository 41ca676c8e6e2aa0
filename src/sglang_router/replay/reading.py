"""Read a file with one record a line, in a stream, plain or compressed; say in which line a mistake is."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_router.errors import ConfigError
from sglang_router.replay.load import MOST

MOST_BYTES = 1 << 28
"""Bytes of a prompt's text that a line may have."""
_MAGIC = b"\x1f\x8b"


class Lines:
    """The lines of a file. Iteration gives each that is not empty, without its end; `number` is that of the last one.

    Raises, also while it is read: ConfigError, when the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0

    def __repr__(self) -> str:
        return f"<Lines of {self.path}, {self.number} read>"

    def __iter__(self) -> Iterator[str]:
        self.number = 0
        try:
            if self.path.is_fifo():
                raise ConfigError(f"{self.path}: a trace is read several times, so it must be a file and not a pipe")
            with self.path.open("rb") as file:
                packed = file.peek(2)[:2] == _MAGIC
                with io.TextIOWrapper(gzip.GzipFile(fileobj=file) if packed else file, "utf-8") as text:
                    for line in text:
                        self.number += 1
                        if line := line.strip():
                            yield line
        except UnicodeDecodeError:
            raise ConfigError(f"{self.path}, after line {self.number}: not text in UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{self.path}: cannot be read: {reason}") from None

    def wrong(self, what: str) -> ConfigError:
        """Return the error about the last line."""
        return ConfigError(f"{self.path}, line {self.number}: {what}")

    def object(self, line: str) -> dict[str, Any]:
        """Return the JSON object of the last line. Raises: ConfigError."""
        try:
            found = json.loads(line)
        except ValueError:
            raise self.wrong("not JSON") from None
        except RecursionError:
            raise self.wrong("nested too deeply") from None
        if not isinstance(found, dict):
            raise self.wrong("not a JSON object")
        return found

    def count(self, found: Any, name: str, most: int = MOST) -> int:
        """Return a number of tokens or blocks of the last line, at most `most`. Raises: ConfigError."""
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise self.wrong(f"{name} must be a whole number of 0 or more")
        if found > most:
            raise self.wrong(f"{name} must be at most {most:,}")
        return found

    def seconds(self, found: Any, name: str) -> float:
        """Return a time or pause of the last line. Raises: ConfigError."""
        if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 <= found < 1e12:
            raise self.wrong(f"{name} must be a number of 0 or more")
        return float(found)
