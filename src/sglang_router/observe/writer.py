"""Writes log lines to where they are kept. It may lose lines, and says how many, but never blocks the router.

    any thread -> LogWriter.write -> LineBuffer: bounded buffer -> its daemon thread -> stderr
                                 '-> LineBuffer: bounded buffer -> its daemon thread -> a file (`log_files`)

Each destination has its own buffer and thread, so that a stopped terminal does not delay the file. The thread gathers
lines for `_GATHER` seconds before it writes them: one wake-up and one write for many lines, because a thread that wakes
for each line would cost more than the request. Warnings are written at once.

A line that does not fit into the buffer is dropped and counted, and so is a line that a full disk or a closed pipe does
not accept. The next line that can be written follows a notice that says how many are missing. `close` writes what was
accepted; it waits at most `CLOSE_TIMEOUT` seconds for a blocked destination.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

CAPACITY = 4 << 20  # characters that a destination may lag behind
CLOSE_TIMEOUT = 2.0  # seconds
_GATHER = 0.1  # seconds
_CHUNK = 65536  # bytes


class Destination(Protocol):
    """Where a buffer writes to."""

    def fd(self) -> int:
        """Return the descriptor to write to now.

        Raises: OSError
        """

    def close(self) -> None:
        """Close the file."""


class OpenFile:
    """A descriptor that is always open, such as stderr's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fd(self) -> int:
        """Return the file's descriptor."""
        return self._fd

    def close(self) -> None:
        """Leave the descriptor open: it is not ours."""


class _Notice(str):
    """A line that replaces missing lines, and how many they are."""

    __slots__ = ("missing",)
    missing: int


class LineBuffer:
    """One destination with its buffer and its thread. `notice(n)` makes the line that says n lines are missing."""

    def __init__(self, file: Destination, notice: Callable[[int], str], capacity: int = CAPACITY) -> None:
        self._file = file
        self._notice = notice
        self._capacity = capacity
        # Guarded by the lock. It is held for moments only, and is re-entrant: a finalizer may log meanwhile.
        self._lock = threading.RLock()
        self._lines: list[str] = []
        self._size = 0
        self._missing = 0  # lost lines that no notice has reported
        self._busy = False  # the thread is writing lines
        self._closing = False
        self.lost = 0  # all lost lines
        # Owned by the thread
        self._torn = False  # the last write ended inside a line
        # Signals between callers and the thread
        self._work = threading.Event()
        self._hurry = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str, urgent: bool = False) -> None:
        """Accept a line that ends in a newline, or count it as lost."""
        self.put_all((line,))
        if urgent:
            self._hurry.set()

    def put_all(self, lines: Sequence[str]) -> None:
        """Accept lines, each of which ends in a newline; count those as lost for which there is no room."""
        with self._lock:
            first = not self._lines
            size = sum(map(len, lines))
            if self._size + size <= self._capacity and not (self._missing or self._closing):
                self._size += size
                self._lines += lines
            else:
                for line in lines:
                    self._put(line)
            first = first and bool(self._lines)
        if first:
            self._work.set()

    def _put(self, line: str) -> None:
        if self._size + len(line) > self._capacity or self._closing:
            self._missing += 1
            self.lost += 1
            return
        if self._missing:
            self._add_notice()
        self._size += len(line)
        self._lines.append(line)

    def _add_notice(self) -> None:
        notice = _Notice(self._notice(self._missing))
        notice.missing, self._missing = self._missing, 0
        self._size += len(notice)
        self._lines.append(notice)

    def flush(self, timeout: float) -> bool:
        """Wait until all accepted lines are written or lost; False after `timeout` seconds."""
        with self._lock:
            self._hurry.set()
            return self._idle.wait_for(lambda: not self._lines and not self._busy, timeout)

    def close(self, timeout: float) -> None:
        """Flush, and end the thread. A thread that is blocked in a write is left behind."""
        with self._lock:
            self._closing = True
        self._hurry.set()
        self._work.set()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._file.close()

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
                    self._add_notice()
                lines, self._lines = self._lines, []
            unwritten = self._write(lines) if lines else []
            with self._lock:
                # Not earlier: lines that are being written count against the capacity as well.
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
        """Write the lines; return those of which at least the end could not be written."""
        texts = ["\n", *lines] if self._torn else lines
        data = "".join(texts).encode("utf-8", "backslashreplace")
        done = 0
        try:
            fd = self._file.fd()
            while done < len(data):
                done += _write_some(fd, data, done)
        except OSError:  # the disk is full, the reader is gone, the directory was removed
            pass
        if done:
            self._torn = data[done - 1 : done] != b"\n"
        if done == len(data):
            return []
        ends = accumulate(len(text.encode("utf-8", "backslashreplace")) for text in texts)
        unwritten = [text for text, end in zip(texts, ends, strict=True) if end > done]
        return unwritten[-len(lines) :]


def _write_some(fd: int, data: bytes, start: int) -> int:
    """Write a part of the data; return the number of bytes written."""
    try:
        return os.write(fd, memoryview(data)[start : start + _CHUNK])
    except BlockingIOError:  # another process made the descriptor non-blocking: wait here
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll(1000)
        return 0
