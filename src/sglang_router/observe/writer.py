"""The way of a log line to where it is kept. It may lose lines, and says how many, but never blocks the router.

    any thread -> LogWriter.write -> Drain: bounded buffer -> its daemon thread -> stderr
                                 '-> Drain: bounded buffer -> its daemon thread -> the day's file in --log-dir

Each place has a buffer and a thread of its own, so that a terminal that was stopped does not hold up the file.
The thread gathers lines for `_GATHER` seconds before it writes them: one wake-up and one write for many, as a
thread that wakes for each line would cost more than the request it tells of. Warnings go at once.

What does not fit into the buffer is dropped and counted, and so is what a full disk or a closed pipe refuses; the
next line that can be written stands behind one that says how many are missing. `close` writes what was accepted,
and waits for a blocked place no longer than `PATIENCE` seconds.
"""

from __future__ import annotations

import os
import select
import threading
import time
from itertools import accumulate
from typing import TYPE_CHECKING

from sglang_router.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY = 4 << 20  # characters a place may lag behind
_GATHER = 0.1
PATIENCE = 2.0
_CHUNK = 65536


class Fixed:
    """A descriptor that is always open, such as stderr's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fd(self) -> int:
        return self._fd

    def close(self) -> None:
        """Leaves the descriptor open: it is not ours."""


class Daily:
    """sglang-router.YYYY-MM-DD.log in a directory; a new one each day (UTC), or when it was taken away.

    Raises: ConfigError when the first cannot be opened.
    """

    def __init__(self, directory: str, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock
        self._day = -1
        self._fd = -1
        try:
            os.makedirs(directory, exist_ok=True)
            self.fd()
        except OSError as exc:
            raise ConfigError(f"--log-dir {directory}: {exc.strerror or exc}") from None

    def fd(self) -> int:
        """The descriptor to write to now.

        Raises: OSError
        """
        now = self._clock()
        if int(now // 86400) != self._day or os.fstat(self._fd).st_nlink == 0:
            name = time.strftime("sglang-router.%Y-%m-%d.log", time.gmtime(now))
            path = os.path.join(self._directory, name)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            self.close()
            self._fd, self._day = fd, int(now // 86400)
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Notice(str):
    """A line that stands in the place of lines that are missing."""

    __slots__ = ("missing",)
    missing: int


class Drain:
    """One place, its buffer and its thread. `notice(n)` makes the line that says n lines are missing."""

    def __init__(self, place: Fixed | Daily, notice: Callable[[int], str], capacity: int = CAPACITY) -> None:
        self._place = place
        self._notice = notice
        self._capacity = capacity
        # Under the lock; it is held for moments only, and re-entrant, as a finalizer may log meanwhile.
        self._lock = threading.RLock()
        self._lines: list[str] = []
        self._size = 0
        self._missing = 0  # lines lost that no notice has told of
        self._busy = False  # the thread has lines in hand
        self._closing = False
        self.lost = 0  # lines lost in all
        # Of the thread
        self._torn = False  # what was written last ends inside a line
        # Between them
        self._work = threading.Event()
        self._hurry = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str, urgent: bool = False) -> None:
        """Accepts a line that ends in a newline, or counts it as lost."""
        with self._lock:
            if self._size + len(line) > self._capacity or self._closing:
                self._missing += 1
                self.lost += 1
                return
            first = not self._lines
            if self._missing:
                self._tell()
            self._size += len(line)
            self._lines.append(line)
        if first:
            self._work.set()
        if urgent:
            self._hurry.set()

    def _tell(self) -> None:
        notice = _Notice(self._notice(self._missing))
        notice.missing, self._missing = self._missing, 0
        self._size += len(notice)
        self._lines.append(notice)

    def flush(self, timeout: float) -> bool:
        """Waits until all that was accepted is written or lost; False when the time was not enough."""
        with self._lock:
            self._hurry.set()
            return self._idle.wait_for(lambda: not self._lines and not self._busy, timeout)

    def close(self, timeout: float) -> None:
        """Flushes, and ends the thread. A thread that is stuck in a write is left behind."""
        with self._lock:
            self._closing = True
        self._hurry.set()
        self._work.set()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._place.close()

    # -- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        closing = False
        while not closing:
            self._work.wait()
            self._hurry.wait(_GATHER)
            with self._lock:
                self._work.clear()
                self._hurry.clear()
                self._busy, closing = True, self._closing
                if closing and self._missing:
                    self._tell()
                lines, self._lines = self._lines, []
            unwritten = self._write(lines) if lines else []
            with self._lock:
                # Only now, for what was in hand counts against the capacity as well.
                self._size -= sum(map(len, lines))
                for line in unwritten:
                    if isinstance(line, _Notice):
                        self._missing += line.missing
                    else:
                        self._missing += 1
                        self.lost += 1
                self._busy = False
                self._idle.notify_all()

    def _write(self, lines: list[str]) -> list[str]:
        """Writes the lines; returns those of which at least the end could not be written."""
        texts = ["\n", *lines] if self._torn else lines
        data = "".join(texts).encode("utf-8", "backslashreplace")
        done = 0
        try:
            fd = self._place.fd()
            while done < len(data):
                done += _write_some(fd, data, done)
        except OSError:  # the disk is full, the reader has gone, the directory is no more
            pass
        if done:
            self._torn = data[done - 1 : done] != b"\n"
        if done == len(data):
            return []
        ends = accumulate(len(text.encode("utf-8", "backslashreplace")) for text in texts)
        unwritten = [text for text, end in zip(texts, ends, strict=True) if end > done]
        return unwritten[-len(lines) :]


def _write_some(fd: int, data: bytes, start: int) -> int:
    """Writes a part, and says how much that was."""
    try:
        return os.write(fd, memoryview(data)[start : start + _CHUNK])
    except BlockingIOError:  # somebody made the descriptor non-blocking, so the waiting is on us
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll(1000)
        return 0
