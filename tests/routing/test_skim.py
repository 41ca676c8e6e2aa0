"""What is found in a large body without decoding it, and that no step of the search grows with the body."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import InvalidJSON, InvalidRequest
from sglang_router.routing.body_reader import NAMESPACE
from sglang_router.routing.endpoints import ENDPOINTS, Endpoint
from sglang_router.routing.facts import LARGE, MOST_TEXT, Facts, Skimming, read
from sglang_router.routing.skim import WINDOWS, WORK, Skim

CHAT = ENDPOINTS[b"/v1/chat/completions"]
NAMES = ["model", "messages", "stream", "caf\u00e9", "x"]
WANTED = {name.encode() for name in NAMES}
TINY = (2, 5)
"""Bytes of the smallest and the largest window, where a test shall cut values everywhere."""


def skimmed(body: bytes | bytearray, work: int = WORK, windows: tuple[int, int] = WINDOWS) -> Skim:
    """Skim a body to its end."""
    skim = Skim(body, WANTED, windows)
    while not skim.step(work):
        pass
    return skim


def skimmed_facts(endpoint: Endpoint, body: bytes, key: bytes = b"", most_text: int = MOST_TEXT) -> Facts:
    """Read a body as a large one is read."""
    skimming = Skimming(endpoint, bytearray(body), key, most_text)
    while (facts := skimming.step()) is None:
        pass
    return facts


# -- what is found -----------------------------------------------------------------------------------------------------

TEXTS = st.text() | st.text(alphabet='\\"[]{},:u/n') | st.sampled_from(["\\", '"', '\\"', "\\\\" * 4, "[{", "\ud83d"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
BLANKS = st.text(" \t\r\n", max_size=4)


@st.composite
def documents(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """Draw a JSON object as text, with white space and repeated names, and what Python's reader makes of it."""
    ascii_only = draw(st.booleans())
    indent = draw(st.sampled_from([None, 1]))
    members = []
    for name, value in draw(st.lists(st.tuples(st.sampled_from(NAMES) | TEXTS, VALUES), max_size=6)):
        inside = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
        blanks = [draw(BLANKS) for _ in range(4)]
        members.append(f"{blanks[0]}{json.dumps(name)}{blanks[1]}:{blanks[2]}{inside}{blanks[3]}")
    text = f"{draw(BLANKS)}{{{','.join(members) or draw(BLANKS)}}}{draw(BLANKS)}"
    return text.encode("utf-8", "surrogatepass"), json.loads(text)


@given(
    document=documents(),
    work=st.integers(1, 5000),
    windows=st.tuples(st.integers(2, 9), st.integers(9, 40)) | st.just(WINDOWS),
)
def test_each_wanted_member_is_found_however_the_body_is_cut(
    document: tuple[bytes, dict[str, Any]], work: int, windows: tuple[int, int]
) -> None:
    body, decoded = document
    skim = skimmed(bytearray(body), work, windows)
    found = {
        name.decode(): json.loads(body[begin:end].decode("utf-8", "surrogatepass"))
        for name, (begin, end) in skim.spans.items()
    }
    assert repr(found) == repr({name: decoded[name] for name in found})  # repr: NaN is not equal to itself
    assert set(found) == set(decoded) & set(NAMES)
    assert body[skim.close :].strip() == b"}"
    assert skim.empty is (not decoded)


@given(
    endpoint=st.sampled_from([row for row in ENDPOINTS.values() if row.json]),
    body=st.dictionaries(
        st.sampled_from(sorted({*NAMESPACE, "stream", "text", "tools", "messages", "prompt", "input", "query"})),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=200),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    ),
    most_text=st.integers(1, 40) | st.just(MOST_TEXT),
)
def test_the_facts_are_those_of_a_small_body(endpoint: Endpoint, body: dict[str, Any], most_text: int) -> None:
    raw = json.dumps(body).encode()
    skimmed, decoded = skimmed_facts(endpoint, raw, b"key", most_text), read(endpoint, raw, b"key", most_text)
    for name in ("model", "namespace", "routing_key", "scaffold", "body", "streaming", "text"):
        assert getattr(skimmed, name) == getattr(decoded, name), name
    assert type(skimmed.text) is bytes


def test_routing_text_beyond_a_bounded_prefix_adds_nothing() -> None:
    """F10, F30: the routing text of a large body is a bounded copy, so that what follows costs nothing."""
    shared = b'{"messages":[{"role":"user","content":"' + b"x" * MOST_TEXT
    one, other = (skimmed_facts(CHAT, shared + rest * 9_000 + b'"}]}') for rest in (b"one", b"other"))
    assert one.text == other.text
    assert len(one.text) == MOST_TEXT
    assert len(one.body) == len(shared) + 27_000 + len(b'"}]}')


def test_no_more_of_a_name_counts_than_is_bounded() -> None:
    names = [b'"' + b"m" * (2 * LARGE) + end + b'"' for end in (b"1", b"2")]
    one, other = (skimmed_facts(CHAT, b'{"model":' + name + b"}") for name in names)
    assert len(one.model) <= 1 << 16
    assert one.namespace == other.namespace != b""


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" \r\n", b"null", b"[]", b'[{"x":1}]', b'"x"', b"{", b"{{}}", b"{,}", b'{"x"}', b'{"x":}', b'{"x":1'),
        *(b'{"x":1}}', b'{"x":1} x', b'{"x":1}{"x":1}', b'{"x":1,}', b"{'x':1}", b"{x:1}", b'{"x" 1}', b'{"x":1 2}'),
        *(b'{"x":"', b'{"x":"\\"', b'{"x":"\\', b'{"x":[', b'{"x":["]', b'{"x":[{]', b'{"x":"a"b}', b'{"x":[]1}'),
        *(b'{"x":' + b"[" * 1030 + b"]" * 1030 + b"}", b'{"x":' + b'[{"a":' * 50_000 + b"}]" * 50_000 + b"}"),
        *('{"x":1}'.encode("utf-16"), b"[" * 100_000, b'{"x":' * 100_000),
    ],
    ids=lambda body: repr(body[:12]),
)
@pytest.mark.parametrize("windows", [TINY, WINDOWS])
def test_what_is_not_an_object_to_its_end_is_invalid(body: bytes, windows: tuple[int, int]) -> None:
    with pytest.raises(InvalidJSON) as caught:
        skimmed(body, windows=windows)
    assert (caught.value.status, caught.value.code) == (400, "json_parse_error")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        *(b"NaN", b"-Infinity", b"01", b"+1", b'"a\nb"', rb'"\q"', rb'"\ud83d"', b'"\xff"', b"[1,,2]", b"[{]]", b"[:]"),
        b"[" * 1024 + b"]" * 1024,
        b"[" + (b"[" * 1000 + b"]" * 1000) * 20 + b"]",
        b'{"a":' * 1024 + b"1" + b"}" * 1024,
    ],
    ids=lambda value: repr(value[:12]),
)
def test_what_is_inside_of_values_is_for_the_engine_to_judge(value: bytes) -> None:
    body = b'{"x":' + value + b',"model":"m"}'
    skim = skimmed(body)
    assert body[slice(*skim.spans[b"x"])] == value
    assert body[slice(*skim.spans[b"model"])] == b'"m"'


def test_a_byte_order_mark_is_skipped_as_some_engines_do() -> None:
    assert skimmed(b'\xef\xbb\xbf {"x":1}').spans == {b"x": (9, 10)}


def test_more_members_than_any_engine_knows_are_refused() -> None:
    member = b'"a":1,'
    assert skimmed(b"{" + member * 9_999 + b'"x":1}').spans
    with pytest.raises(InvalidRequest, match="more than 10000 members"):
        skimmed(b"{" + member * 10_000 + b'"x":1}')


# -- the work ----------------------------------------------------------------------------------------------------------

SIZE = 2_000_000


def filled(unit: bytes, before: bytes = b'{"x":[', after: bytes = b"1]}") -> bytes:
    return before + unit * (SIZE // len(unit)) + after


BODIES = {
    "text": filled(b"some text ", b'{"x":"', b'"}'),
    "quotes": filled(rb"\"\\", b'{"x":"', b'"}'),
    "backslashes": filled(b"\\\\", b'{"x":"', b'"}'),
    "chat": filled(b'{"role":"user","content":"How are you?"},'),
    "ids": filled(b"12345, "),
    "empty strings": filled(b'"",'),
    "arrays": filled(b"[],"),
    "waves": filled(b"[" * 100 + b"]" * 100 + b","),
    "deep": filled(b"[" * 1000 + b"]" * 1000 + b","),
    "number": filled(b"1", b'{"x":', b"}"),
    "space before": filled(b" ", b"", b'{"x":1}'),
    "space inside": filled(b"\n", b'{"x":', b"1}"),
    "space behind": filled(b"\t", b'{"x":1}', b""),
    "a long name": filled(b"x", b'{"', b'":1}'),
}
UNWANTED = {kind: body.replace(b'"x"', b'"unread"', 1) for kind, body in BODIES.items() if kind != "a long name"}


def steps(body: bytes) -> Iterator[int]:
    """Skim a body; yield how many bytes each step reads."""
    skim = Skim(bytearray(body), WANTED)
    while True:
        before = skim.at
        done = skim.step()
        yield skim.at - before
        if done:
            return


@pytest.mark.parametrize(
    "body", [*BODIES.values(), *UNWANTED.values()], ids=[*BODIES, *map("unread {}".format, UNWANTED)]
)
def test_f10_no_step_reads_more_bytes_however_large_the_body_is(body: bytes) -> None:
    """F10: reading a large body held up all other requests for as long as it took."""
    sizes = list(steps(body))
    assert sum(sizes) == len(body)
    assert max(sizes) <= WORK // 2 + WINDOWS[1]
    assert len(sizes) <= 40 * SIZE // WORK + 2, "and it does not take much longer because of that"


@pytest.mark.parametrize(("kind", "each"), [("empty strings", 25), ("arrays", 8), ("chat", 8)])
def test_f10_steps_are_shorter_where_bytes_cost_more(kind: str, each: int) -> None:
    """F10: nested arrays took four times as long as text of the same size. each: nanoseconds a byte, at least."""
    assert max(steps(BODIES[kind])) <= WORK // each + WINDOWS[1]
