"""Log files by name: opened again when they were moved away or removed; one a day, and how many are kept.

    PathFile("rank-0.log")          one name; `logrotate` moves the file away, and the next line begins a new one
    DailyFile("logs", clock, rules) sglang-router.2026-11-27.log, a new name each day (UTC)
                                    above `max_bytes`: sglang-router.2026-11-27.1.log, .2.log ... hold what came before

The thread of a `LineBuffer` asks for the descriptor before each write, at most ten times a second: one stat() then
tells whether the name still leads to the file that is open.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from sglang_router.errors import ConfigError

_DAY = 86400
_NAME = re.compile(r"sglang-router\.(\d{4}-\d\d-\d\d)(?:\.(\d+))?\.log")
_SEQUENCE_END = 1 << 30  # the file of a day without a number is the newest of that day


class KeepRules(NamedTuple):
    """How many log files are kept; 0 means that there is no limit.

    files      most files, the current one included
    days       files that were not written to for so many days are removed
    max_bytes  a larger file is closed, and another one is begun
    """

    files: int = 0
    days: float = 0.0
    max_bytes: int = 0


KEEP_ALL = KeepRules()


class PathFile:
    """The file with this name, opened at the first line and whenever the name leads to another file or to none."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1

    def fd(self) -> int:
        """Return the descriptor to write to now. Raises: OSError."""
        if self._fd < 0 or not self._is_current():
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            self.close()
            self._fd = fd
        return self._fd

    @property
    def size(self) -> int:
        """Bytes in the file; 0 when it is not open, or was moved away."""
        return os.fstat(self._fd).st_size if self._fd >= 0 and self._is_current() else 0

    def _is_current(self) -> bool:
        try:
            named, opened = os.stat(self.path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DailyFile:
    """sglang-router.YYYY-MM-DD.log in a directory; see the module. `clock`: seconds since 1970.

    Raises: ConfigError when the first file cannot be opened.
    """

    def __init__(self, directory: str, clock: Callable[[], float], rules: KeepRules = KEEP_ALL) -> None:
        self._directory = directory
        self._clock = clock
        self._rules = rules
        self._day = -1
        self._file = PathFile("")
        try:
            os.makedirs(directory, exist_ok=True)
            self.fd()
        except OSError as exc:
            raise ConfigError(f"--log-dir {directory}: {exc.strerror or exc}") from None

    def fd(self) -> int:
        """Return the descriptor of today's file. Raises: OSError."""
        now = self._clock()
        day = int(now // _DAY)
        if day != self._day:
            self._file.close()
            name = time.strftime("sglang-router.%Y-%m-%d.log", time.gmtime(now))
            self._file, self._day = PathFile(os.path.join(self._directory, name)), day
            self._tidy(now)
        elif 0 < self._rules.max_bytes <= self._file.size:
            self._set_aside()
            self._tidy(now)
        return self._file.fd()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _set_aside(self) -> None:
        """Give today's file the next number of this day."""
        self._file.close()
        stem = self._file.path.removesuffix(".log")
        day = os.path.basename(stem).rpartition(".")[2]
        last = max((number for of, number, _ in self._found() if of == day and number < _SEQUENCE_END), default=0)
        with contextlib.suppress(FileNotFoundError):  # somebody else moved it away just now
            os.rename(self._file.path, f"{stem}.{last + 1}.log")

    def _found(self) -> list[tuple[str, int, str]]:
        """Return day, number and path of each log file here, oldest first."""
        matches = filter(None, map(_NAME.fullmatch, os.listdir(self._directory)))
        return sorted(
            (match[1], int(match[2] or _SEQUENCE_END), os.path.join(self._directory, match[0])) for match in matches
        )

    def _tidy(self, now: float) -> None:
        """Remove the files that are too many or too old, never the current one."""
        older = [path for *_, path in self._found() if path != self._file.path]
        if self._rules.files:
            self._remove(older[: max(0, len(older) + 1 - self._rules.files)])
        if self._rules.days:
            self._remove([path for path in older if _modified(path) < now - self._rules.days * _DAY])

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):  # somebody else removed it, or owns it
                os.unlink(path)


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return float("inf")
