"""Gateways that do not keep to the protocol, and heads that HTTP does not allow: a clear end, and nothing is left."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from gateways import BODY, Asked, Scene, answer_head, request_head, scene, wake, with_subset
from raw_gateways import DATA, END_STREAM, HEADERS, PING, RawGateway, raw_gateway
from sglang_router.picker.front import Pings
from sglang_router.picker.messages import METHOD, SERVICE, ProcessingRequest, ProcessingResponse
from sglang_router.routing.outcome import Outcome


@pytest.fixture
def one() -> Iterator[Scene]:
    with scene(workers=1) as here:
        yield here


@contextlib.contextmanager
def limited(**options: Any) -> Iterator[Scene]:
    with scene(workers=1, options=options) as here:
        yield here


def code_of(asked: Asked) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        asked.receive()
    code: grpc.StatusCode = caught.value.code()
    return code


def body(data: bytes) -> Any:
    message = ProcessingRequest()
    message.request_body.body, message.request_body.end_of_stream = data, True
    return message


def no_streams(here: Scene) -> bool:
    return not here.gateway.front.connections or wake(here)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"x_request_id": "a\r\nset-cookie: evil=1"},
        {"x_one": "a\0b"},
        {"bad name": "a"},
        {"content_length": "abc"},
        {"content_length": "9" * 5000},
        {":path": "/v1/completions\r\nx: y"},
        {":path": "/v1/completions HTTP/1.1"},
        {":method": "PO ST"},
    ],
)
def test_a_head_that_http_does_not_allow_is_refused_and_comes_back_in_nothing(
    one: Scene, fields: dict[str, str]
) -> None:
    refused = one.gateway.ask("/v1/completions", BODY, **fields).refusal()
    assert (refused.status, refused.fields["x-smg-error-code"]) == (400, "bad_http")
    assert "set-cookie" not in refused.fields
    assert one.ended().leg is None


def test_a_field_that_stands_twice_where_http_allows_one_is_refused(one: Scene) -> None:
    for name in (":path", "content-length"):
        asked = one.gateway.open()
        message = request_head("/v1/completions", content_length=str(len(BODY)))
        message.request_headers.headers.headers.add(key=name, raw_value=b"/other" if name == ":path" else b"1")
        asked.send(message)
        assert asked.refusal().fields["x-smg-error-code"] == "bad_http"
    one.ended(2)


@pytest.mark.parametrize("fields", [{"x_large": "x" * 70_000}, {f"x{place}": "" for place in range(200)}])
def test_a_head_that_is_too_large_is_refused(one: Scene, fields: dict[str, str]) -> None:
    refused = one.gateway.ask("/v1/completions", BODY, **fields).refusal()
    assert (refused.status, refused.fields["x-smg-error-code"]) == (431, "head_too_large")
    one.ended()


def test_metadata_without_end_is_not_read(one: Scene) -> None:
    asked = one.gateway.open()
    asked.send(with_subset(request_head("/v1/completions", True), *["10.0.0.1:80"] * 50_000))
    assert asked.refusal().status == 431
    asked = one.gateway.ask("/v1/completions", BODY)
    asked.choice()
    asked.given_back()
    asked.answer(200, b"{}", served="x" * 600_000)
    assert one.ended(2).answer.outcome is Outcome.SERVED


@pytest.mark.parametrize("status", [b"9" * 5000, b"20", b"2000", b"+200", b"000", b""])
def test_a_status_that_is_none_is_counted_as_none(one: Scene, status: bytes) -> None:
    asked = one.gateway.ask("/v1/completions", BODY)
    asked.choice()
    asked.given_back()
    message = ProcessingRequest()
    message.response_headers.headers.headers.add(key=":status", raw_value=status)
    message.response_headers.end_of_stream = True
    asked.send(message)
    assert asked.receive().WhichOneof("kind") == "response_headers"
    asked.close()
    assert one.ended().answer.status == 0


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "sent"), [(10, 11), (11, 10), (70_000, 200_000), (200_000, 70_000)])
def test_a_body_that_is_not_as_long_as_announced_is_refused(one: Scene, length: int, sent: int) -> None:
    asked = one.gateway.open()
    asked.head("/v1/completions", content_length=str(length))
    for left in range(sent, 0, -50_000):
        asked.body(b"x" * min(left, 50_000), left <= 50_000)
    assert asked.refusal().fields["x-smg-error-code"] == "bad_http"
    one.ended()
    assert one.router.call(lambda: one.router.clients.budget.held) == 0


# -- the order of messages ---------------------------------------------------------------------------------------------


def test_an_answer_of_another_filter_inside_the_body_passes_and_ends_the_request(one: Scene) -> None:
    asked = one.gateway.open()
    asked.head("/v1/completions")
    asked.body(b"{", False)
    asked.answer(408, b"too ", b"slow")
    asked.close()
    one.router.until(lambda: no_streams(one))
    assert not one.ends.seen
    assert one.router.call(lambda: one.router.clients.budget.held) == 0


def test_an_answer_of_another_filter_to_a_queued_request_passes_and_leaves_the_queue() -> None:
    with limited(max_concurrent_requests=1, queue_size=1) as here:
        first = here.gateway.ask("/v1/completions", BODY)
        first.choice()
        first.given_back()
        waits = here.gateway.ask("/v1/completions", BODY)
        here.router.until(lambda: len(here.router.router.queue) == 1 or wake(here))
        waits.answer(504, b"too slow")
        assert here.ends.seen[-1].answer.outcome is Outcome.GONE
        assert not here.router.call(lambda: len(here.router.router.queue))
        waits.close()
        first.answer(200, b"{}")
        here.ended(2)


def test_messages_in_another_order_break_the_stream_off(one: Scene) -> None:
    asked = one.gateway.open()
    asked.head("/v1/completions")
    asked.head("/v1/completions")
    assert code_of(asked) is grpc.StatusCode.INVALID_ARGUMENT
    one.router.until(lambda: no_streams(one))


def test_what_follows_the_end_of_a_queued_request_is_not_kept() -> None:
    with limited(max_concurrent_requests=1, queue_size=1) as here:
        first = here.gateway.ask("/v1/completions", BODY)
        first.choice()
        waits = here.gateway.ask("/v1/completions", BODY)
        here.router.until(lambda: len(here.router.router.queue) == 1 or wake(here))
        waits.body(b"more")
        assert code_of(waits) is grpc.StatusCode.INVALID_ARGUMENT
        first.cancel()
        here.ended(2)


@pytest.mark.parametrize("before", [0, 1])
def test_what_is_no_message_is_refused_without_a_traceback(
    one: Scene, before: int, caplog: pytest.LogCaptureFixture
) -> None:
    call = one.gateway.channel.stream_stream(
        f"/{SERVICE}/{METHOD}",
        request_serializer=bytes,
        response_deserializer=ProcessingResponse.FromString,
    )
    head = request_head("/v1/completions").SerializeToString()
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.RpcError) as caught:
        next(call(iter([head] * before + [b"\xff\xff\xff"]), timeout=60))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    one.router.until(lambda: no_streams(one))
    assert not caplog.records


# -- silence -----------------------------------------------------------------------------------------------------------


def test_a_stream_that_says_nothing_is_closed_in_time() -> None:
    with limited(head_timeout_secs=0.2) as here:
        silent = [here.gateway.open() for _ in range(20)]
        assert {code_of(each) for each in silent} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        here.router.until(lambda: no_streams(here))


def test_a_stream_that_stays_open_after_its_answer_is_closed_in_time_and_well() -> None:
    with limited(keepalive_timeout_secs=0.2) as here:
        asked = here.gateway.ask("/v1/completions", BODY)
        asked.choice()
        asked.given_back()
        asked.answer(200, b"{}")
        assert asked.receive() is None
        here.router.until(lambda: no_streams(here))
        assert here.ended().answer.outcome is Outcome.SERVED


def test_streams_without_a_request_do_not_hold_up_the_end(one: Scene) -> None:
    silent, over, busy = one.gateway.open(), *(one.gateway.ask("/v1/completions", BODY) for _ in range(2))
    for asked in (over, busy):
        asked.choice()
        asked.given_back()
    over.answer(200, b"{}")
    one.router.until(lambda: one.gateway.front.connections == 3 or wake(one))
    one.router.call(one.gateway.front.drain)
    assert code_of(silent) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert over.receive() is None
    busy.answer(200, b"{}")
    assert busy.receive() is None
    one.ended(2)
    one.router.until(lambda: one.gateway.front.drained.is_set() or wake(one))


def test_a_gateway_may_ping_often(one: Scene) -> None:
    with raw_gateway(one.router.app.args.epp_port) as link:
        for place in range(8):
            number = b"%08d" % place
            link.ping(number)
            while (frame := link.until(PING)) is not None and frame.payload != number:
                assert not frame.flags, "a ping of the router"
            assert frame is not None, "the connection was closed"


def test_a_gateway_that_vanishes_loses_its_streams_and_one_that_is_only_silent_does_not() -> None:
    with scene(workers=1, pings=Pings(0.3, 2.0)) as here, raw_gateway(here.router.app.args.epp_port) as link:
        link.ask(1, request_head("/v1/completions"), body(BODY))
        assert link.until(DATA)
        for _ in range(3):
            assert link.until(PING), "the connection was closed"
        assert not here.ends.seen
        link.mute = True
        assert here.ended().answer.outcome is Outcome.GONE
        here.router.until(lambda: no_streams(here))


def status_of(link: RawGateway) -> bytes:
    """Read stream 1 to its end; return its trailers."""
    while (frame := link.until(HEADERS)) is not None and not frame.flags & END_STREAM:
        pass
    assert frame is not None, "the connection was closed"
    return frame.payload


@pytest.mark.parametrize("request_body", [BODY, b"garbage"])
def test_a_gateway_that_reads_nothing_loses_its_places_and_hears_why_when_it_reads(request_body: bytes) -> None:
    with limited(send_timeout_secs=0.3) as here, raw_gateway(here.router.app.args.epp_port, window=0) as link:
        link.ask(1, request_head("/v1/completions"), body(request_body))
        here.ended()
        here.router.until(lambda: no_streams(here))
        link.widen(1, 100_000)
        assert b"--send-timeout-secs" in status_of(link)


def test_the_body_of_a_gateway_that_reads_nothing_is_freed_and_its_stream_counts_until_it_ends() -> None:
    with limited(send_timeout_secs=0.3) as here:
        asked = here.gateway.open()
        asked.head("/v1/completions")
        for piece in (b'{"prompt":"', *[b"x" * (1 << 20)] * 4):
            asked.body(piece, False)
        asked.body(b'"}')
        here.ended()
        here.router.until(lambda: no_streams(here))
        assert not here.router.call(lambda: large_views() or here.router.clients.budget.held)
        front = here.gateway.front
        assert front.clients is not None
        front.clients.limit = 1
        code = code_of(here.gateway.ask("/v1/completions", BODY))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        asked.choice()
        with pytest.raises(grpc.RpcError):
            asked.given_back()
        here.router.until(lambda: not front.unread)
        here.gateway.ask("/v1/completions", BODY).choice()


def large_views() -> list[memoryview]:
    """Return what is kept of large bodies."""
    return [each for each in gc.get_objects() if type(each) is memoryview and each.nbytes > 1 << 20]


def test_a_gateway_that_reads_nothing_does_not_hold_up_the_end_of_a_request() -> None:
    options = {"send_timeout_secs": 60.0, "request_timeout_secs": 0.1}
    with limited(**options) as here, raw_gateway(here.router.app.args.epp_port, window=0) as link:
        link.ask(1, request_head("/v1/completions"), body(BODY))
        assert here.ended().answer.outcome is Outcome.TIMEOUT
        here.router.until(lambda: no_streams(here))


def test_an_answer_before_the_head_is_refused(one: Scene) -> None:
    asked = one.gateway.open()
    asked.send(answer_head(200))
    assert code_of(asked) is grpc.StatusCode.INVALID_ARGUMENT
