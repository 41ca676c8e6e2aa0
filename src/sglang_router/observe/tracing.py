"""OpenTelemetry traces: a listener that makes the spans of a request when it has ended.

Imported only with --enable-trace: it needs packages of the extra `otel`.

    SERVER    POST /v1/chat/completions     from the whole request in to the last byte of its answer out
      INTERNAL  decide                      from the request, or the failure before, to the choice of a worker
      CLIENT    chat llama                  a leg: one for each attempt, two for a pair; open until its last byte

Names and attributes are those of OpenTelemetry's conventions for HTTP and generative AI; what only a router knows is
called sglang_router.*. No part of a prompt or an answer is in a span.

    routed, retried, leg_ended   note times and outcomes of a request that is recorded
    finished                     makes its spans and puts them into the exporter's queue (`observe.span_export`)

Ids follow from `routing.trace_ids`: what engines were told as their parent is the span of the leg that they got.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Protocol
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from sglang_router.routing.endpoints import ENDPOINTS, UNKNOWN
from sglang_router.routing.events import Finished, FirstByte, LegEnded, Listener, Retried, Routed
from sglang_router.routing.model_names import plain_name
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag
from sglang_router.routing.trace_ids import TraceContext, TraceIds
from sglang_router.routing.usage import Usage

Attributes = dict[str, AttributeValue]

_OPERATIONS = {
    **dict.fromkeys(("chat", "responses", "messages", "invocations", "api_chat"), "chat"),
    **dict.fromkeys(("completions", "completion", "infill"), "text_completion"),
    **dict.fromkeys(("embeddings", "api_embed", "api_embeddings"), "embeddings"),
    **dict.fromkeys(("generate", "api_generate"), "generate_content"),
}
"""gen_ai.operation.name by the name of the endpoint; the others are called as their endpoint."""
_ROUTES = {row.name: path.decode() for path, row in ENDPOINTS.items() if "{" in path.decode()} | {
    UNKNOWN.name: UNKNOWN.path.decode()
}
"""http.route of endpoints whose paths hold ids."""
_NO_FAULT = (Outcome.SERVED, Outcome.GONE, Outcome.ABANDONED)
"""Ends of a leg that are no error of its worker."""
_LONGEST = 256
"""Characters of what a client chooses."""


class SpanSink(Protocol):
    """Where spans go."""

    @property
    def resource(self) -> Resource:
        """What emits the spans."""

    def put(self, spans: Iterable[ReadableSpan]) -> None:
        """Take spans, or count them as lost."""


class _TracedLeg:
    """One leg. Times in seconds of the router's clock; ended, outcome: None while it runs."""

    __slots__ = ("decided", "ended", "first_byte", "outcome", "routed", "sent", "session", "since", "status", "usage")

    def __init__(self, routed: Routed, since: float, now: float) -> None:
        self.routed = routed
        self.since = since
        self.decided = self.sent = now
        self.ended: float | None = None
        self.outcome: Outcome | None = None
        self.usage: Usage | None = None
        self.first_byte = -1.0
        self.status = 0
        self.session = b""


class Tracing(Listener):
    """See the module. Add it to the listeners that hear at once: what it hears tells no times.

    ids     of the traces
    sink    takes the spans
    clock   returns seconds of the router's clock
    server  host and port where the router listens; secure: over TLS
    """

    def __init__(
        self, ids: TraceIds, sink: SpanSink, clock: Callable[[], float], server: tuple[str, int], secure: bool = False
    ) -> None:
        self._scheme = "https" if secure else "http"
        self._ids = ids
        self._sink = sink
        self._clock = clock
        self._server = server
        self._scope = InstrumentationScope("sglang_router")
        self._open: dict[int, list[_TracedLeg]] = {}  # by number of the request; only of those that are recorded

    def __repr__(self) -> str:
        return f"<Tracing {len(self._open)} open>"

    # -- while the request runs ------------------------------------------------------------------------------------

    def routed(self, event: Routed) -> None:
        """Note a leg."""
        tag, now = event.tag, self._clock()
        legs = self._open.get(tag.number)
        if legs is None:
            if not self._ids.context(tag).sampled:
                return
            legs = self._open[tag.number] = []
        legs.append(_TracedLeg(event, now if event.retries else tag.start, now))

    def retried(self, event: Retried) -> None:
        """Note the end of a leg, and when the next ones are sent."""
        now = self._clock()
        for leg in self._open.get(event.tag.number, ()):
            if leg.routed.leg.lease == event.leg.lease:
                leg.ended, leg.outcome, leg.status = now, event.outcome, event.status
            elif leg.ended is None and leg.routed.retries:
                leg.sent = leg.decided + event.delay

    def leg_ended(self, event: LegEnded) -> None:
        """Note the end of a leg that is not retried."""
        for leg in self._open.get(event.tag.number, ()):
            if leg.routed.leg.lease == event.leg.lease:
                leg.ended, leg.outcome = event.at, event.outcome
                leg.usage, leg.session = event.usage, event.session

    def first_byte(self, event: FirstByte) -> None:
        """Note when the answer began."""
        for leg in self._open.get(event.tag.number, ()):
            if leg.routed.leg.lease == event.leg.lease:
                leg.first_byte = event.tag.start + event.seconds

    # -- its end ---------------------------------------------------------------------------------------------------

    def finished(self, event: Finished) -> None:
        """Make the spans of a request, if it is recorded. Those of the control plane are not."""
        tag = event.tag
        legs = self._open.pop(tag.number, None)
        if not tag.route.endpoint:
            return
        context = self._ids.context(tag)
        if not context.sampled:
            return
        end = tag.start + event.answer.duration
        made = _Maker(self._sink.resource, self._scope, context, time.time_ns() - int(self._clock() * 1e9))
        request = self._ids.request(tag)
        spans = []
        for leg in legs or ():
            attributes, operation = self._leg_attributes(leg, event), _operation(tag)
            number, planned = leg.routed.leg.lease, leg.routed.leg
            spans.append(
                made.span("decide", self._ids.decision(tag, number), request, (leg.since, leg.decided), _choice(leg))
            )
            ended = end if leg.ended is None else leg.ended
            spans.append(
                made.span(
                    f"{operation} {_model(tag, planned)}".rstrip(),
                    self._ids.leg(tag, number),
                    request,
                    (min(leg.sent, ended), ended),
                    attributes,
                    SpanKind.CLIENT,
                    ""
                    if leg.outcome is None or leg.outcome in _NO_FAULT
                    else f"{planned.target.name}: {leg.outcome.label}",
                )
            )
        route = self._request_attributes(event)
        failed = str(route["error.type"]) if event.answer.code or event.answer.status >= 500 else ""
        name = f"{tag.route.method} {route['http.route']!s}"
        spans.append(made.span(name, request, context.parent, (tag.start, end), route, SpanKind.SERVER, failed))
        self._sink.put(spans)

    def _request_attributes(self, event: Finished) -> Attributes:
        tag, answer = event.tag, event.answer
        found: Attributes = {
            "http.request.method": tag.route.method,
            "http.route": _ROUTES.get(tag.route.endpoint, tag.route.path),
            "url.path": tag.route.path[:_LONGEST],
            "url.scheme": self._scheme,
            "server.address": self._server[0],
            "server.port": self._server[1],
            "http.request.body.size": tag.received,
            "http.response.body.size": answer.sent,
            "sglang_router.request.id": tag.id,
            "sglang_router.retries": answer.retries,
        }
        if answer.status:
            found["http.response.status_code"] = answer.status
        if not answer.status or answer.outcome is Outcome.GONE:
            found["error.type"] = "client_disconnected"
        if answer.code or answer.status >= 500:
            found["error.type"] = answer.code or str(answer.status)
        if tag.peer:
            found["client.address"] = tag.peer
        if tag.client:
            found["sglang_router.client"] = tag.client
        if tag.queued:
            found["sglang_router.queue.seconds"] = tag.queued
        if answer.first_byte >= 0.0:
            found["sglang_router.first_byte.seconds"] = answer.first_byte
        if answer.resumed:
            found["sglang_router.resumed"] = answer.resumed
        return found

    def _leg_attributes(self, leg: _TracedLeg, event: Finished) -> Attributes:
        tag, planned = event.tag, leg.routed.leg
        where = urlsplit(planned.target.url)
        found: Attributes = {
            "gen_ai.operation.name": _operation(tag),
            "gen_ai.provider.name": "openai",
            "server.address": where.hostname or "",
            "server.port": where.port or (443 if where.scheme == "https" else 80),
            "sglang_router.worker": planned.target.name,
            "sglang_router.attempt": leg.routed.retries + 1,
        }
        if planned.target.role != "regular":
            found["sglang_router.worker.role"] = planned.target.role
        asked = _model(tag, None)
        if asked:
            found["gen_ai.request.model"] = _model(tag, planned)
            if planned.model:
                found["sglang_router.requested_model"] = asked
        session = leg.session.decode("utf-8", "replace") or tag.session
        if session:
            found["gen_ai.conversation.id"] = session[:_LONGEST]
        if leg.outcome is not None and leg.outcome is not Outcome.SERVED:
            found["error.type"] = leg.outcome.label
        if leg.status:
            found["http.response.status_code"] = leg.status
        elif (
            event.leg is not None and event.leg.lease == planned.lease and event.answer.status and not event.answer.code
        ):
            found["http.response.status_code"] = event.answer.status
        if leg.first_byte >= 0.0:
            found["gen_ai.response.time_to_first_chunk"] = max(leg.first_byte - leg.sent, 0.0)
        return found | _tokens(leg.usage)


class _Maker:
    """Makes the spans of one request. epoch: nanoseconds from 1970 to the zero of the router's clock."""

    def __init__(self, resource: Resource, scope: InstrumentationScope, context: TraceContext, epoch: int) -> None:
        self._resource = resource
        self._scope = scope
        self._trace = int(context.trace, 16)
        self._epoch = epoch

    def span(
        self,
        name: str,
        span: bytes,
        parent: bytes,
        times: tuple[float, float],
        attributes: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        error: str = "",
    ) -> ReadableSpan:
        """Make a span. parent: b"" for none; times: seconds of the router's clock; error: what failed, or ""."""
        return ReadableSpan(
            name,
            self._context(span, remote=False),
            parent=self._context(parent, kind is SpanKind.SERVER) if parent else None,
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=Status(StatusCode.ERROR, error) if error else Status(),
            start_time=self._at(times[0]),
            end_time=self._at(max(times)),
            instrumentation_scope=self._scope,
        )

    def _context(self, span: bytes, remote: bool) -> SpanContext:
        return SpanContext(self._trace, int(span, 16), remote, TraceFlags(TraceFlags.SAMPLED))

    def _at(self, seconds: float) -> int:
        return self._epoch + int(seconds * 1e9)


def _choice(leg: _TracedLeg) -> Attributes:
    """Return what the decision was."""
    routed, planned = leg.routed, leg.routed.leg
    found: Attributes = {
        "sglang_router.policy": routed.policy,
        "sglang_router.branch": planned.branch,
        "sglang_router.worker": planned.target.name,
        "sglang_router.candidates": routed.candidates,
        "sglang_router.attempt": routed.retries + 1,
    }
    if planned.total:
        found["sglang_router.matched_bytes"] = planned.matched
        found["sglang_router.text_bytes"] = planned.total
    return found


def _model(tag: RequestTag, leg: PlannedLeg | None) -> str:
    """Return the model that the engine is told, or the one that the client named; "" for none."""
    if leg is not None and leg.model:
        return plain_name(leg.model.decode("utf-8", "replace"))[:_LONGEST]
    if not tag.model:
        return ""
    try:
        named = str(json.loads(tag.model))[:_LONGEST]
    except ValueError:  # cut, or no text in UTF-8
        named = tag.model[:_LONGEST]
    # A lone surrogate, which JSON allows, could not be sent, and would take the other spans of its batch with it.
    return named.encode("utf-8", "replace").decode()


def _operation(tag: RequestTag) -> str:
    return _OPERATIONS.get(tag.route.endpoint, tag.route.endpoint)


def _tokens(usage: Usage | None) -> Attributes:
    """Return what the engine told of its answer."""
    if usage is None:
        return {}
    told = {"input_tokens": usage.prompt, "cache_read.input_tokens": usage.cached, "output_tokens": usage.completion}
    return {f"gen_ai.usage.{name}": tokens for name, tokens in told.items() if tokens >= 0}
