"""When scripts/test-engines takes the spans of a request for joined, and below which it finds the engine's."""

from __future__ import annotations

import pytest
from scripts.real_engines.launched import Answer
from scripts.real_engines.traces import answer_id, tree_of, whole

from collectors import Got


def span(service: str, kind: str, name: str, parent: str, attempt: int = 0) -> Got:
    attributes = {"sglang_router.attempt": attempt} if attempt else {}
    return Got(service, name, kind, "trace", name, parent, 0, 1, attributes, False)


SERVER = span("sglang-router", "SERVER", "server", "client")
FIRST, SECOND = (span("sglang-router", "CLIENT", f"attempt {n}", "server", n) for n in (1, 2))
TOP = span("sglang", "INTERNAL", "request", "attempt 2")
BELOW = span("sglang", "INTERNAL", "scheduler", "request")


def test_a_trace_is_whole_when_no_parent_is_missing() -> None:
    assert whole([BELOW, SECOND, TOP, FIRST, SERVER], "client")
    assert not whole([SERVER, FIRST, SECOND], "client"), "nothing of the engine"
    assert not whole([SERVER, FIRST, SECOND, BELOW], "client"), "the engine's first span is not there yet"
    assert not whole([FIRST, SECOND, TOP, BELOW], "client"), "the router's is not"
    assert not whole([SERVER, TOP, BELOW], "client")


def test_an_engine_beside_the_router_has_not_joined_it() -> None:
    beside = span("sglang", "INTERNAL", "request", "client")
    assert not whole([SERVER, FIRST, beside], "client")


def test_the_tree_tells_the_attempts_in_order_and_where_the_engine_begins() -> None:
    tree = tree_of([SECOND, BELOW, TOP, FIRST, SERVER])
    assert tree.server == SERVER
    assert tree.clients == [FIRST, SECOND]
    assert tree.tops == [TOP]
    assert tree.engine == [BELOW, TOP]


@pytest.mark.parametrize("body", [b'{"id":"cmpl-7","choices":[]}', b'data: {"id":"cmpl-7"}\n\ndata: [DONE]\n\n'])
def test_an_answer_has_an_id_streamed_or_not(body: bytes) -> None:
    assert answer_id(Answer(200, {}, body)) == "cmpl-7"
