"""Members that are added to a JSON body: they override the client's, and no other byte changes."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from sglang_router.wire.splice import splice

BLANKS = st.text(" \t\r\n", max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["}", "{", '"}', "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(max_size=4) | st.just("data_parallel_rank")


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Draw a JSON object with white space wherever it is allowed."""
    members = [
        f"{draw(BLANKS)}{json.dumps(name)}{draw(BLANKS)}:{draw(BLANKS)}{json.dumps(value)}{draw(BLANKS)}"
        for name, value in draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    ]
    inside = ",".join(members) or draw(BLANKS)
    return f"{draw(BLANKS)}{{{inside}}}{draw(BLANKS)}".encode()


@given(bodies(), st.integers(0, 1023))
def test_a_rank_is_one_field_more_and_no_other_byte_changes(body: bytes, rank: int) -> None:
    told = splice(body, b'"data_parallel_rank":%d' % rank)
    assert json.loads(told) == {**json.loads(body), "data_parallel_rank": rank}
    end = body.rindex(b"}")
    assert told.startswith(body[:end])
    assert told.endswith(body[end:])
    assert len(told) <= len(body) + len(b',"data_parallel_rank":1023')
