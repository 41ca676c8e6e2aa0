"""Logging: one line per record, in text or JSON, through a writer that never blocks.

    logging.getLogger("sglang_router.x").info("msg", extra={"fields": {...}})  --> _Handler --.
    AccessLog (observe.access), directly                                       ---------------+--> LogWriter

    2026-10-25T12:00:00.123Z INFO  sglang_router.workers: worker is healthy worker=http://10.0.0.7:30000
    {"time":"2026-10-25T12:00:00.123Z","level":"info","logger":"sglang_router.workers","message":"worker ..."}

The text of a line may come from a client or a worker, so nothing in it may end the line or start another one: text is
escaped as in JSON, and a value with spaces is quoted. Only the lines of a traceback follow a line, each after a bar.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_router.observe.line_parts import LONGEST_MESSAGE, Stamp, cut, escaped, value
from sglang_router.observe.log_files import KEEP_ALL, DailyFile, KeepRules
from sglang_router.observe.short_lines import ShortLines
from sglang_router.observe.writer import CAPACITY, CLOSE_TIMEOUT, Destination, LineBuffer, OpenFile

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_NAMES = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}
_OWN = "sglang_router"
_STDERR = 2


def text_line(stamp: str, level: int, logger: str, message: str, fields: Mapping[str, object], trace: str) -> str:
    """Format one record as text, with the newline."""
    pairs = "".join([f" {key}={value(item)}" for key, item in fields.items()])
    lines = "".join([f"    | {escaped(line)}\n" for line in trace.splitlines()])
    return f"{stamp} {_name(level):<5} {escaped(logger)}: {escaped(message)}{pairs}\n{lines}"


def json_line(stamp: str, level: int, logger: str, message: str, fields: Mapping[str, object], trace: str) -> str:
    """Format one record as a JSON object, with the newline."""
    record: dict[str, object] = {"time": stamp, "level": _name(level).lower(), "logger": logger}
    record["message"] = cut(message, LONGEST_MESSAGE)
    record |= {key: item for key, item in fields.items() if key not in record}
    if trace:
        record["trace"] = trace
    return json.dumps(record, default=str, separators=(",", ":")) + "\n"


def _name(level: int) -> str:
    return _NAMES[max(known for known in _NAMES if known <= max(level, logging.DEBUG))]


AUTO = "auto"
"""The format of lines that nobody has chosen: short ones on a terminal, else text."""
FORMATS: dict[str, Callable[[str, int, str, str, Mapping[str, object], str], str]] = {
    "text": text_line,
    "json": json_line,
}


class LogWriter:
    """Writes log lines to all destinations.

    level  the least severe level that is wanted, a number of `logging`
    json   whether lines are JSON
    line   formats one record
    short  how lines are made short, for people at a terminal; None: they are not
    write  takes a line that ends in a newline, and whether it is urgent; never blocks
    """

    write: Callable[[str, bool], None]

    def __init__(
        self,
        level: int,
        form: str,
        files: list[Destination],
        capacity: int = CAPACITY,
        short: ShortLines | None = None,
    ) -> None:
        self.level = level
        self.json = form == "json"
        self.short = short
        self.line = FORMATS[form] if short is None else short.line
        self._buffers = [LineBuffer(file, self._notice, capacity) for file in files]
        self.write = self._buffers[0].put if len(files) == 1 else self._write
        self._handler: _Handler | None = None

    @property
    def lost(self) -> int:
        """Lines that could not be written, over all destinations."""
        return sum(buffer.lost for buffer in self._buffers)

    def write_all(self, lines: Sequence[str]) -> None:
        """Take lines, none of which is urgent; see `write`."""
        for buffer in self._buffers:
            buffer.put_all(lines)

    def _write(self, line: str, urgent: bool) -> None:
        for buffer in self._buffers:
            buffer.put(line, urgent)

    def flush(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Wait until all accepted lines are written or lost; False after `timeout` seconds."""
        done = [buffer.flush(timeout) for buffer in self._buffers]
        return all(done)

    def attach(self) -> None:
        """Make `logging` write here: the router's own loggers from `level` on, others from warnings on."""
        root = logging.getLogger()
        self._handler = _Handler(self)
        root.addHandler(self._handler)
        root.setLevel(max(self.level, logging.WARNING))
        logging.getLogger(_OWN).setLevel(self.level)

    def set_level(self, level: str) -> None:
        """Write lines from this level on, from now on."""
        self.level = LEVELS[level]
        logging.getLogger().setLevel(max(self.level, logging.WARNING))
        logging.getLogger(_OWN).setLevel(self.level)

    def tell(self, message: str) -> None:
        """Write a line whatever the level, at once."""
        self.write(self.line(Stamp()(time.time()), logging.INFO, _OWN, message, {}, ""), True)

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Detach from `logging`, write what was accepted, and end; wait at most `timeout` seconds per destination."""
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
        for buffer in self._buffers:
            buffer.close(timeout)

    def _notice(self, missing: int) -> str:
        message = "log lines are missing: they could not be written"
        return self.line(Stamp()(time.time()), logging.WARNING, _OWN, message, {"missing": missing}, "")


class _Handler(logging.Handler):
    """Passes records of `logging` to the writer. `logging` flushes it when the interpreter exits."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer
        self._stamp = Stamp()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit the message: log them all the same
            message = f"{record.msg} {record.args}"
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        trace = ""
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1]))
        line = self._writer.line(self._stamp(record.created), record.levelno, record.name, message, fields, trace)
        self._writer.write(line, record.levelno >= logging.WARNING)

    def flush(self) -> None:
        """Write all lines that are kept."""
        self._writer.flush()


def configure(
    level: str, form: str, log_dir: str | None, *, stderr: int = _STDERR, keep: KeepRules = KEEP_ALL
) -> LogWriter:
    """Start logging.

    level    debug, info, warn or error
    form     text or json; auto: text, or short lines where standard error is a terminal and the only destination
    log_dir  gets one file per day; keep: how many of them stay

    Raises: ConfigError when the file cannot be opened.
    """
    files: list[Destination] = [OpenFile(stderr)]
    if log_dir is not None:
        files.append(DailyFile(log_dir, time.time, keep))
    short = None
    if form == AUTO:
        form = "text"
        if log_dir is None and os.isatty(stderr):
            short = ShortLines(colours=not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")
    writer = LogWriter(LEVELS[level], form, files, short=short)
    writer.attach()
    return writer
