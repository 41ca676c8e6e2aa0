"""What spans say: of a whole request, and the SERVER span of an end that is no answer of an engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from event_makers import finished, leg, tag, target
from fleets import Bench
from sglang_router.observe.tracing import Tracing
from sglang_router.routing.events import FirstByte, LegEnded, Retried, Routed
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg
from sglang_router.routing.trace_ids import TraceIds
from sglang_router.routing.usage import Usage


class Kept:
    """Keeps spans."""

    def __init__(self) -> None:
        self.resource = Resource({})
        self.spans: list[ReadableSpan] = []

    def put(self, spans: Iterable[ReadableSpan]) -> None:
        self.spans += spans


@pytest.mark.parametrize(
    ("answer", "error", "failed"),
    [
        ({}, None, False),
        ({"outcome": Outcome.GONE}, "client_disconnected", False),
        ({"outcome": Outcome.GONE, "status": 0, "first_byte": -1.0}, "client_disconnected", False),
        ({"outcome": Outcome.FAILED, "status": 500}, "500", True),
        ({"outcome": None, "status": 429, "code": "queue_full"}, "queue_full", True),
        ({"outcome": Outcome.CUT, "code": "upstream_cut"}, "upstream_cut", True),
    ],
    ids=repr,
)
def test_how_a_request_ended(answer: dict[str, Any], error: str | None, failed: bool) -> None:
    kept = Kept()
    tracing = Tracing(TraceIds(b"key", 1.0), kept, lambda: 0.0, ("127.0.0.1", 30000))
    tracing.finished(finished(**answer))
    (span,) = kept.spans
    attributes = span.attributes or {}
    assert attributes.get("error.type") == error
    assert (span.status.status_code is StatusCode.ERROR) is failed
    assert attributes.get("http.response.status_code") == (answer.get("status", 200) or None)


# -- a whole request ---------------------------------------------------------------------------------------------------

TRACEPARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Story:
    """One traced request, told as it happens. now: seconds of the router's clock."""

    def __init__(self, **fields: Any) -> None:
        self.kept, self.now = Kept(), 100.0
        ids = TraceIds(b"key", 1.0)
        self.tracing = Tracing(ids, self.kept, lambda: self.now, ("router.example", 30000), secure=True)
        self.fields = {"id": "mine", "start": 100.0, **fields}
        self.tag = tag(**self.fields)
        self.tag.named = (*self.tag.named[:2], TRACEPARENT, *self.tag.named[3:])

    def sent(self, leg: PlannedLeg, retries: int = 0) -> PlannedLeg:
        self.tracing.routed(Routed(self.tag, leg, "cost", retries, 3))
        return leg

    def spans(self, **answer: Any) -> dict[str, ReadableSpan]:
        """End the request, and return its spans by name, those of legs with their attempt."""
        end = finished(**self.fields, **answer)
        end.tag, end.leg = self.tag, self.last
        self.tracing.finished(end)
        named = [(span.name, (span.attributes or {}).get("sglang_router.attempt", "")) for span in self.kept.spans]
        return {f"{name} {attempt}".rstrip(): s for (name, attempt), s in zip(named, self.kept.spans, strict=True)}

    last: PlannedLeg | None = None


def seconds(span: ReadableSpan, origin: ReadableSpan) -> tuple[float, float]:
    """Return when a span began and ended, by the clock of the story, whose request begins at 100."""
    assert span.start_time is not None
    assert span.end_time is not None
    assert origin.start_time is not None
    return tuple(round(100.0 + (moment - origin.start_time) / 1e9, 3) for moment in (span.start_time, span.end_time))  # type: ignore[return-value]


def test_all_that_the_spans_of_a_retried_request_say() -> None:
    bench = Bench(2, "round_robin")
    story = Story(model='"llama"', client="team", streaming=True)
    story.tag.queued = 0.25
    story.now = 100.5
    failed = story.sent(leg(bench.workers[0], "hit", 870, 1000))
    story.now = 102.0
    served = PlannedLeg(2, target(bench.workers[1]), "miss")
    served.model = b'"llama-3"'
    story.sent(served, 1)
    story.tracing.retried(Retried(story.tag, failed, Outcome.FAILED, 0.5, 503))
    story.now = 103.0
    story.tracing.first_byte(FirstByte(story.tag, served, 2.75))
    story.tracing.leg_ended(LegEnded(story.tag, served, Outcome.SERVED, 104.0, Usage(10, 4, 3), b"agent-7"))
    story.last, story.now = served, 105.0
    spans = story.spans(status=200, duration=4.5, first_byte=2.75, sent=1000, retries=1, resumed=1)
    request = spans["POST /v1/chat/completions"]
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "https",
        "server.address": "router.example",
        "server.port": 30000,
        "http.request.body.size": 100,
        "http.response.body.size": 1000,
        "http.response.status_code": 200,
        "client.address": "10.0.0.9",
        "sglang_router.request.id": "mine",
        "sglang_router.retries": 1,
        "sglang_router.client": "team",
        "sglang_router.queue.seconds": 0.25,
        "sglang_router.first_byte.seconds": 2.75,
        "sglang_router.resumed": 1,
    }
    first, second = bench.workers[0].url, bench.workers[1].url
    assert spans["chat llama 1"].attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "llama",
        "server.address": urlsplit(first).hostname,
        "server.port": urlsplit(first).port or 80,
        "sglang_router.worker": first,
        "sglang_router.attempt": 1,
        "error.type": "failed",
        "http.response.status_code": 503,
    }
    assert spans["chat llama-3 2"].attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "llama-3",
        "sglang_router.requested_model": "llama",
        "gen_ai.conversation.id": "agent-7",
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "server.address": urlsplit(second).hostname,
        "server.port": urlsplit(second).port or 80,
        "sglang_router.worker": second,
        "sglang_router.attempt": 2,
        "http.response.status_code": 200,
    }
    policy = {"sglang_router.policy": "cost", "sglang_router.candidates": 3}
    assert spans["decide 1"].attributes == {
        **policy,
        "sglang_router.branch": "hit",
        "sglang_router.worker": first,
        "sglang_router.attempt": 1,
        "sglang_router.matched_bytes": 870,
        "sglang_router.text_bytes": 1000,
    }
    assert spans["decide 2"].attributes == {
        **policy,
        "sglang_router.branch": "miss",
        "sglang_router.worker": second,
        "sglang_router.attempt": 2,
    }
    assert {name: seconds(span, request) for name, span in spans.items()} == {
        "POST /v1/chat/completions": (100.0, 104.5),
        "decide 1": (100.0, 100.5),
        "chat llama 1": (100.5, 102.0),
        "decide 2": (102.0, 102.0),
        "chat llama-3 2": (102.5, 104.0),  # the delay of the retry
    }
    failures = {name for name, span in spans.items() if span.status.status_code is StatusCode.ERROR}
    assert failures == {"chat llama 1"}
    assert spans["chat llama 1"].status.description == f"{first}: failed"
    assert repr(story.tracing) == "<Tracing 0 open>"


def test_spans_hang_together_and_below_the_clients() -> None:
    bench = Bench(1, "round_robin")
    story = Story()
    story.last = story.sent(leg(bench.workers[0]))
    assert repr(story.tracing) == "<Tracing 1 open>"
    spans = story.spans()
    request = spans.pop("POST /v1/chat/completions")
    assert request.parent is not None
    assert (f"{request.parent.trace_id:032x}", f"{request.parent.span_id:016x}") == (
        "0af7651916cd43dd8448eb211c80319c",
        "b7ad6b7169203331",
    )
    assert request.parent.is_remote
    assert request.kind is SpanKind.SERVER
    assert {span.kind for span in spans.values()} == {SpanKind.INTERNAL, SpanKind.CLIENT}
    assert {span.parent and span.parent.span_id for span in spans.values()} == {request.context.span_id}
    assert {span.context.trace_id for span in spans.values()} == {request.context.trace_id}
    made = TraceIds(b"key", 1.0).leg(story.tag, story.last.lease)  # what the engine is told as its parent
    assert f"{spans['chat m 1'].context.span_id:016x}".encode() == made


def test_what_is_not_sampled_leaves_nothing() -> None:
    bench = Bench(1, "round_robin")
    story = Story()
    story.tag.named = (*story.tag.named[:2], TRACEPARENT[:-2] + b"00", *story.tag.named[3:])
    story.last = story.sent(leg(bench.workers[0]))
    assert repr(story.tracing) == "<Tracing 0 open>"
    assert story.spans() == {}
