"""How a request tells its session: headers, fields of the body, the request's id; in small and in large bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import LARGE, MOST_TEXT, Skimming, read_quickly, read_slowly
from sglang_router.routing.keys import LONGEST
from sglang_router.routing.reserved import HOLDERS, RESERVED
from sglang_router.routing.session_hints import FIELDS, HEADERS, SessionHints

CHAT = ENDPOINTS[b"/v1/chat/completions"]
ALL = SessionHints(HEADERS, FIELDS, [row for row in ENDPOINTS.values() if row.generates])
ID = b"chatcmpl-0123456789abcdef01234567"


def session(
    body: dict[str, Any] | bytes | None = None, id: bytes = ID, hints: SessionHints = ALL, **headers: str
) -> bytes:
    """The session of a chat request."""
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    hinted = hints.begin("chat", fields, id)
    assert hinted is not None
    raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    facts = read_quickly(CHAT, raw, b"", MOST_TEXT, hinted.body)
    if facts is None:
        facts = read_slowly(CHAT, raw, b"", MOST_TEXT, hinted.body)
    return hinted.found(facts.session)


@pytest.mark.parametrize("name", HEADERS)
def test_each_header_that_agents_send_names_a_session(name: str) -> None:
    hinted = ALL.begin("chat", [(b"host", b"x"), (name.encode(), b"s-1")], ID)
    assert hinted is not None
    assert hinted.found(b"") == b"s-1"
    assert hinted.body is None, "the body need not be searched"


def test_the_header_that_is_preferred_counts_whatever_their_order() -> None:
    assert session(x_session_id="b", x_smg_routing_key="a") == b"a"
    assert session(x_smg_routing_key="a", x_session_id="b") == b"a"
    assert session(x_smg_routing_key="", x_session_id="b") == b"b", "an empty one names nothing"


@pytest.mark.parametrize("name", ["x-request-id", "x-client-request-id", "x-correlation-id", "traceparent"])
def test_an_id_that_each_request_has_anew_is_no_session(name: str) -> None:
    hinted = ALL.begin("chat", [(name.encode(), b"s-1")], ID)
    assert hinted is not None
    assert hinted.found(b"") == b""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"session_id": "s"}, b"s"),
        ({"session_params": {"id": "s", "rid": "x"}}, b"s"),
        ({"conversation": "conv_1"}, b"conv_1"),
        ({"conversation": {"id": "conv_1"}}, b"conv_1"),
        ({"prompt_cache_key": "s"}, b"s"),
        ({"metadata": {"user_id": "user_1_session_2"}}, b"user_1_session_2"),
        ({"metadata": {"session_id": "s"}}, b"s"),
        ({"session_id": 7}, b"7"),
        ({"session_id": None, "prompt_cache_key": "s"}, b"s"),
        ({"session_id": "", "metadata": {"user_id": ""}}, b""),
        ({"session_id": ["s"], "session_params": "s", "metadata": [1], "conversation": {"x": 1}}, b""),
        ({"session_params": {"id": {"id": "s"}}}, b""),
        ({"user": "weak"}, b""),
        ({"metadata": {"user_id": "u"}, "session_id": "s"}, b"s"),
        ({"metadata": {"user_id": "u", "blob": "x" * 9000}}, b""),
    ],
)
def test_fields_of_the_body_name_a_session(body: dict[str, Any], found: bytes) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **body}
    assert session(body) == found
    assert session(body, x_session_id="header") == b"header"


def test_a_request_id_with_turn_and_retry_names_its_conversation() -> None:
    assert session(id=b"conv-7_t12_r0") == session(id=b"conv-7_t13_r2") == b"conv-7"
    assert session({"session_id": "s"}, id=b"conv-7_t12_r0") == b"s", "it is the last resort"
    for other in (b"conv-7_t12", b"_t1_r1", b"conv-7_tx_r1", b"conv-7_t12_r0x", b"conv_t1_r99999999999"):
        assert session(id=other) == b""


def test_a_long_name_is_kept_as_its_digest() -> None:
    one, other = session(x_session_id="a" * 500), session(x_session_id="a" * 499 + "b")
    assert len(one) <= LONGEST
    assert one != other
    assert session({"session_id": "a" * 500}) == one
    assert session(id=b"a" * 200 + b"_t1_r0") == session(id=b"a" * 200 + b"_t2_r0") != b""


def test_names_can_be_configured() -> None:
    hints = SessionHints(["X-Mine"], ["thread.key", "thread"], [CHAT])
    assert session(x_mine="a", hints=hints) == b"a"
    assert session({"session_id": "no", "thread": {"key": "b"}}, hints=hints) == b"b"
    assert session({"thread": "c"}, hints=hints) == b"c"


def test_fields_that_have_another_meaning_are_not_searched() -> None:
    hints = SessionHints([], ["messages.id", *HOLDERS, *RESERVED, "session_id"], [CHAT])
    body = {"messages": [{"role": "user", "content": "x"}], "extra_body": {"a": 1}, "session_id": "s"}
    assert session(body, hints=hints) == b"s"
    assert session(b'{"bootstrap_host":"h","session_id":"s"}', hints=hints) == b"s"


def test_an_endpoint_that_generates_nothing_has_no_sessions() -> None:
    assert ALL.begin("embeddings", [(b"x-session-id", b"s")], ID) is None
    rows = {row.name for row in ENDPOINTS.values() if row.generates}
    others = {"invocations", "completion", "infill", "api_generate", "api_chat"}
    assert rows == {"generate", "chat", "completions", "responses", "messages", *others}


def test_a_body_that_only_python_reads_names_its_session() -> None:
    assert session(b'{"n": NaN, "session_id": "s"}') == b"s"


hint_fields = st.dictionaries(
    st.sampled_from(["session_id", "session_params", "conversation", "prompt_cache_key", "metadata", "model"]),
    st.one_of(
        st.none(),
        st.text(max_size=80),
        st.integers(-9, 9),
        st.dictionaries(st.sampled_from(["id", "user_id", "session_id"]), st.text(max_size=80), max_size=3),
    ),
)


@given(hint_fields)
def test_a_large_body_tells_what_a_small_one_tells(fields: dict[str, Any]) -> None:
    hinted = ALL.begin("chat", [], ID)
    assert hinted is not None
    small = json.dumps({**fields, "messages": [{"role": "user", "content": "hi"}]}).encode()
    large = bytearray(small[:-1] + b',"pad":"' + b"x" * LARGE + b'"}')
    quick = read_quickly(CHAT, small, b"", MOST_TEXT, hinted.body)
    slow = read_slowly(CHAT, small, b"", MOST_TEXT, hinted.body)
    skimming = Skimming(CHAT, large, b"", MOST_TEXT, hinted.body)
    while (skimmed := skimming.step()) is None:
        pass
    assert quick is not None
    assert quick.session == slow.session == skimmed.session
    assert len(quick.session) <= LONGEST
    without = read_quickly(CHAT, small, b"", MOST_TEXT)
    assert without is not None
    assert without.session == b""
    assert (without.text, without.model, without.namespace) == (quick.text, quick.model, quick.namespace)
