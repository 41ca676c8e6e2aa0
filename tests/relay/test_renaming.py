"""Bodies that name another model than the client wrote: no other byte changes, however large the body is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.relay.outgoing import SLICE, Outgoing
from sglang_router.relay.renaming import renamed, renamed_target
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import LARGE, Facts, Skimming, read
from sglang_router.routing.multipart import model_of, span_of
from sglang_router.wire.gathering import Body
from sglang_router.wire.request import Request
from sglang_router.wire.splice import Spliced

CHAT = ENDPOINTS[b"/v1/chat/completions"]
FORM = ENDPOINTS[b"/v1/audio/transcriptions"]
RANK = b'"data_parallel_rank":1'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["model", '"model"', "}", '\\"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("model"), inner),
    max_leaves=8,
)


def sent(body: Body | Spliced) -> bytes:
    """What goes to the engine."""
    outgoing, found = Outgoing(body), b""
    while not outgoing.done:
        found += outgoing.next()
    assert len(body) == len(found)
    return found


@pytest.mark.parametrize(
    ("target", "sent_as"),
    [
        (b"/v1/realtime?model=gpt-4", b"/v1/realtime?model=a%2Fb+%C3%A9%26"),
        (b"/v1/realtime?model=gpt%2D4&model=gpt-4", b"/v1/realtime?model=a%2Fb+%C3%A9%26&model=a%2Fb+%C3%A9%26"),
        (b"/v1/realtime?model=other", b"/v1/realtime?model=other"),
        (b"/v1/realtime?models=gpt-4", b"/v1/realtime?models=gpt-4"),
        (b"/v1/realtime", b"/v1/realtime"),
    ],
)
def test_a_query_names_the_other_model_where_it_named_the_clients(target: bytes, sent_as: bytes) -> None:
    facts = read(ENDPOINTS[b"/v1/realtime"], b"")
    facts.model = b'"gpt-4"'
    request = Request(b"GET", target, target.partition(b"?")[0], [])
    assert renamed_target(request, facts, '"a/b \u00e9&"'.encode()) == sent_as
    facts.model, facts.asked = b'"llama"', b'"gpt-4"'
    assert renamed_target(request, facts, '"a/b \u00e9&"'.encode()) == sent_as


def skimmed(body: Body) -> Facts:
    skimming = Skimming(CHAT, body)
    while (facts := skimming.step()) is None:
        pass
    return facts


NAMES = st.text(max_size=4).filter(lambda name: name != "model")


@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=4),
    VALUES,
    st.integers(0, 4),
    st.sampled_from([b"", RANK]),
    st.booleans(),
)
def test_only_the_model_changes(others: list[tuple[str, Any]], model: Any, at: int, members: bytes, skim: bool) -> None:
    pieces = [b"%b : %b" % (json.dumps(name).encode(), json.dumps(value).encode()) for name, value in others]

    def body_with(value: bytes) -> bytes:
        return b"{" + b" ,".join([*pieces[:at], b'"model": ' + value, *pieces[at:]])

    body = body_with(json.dumps(model).encode()) + b"} "
    facts = skimmed(body) if skim else read(CHAT, body)
    found = sent(renamed(body, facts, b'"another"', members))
    assert found.rstrip() == body_with(b'"another"') + (b"," + members if members else b"") + b"}"


@pytest.mark.parametrize("size", [10, 70_000, LARGE - 200, LARGE + 1, 3 * SLICE])
@pytest.mark.parametrize("members", [b"", RANK])
@pytest.mark.parametrize("first", [True, False])
def test_large_bodies(size: int, members: bytes, first: bool) -> None:
    name, rest = b'"model" : "gpt-4"', b'"messages":[{"role":"user","content":"%b"}]' % (b"x" * size)
    body = bytearray(b"{" + b", ".join((name, rest) if first else (rest, name)) + b"}")
    facts = read(CHAT, bytes(body)) if len(body) <= LARGE else skimmed(body)
    found = sent(renamed(body, facts, b'"a longer name"', members))
    expected = bytes(body).replace(b'"gpt-4"', b'"a longer name"')
    assert found == (expected if not members else expected[:-1] + b"," + members + b"}")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a","model":"b"}', b'{"model":"a","model":"X"}'),
        (b'{"mod\\u0065l":"b"}', b'{"mod\\u0065l":"X"}'),
        (b'{"a":{"model":"b"}, "model":\n"b" }', b'{"a":{"model":"b"}, "model":\n"X" }'),
        (b'{"prompt":"x"}', b'{"prompt":"x"}'),
        (b'\xef\xbb\xbf{"model":"b"}', b'\xef\xbb\xbf{"model":"X"}'),
        ('{"model":"b","x":"é"}'.encode("utf-16"), '{"model":"X","x":"é"}'.encode()),
        ('{"x":"\ud800","model":"b"}'.encode("utf-32-be", "surrogatepass"), b'{"x":"\xed\xa0\x80","model":"X"}'),
        (b'{"model":"b","x":NaN}', b'{"model":"X","x":NaN}'),
    ],
)
def test_unusual_bodies(body: bytes, expected: bytes) -> None:
    assert sent(renamed(body, read(CHAT, body), b'"X"', b"")) == expected


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = [b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (n.encode(), v) for n, v in fields]
    return b"".join(parts) + b"--b--\r\n"


@pytest.mark.parametrize("size", [10, 70_000, 3 << 20])
@pytest.mark.parametrize("first", [True, False])
def test_a_form_names_another_model(size: int, first: bool) -> None:
    fields = [("model", b"gpt-4"), ("file", b"\0model" * (size // 6))]
    fields = fields if first else fields[::-1]
    body = form(*fields)
    facts = Facts(FORM, model=model_of(body))
    found = sent(renamed(body, facts, '"modèle"'.encode(), b""))
    assert found == body.replace(b"gpt-4", "modèle".encode())
    assert model_of(found) == '"modèle"'.encode()


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([b"--b", b"\r\n", b"model", b'name="model"', b": "])).map(b"".join)
)
def test_any_form_is_taken(body: bytes) -> None:
    span = span_of(body)
    assert span is None or 0 <= span[0] <= span[1] <= len(body)
    assert isinstance(sent(renamed(body, Facts(FORM, model=b'"m"'), b'"X"', b"")) if body else b"", bytes)
