"""Whose failure a decode worker tells."""

from __future__ import annotations

import pytest

from sglang_router.routing.guilt import MOST_READ, names_prefill

PREFILLS = [
    b"Decode handshake failed for request rank=0 decode_req.req.rid='r' decode_req.req.bootstrap_room=3 with exception",
    b"Decode transfer failed for request rank=0 decode_req.req.rid='r' with exception KVTransferError(3): gone",
    b"KVTransferError(bootstrap_room=3): Lost connection with prefill instance (bootstrap_addr: 10.0.0.7:8998)",
    b"Failed to get kvcache from prefill instance, it might be dead",
    b'{"object":"error","message":"Request 7 Aborted by AbortReq.","code":500}',
]
OWN = [
    b"",
    b"Internal server error",
    b'{"error":{"message":"Out of memory. Please tune --mem-fraction-static."}}',
    b'{"error":{"message":"the prompt speaks of prefill and of a handshake"}}',
    b"EngineCore encountered an issue. See stack trace (above) for the root cause.",
    b"x" * MOST_READ + PREFILLS[2],
]


@pytest.mark.parametrize("body", PREFILLS)
def test_what_engines_write_when_prefill_failed_them(body: bytes) -> None:
    assert names_prefill(body)
    assert names_prefill(body.upper())
    assert names_prefill(b'{"error":{"message":"' + body + b'"}}')


@pytest.mark.parametrize("body", OWN)
def test_everything_else_is_decodes_own(body: bytes) -> None:
    assert not names_prefill(body)
