"""Whose failure a decode worker tells: its own, or that of the prefill worker it waited for.

A decode worker answers 500 when the prefill worker of its pair died, never came, or was aborted; SGLang's texts are

    Decode handshake failed for request ...                          nothing answered at the bootstrap port
    Decode transfer failed for request ... KVTransferError ...       it broke during the transfer
    Lost connection with prefill instance (bootstrap_addr: ...)      it is gone
    ... Aborted by AbortReq.                                         the pair was given up from outside

Only texts that an engine writes are looked for, not the word "prefill" alone.
"""

from __future__ import annotations

from typing import Final

MOST_READ: Final = 65536
"""Bytes of an error's body that are read."""

_NAMES: Final = (
    b"decode handshake failed",
    b"decode transfer failed",
    b"lost connection with prefill",
    b"from prefill instance",
    b"prefill instance is",
    b"aborted by abortreq",
)


def names_prefill(body: bytes) -> bool:
    """Return whether the body of a decode worker's error says that the prefill worker failed it."""
    text = body[:MOST_READ].lower()
    return any(name in text for name in _NAMES)
