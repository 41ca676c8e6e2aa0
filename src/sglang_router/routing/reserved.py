"""Fields of a body that only a router may set: they say which engine or rank works with which.

A client that could send them could point an engine at another host, take a rank from the router's choice, or end a
vLLM engine (`"kv_transfer_params": {"do_remote_prefill": true}`). So a request with one of them is refused by its name,
unless clients are trusted (--trust-client-routing-fields). `null` means the same as a missing field: some clients send
every field they know. The headers of the same kind are in `wire.headers`.
"""

from __future__ import annotations

from collections.abc import Iterable

RESERVED = (
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "data_parallel_rank",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "dp_rank",
)


def first_reserved(members: Iterable[tuple[str, bytes]]) -> str:
    """Return the name of the first reserved field that has a value, or "".

    members  names of the body's fields with their raw JSON; b"" stands for a missing one
    """
    for name, raw in members:
        if name in RESERVED and raw not in (b"", b"null"):
            return name
    return ""
