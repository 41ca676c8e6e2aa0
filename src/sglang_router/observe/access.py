"""Two listeners that write log lines: one line per finished request, one per change of a worker.

    2026-10-25T12:00:00.123Z INFO  sglang_router.access: POST /v1/chat/completions 200 id=chatcmpl-4f peer=10.0.0.9
        worker=http://10.0.0.7:30000 branch=hit matched=87% retries=0 duration_ms=812.4 first_byte_ms=95.1
        in=5120 out=20480 stream=1                                          (in truth all on one line)

Never in it: anything of a prompt or an answer, header values but the request's id, the query. What clients choose
(id, path) is escaped where it could break the line or be taken for another field.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.events import Listener
from sglang_router.core.worker import Outcome
from sglang_router.observe.logs import Stamp, cut, plain, value

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_router.core.events import Finished, WorkerChanged
    from sglang_router.core.worker import Worker
    from sglang_router.observe.logs import LogWriter

_LOGGER = "sglang_router.access"
_SERVED = Outcome.SERVED
_encode = msgspec.json.Encoder().encode


class AccessLine(msgspec.Struct, gc=False):
    """The line in JSON. `matched` is in percent, null when there was nothing to match; `first_byte_ms` is null
    when there was none; `in` and `out` are bytes of the bodies, a stream's with its chunked coding. `client`, the name
    of its key, is only there with one, and `resumed` only where another worker had to go on with a stream."""

    time: str
    level: str
    logger: str
    message: str
    id: str
    peer: str
    method: str
    path: str
    status: int
    code: str
    outcome: str | None
    worker: str | None
    branch: str
    matched: int | None
    retries: int
    duration_ms: float
    first_byte_ms: float | None
    received: int = msgspec.field(name="in")
    sent: int = msgspec.field(name="out")
    stream: bool = False
    client: str | msgspec.UnsetType = msgspec.UNSET
    resumed: int | msgspec.UnsetType = msgspec.UNSET


class AccessLog(Listener):
    """One line for each request that ended, at level info. `clock` gives seconds since 1970."""

    def __init__(self, writer: LogWriter, clock: Callable[[], float] = time.time) -> None:
        self._write = writer.write
        self._clock = clock
        self._stamp = Stamp()
        self._line = self._json if writer.json else self._text
        self._wanted = writer.level <= logging.INFO

    def finished(self, event: Finished) -> None:
        if self._wanted:
            self._write(self._line(event), False)

    def _text(self, event: Finished) -> str:
        worker, outcome, total, first = event.worker, event.outcome, event.total, event.first_byte
        request_id, path, code = event.request_id, event.path, event.code
        if not (request_id and path and plain(request_id + path)):
            request_id, path = value(request_id), value(path)
        end = f" client={value(event.client)}" if event.client else ""
        if event.resumed:
            end += f" resumed={event.resumed}"
        if code or (outcome is not None and outcome is not _SERVED):
            end += f" code={code or '-'} outcome={outcome.label if outcome is not None else '-'}"
        return (
            f"{self._stamp(self._clock())} INFO  {_LOGGER}: {event.method} {path} {event.status}"
            f" id={request_id} peer={event.peer or '-'} worker={'-' if worker is None else worker.url}"
            f" branch={event.branch or '-'} matched={f'{event.matched * 100 // total}%' if total else '-'}"
            f" retries={event.retries} duration_ms={event.duration * 1e3:.1f}"
            f" first_byte_ms={f'{first * 1e3:.1f}' if first >= 0.0 else '-'}"
            f" in={event.received} out={event.sent} stream={1 if event.streaming else 0}{end}\n"
        )

    def _json(self, event: Finished) -> str:
        worker, outcome, total, first = event.worker, event.outcome, event.total, event.first_byte
        line = AccessLine(
            self._stamp(self._clock()),
            "info",
            _LOGGER,
            "request",
            event.request_id,
            event.peer,
            event.method,
            cut(event.path),
            event.status,
            event.code,
            None if outcome is None else outcome.label,
            None if worker is None else worker.url,
            event.branch,
            event.matched * 100 // total if total else None,
            event.retries,
            round(event.duration * 1e3, 1),
            round(first * 1e3, 1) if first >= 0.0 else None,
            event.received,
            event.sent,
            event.streaming,
            event.client or msgspec.UNSET,
            event.resumed or msgspec.UNSET,
        )
        text = _encode(line).decode()
        if not (event.request_id.isprintable() and event.path.isprintable()):
            # JSON lets through what moves a terminal's cursor, or ends a line for some readers (U+0085).
            text = json.dumps(json.loads(text), separators=(",", ":"))
        return text + "\n"


_workers = logging.getLogger("sglang_router.workers")

_CHANGES = {
    ("added", ""): (logging.INFO, "worker added"),
    ("removed", ""): (logging.INFO, "worker removed"),
    ("restarted", ""): (logging.WARNING, "worker is another process: what it had cached is forgotten"),
    ("health", "healthy"): (logging.INFO, "worker is healthy"),
    ("health", "starting"): (logging.WARNING, "worker's process is gone; another one starts"),
    ("health", "down"): (logging.ERROR, "worker is down and is not started again"),
    ("health", "unhealthy"): (logging.WARNING, "worker is unhealthy"),
    ("breaker", "open"): (logging.WARNING, "circuit breaker is open: no requests for the worker"),
    ("breaker", "half_open"): (logging.INFO, "circuit breaker is half open: one request may try the worker"),
    ("breaker", "closed"): (logging.INFO, "circuit breaker is closed: the worker serves again"),
    ("outlier", "held_off"): (logging.WARNING, "worker is held off: it does much worse than the others"),
    ("outlier", "kept"): (logging.INFO, "worker is not held off any more"),
    ("draining", "draining"): (logging.INFO, "worker is draining: it gets no new requests"),
    ("draining", "active"): (logging.INFO, "worker takes requests again"),
}
"""Level and message for what changed and its new state; "" stands for any."""


class WorkerLog(Listener):
    """One line for each change of a worker, through `logging`: there are few of them."""

    def worker_changed(self, event: WorkerChanged) -> None:
        worker, what = event.worker, event.what
        unknown = (logging.INFO, f"worker changed: {what}")
        level, message = _CHANGES.get((what, event.new)) or _CHANGES.get((what, "")) or unknown
        fields: dict[str, object] = {"worker": worker.url}
        if event.old:
            fields["was"] = event.old
        if what == "added":
            fields["health"] = event.new
        if what == "breaker":
            fields["failures"] = worker.failures
            if event.new == "open":
                fields["open_seconds"] = worker.open_for
        if worker.held_off:
            fields["why"] = worker.held_off
        if worker.last_error:
            fields["error"] = _without_key(worker)
        _workers.log(level, message, extra={"fields": fields})


def _without_key(worker: Worker) -> str:
    """The worker's last error; it is made of what the worker said, which may be what it was sent."""
    key = worker.spec.api_key
    return worker.last_error.replace(key, "***") if key else worker.last_error
