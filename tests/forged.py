"""Values of header fields that try to inject further fields, for Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

forged_lines = st.lists(
    st.lists(
        st.sampled_from(
            [b"a", b"\x85", b"\xff", b" ", b"\t", b": ", b",", b"\r\n", b"\r\nX: y", b"\r", b"\n", b"\0", b"\r\n\r\n"]
        ),
        max_size=6,
    ).map(b"".join),
    min_size=1,
    max_size=3,
)
"""Up to three values of fields."""
