"""Add members to a JSON object without changing its other bytes."""

from __future__ import annotations


def splice(body: bytes, members: bytes) -> bytes:
    """Return `body`, a JSON object, with `members` (such as b'"data_parallel_rank":1') added at its end.

    Engines use the last of several members with the same name, so these override the client's.

    Raises: ValueError, when `body` has no "}".
    """
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip().endswith(b"{") else b","
    return b"%b%b%b%b" % (body[:end], comma, members, body[end:])
