"""The endpoint picker over gRPC on loopback: a gateway asks, a router with fake workers answers."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from fake_worker import answer
from gateways import BODY, Asked, Scene, answer_head, request_head, scene, wake, with_subset
from sglang_router.picker.messages import ProcessingRequest
from sglang_router.picker.pick import Pick
from sglang_router.picker.streams import GatewayStream
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.rules import HealthRules, PolicySettings

USAGE = b'{"id":"1","usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'


@pytest.fixture
def two() -> Iterator[Scene]:
    with scene(options={"decision_headers": True}) as here:
        yield here


def test_a_request_is_sent_to_a_worker_and_its_answer_is_counted(two: Scene) -> None:
    asked = two.gateway.ask(
        "/v1/completions", BODY, x_forwarded_for="10.1.1.1, 10.2.2.2", x_request_id="mine", via="1.0 proxy"
    )
    chosen = asked.choice()
    assert chosen.endpoint == chosen.metadata
    assert chosen.endpoint in two.endpoints
    via = two.router.app.relay.forward.tail.decode().removeprefix("via: ").strip()
    assert chosen.sets == {"x-request-id": "mine", "via": f"1.0 proxy, {via}"}
    assert asked.given_back() == BODY
    assert two.router.call(lambda: [worker.load for worker in two.router.fleet]).count(1) == 1
    added = asked.answer(200, USAGE[:40], USAGE[40:])
    assert added["x-request-id"] == "mine"
    assert added["x-sglang-router-worker"] == f"http://{chosen.endpoint}"
    end = two.ended()
    asked.close()
    assert (end.tag.peer, end.tag.received, end.tag.model) == ("10.2.2.2", len(BODY), '"m"')
    assert (end.answer.status, end.answer.outcome, end.answer.sent) == (200, Outcome.SERVED, len(USAGE))
    assert end.answer.usage is not None
    assert (end.answer.usage.prompt, end.answer.usage.cached) == (9, 4)
    assert end.answer.first_byte >= 0.0


def test_a_stream_passes_piece_by_piece_and_its_first_byte_is_heard(two: Scene) -> None:
    asked = two.gateway.ask("/v1/completions", b'{"prompt":"x","stream":true}')
    asked.choice()
    asked.given_back()
    assert two.router.call(lambda: sum(worker.waiting for worker in two.router.fleet)) == 1
    asked.send(answer_head(200, content_type="text/event-stream"))
    asked.receive()
    assert asked.piece(b": hello\n\ndata: 1\n", False) == b": hello\n\ndata: 1\n"
    assert two.router.call(lambda: sum(worker.waiting for worker in two.router.fleet)) == 1
    assert asked.piece(b"\ndata: " + USAGE + b"\n\n", False)
    assert two.router.call(lambda: sum(worker.waiting for worker in two.router.fleet)) == 0
    assert asked.piece(b"data: [DONE]\n\n", True)
    end = two.ended()
    assert end.answer.usage is not None
    assert end.answer.usage.cached == 4
    asked.close()


def test_requests_with_the_same_prefix_go_to_the_same_worker() -> None:
    with scene(policy="cache_aware") as here:
        found = set()
        for turn in range(4):
            prompt = "a long prefix " * 40 + "x" * turn
            asked = here.gateway.ask("/v1/completions", json.dumps({"prompt": prompt}).encode())
            found.add(asked.choice().endpoint)
            asked.given_back()
            asked.answer(200, b"{}")
            here.ended(turn + 1)
            asked.close()
        assert len(found) == 1


def test_a_large_body_in_many_pieces_comes_back_whole(two: Scene) -> None:
    body = b'{"prompt":"' + b"y" * 3_000_000 + b'"}'
    asked = two.gateway.open()
    asked.head("/v1/completions")
    for at in range(0, len(body), 60_000):
        asked.body(body[at : at + 60_000], at + 60_000 >= len(body))
    asked.choice()
    assert asked.given_back() == body
    assert two.router.call(lambda: two.router.clients.budget.held) == 0
    asked.answer(200, b"{}")
    assert two.ended().tag.received == len(body)


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "code"),
    [
        ("/v1/completions", "POST", b'{"prompt', 400, "json_parse_error"),
        ("/v1/completions", "POST", b"[1]", 400, "json_parse_error"),
        ("/v1/completions", "POST", b"", 400, "json_parse_error"),
        ("/v1/completions", "POST", b'{"prompt":"x","data_parallel_rank":1}', 400, "reserved_field"),
        ("/flush_cache", "POST", b"{}", 404, "not_found"),
        ("/v1/completions/../../flush_cache", "POST", b"{}", 404, "not_found"),
        ("", "POST", b"", 400, "bad_http"),
    ],
)
def test_what_is_wrong_is_the_clients_answer(
    two: Scene, path: str, method: str, body: bytes, status: int, code: str
) -> None:
    refused = two.gateway.ask(path, body, method).refusal()
    assert (refused.status, refused.fields["x-smg-error-code"]) == (status, code)
    assert json.loads(refused.body)["error"]["code"] == code
    end = two.ended()
    assert (end.answer.status, end.answer.code, end.leg) == (status, code, None)


def test_a_request_that_comes_round_again_is_refused(two: Scene) -> None:
    asked = two.gateway.ask("/v1/completions", BODY)
    via = asked.choice().sets["via"]
    assert two.gateway.ask("/v1/completions", BODY, via=via).refusal().fields["x-smg-error-code"] == "loop_detected"
    asked.cancel()
    two.ended(2)


def test_workers_with_the_roles_of_pairs_get_nothing_and_keep_no_load() -> None:
    with scene(workers=0) as here:
        for role in ("prefill", "decode"):
            fake = here.router.fake({})
            here.router.add(fake.url, worker_type=role)
            here.router.until_healthy(fake.url)
        for times in range(1, 4):
            refused = here.gateway.ask("/v1/completions", BODY).refusal()
            assert refused.status == 500
            assert b"pairs of prefill and decode workers" in refused.body
            here.ended(times)


def test_errors_have_the_shape_that_the_path_expects(two: Scene) -> None:
    refused = two.gateway.ask("/v1/messages", b"nonsense").refusal()
    assert json.loads(refused.body)["type"] == "error"


def test_a_body_that_is_too_large_is_refused_as_soon_as_that_is_known() -> None:
    with scene(options={"max_payload_size": 100_000}) as here:
        refused = here.gateway.open()
        refused.head("/v1/completions", content_length="100001")
        assert refused.refusal().status == 413
        growing = here.gateway.open()
        growing.head("/v1/completions")
        growing.body(b"x" * 60_000, False)
        growing.body(b"x" * 60_000, False)
        assert growing.refusal().status == 413
        here.ended(2)
        assert here.router.call(lambda: here.router.clients.budget.held) == 0


def test_a_body_waits_unread_for_room_and_is_refused_in_time() -> None:
    options = {"max_buffered_request_bytes": 400_000, "queue_timeout_secs": 0.3}
    with scene(options=options) as here:
        first = here.gateway.open()
        first.head("/v1/completions", content_length="300000")
        first.body(b'{"prompt":"' + b"x" * 100_000, False)
        here.router.until(lambda: here.router.clients.budget.held >= 300_000 or wake(here))
        second = here.gateway.open()
        second.head("/v1/completions", content_length="300000")
        second.body(b'{"prompt":"' + b"x" * 100_000, False)
        assert second.refusal().fields["x-smg-error-code"] == "buffer_full"
        first.body(b"x" * (300_000 - 100_011 - 2) + b'"}')
        first.choice()
        assert len(first.given_back()) == 300_000
        first.answer(200, b"{}")
        here.ended(2)


def test_a_body_that_comes_too_slowly_is_refused() -> None:
    with scene(options={"body_timeout_secs": 0.2}) as here:
        for size in (10, 100_000):
            asked = here.gateway.open()
            asked.head("/v1/completions")
            asked.body(b"x" * size, False)
            assert asked.refusal().fields["x-smg-error-code"] == "request_timeout"
        here.ended(2)
        assert here.router.call(lambda: here.router.clients.budget.held) == 0


def test_without_a_worker_the_answer_is_503_with_a_time_to_come_back() -> None:
    with scene(workers=0) as here:
        refused = here.gateway.ask("/v1/completions", BODY).refusal()
        assert refused.status == 503
        assert int(refused.fields["retry-after"]) > 0
        here.ended()


def test_a_request_waits_for_a_place_and_a_full_queue_is_429() -> None:
    with scene(options={"max_concurrent_requests": 1, "queue_size": 1}) as here:
        first = here.gateway.ask("/v1/completions", BODY)
        first.choice()
        waits = here.gateway.ask("/v1/completions", BODY)
        here.router.until(lambda: len(here.router.router.queue) == 1 or wake(here))
        assert here.gateway.ask("/v1/completions", BODY).refusal().status == 429
        first.given_back()
        first.answer(200, b"{}")
        waits.choice()
        waits.given_back()
        waits.answer(200, b"{}")
        here.ended(3)


def test_who_waits_too_long_is_told_so() -> None:
    options = {"max_concurrent_requests": 1, "queue_size": 1, "queue_timeout_secs": 0.2}
    with scene(options=options) as here:
        first = here.gateway.ask("/v1/completions", BODY)
        first.choice()
        assert here.gateway.ask("/v1/completions", BODY).refusal().status == 408
        first.cancel()
        here.ended(2)


@pytest.mark.parametrize("leave", [Asked.cancel, Asked.close])
def test_who_leaves_the_queue_takes_no_place(leave: Any) -> None:
    with scene(options={"max_concurrent_requests": 1, "queue_size": 1}) as here:
        first = here.gateway.ask("/v1/completions", BODY)
        first.choice()
        waits = here.gateway.ask("/v1/completions", BODY)
        here.router.until(lambda: len(here.router.router.queue) == 1 or wake(here))
        leave(waits)
        here.router.until(lambda: not len(here.router.router.queue))
        first.given_back()
        first.answer(200, b"{}")
        here.ended(2)


@pytest.mark.parametrize("leave", [Asked.cancel, Asked.close])
@pytest.mark.parametrize("after", ["head", "body", "choice", "answer", "piece"])
def test_a_client_that_leaves_frees_its_worker(two: Scene, leave: Any, after: str) -> None:
    asked = two.gateway.open()
    asked.head("/v1/completions")
    if after == "body":
        asked.body(BODY, False)
    elif after != "head":
        asked.body(BODY)
        asked.choice()
        asked.given_back()
    if after in ("answer", "piece"):
        asked.send(answer_head(200))
        asked.receive()
    if after == "piece":
        asked.piece(b"data", False)
    leave(asked)
    if after in ("head", "body"):  # it was no whole request: nothing is told of it
        two.router.until(lambda: not two.gateway.front.connections or wake(two))
        assert not two.ends.seen
        return
    end = two.ended()
    assert end.answer.outcome is Outcome.GONE
    assert [worker.circuit.state.name for worker in two.router.fleet] == ["CLOSED"] * 2


def test_a_failing_status_is_held_against_the_worker(two: Scene) -> None:
    for times in range(1, 3):
        asked = two.gateway.ask("/v1/completions", BODY)
        asked.choice()
        asked.given_back()
        asked.answer(500, b"oh")
        assert two.ended(times).answer.outcome is Outcome.FAILED


def test_envoys_own_answer_for_a_worker_that_refuses_opens_its_breaker() -> None:
    with scene(workers=1, options={"cb_failure_threshold": 1}) as here:
        asked = here.gateway.ask("/v1/completions", BODY)
        asked.choice()
        asked.given_back()
        words = b"upstream connect error or disconnect/reset before headers. reset reason: connection failure"
        asked.answer(503, words)
        assert here.ended().answer.outcome is Outcome.REFUSED
        assert ("breaker", "open") in here.ends.changes


def test_only_endpoints_of_the_subset_are_chosen(two: Scene) -> None:
    for times in range(1, 4):
        asked = two.gateway.open()
        asked.send(with_subset(request_head("/v1/completions"), two.endpoints[1], "10.9.9.9:1"))
        asked.body(BODY)
        assert asked.choice().endpoint == two.endpoints[1]
        asked.given_back()
        asked.answer(200, b"{}")
        two.ended(times)
    for subset in ([], ["10.9.9.9:1"]):
        asked = two.gateway.open()
        asked.send(with_subset(request_head("/v1/completions"), *subset))
        asked.body(BODY)
        assert asked.refusal().status == 503


def test_further_endpoints_follow_in_order_and_the_lease_is_with_the_one_that_served() -> None:
    with scene(workers=3, options={"epp_fallback_endpoints": 1}) as here:
        asked = here.gateway.ask("/v1/completions", BODY)
        told = asked.choice().endpoint.split(",")
        assert len(set(told)) == 2
        asked.given_back()
        asked.send(answer_head(200, served=told[1]))
        asked.receive()
        loads = here.router.call(lambda: {w.url.removeprefix("http://"): w.load for w in here.router.fleet})
        assert loads[told[1]] == 1
        assert sum(loads.values()) == 1
        asked.piece(b"{}", True)
        end = here.ended()
        assert end.leg is not None
        assert end.leg.target.name == f"http://{told[1]}"
        assert end.answer.outcome is Outcome.SERVED


def test_what_engines_tell_is_asked_of_each_in_turn(two: Scene) -> None:
    found = []
    for times in range(1, 3):
        asked = two.gateway.ask("/v1/models", method="GET")
        found.append(asked.choice().endpoint)
        asked.answer(200, b"{}")
        two.ended(times)
    assert sorted(found) == sorted(two.endpoints)


def test_an_answer_without_a_body_and_one_with_trailers_end(two: Scene) -> None:
    asked = two.gateway.ask("/v1/models", method="HEAD")
    asked.choice()
    asked.answer(204)
    two.ended(1)
    asked = two.gateway.ask("/v1/completions", BODY)
    asked.choice()
    asked.given_back()
    asked.send(answer_head(200))
    asked.receive()
    asked.piece(b"{}", False)
    message = ProcessingRequest()
    message.response_trailers.SetInParent()
    asked.send(message)
    assert asked.receive().WhichOneof("kind") == "response_trailers"
    assert two.ended(2).answer.outcome is Outcome.SERVED


def test_trailers_of_a_request_follow_its_body(two: Scene) -> None:
    asked = two.gateway.open()
    asked.head("/v1/completions")
    asked.body(BODY, False)
    message = ProcessingRequest()
    message.request_trailers.SetInParent()
    asked.send(message)
    asked.choice()
    reply = asked.receive().request_body.response.body_mutation.streamed_response
    assert (reply.body, reply.end_of_stream) == (BODY, False)
    assert asked.receive().WhichOneof("kind") == "request_trailers"
    asked.answer(200, b"{}")
    two.ended()


def test_an_empty_body_is_given_back_as_one(two: Scene) -> None:
    asked = two.gateway.open()
    asked.head("/v1/responses/resp_1/cancel")
    asked.body(b"")
    asked.choice()
    assert asked.given_back() == b""
    asked.answer(200, b"{}")
    two.ended()


def test_a_gateway_that_does_not_send_bodies_in_full_duplex_is_told_what_to_set(two: Scene) -> None:
    asked = two.gateway.open()
    message = request_head("/v1/completions")
    message.protocol_config.request_body_mode = 2
    asked.send(message)
    refused = asked.refusal()
    assert refused.status == 500
    assert b"FULL_DUPLEX_STREAMED" in refused.body
    two.ended()


def test_a_gateway_that_does_not_show_answers_ends_them_with_the_stream(two: Scene) -> None:
    asked = two.gateway.open()
    message = request_head("/v1/completions")
    message.protocol_config.response_body_mode = 0
    asked.send(message)
    asked.body(BODY)
    asked.choice()
    asked.given_back()
    asked.send(answer_head(200))
    asked.receive()
    asked.close()
    assert two.ended().answer.outcome is Outcome.SERVED


def test_a_stream_that_begins_with_something_else_is_refused(two: Scene) -> None:
    asked = two.gateway.open()
    asked.body(BODY)
    with pytest.raises(grpc.RpcError) as caught:
        asked.receive()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert two.gateway.ask("/v1/completions", BODY).choice()


def test_more_streams_than_the_router_has_descriptors_for_are_refused(two: Scene) -> None:
    clients = two.gateway.front.clients
    assert clients is not None
    two.router.call(lambda: setattr(clients, "limit", 0))
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            two.gateway.ask("/v1/completions", BODY).receive()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    two.router.call(lambda: setattr(clients, "limit", 10))
    two.router.until(lambda: not two.gateway.front.connections or wake(two))
    assert two.gateway.ask("/v1/completions", BODY).choice()


def test_a_policy_that_fails_is_an_error_of_the_router(two: Scene, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Policy):
        name = "broken"

        def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
            raise ZeroDivisionError

    pool = two.router.fleet.pools.default
    two.router.call(lambda: pool.use(Broken(PolicySettings(), random.Random(1))))
    refused = two.gateway.ask("/v1/completions", BODY).refusal()
    assert (refused.status, refused.fields["x-smg-error-code"]) == (500, "internal_error")
    assert "could not be decided" in caplog.text
    two.ended()


def test_a_model_has_the_name_that_its_engine_knows(two: Scene) -> None:
    two.router.call(lambda: two.router.router.naming.use({"gpt": "m"}, {}, False))
    asked = two.gateway.ask("/v1/completions", b'{"model":"gpt","prompt":"hello","stream":true}')
    asked.choice()
    assert asked.given_back() == b'{"model":"m","prompt":"hello","stream":true}'
    added = asked.answer(200, b"data: {}\n\n", content_type="text/event-stream")
    assert added["x-sglang-router-model"] == "m"
    two.ended()


def test_a_workers_own_key_and_path_are_set() -> None:
    with scene(workers=0) as here:
        fake = here.router.fake({"GET /base/health": answer(200)})
        here.router.add(f"{fake.url}/base", api_key="own")
        here.router.until_healthy(f"{fake.url}/base")
        chosen = here.gateway.ask("/v1/completions?x=1", BODY).choice()
        assert chosen.endpoint == f"127.0.0.1:{fake.port}"
        assert chosen.sets["authorization"] == "Bearer own"
        assert chosen.sets[":path"] == "/base/v1/completions?x=1"


def test_a_worker_with_a_name_is_told_by_its_address_and_left_out_when_it_has_none() -> None:
    found = {"engine": ["127.0.0.1"]}

    def look_up(host: str) -> list[str]:
        if host not in found:
            raise OSError(0, "no such name")
        return found[host]

    health = HealthRules(enabled=False)
    with scene(workers=0, look_up=look_up, health=health) as here:
        here.router.add("http://nowhere:8000")
        refused = here.gateway.ask("/v1/completions", BODY).refusal()
        assert (refused.status, refused.fields["x-smg-error-code"]) == (502, "worker_unreachable")
        here.ended(1)
        here.router.add("http://engine:8000")
        for times in range(2, 5):
            asked = here.gateway.ask("/v1/completions", BODY)
            assert asked.choice().endpoint == "127.0.0.1:8000"
            asked.given_back()
            asked.answer(200, b"{}")
            here.ended(times)


def test_usage_that_only_the_router_asks_for_is_hidden() -> None:
    with scene(options={"inject_usage": True}) as here:
        asked = here.gateway.ask("/v1/completions", b'{"prompt":"x","stream":true}')
        asked.choice()
        assert asked.given_back() == b'{"prompt":"x","stream":true,"stream_options":{"include_usage":true}}'
        asked.send(answer_head(200, content_type="text/event-stream"))
        asked.receive()
        first, usage = b'data: {"choices":[{"text":"a"}]}\n\n', b'data: {"choices":[],"usage":{"prompt_tokens":7}}\n\n'
        assert asked.piece(first[:9], False) == b""
        assert asked.piece(first[9:] + usage, False) == first
        assert asked.piece(b"data: [DONE]\n\n", True) == b"data: [DONE]\n\n"
        end = here.ended()
        assert end.answer.usage is not None
        assert end.answer.usage.prompt == 7


def test_an_event_that_trailers_cut_short_is_not_lost() -> None:
    with scene(options={"inject_usage": True}) as here:
        asked = here.gateway.ask("/v1/completions", b'{"prompt":"x","stream":true}')
        asked.choice()
        asked.given_back()
        asked.send(answer_head(200, content_type="text/event-stream"))
        asked.receive()
        assert asked.piece(b"data: 1", False) == b""
        message = ProcessingRequest()
        message.response_trailers.SetInParent()
        asked.send(message)
        streamed = asked.receive().response_body.response.body_mutation.streamed_response
        assert (streamed.body, streamed.end_of_stream) == (b"data: 1", False)
        assert asked.receive().WhichOneof("kind") == "response_trailers"
        here.ended()


def test_what_a_worker_keeps_is_asked_for_there(two: Scene) -> None:
    made = two.gateway.ask("/v1/responses", b'{"input":"x"}')
    endpoint = made.choice().endpoint
    made.given_back()
    made.answer(200, b'{"id":"resp_1","object":"response"}')
    two.ended(1)
    for times in range(2, 5):
        asked = two.gateway.ask("/v1/responses/resp_1", method="GET")
        assert asked.choice().endpoint == endpoint
        asked.answer(200, b"{}")
        two.ended(times)


def test_streams_leave_no_cycle_behind(two: Scene) -> None:
    """The router collects cycles seldom, and one with a call of gRPC keeps the bodies that went over it."""

    def left() -> int:
        return sum(isinstance(each, (GatewayStream, Pick)) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = left()
        served = two.gateway.ask("/v1/completions", BODY)
        served.choice()
        served.given_back()
        served.answer(200, b"{}")
        served.close()
        assert two.gateway.ask("/v1/completions", b"garbage").refusal().status == 400
        gone = two.gateway.ask("/v1/completions", BODY)
        gone.choice()
        gone.cancel()
        half = two.gateway.open()
        half.head("/v1/completions")
        half.body(b"{", False)
        half.cancel()
        two.ended(3)
        two.router.until(lambda: not two.gateway.front.connections or wake(two))
        del served, gone, half
        two.router.until(lambda: left() == before or wake(two))
    finally:
        gc.enable()


def test_an_answer_that_takes_too_long_ends_the_lease() -> None:
    with scene(options={"request_timeout_secs": 0.3}) as here:
        asked = here.gateway.ask("/v1/completions", BODY)
        asked.choice()
        asked.given_back()
        with pytest.raises(grpc.RpcError) as caught:
            asked.receive()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert here.ended().answer.outcome is Outcome.TIMEOUT


def test_keys_are_checked_and_not_passed_on() -> None:
    with scene(options={"api_key": "secret-key"}) as here:
        assert here.gateway.ask("/v1/completions", BODY).refusal().status == 401
        assert here.gateway.ask("/v1/models", method="GET").refusal().status == 401
        asked = here.gateway.ask(
            "/v1/completions", BODY, authorization="Bearer secret-key", x_sglang_router_explain="1"
        )
        assert sorted(asked.choice().removes) == ["authorization", "x-sglang-router-explain"]
        asked.given_back()
        assert "x-sglang-router-decision" in asked.answer(200, b"{}")
        here.ended(3)
