"""Two listeners that write log lines: one line per finished request, and one per change of a worker.

    2026-10-25T12:00:00.123Z INFO  sglang_router.access: POST /v1/chat/completions 200 id=chatcmpl-4f peer=10.0.0.9
        worker=http://10.0.0.7:30000 branch=hit matched=87% retries=0 duration_ms=812.4 first_byte_ms=95.1
        in=5120 out=20480 stream=1 prompt_tokens=1280 cached_tokens=1104 completion_tokens=300 model=llama
        ttft_ms=95.1 queue_ms=20.0 trace_id=4bf92f3577b34da6a3ce929d0e0e4736   (one line; broken here to fit)

ttft_ms is there for streams, queue_ms for requests that were queued, trace_id where there is a trace. The tokens
are there as far as the engine tells them. Of a pair, `worker` is the decode worker, and `prefill` follows.

A line never contains: text of a prompt or an answer, a header value except the request id, the query string. What
clients choose (id, path) is escaped where it could end the line or be read as another field.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from sglang_router.observe.access_line import AccessLine
from sglang_router.observe.line_parts import Stamp, cut, on_one_line, plain, value
from sglang_router.observe.logs import LogWriter
from sglang_router.routing.events import Finished, Listener, Quarantined, WorkerChanged
from sglang_router.routing.model_names import plain_name
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.trace_ids import TraceIds, context_of
from sglang_router.routing.usage import Usage

_LOGGER: Final = "sglang_router.access"
_SERVED: Final = Outcome.SERVED  # a global is quicker than a member of an enumeration
_INFO: Final = logging.INFO
_MOST_HEADS: Final = 1000
_LONGEST_HEAD: Final = 256  # characters
_UNTOLD: Final = Usage()
_encode = msgspec.json.Encoder().encode


PROBES: Final = frozenset(("/health", "/health_generate", "/liveness", "/readiness", "/metrics", "/engine_metrics"))
"""Paths that load balancers, kubelets and Prometheus ask every few seconds."""


class AccessLog(Listener):
    """One line for each finished request, at level info.

    clock   gives seconds since 1970
    probes  also the requests by which others watch the router, see `PROBES`
    traces  the ids of traces; None: only those that clients name are known
    short   formats lines for a terminal; None: all fields are written
    """

    def __init__(
        self,
        writer: LogWriter,
        clock: Callable[[], float] = time.time,
        *,
        probes: bool = True,
        traces: TraceIds | None = None,
        short: Callable[[Finished, str], str] | None = None,
    ) -> None:
        self._writer = writer
        self._traces = traces
        self._probes = probes
        self._clock = clock
        self._stamp = Stamp()
        self._line = short or (self._json if writer.json else self._text)
        # The text before the id, and the field of the model; by method, path, status and model. At most _MOST_HEADS.
        self._heads: dict[tuple[str, str, int, str], tuple[str, str]] = {}

    def finished(self, event: Finished) -> None:
        """Write the line of a request."""
        self.finished_all((event,))

    def finished_all(self, events: Sequence[Finished]) -> None:
        """Write the lines of requests, if the log level wants them."""
        if self._writer.level > _INFO:
            return
        if not self._probes:
            events = [each for each in events if each.tag.route.endpoint or each.tag.route.path not in PROBES]
        now, line = self._stamp(self._clock()), self._line
        self._writer.write_all([line(event, now) for event in events])

    def _text(self, event: Finished, now: str) -> str:
        """Format the line as text.

        Hot path: two numbers in one "%" cost less than one by one, and a constant "0" less than a formatted 0.
        """
        tag, leg, answer = event.tag, event.leg, event.answer
        request_id, first, outcome = tag.id, answer.first_byte, answer.outcome
        route = tag.route
        kept = self._heads.get((route.method, route.path, answer.status, tag.model))
        head, more = kept or self._head(tag, answer.status)
        if not plain(request_id):
            request_id = value(request_id)
        worker = branch = matched = "-"
        end = ""
        if leg is not None:
            worker, branch = leg.target.name, leg.branch or "-"
            if leg.total:
                matched = f"{leg.matched * 100 // leg.total}%"
            if leg.model:
                end = f" served_model={value(plain_name(leg.model.decode('utf-8', 'replace')))}"
            if leg.partner is not None:
                worker = f"{worker} prefill={leg.partner.target.name}"
        if first >= 0.0:
            times = "%.1f first_byte_ms=%.1f" % (answer.duration * 1e3, first * 1e3)  # noqa: UP031
        else:
            times = f"{answer.duration * 1e3:.1f} first_byte_ms=-"
        usage = answer.usage
        if usage is not None:
            if usage.prompt >= 0 <= usage.cached and usage.completion >= 0:  # usual
                told = (usage.prompt, usage.cached, usage.completion)
                end += " prompt_tokens=%d cached_tokens=%d completion_tokens=%d" % told  # noqa: UP031
            else:
                end += _tokens(usage)
        if tag.streaming or tag.queued or tag.named[2] or self._traces is not None:
            more += self._times_and_trace(tag, first)
        end += "" if outcome is _SERVED and not (answer.code or tag.client or answer.resumed) else _end(event)
        return (
            f"{now}{head}{request_id} peer={tag.peer or '-'}"
            f" worker={worker} branch={branch} matched={matched} retries={answer.retries or '0'}"
            f" duration_ms={times} in={tag.received} out={answer.sent}"
            f" stream={'1' if tag.streaming else '0'}{end}{more}\n"
        )

    def _head(self, tag: RequestTag, status: int) -> tuple[str, str]:
        """Return the line's text between time and request id, and the field of the model.

        Texts of relayed paths are kept: few, and hot. Clients choose models, so not for ever.
        """
        head = f" INFO  {_LOGGER}: {tag.route.method} {value(tag.route.path)} {status} id="
        model = f" model={value(plain_name(tag.model))}" if tag.model else ""
        if tag.route.endpoint and len(head) + len(tag.model) <= _LONGEST_HEAD:
            if len(self._heads) >= _MOST_HEADS:
                self._heads.clear()
            self._heads[tag.route.method, tag.route.path, status, tag.model] = head, model
        return head, model

    def _times_and_trace(self, tag: RequestTag, first: float) -> str:
        """Return the fields of streams, of queued requests, and of those that belong to a trace."""
        text = f" ttft_ms={first * 1e3:.1f}" if tag.streaming and first >= 0.0 else ""
        if tag.queued:
            text += f" queue_ms={tag.queued * 1e3:.1f}"
        trace = self._trace_id(tag)
        return f"{text} trace_id={trace}" if trace else text

    def _trace_id(self, tag: RequestTag) -> str:
        """Return the id of the request's trace; "" without one."""
        known = context_of(tag.named[2]) if self._traces is None else self._traces.context(tag)
        return "" if known is None else known.trace.decode()

    def _json(self, event: Finished, now: str) -> str:
        return on_one_line(_encode(self._fields(event, now)).decode()) + "\n"

    def _fields(self, event: Finished, now: str) -> AccessLine:
        tag, leg, answer = event.tag, event.leg, event.answer
        outcome, first, usage = answer.outcome, answer.first_byte, answer.usage or _UNTOLD
        return AccessLine(
            now,
            "info",
            _LOGGER,
            "request",
            tag.id,
            tag.peer,
            tag.route.method,
            cut(tag.route.path),
            answer.status,
            answer.code,
            None if outcome is None else outcome.label,
            None if leg is None else leg.target.name,
            "" if leg is None else leg.branch,
            leg.matched * 100 // leg.total if leg is not None and leg.total else None,
            answer.retries,
            round(answer.duration * 1e3, 1),
            round(first * 1e3, 1) if first >= 0.0 else None,
            tag.received,
            answer.sent,
            tag.streaming,
            tag.client or msgspec.UNSET,
            answer.resumed or msgspec.UNSET,
            usage.prompt if usage.prompt >= 0 else msgspec.UNSET,
            usage.cached if usage.cached >= 0 else msgspec.UNSET,
            usage.completion if usage.completion >= 0 else msgspec.UNSET,
            plain_name(leg.model.decode("utf-8", "replace")) if leg is not None and leg.model else msgspec.UNSET,
            leg.partner.target.name if leg is not None and leg.partner is not None else msgspec.UNSET,
            cut(plain_name(tag.model)) if tag.model else msgspec.UNSET,
            round(first * 1e3, 1) if tag.streaming and first >= 0.0 else msgspec.UNSET,
            round(tag.queued * 1e3, 1) if tag.queued else msgspec.UNSET,
            (self._trace_id(tag) or msgspec.UNSET) if self._traces is not None or tag.named[2] else msgspec.UNSET,
        )


def _tokens(usage: Usage) -> str:
    """Return the fields of what the engine told of its answer, where it did not tell all."""
    text = f" prompt_tokens={usage.prompt}" if usage.prompt >= 0 else ""
    if usage.cached >= 0:
        text += f" cached_tokens={usage.cached}"
    return f"{text} completion_tokens={usage.completion}" if usage.completion >= 0 else text


def _end(event: Finished) -> str:
    """Return the fields that only some lines have."""
    client, answer = event.tag.client, event.answer
    outcome = answer.outcome
    end = f" client={value(client)}" if client else ""
    if answer.resumed:
        end += f" resumed={answer.resumed}"
    if answer.code or (outcome is not None and outcome is not _SERVED):
        end += f" code={answer.code or '-'} outcome={outcome.label if outcome is not None else '-'}"
    return end


_workers = logging.getLogger("sglang_router.workers")

_CHANGES: Final = {
    ("added", ""): (logging.INFO, "worker added"),
    ("removed", ""): (logging.INFO, "worker removed"),
    ("restarted", ""): (logging.WARNING, "worker is a new process: its remembered prefixes are dropped"),
    ("emptied", ""): (
        logging.WARNING,
        "worker reports that nothing is cached of what it had, here or to another router: its prefixes are dropped",
    ),
    ("health", "healthy"): (logging.INFO, "worker is healthy"),
    ("health", "starting"): (logging.WARNING, "worker's process ended; a new one starts"),
    ("health", "down"): (logging.ERROR, "worker is down and will not be restarted"),
    ("health", "unhealthy"): (logging.WARNING, "worker is unhealthy"),
    ("breaker", "open"): (logging.WARNING, "circuit breaker is open: the worker gets no requests if others are left"),
    ("breaker", "half_open"): (logging.INFO, "circuit breaker is half open: one request at a time probes the worker"),
    ("breaker", "closed"): (logging.INFO, "circuit breaker is closed: the worker gets requests again"),
    ("outlier", "held_off"): (logging.WARNING, "worker is ejected: it fails or lags far more than the others"),
    ("outlier", "kept"): (logging.INFO, "worker is no longer ejected"),
    ("role", ""): (logging.INFO, "worker has another role: it is in another pool, its remembered prefixes are dropped"),
    ("draining", "draining"): (logging.INFO, "worker is draining: it gets no new requests"),
    ("draining", "active"): (logging.INFO, "worker gets new requests again"),
    ("withheld", "withheld"): (logging.INFO, "worker is withheld by its source: it gets no new requests"),
    ("withheld", "allowed"): (logging.INFO, "worker is not withheld any more: it gets new requests again"),
    ("paused", "paused"): (logging.INFO, "worker is paused by the control plane: it gets no new requests"),
    ("paused", "running"): (logging.INFO, "worker is no longer paused"),
    ("updating", "updating"): (logging.DEBUG, "worker loads new weights: it gets no new requests meanwhile"),
    ("updating", "running"): (logging.DEBUG, "worker has answered to new weights"),
}
"""Level and message by what changed and its new state; "" stands for any state."""


class WorkerLog(Listener):
    """One line for each change of a worker, through `logging`: changes are rare."""

    def worker_changed(self, event: WorkerChanged) -> None:
        """Log the change."""
        worker, what = event.worker, event.what
        unknown = (logging.INFO, f"worker changed: {what}")
        level, message = _CHANGES.get((what, event.new)) or _CHANGES.get((what, "")) or unknown
        fields: dict[str, object] = {"worker": worker.url}
        if event.old:
            fields["was"] = event.old
        if what == "added":
            fields["health"] = event.new
        if what in ("added", "removed"):
            fields["source"] = worker.spec.source.value
        if worker.spec.origin:
            fields["origin"] = worker.spec.origin
        if what == "withheld" and worker.withheld:
            fields["why"] = worker.withheld
        if what == "breaker":
            fields["failures"] = worker.circuit.failures
            if event.new == "open":
                fields["open_seconds"] = worker.circuit.open_for
        if worker.paused:
            fields["paused"] = "+".join(worker.paused)
        if worker.ejected:
            fields["why"] = worker.ejected
        if worker.reason:
            fields["error"] = worker.reason
        _workers.log(level, message, extra={"fields": fields})

    def quarantined(self, event: Quarantined) -> None:
        """Log that a request breaks workers: an operator should look for it."""
        tag = event.tag
        fields = {"request": tag.id, "path": tag.route.path, "workers": event.workers, "bytes": tag.received}
        _workers.warning("a request broke its workers: it is refused for a while", extra={"fields": fields})
