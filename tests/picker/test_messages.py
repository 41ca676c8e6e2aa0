"""The messages, as bytes: what Envoy's own declarations (xds-protos 1.85.0) made of the same content."""

from __future__ import annotations

import pytest

from sglang_router.picker import replies
from sglang_router.picker.asked import length_of, peer_of, request_of, served_of, subset_of
from sglang_router.picker.changes import added, removed
from sglang_router.picker.envoy_words import outcome_of
from sglang_router.picker.messages import ProcessingRequest
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Headers, Request

ASKED = (
    "12420a3e0a0f0a073a6d6574686f641a04504f53540a1c0a053a706174681a132f76312f636f6d706c6574696f6e733f613d310a0d0a05782d"
    "6f6c64120474657874180142650a630a14656e766f792e6c622e7375627365745f68696e74124b0a490a25782d676174657761792d64657374"
    "696e6174696f6e2d656e64706f696e742d7375627365741220321e0a0d1a0b31302e302e302e313a38300a0d1a0b31302e302e302e323a3830"
    "4a2f0a1b656e766f792e66696c746572732e687474702e6578745f70726f6312100a0e0a0161120911000000000000f03f5a0408041004"
)
SERVED = (
    "1a120a100a0e0a073a7374617475731a0332303042460a440a08656e766f792e6c6212380a360a25782d676174657761792d64657374696e61"
    "74696f6e2d656e64706f696e742d736572766564120d1a0b31302e302e302e323a3830"
)
CHOSEN = (
    "0a600a5e125a0a310a2d0a1e782d676174657761792d64657374696e6174696f6e2d656e64706f696e741a0b31302e302e302e313a38301802"
    "0a160a120a0c782d726571756573742d69641a0272311802120d617574686f72697a6174696f6e280142410a3f0a08656e766f792e6c621233"
    "2a310a2f0a1e782d676174657761792d64657374696e6174696f6e2d656e64706f696e74120d1a0b31302e302e302e313a3830"
)


def told(reply: object) -> str:
    return str(reply.SerializeToString(deterministic=True).hex())  # type: ignore[attr-defined]


def request(*fields: tuple[bytes, bytes], path: bytes = b"/v1/completions") -> Request:
    return Request(b"POST", path, path, [*fields])


# -- what arrives ------------------------------------------------------------------------------------------------------


def test_a_request_is_read() -> None:
    message = ProcessingRequest.FromString(bytes.fromhex(ASKED))
    assert message.WhichOneof("kind") == "request_headers"
    found = request_of(message.request_headers, Limits())
    assert (found.method, found.target, found.path) == (b"POST", b"/v1/completions?a=1", b"/v1/completions")
    assert (found.headers, found.refusal) == ([(b"x-old", b"text")], None)
    assert message.request_headers.end_of_stream
    assert subset_of(message) == frozenset(("10.0.0.1:80", "10.0.0.2:80"))
    assert served_of(message) == ""
    assert (message.protocol_config.request_body_mode, message.protocol_config.response_body_mode) == (4, 4)


def test_the_head_of_an_answer_is_read() -> None:
    message = ProcessingRequest.FromString(bytes.fromhex(SERVED))
    assert message.WhichOneof("kind") == "response_headers"
    assert served_of(message) == "10.0.0.2:80"
    assert subset_of(message) is None


def test_a_body_is_read() -> None:
    message = ProcessingRequest.FromString(bytes.fromhex("22060a027b7d1001"))
    assert (message.request_body.body, message.request_body.end_of_stream) == (b"{}", True)


def test_a_subset_may_be_a_text_and_may_be_empty() -> None:
    message = ProcessingRequest()
    entry = message.metadata_context.filter_metadata.add(key="envoy.lb.subset_hint")
    value = entry.value.fields["x-gateway-destination-endpoint-subset"]
    value.string_value = "10.0.0.1:80, 10.0.0.2:80"
    assert subset_of(message) == frozenset(("10.0.0.1:80", "10.0.0.2:80"))
    value.list_value.SetInParent()
    assert subset_of(message) == frozenset()


@pytest.mark.parametrize("fields", [{}, {":method": b"GET"}, {":method": b"GET", ":path": b"*"}])
def test_what_is_no_request_is_refused(fields: dict[str, bytes]) -> None:
    message = ProcessingRequest().request_headers
    for name, value in fields.items():
        message.headers.headers.add(key=name, raw_value=value)
    found = request_of(message, Limits())
    assert found.refusal is not None
    assert found.refusal.status == 400


@pytest.mark.parametrize(
    ("value", "length"), [(b"12", 12), (b"", -1), (b"+1", -1), (b"1" * 30, -1), ("٣".encode(), -1)]
)
def test_a_length_is_a_plain_number(value: bytes, length: int) -> None:
    assert length_of(request((b"content-length", value))) == length
    assert length_of(request()) == -1


def test_the_client_is_the_last_address_that_the_gateway_has_added() -> None:
    assert peer_of(request((b"x-forwarded-for", b"6.6.6.6, 10.0.0.9")), lambda: "ipv4:10.0.0.1:5") == "10.0.0.9"
    assert peer_of(request(), lambda: "ipv4:10.0.0.1:5") == "10.0.0.1"
    assert peer_of(request(), lambda: "ipv6:%5B::1%5D:5") == "::1"
    assert len(peer_of(request((b"x-forwarded-for", b"x" * 5000)), lambda: "")) == 64


# -- what is answered --------------------------------------------------------------------------------------------------


def test_the_choice_is_as_envoy_reads_it() -> None:
    assert told(replies.chosen("10.0.0.1:80", [(b"x-request-id", b"r1")], [b"authorization"])) == CHOSEN


def test_the_other_answers_are_as_envoy_reads_them() -> None:
    refused = replies.refused(503, [(b"retry-after", b"5")], b"no")
    assert told(refused) == "3a210a0308f70312160a140a100a0b72657472792d61667465721a013518021a026e6f"
    assert told(replies.piece(replies.RESPONSE_BODY, b"data", True)) == "220e0a0c1a0a1a080a04646174611001"
    assert told(replies.trailers(replies.RESPONSE_TRAILERS)) == "3200"
    assert (
        told(replies.headers([(b"x-request-id", b"r1")]))
        == "121c0a1a12180a160a120a0c782d726571756573742d69641a0272311802"
    )


def test_fields_are_those_of_a_head_without_its_framing() -> None:
    head = b"HTTP/1.1 503 X\r\ncontent-length: 2\r\nretry-after: 5\r\nconnection: close\r\nx-a: b: c"
    assert replies.fields_of(head) == [(b"retry-after", b"5"), (b"x-a", b"b: c")]


# -- header fields -----------------------------------------------------------------------------------------------------

SENT: Headers = [
    (b"authorization", b"Bearer k"),
    (b"x-api-key", b"k"),
    (b"x-data-parallel-rank", b"3"),
    (b"x_prefiller_host_port", b"a:1"),
    (b"x-override-url", b"http://a"),
    (b"x-sglang-router-explain", b"1"),
    (b"content-type", b"application/json"),
    (b"accept-encoding", b"gzip"),
]


def test_what_a_worker_may_not_see_is_removed() -> None:
    assert removed(request(*SENT), ForwardRules()) == [
        *(b"x-data-parallel-rank", b"x_prefiller_host_port", b"x-override-url", b"x-sglang-router-explain"),
        b"accept-encoding",
    ]
    assert removed(request(*SENT), ForwardRules(guarded=True))[:2] == [b"authorization", b"x-api-key"]
    assert removed(request(*SENT), ForwardRules(everything=True, trusted=True)) == [b"x-sglang-router-explain"]
    secret = ForwardRules(withheld=lambda value: value == b"Bearer k")
    assert removed(request((b"authorization", b"Bearer k")), secret) == [b"authorization"]


def test_a_worker_gets_its_own_key_rank_and_path() -> None:
    target = Target("http://a:1/base", 2, b"own")
    whole = [
        (b"x-request-id", b"r1"),
        (b"authorization", b"Bearer own"),
        (b"x-data-parallel-rank", b"2"),
        (b":path", b"/base/v1/completions"),
    ]
    assert added(request(), target, b"r1", b"/base", ForwardRules()) == whole
    named = added(request(*SENT), target, b"r1", b"", ForwardRules())
    assert named == [whole[0], whole[2]]
    assert added(request(*SENT), target, b"r1", b"", ForwardRules(guarded=True)) == whole[:3]


# -- Envoy's own answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (
            503,
            b"upstream connect error or disconnect/reset before headers. reset reason: connection timeout",
            "UNCONNECTED",
        ),
        (
            503,
            b"upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, "
            b"transport failure reason: delayed connect error: Connection refused",
            "REFUSED",
        ),
        (
            503,
            b"upstream connect error or disconnect/reset before headers. reset reason: connection termination",
            "BROKEN",
        ),
        (503, b"upstream connect error or disconnect/reset before headers. reset reason: overflow", "BROKEN"),
        (503, b"no healthy upstream", "UNREACHABLE"),
    ],
)
def test_envoys_own_answers_say_what_was_wrong(status: int, body: bytes, outcome: str) -> None:
    assert outcome_of(status, body) is Outcome[outcome]


def test_answers_of_workers_are_not_mistaken_for_envoys() -> None:
    assert outcome_of(200, b"no healthy upstream") is None
    assert outcome_of(503, b'{"error":"no healthy upstream"}') is None
