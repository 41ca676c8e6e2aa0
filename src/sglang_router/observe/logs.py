"""Logging: one line per record, in text or JSON, through a writer that never blocks.

    logging.getLogger("sglang_router.x").info("msg", extra={"fields": {...}})  --> _Handler --.
    AccessLog (observe.access), without the detour                             ---------------+--> LogWriter

    2026-10-25T12:00:00.123Z INFO  sglang_router.workers: worker is healthy worker=http://10.0.0.7:30000
    {"time":"2026-10-25T12:00:00.123Z","level":"info","logger":"sglang_router.workers","message":"worker ..."}

Whatever a line tells may come from a client or a worker, so nothing in it may end the line or start another:
text is escaped as in JSON, values with spaces stand in quotes, and only the lines of a traceback follow, each
behind a bar.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from typing import TYPE_CHECKING, Any

from sglang_router.observe.writer import CAPACITY, PATIENCE, Daily, Drain, Fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_NAMES = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}
_OWN = "sglang_router"
_LONGEST_MESSAGE = 16384  # characters
_LONGEST_VALUE = 1024
_STDERR = 2


class Stamp:
    """UTC time in ISO 8601 with milliseconds. The last one is kept: under load many lines share it."""

    __slots__ = ("_millisecond", "_second", "_text", "_whole")

    def __init__(self) -> None:
        self._millisecond = self._second = -1
        self._text = self._whole = ""

    def __call__(self, now: float) -> str:
        """`now` is in seconds since 1970."""
        millisecond = int(now * 1000)
        if millisecond != self._millisecond:
            self._millisecond = millisecond
            second, rest = divmod(millisecond, 1000)
            if second != self._second:
                self._second = second
                self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._whole = f"{self._text}.{rest:03d}Z"
        return self._whole


def escaped(text: str) -> str:
    """A message on one line: what does not print becomes an escape as in JSON."""
    text = cut(text, _LONGEST_MESSAGE)
    return text if text.isprintable() else json.dumps(text)[1:-1].replace('\\"', '"')


def plain(text: str) -> bool:
    """Whether a text may stand after `key=` as it is: it cannot be taken for more than one value."""
    return text.isprintable() and " " not in text and '"' not in text and 0 < len(text) <= _LONGEST_VALUE


def value(item: object) -> str:
    """A value for `key=value`, in quotes as JSON where it must be."""
    text = str(item)
    return text if plain(text) else json.dumps(cut(text))


def cut(text: str, longest: int = _LONGEST_VALUE) -> str:
    """A text of bounded length."""
    return text if len(text) <= longest else text[:longest] + "..."


def text_line(stamp: str, level: int, logger: str, message: str, fields: Mapping[str, object], trace: str) -> str:
    """One record as text, with the newline."""
    pairs = "".join([f" {key}={value(item)}" for key, item in fields.items()])
    lines = "".join([f"    | {escaped(line)}\n" for line in trace.splitlines()])
    return f"{stamp} {_name(level):<5} {escaped(logger)}: {escaped(message)}{pairs}\n{lines}"


def json_line(stamp: str, level: int, logger: str, message: str, fields: Mapping[str, object], trace: str) -> str:
    """One record as a JSON object, with the newline."""
    record: dict[str, object] = {"time": stamp, "level": _name(level).lower(), "logger": logger}
    record["message"] = cut(message, _LONGEST_MESSAGE)
    record |= {key: item for key, item in fields.items() if key not in record}
    if trace:
        record["trace"] = trace
    return json.dumps(record, default=str, separators=(",", ":")) + "\n"


def _name(level: int) -> str:
    return _NAMES[max(known for known in _NAMES if known <= max(level, logging.DEBUG))]


FORMATS: dict[str, Callable[[str, int, str, str, Mapping[str, object], str], str]] = {
    "text": text_line,
    "json": json_line,
}


class LogWriter:
    """Where lines go.

    level  the least severe one that is wanted, a number of `logging`
    json   whether lines are JSON
    write  takes a line that ends in a newline, and whether it is urgent; returns at once, whatever the places do
    """

    write: Callable[[str, bool], None]

    def __init__(self, level: int, form: str, places: list[Fixed | Daily], capacity: int = CAPACITY) -> None:
        self.level = level
        self.json = form == "json"
        self.line = FORMATS[form]
        self._drains = [Drain(place, self._notice, capacity) for place in places]
        self.write = self._drains[0].put if len(places) == 1 else self._write_all
        self._handler: _Handler | None = None

    @property
    def lost(self) -> int:
        """Lines that could not be written, in all places together."""
        return sum(drain.lost for drain in self._drains)

    def _write_all(self, line: str, urgent: bool) -> None:
        for drain in self._drains:
            drain.put(line, urgent)

    def flush(self, timeout: float = PATIENCE) -> bool:
        """Waits until all accepted lines are written or lost; False if `timeout` seconds were not enough."""
        done = [drain.flush(timeout) for drain in self._drains]
        return all(done)

    def attach(self) -> None:
        """Makes `logging` write here: the router's own loggers at the level, others from warnings on."""
        root = logging.getLogger()
        self._handler = _Handler(self)
        root.addHandler(self._handler)
        root.setLevel(max(self.level, logging.WARNING))
        logging.getLogger(_OWN).setLevel(self.level)

    def close(self, timeout: float = PATIENCE) -> None:
        """Writes what was accepted, and lets go; a blocked place costs at most the time."""
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
        for drain in self._drains:
            drain.close(timeout)

    def _notice(self, missing: int) -> str:
        message = "log lines are missing: they could not be written"
        return self.line(Stamp()(time.time()), logging.WARNING, _OWN, message, {"missing": missing}, "")


class _Handler(logging.Handler):
    """From `logging` to the writer. `logging` itself flushes it when the interpreter exits."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer
        self._stamp = Stamp()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit the message: still worth a line
            message = f"{record.msg} {record.args}"
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        trace = ""
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1]))
        line = self._writer.line(self._stamp(record.created), record.levelno, record.name, message, fields, trace)
        self._writer.write(line, record.levelno >= logging.WARNING)

    def flush(self) -> None:
        self._writer.flush()


def configure(level: str, form: str, log_dir: str | None, *, stderr: int = _STDERR) -> LogWriter:
    """Starts logging: level debug, info, warn or error; form text or json; `log_dir` gets a file a day.

    Raises: ConfigError when the file cannot be opened.
    """
    places: list[Fixed | Daily] = [Fixed(stderr)]
    if log_dir is not None:
        places.append(Daily(log_dir, time.time))
    writer = LogWriter(LEVELS[level], form, places)
    writer.attach()
    return writer
