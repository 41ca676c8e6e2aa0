"""Fields of a body that only a router may set: they say which engine or rank works with which.

A client that could send them could point an engine at another host, take a rank from the router's choice, or end a
vLLM engine (`"kv_transfer_params": {"do_remote_prefill": true}`). So a request with one of them is refused by its name,
unless clients are trusted (--trust-client-routing-fields). `null` means the same as a missing field: some clients send
every field they know. The headers of the same kind are in `wire.headers`.

Engines unpack some fields into their own (`HOLDERS`): vLLM reads `vllm_xargs.kv_transfer_params` like the field itself.
So reserved fields are looked for in these, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from sglang_router.routing.tolerant import members

RESERVED: Final = (
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "bootstrap_addr",
    "bootstrap_info",
    "data_parallel_rank",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "disagg_decode_dp_rank",
    "prefill_dp_rank",
    "decode_dp_rank",
    "dp_rank",
)
HOLDERS: Final = ("vllm_xargs", "extra_args", "extra_body")
LONGEST_HELD: Final = 1 << 16
"""Bytes of a holder that are searched; a longer one is refused."""
_LONGEST_ODD: Final = 1 << 13
"""The same for one that the fast decoder refuses: the other one takes milliseconds for more."""
_HOLDER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NOTHING: Final = (b"", b"null")


def first_reserved(fields: Iterable[tuple[str, bytes]]) -> str:
    """Return the name of the first reserved field that has a value, or "".

    fields  names of the body's fields with their raw JSON; b"" stands for a missing one
    """
    for name, raw in fields:
        if raw in _NOTHING:
            continue
        if name in RESERVED:
            return name
        if name in HOLDERS and (inner := _first_held(name, raw)):
            return inner
    return ""


def _first_held(name: str, raw: bytes) -> str:
    """Return the name of the first reserved field in a holder. `raw` may be longer than what is searched."""
    if len(raw) > LONGEST_HELD:
        return name
    try:
        fields = _HOLDER.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        if len(raw) > _LONGEST_ODD:
            return name
        try:
            fields = {inner: msgspec.Raw(held) for inner, held in members(raw).items()}
        except (ValueError, RecursionError):
            return ""  # no object: engines cannot unpack it
    found = next((inner for inner, value in fields.items() if inner in RESERVED and bytes(value) not in _NOTHING), "")
    return found and f"{name}.{found}"
