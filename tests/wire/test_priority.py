"""The header x-smg-priority: names, numbers, and what is no priority."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import InvalidRequest, UnsupportedMediaType
from sglang_router.wire.request_id import RequestIds, read_priority

IDS = RequestIds(lambda bits: 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"high", 10),
        (b"Interactive", 10),
        (b"SYSTEM", 20),
        (b"default", 0),
        (b"normal", 0),
        (b" low ", -10),
        (b"bulk", -10),
        (b"-20", -20),
        (b"+7", 7),
        (b"0", 0),
    ],
)
def test_a_priority_is_a_name_or_a_number(value: bytes, expected: int) -> None:
    named = IDS.read([(b"x-request-id", b"r"), (b"x-smg-priority", value)], b"")
    assert (named[3], named[5]) == (None, expected)


@pytest.mark.parametrize("value", [b"", b"urgent", b"21", b"-21", b"1.5", b"1_0", b"0x1", b"\xb2", b"9" * 5000, b"u=1"])
def test_anything_else_is_refused(value: bytes) -> None:
    fault = IDS.read([(b"x-smg-priority", value)], b"")[3]
    assert isinstance(fault, InvalidRequest)
    assert (fault.status, fault.param) == (400, "x-smg-priority")
    assert "a whole number from -20 to 20, or one of system, interactive" in str(fault)


def test_without_the_header_none_is_asked_for() -> None:
    assert IDS.read([(b"priority", b"u=1")], b"")[5] is None


def test_an_earlier_fault_stays() -> None:
    fields = [(b"content-encoding", b"gzip"), (b"x-smg-priority", b"soon")]
    assert isinstance(IDS.read(fields, b"")[3], UnsupportedMediaType)


@given(st.text(max_size=5))
def test_every_text_is_a_priority_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert -20 <= read_priority(text) <= 20
