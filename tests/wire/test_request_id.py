"""What is read of a request's header: the trace that it belongs to."""

from __future__ import annotations

import pytest

from sglang_router.routing.trace_ids import context_of
from sglang_router.wire.request_id import RequestIds

IDS = RequestIds(lambda bits: 0)
ONE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


@pytest.mark.parametrize("more", [[], [(b"x-request-id", b"r")]])
def test_the_trace_of_the_client_is_read(more: list[tuple[bytes, bytes]]) -> None:
    assert IDS.read([(b"traceparent", ONE), *more], b"")[2] == ONE


@pytest.mark.parametrize("second", [OTHER, ONE, b"", b"x"])
def test_two_traceparents_are_none(second: bytes) -> None:
    """W3C Trace Context: who gets several of them begins a trace, for nobody can tell which one holds."""
    assert context_of(IDS.read([(b"traceparent", ONE), (b"traceparent", second)], b"")[2]) is None
