"""What a relay logs: it goes to the decider, which writes it; to standard error while that is away."""

from __future__ import annotations

import logging
import os
import time
import traceback

from sglang_router.observe.line_parts import Stamp
from sglang_router.observe.logs import FORMATS, LEVELS
from sglang_router.processes.link import Link
from sglang_router.processes.messages import Said

_STDERR = 2
_OWN = "sglang_router"


class RelayLog(logging.Handler):
    """See the module. link: to the decider; None: it is away."""

    def __init__(self, level: str, form: str, index: int) -> None:
        super().__init__()
        self.link: Link | None = None
        self._level = LEVELS[level]
        self._line = FORMATS[form]
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
        fields = {str(name): str(value) for name, value in getattr(record, "fields", {}).items()}
        trace = ""
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1]))
        message = record.getMessage()
        if self.link is not None:
            self.link.put(Said(record.levelno, record.name, message, fields, trace))
        else:
            message = f"relay {self._index + 1}: {message}"
            line = self._line(Stamp()(time.time()), record.levelno, record.name, message, fields, trace)
            os.write(_STDERR, line.encode("utf-8", "replace"))
