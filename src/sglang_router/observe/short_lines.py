"""Log lines for people at a terminal: short, and coloured by how serious they are.

    12:00:00.123 200 POST /v1/chat/completions  812 ms, first 95 ms  10.0.0.7:30000 hit 87%  1280+300 tokens
    12:00:00.123 worker is healthy worker=http://10.0.0.7:30000
    12:00:00.123 WARN worker is unhealthy worker=http://10.0.0.7:30000 error="connection refused"

As in the other formats, nothing that a client or a worker chooses can end a line, or reach the terminal as anything but
text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from sglang_router.observe.line_parts import escaped, value
from sglang_router.routing.events import Finished

_OFF = "\x1b[0m"
_DIM, _RED, _GREEN, _YELLOW = "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m"


class ShortLines:
    """See the module. colours: whether lines are coloured."""

    def __init__(self, colours: bool) -> None:
        self._colours = colours

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_OFF}" if self._colours else text

    def line(self, stamp: str, level: int, logger: str, message: str, fields: Mapping[str, object], trace: str) -> str:
        """Format one record of `logging`, with the newline."""
        word = ""
        if level >= logging.WARNING:
            serious = level >= logging.ERROR
            word = self._in(_RED if serious else _YELLOW, "ERROR" if serious else "WARN") + " "
        pairs = "".join([f" {key}={value(item)}" for key, item in fields.items()])
        lines = "".join([f"    | {escaped(line)}\n" for line in trace.splitlines()])
        return f"{self._in(_DIM, _time(stamp))} {word}{escaped(message)}{self._in(_DIM, pairs)}\n{lines}"

    def request(self, event: Finished, stamp: str) -> str:
        """Format the line of one request."""
        tag, leg, answer = event.tag, event.leg, event.answer
        colour = _GREEN if answer.status < 400 and not answer.code else _YELLOW if answer.status < 500 else _RED
        if not answer.status or (answer.code and answer.status < 400):
            colour = _RED
        times = f"{answer.duration * 1e3:.0f} ms"
        if tag.streaming and answer.first_byte >= 0.0:
            times += f", first {answer.first_byte * 1e3:.0f} ms"
        if tag.queued:
            times += f", queued {tag.queued * 1e3:.0f} ms"
        parts = [times]
        if leg is not None:
            place = f"{leg.target.name.partition('://')[2]} {leg.branch}".rstrip()
            parts.append(f"{place} {leg.matched * 100 // leg.total}%" if leg.total else place)
        if answer.usage is not None and answer.usage.prompt >= 0:
            parts.append(f"{answer.usage.prompt}+{max(answer.usage.completion, 0)} tokens")
        if answer.retries:
            parts.append(f"{answer.retries} retries" if answer.retries > 1 else "1 retry")
        if answer.code:
            parts.append(answer.code)
        status = self._in(colour, str(answer.status) if answer.status else "gone")
        head = (
            f"{self._in(_DIM, _time(stamp))} {status} {value(tag.route.method or '-')} {value(tag.route.path or '-')}"
        )
        return f"{head}  {'  '.join(parts)}\n"


def _time(stamp: str) -> str:
    """Return the time of day of a stamp."""
    return stamp[11:-1]
