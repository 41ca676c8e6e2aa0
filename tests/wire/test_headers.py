"""Heads that the router sends to workers: what is forwarded, what never is, and that clients cannot inject fields."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forged import forged_lines
from sglang_router.wire.headers import HOP_BY_HOP, WHITELIST, ForwardRules, request_head
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Headers, Request, RequestParser

START = b"POST /generate HTTP/1.1\r\nhost: worker\r\n"

END_TO_END: Headers = [
    (b"user-agent", b"client/1"),
    (b"cookie", b"a=b"),
    (b"accept-encoding", b"gzip"),
    (b"x-forwarded-for", b"10.0.0.1"),
    (b"x-smg-target-worker", b"1"),
    (b"content-encoding", b"identity"),
]
"""Fields that reach the worker only with --forward-headers all."""

ONE_HOP: Headers = [
    (b"connection", b"keep-alive"),
    (b"http2-settings", b"AAMAAABk"),
    (b"keep-alive", b"timeout=5"),
    (b"proxy-authenticate", b"Basic"),
    (b"proxy-authorization", b"Basic c2VjcmV0"),
    (b"proxy-connection", b"keep-alive"),
    (b"te", b"trailers"),
    (b"trailer", b"x-sum"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"h2c"),
]


def leg(
    headers: Headers,
    body: bytes = b"{}",
    *,
    key: bytes | None = None,
    everything: bool = False,
    guarded: bool = False,
) -> Headers:
    """Return the fields of a leg as the worker reads them, without the Host that every leg begins with."""
    request = Request(b"POST", b"/generate", b"/generate", headers)
    head = request_head(request, START, b"id-1", len(body), key, ForwardRules(everything, guarded))
    (read,) = RequestParser(Limits()).feed(head + body)
    assert isinstance(read, Request)
    assert read.headers[0] == (b"host", b"worker")
    assert read.body == body
    return read.headers[1:]


def passed(headers: Headers, *, key: bytes | None = None, everything: bool = False) -> Headers:
    """Return the fields of the client that are forwarded, and the worker's key."""
    fields = leg(headers, key=key, everything=everything)
    assert fields[:2] == [(b"x-request-id", b"id-1"), (b"content-length", b"2")]
    return fields[2:]


# -- to the worker -----------------------------------------------------------------------------------------------------


def test_the_whitelist_passes_and_nothing_else() -> None:
    listed = [(name, b"v") for name in sorted(WHITELIST)]
    extra = [(b"x-request-id-tenant", b"v"), (b"x-request-id-", b"v")]
    mixed = [field for pair in zip(listed, [*END_TO_END, *END_TO_END], strict=False) for field in pair]
    assert passed([*mixed, *extra]) == [*listed, *extra]


def test_the_whitelist_holds_what_the_reference_forwards_and_the_media_types() -> None:
    reference = {b"traceparent", b"tracestate", b"x-correlation-id", b"x-smg-routing-key"}
    assert reference | {b"accept", b"content-type", b"request-id", b"via", b"x-trace-id"} == WHITELIST


def head_of(headers: Headers, rules: ForwardRules, start: bytes = START) -> list[bytes]:
    request = Request(b"POST", b"/generate", b"/generate", headers)
    lines = request_head(request, start, b"id-1", 0, b"own", rules).split(b"\r\n")
    return [line for line in lines[1:] if line.split(b":")[0] not in (b"host", b"x-request-id", b"content-length", b"")]


def test_f17_each_leg_ends_with_the_mark_of_this_process_behind_those_of_others() -> None:
    rules = ForwardRules(mark=b"router-1")
    assert head_of([(b"via", b"1.1 edge")], rules)[0] == b"via: 1.1 edge"
    assert head_of([(b"via", b"1.1 edge")], rules)[-1] == b"via: 1.1 router-1"


def test_f32_a_key_of_the_control_plane_never_reaches_a_worker() -> None:
    rules = ForwardRules(everything=True, withheld=lambda value: b"ops" in value)
    sent = [(b"authorization", b"Bearer ops"), (b"x-api-key", b"ops")]
    assert head_of(sent, rules) == [b"authorization: Bearer own"]
    assert rules.authorization(sent) is None
    assert head_of([(b"api-key", b"ops"), (b"cookie", b"ops"), (b"x-goog-api-key", b"ops")], rules)[:-1] == []
    theirs = [(b"authorization", b"Bearer mine"), (b"x-api-key", b"mine")]
    assert head_of(theirs, rules) == [b"authorization: Bearer mine", b"x-api-key: mine"]
    assert rules.authorization(theirs) == b"Bearer mine"
    assert ForwardRules(guarded=True).authorization(theirs) is None


@pytest.mark.parametrize("rules", [ForwardRules(), ForwardRules(True), ForwardRules(True, trusted=True)])
def test_no_worker_hears_that_a_client_asks_why_it_was_chosen(rules: ForwardRules) -> None:
    assert head_of([(b"x-sglang-router-explain", b"1")], rules) == [b"authorization: Bearer own"]


CHOICES = (b"x-data-parallel-rank", b"x-override-bootstrap-host", b"x-override-rid", b"x-prefiller-host-port")


def test_case_24_underscores_do_not_help() -> None:
    """With --forward-headers all `X_Data_Parallel_Rank` passed, which some servers take for the field."""
    sent = [(b"x_data_parallel_rank", b"1"), (b"X_Override-Rid".lower(), b"1"), (b"x_other", b"1")]
    assert head_of(sent, ForwardRules(everything=True)) == [b"x_other: 1", b"authorization: Bearer own"]


@pytest.mark.parametrize("everything", [False, True])
def test_case_24_only_trusted_clients_choose_engines_and_ranks(everything: bool) -> None:
    sent = [(name, b"1") for name in CHOICES]
    own = [b"authorization: Bearer own"]
    assert head_of(sent, ForwardRules(everything)) == own
    assert head_of(sent, ForwardRules(everything, trusted=True)) == [b"%s: 1" % name for name in CHOICES] + own
    ranked = START + b"x-data-parallel-rank: 0\r\n"
    assert b"x-data-parallel-rank: 1" not in head_of(sent, ForwardRules(everything, trusted=True), ranked)


def test_everything_is_every_end_to_end_field_in_its_order() -> None:
    fields = [*END_TO_END, (b"accept", b"*/*"), (b"x-two", b"1"), (b"x-two", b"2")]
    assert passed([*ONE_HOP, *fields], everything=True) == fields


@pytest.mark.parametrize("everything", [False, True])
def test_hop_by_hop_fields_never_pass(everything: bool) -> None:
    assert {name for name, _ in ONE_HOP} == HOP_BY_HOP
    assert passed(ONE_HOP, everything=everything) == []


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "connection",
    [
        b"x-secret, traceparent",
        b"keep-alive,\tX-Secret ,TraceParent",
        b"close, x-secret,traceparent,,",
        b"traceparent,x-secret",
    ],
)
def test_fields_named_by_connection_never_pass(connection: bytes, everything: bool) -> None:
    kept = (b"accept", b"*/*")
    fields = [
        (b"traceparent", b"00-1"),
        kept,
        (b"connection", connection),
        (b"x-secret", b"1"),
        (b"traceparent", b"00-2"),
    ]
    assert passed(fields, everything=everything) == [kept]


def test_several_connection_fields_count_together() -> None:
    fields = [(b"connection", b"close"), (b"accept", b"*/*"), (b"connection", b"accept"), (b"connection", b"x")]
    assert passed(fields) == []
    assert passed([*fields, (b"x", b"1"), (b"y", b"1")], everything=True) == [(b"y", b"1")]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("sent", "key", "expected"),
    [
        ([], None, []),
        ([], b"worker-key", [b"Bearer worker-key"]),
        ([b"Bearer client-key"], None, [b"Bearer client-key"]),
        ([b"Bearer client-key"], b"worker-key", [b"Bearer client-key"]),
        ([b"Bearer first", b"Bearer second"], b"worker-key", [b"Bearer first"]),
        ([b"Bearer same", b"Bearer same"], None, [b"Bearer same"]),
    ],
)
def test_authorization_exactly_once(
    sent: list[bytes], key: bytes | None, expected: list[bytes], everything: bool
) -> None:
    fields = passed([(b"authorization", value) for value in sent], key=key, everything=everything)
    assert fields == [(b"authorization", value) for value in expected]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("connection", [b"close", b"accept"])
def test_a_key_for_the_router_ends_here(everything: bool, connection: bytes) -> None:
    fields = [
        (b"authorization", b"Bearer client-key"),
        (b"x-api-key", b"client-key"),
        (b"x_api_key", b"client-key"),  # some servers take both for the same
        (b"connection", connection),
        (b"authorization", b"Basic client-key"),
    ]
    alone = leg(fields, guarded=True, everything=everything)
    assert [name for name, _ in alone] == [b"x-request-id", b"content-length"]
    own = leg(fields, guarded=True, everything=everything, key=b"worker-key")
    assert own[2:] == [(b"authorization", b"Bearer worker-key")]
    assert ((b"x-api-key", b"client-key") in leg(fields, everything=everything)) == everything


@pytest.mark.parametrize("everything", [False, True])
def test_an_authorization_for_one_hop_ends_here(everything: bool) -> None:
    fields = [(b"authorization", b"Bearer client-key"), (b"connection", b"authorization")]
    assert passed(fields, everything=everything) == []
    assert passed(fields, everything=everything, key=b"k") == [(b"authorization", b"Bearer k")]


@pytest.mark.parametrize("everything", [False, True])
def test_the_id_and_the_framing_are_ours_alone(everything: bool) -> None:
    fields = [
        (b"x-request-id", b"theirs"),
        (b"x-request-id", b"theirs too"),
        (b"content-length", b"7"),
        (b"host", b"router"),
        (b"expect", b"100-continue"),
    ]
    assert leg(fields, b"seven", everything=everything) == [(b"x-request-id", b"id-1"), (b"content-length", b"5")]
    assert leg(fields, b"", everything=everything) == [(b"x-request-id", b"id-1"), (b"content-length", b"0")]


def test_a_request_is_not_changed_by_being_sent() -> None:
    """A retry builds the head again, for another worker."""
    fields = [(b"connection", b"accept"), (b"accept", b"*/*"), (b"te", b"x")]
    request = Request(b"POST", b"/", b"/", fields)
    heads = {request_head(request, START, b"id-1", 2, key, ForwardRules()) for key in (None, b"k", None)}
    assert len(heads) == 2
    assert request.headers == [(b"connection", b"accept"), (b"accept", b"*/*"), (b"te", b"x")]


@given(forged_lines, st.booleans())
def test_a_client_cannot_write_into_the_leg(lines: list[bytes], everything: bool) -> None:
    """Whatever our parser accepts: another parser reads from the leg the fields that were forwarded, and no others."""
    raw = b"POST /generate HTTP/1.1\r\nHost: x\r\n" + b"".join(b"Accept: %s\r\n" % line for line in lines) + b"\r\n"
    request = next(iter(RequestParser(Limits()).feed(raw)), None)
    if not isinstance(request, Request):
        return
    worker = h11.Connection(h11.SERVER)
    worker.receive_data(request_head(request, START, b"id-1", 0, None, ForwardRules(everything)))
    event = worker.next_event()
    assert isinstance(event, h11.Request)
    passing = (field for field in request.headers if field[0] == b"accept" or (everything and field[0] != b"host"))
    kept = [(name, value.strip()) for name, value in passing]
    assert list(event.headers)[1:] == [(b"x-request-id", b"id-1"), (b"content-length", b"0"), *kept]
    assert type(worker.next_event()) is h11.EndOfMessage
    assert worker.trailing_data == (b"", False)
