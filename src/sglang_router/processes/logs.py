"""What a relay logs: it goes to the decider, which writes it; to standard error while that is away or does not read.

A log that nobody reads must not hurt the relay: a line for which standard error has no room is dropped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
import traceback

from sglang_router.observe.line_parts import Stamp
from sglang_router.observe.logs import AUTO, FORMATS, LEVELS
from sglang_router.processes.link import Link
from sglang_router.processes.message import as_text
from sglang_router.processes.messages import Said

_STDERR = 2
_OWN = "sglang_router"


class RelayLog(logging.Handler):
    """See the module. link: to the decider; None: it is away."""

    def __init__(self, level: str, form: str, index: int) -> None:
        super().__init__()
        self.link: Link | None = None
        self._level = LEVELS[level]
        self._line = FORMATS["text" if form == AUTO else form]
        self._index = index

    def attach(self) -> None:
        """Take all records of this process."""
        logging.getLogger().addHandler(self)
        self.set_level(self._level)

    def set_level(self, level: int) -> None:
        """Take records from this level on; those of other programs from warnings on."""
        logging.getLogger().setLevel(max(level, logging.WARNING))
        logging.getLogger(_OWN).setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        fields = {str(name): as_text(str(value)) for name, value in getattr(record, "fields", {}).items()}
        trace = ""
        if record.exc_info and record.exc_info[1] is not None:
            trace = as_text("".join(traceback.format_exception(record.exc_info[1])))
        message = as_text(record.getMessage())
        if self.link is not None and not self.link.stuck:
            self.link.put(Said(record.levelno, record.name, message, fields, trace))
        else:
            message = f"relay {self._index + 1}: {message}"
            line = self._line(Stamp()(time.time()), record.levelno, record.name, message, fields, trace)
            _write(line.encode("utf-8", "replace"))


def _write(line: bytes) -> None:
    """Write to standard error, unless that is full or closed."""
    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    if poll.poll(0):
        with contextlib.suppress(OSError):
            os.write(_STDERR, line)
