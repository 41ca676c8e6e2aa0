"""Rows at the bottom of a terminal that are redrawn in place, while all other output scrolls above them.

    any writer --write--> fd --> pipe --> our thread --> terminal        (fd is usually 2, standard error)
    show(rows) -------------------------------^

A pipe replaces the file descriptor, so that writers need not know about the rows: the thread erases the rows, writes
the complete lines that came through the pipe, and draws the rows again. Only the thread waits for the terminal. `close`
restores the descriptor and erases the rows; the other lines stay on the screen.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import unicodedata
from collections.abc import Sequence

_PERIOD = 0.2  # seconds between two drawings
_PATIENCE = 2.0  # seconds that `close` waits for a terminal that accepts no output
_BLOCK = 65536


class Screen:
    """See the module. A descriptor can have one screen at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._terminal = os.dup(fd)
        self._pipe, writing = os.pipe()
        os.dup2(writing, fd, inheritable=os.get_inheritable(fd))
        os.close(writing)
        self._rows: tuple[str, ...] = ()  # set by `show`, read by the thread; one assignment needs no lock
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
        # used by the thread only
        self._drawn: tuple[str, ...] = ()
        self._rest = b""  # the start of an incomplete line
        self._thread.start()

    def show(self, rows: Sequence[str]) -> None:
        """Show these rows from now on, each cut to the terminal's width."""
        self._rows = tuple(rows)

    def close(self) -> None:
        """Erase the rows and restore the descriptor. A second call does nothing."""
        if not self._closing:
            os.dup2(self._terminal, self._fd, inheritable=os.get_inheritable(self._fd))
            self._closing = True
            self._thread.join(_PATIENCE)
            if not self._thread.is_alive():
                os.close(self._terminal)
                os.close(self._pipe)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        at = time.monotonic()  # when to draw next
        while True:
            last = self._closing  # read before the pipe: all that was written before closing is in the pipe now
            wait = 0.0 if last else max(0.0, at - time.monotonic())
            readable, _, _ = select.select([self._pipe], [], [], wait)
            data = os.read(self._pipe, _BLOCK) if readable else b""
            self._write(data)
            if not data and last:
                break
            if time.monotonic() >= at:
                self._draw(self._rows)
                at = time.monotonic() + _PERIOD
        self._draw(())
        self._put(self._rest)

    def _write(self, data: bytes) -> None:
        lines, newline, self._rest = (self._rest + data).rpartition(b"\n")
        if newline:
            self._put(self._erase() + lines + newline)

    def _draw(self, rows: tuple[str, ...]) -> None:
        width, height = self._size()
        rows = tuple(cut(row, width - 1) for row in rows[: height - 1])
        if rows != self._drawn:
            self._put(self._erase() + "".join(f"{row}\n" for row in rows).encode("utf-8", "replace"))
            self._drawn = rows

    def _erase(self) -> bytes:
        drawn, self._drawn = len(self._drawn), ()
        return b"\x1b[%dA\x1b[J" % drawn if drawn else b""

    def _size(self) -> tuple[int, int]:
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self._terminal)
            if size.columns > 1 and size.lines > 1:
                return size
        return 80, 24

    def _put(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; keep reading the pipe so that no writer blocks
            while data:
                data = data[os.write(self._terminal, data) :]


def cut(text: str, width: int) -> str:
    """Cut a text to `width` columns of a terminal, with an ellipsis at the end if it is longer."""
    columns = fits = 0  # fits: number of characters that leave room for the ellipsis
    for at, character in enumerate(text, 1):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > width:
            return text[:fits] + "…"
        if columns < width:
            fits = at
    return text
