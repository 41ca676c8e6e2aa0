"""What the SERVER span says of an end that is no answer of an engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from event_makers import finished
from sglang_router.observe.tracing import Tracing
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.trace_ids import TraceIds


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
