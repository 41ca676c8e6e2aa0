"""Messages and events as SGLang and vLLM write them, older ones, and what is none."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_publisher import CLEARED, as_row, removed, stored
from sglang_router.routing.kv_blocks import DEVICE, Cleared, Removed, Stored
from sglang_router.workers.kv_format import EventReader, batch_of, frames_of

pack = msgspec.msgpack.encode


def read(event: Any, reader: EventReader | None = None) -> Any:
    return (reader or EventReader()).read(pack(event))


def told(event: Any) -> Stored:
    found = read(event)
    assert isinstance(found, Stored)
    return found


VLLM = {
    **stored([3065402942080615654, 2**64 - 1], None, [401, 3435, 7, 416], 2),
    "extra_keys": [None, None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
    "kv_cache_spec_sliding_window": None,
    "locality": "LOCAL",
    "ownership": "x",
    "session_id": "s1",
}
SGLANG = {
    "type": "BlockStored",
    "block_hashes": [-9160969660041500029],
    "parent_block_hash": 5786217816917573091,
    "token_ids": [2049, 3423],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
}


@pytest.mark.parametrize(
    ("event", "whole"),
    [(VLLM, VLLM), (SGLANG, SGLANG), (as_row(VLLM), VLLM), (as_row(SGLANG), SGLANG), (as_row(SGLANG)[:-1], SGLANG)],
)
def test_blocks_that_were_stored(event: Any, whole: dict[str, Any]) -> None:
    found = told(event)
    assert (found.hashes, found.parent, found.tokens, found.size) == (
        whole["block_hashes"], whole["parent_block_hash"], whole["token_ids"], 2,
    )  # fmt: skip
    assert (found.tier, found.adapter, found.salt, found.marks) == (DEVICE, "", "", None)


def test_blocks_that_were_removed_and_all_of_them() -> None:
    for event in (removed([1, -2, b"\x05"]), as_row(removed([1, -2, b"\x05"])), ["BlockRemoved", [1, -2, b"\x05"]]):
        found = read(event)
        assert isinstance(found, Removed)
        assert (found.hashes, found.tier) == ([1, -2, b"\x05"], DEVICE)
    assert isinstance(read(CLEARED), Cleared)
    assert isinstance(read(["AllBlocksCleared"]), Cleared)


def test_names_salts_and_marks() -> None:
    event = stored([1, 2], None, [1, 2, 3, 4], 2)
    assert told({**event, "lora_name": "poet", "lora_id": 3}).adapter == "poet"
    assert told({**event, "lora_id": 3}).adapter not in ("", "3"), "a number is nobody's name"
    assert told({**event, "cache_salt": "mine"}).salt == "mine"
    keys = told({**event, "lora_name": "poet", "extra_keys": [["poet", "mine"], ["poet"]]})
    assert (keys.salt, keys.marks) == ("mine", None)
    picture = told({**event, "extra_keys": [["mine"], [["hash", 3]]]})
    assert (picture.salt, picture.marks) == ("mine", [None, [["hash", 3]]])
    later = told({**event, "parent_block_hash": 9, "extra_keys": [["hash"], None]})
    assert (later.salt, later.marks) == ("", [["hash"], None])


def test_tiers_and_what_lies_elsewhere() -> None:
    event = stored([1], None, [1, 2], 2)
    tiers = [told({**event, "medium": medium}).tier for medium in (None, "GPU", "CPU_PINNED", "DISK", "tape")]
    assert tiers == [1, 1, 2, 4, 8]
    for more in ({"medium": "EXTERNAL"}, {"locality": "REMOTE"}):
        assert read({**event, **more}) is None
        assert read({**removed([1]), **more}) is None


def test_blocks_of_other_kinds_of_layers_are_left_out_and_so_is_their_end() -> None:
    reader = EventReader()
    event = stored([1], None, [1, 2], 2)
    assert read({**event, "group_idx": 1, "kv_cache_spec_kind": "sliding_window"}, reader) is None
    assert read({**removed([1]), "group_idx": 1}, reader) is None
    assert isinstance(read({**removed([1]), "group_idx": 0}, reader), Removed)
    assert isinstance(read({**event, "group_idx": 0, "kv_cache_spec_kind": "mla_attention"}, reader), Stored)


@pytest.mark.parametrize("event", [{"type": "Other"}, ["Other", 1], {}, [], [1], 7, "x", None, {"type": 5}])
def test_what_is_not_known_is_left_out(event: Any) -> None:
    assert read(event) is None


@pytest.mark.parametrize(
    "event",
    [
        {"type": "BlockStored"},
        ["BlockStored", [1]],
        {**SGLANG, "token_ids": [[1, 2], [2, 3]]},
        {**SGLANG, "token_ids": [1]},
        {**SGLANG, "block_size": 0},
        {**SGLANG, "block_size": -2},
        {**SGLANG, "block_hashes": [1.5]},
        {**SGLANG, "block_hashes": None},
        {"type": "BlockRemoved", "block_hashes": "all"},
    ],
)
def test_what_cannot_be_read_is_an_error(event: Any) -> None:
    with pytest.raises(ValueError):
        read(event)


@pytest.mark.parametrize("batch", [[1.5, [CLEARED], 0], [1.5, [CLEARED]], {"ts": 1.0, "events": [CLEARED]}])
def test_a_batch_is_an_array_or_a_map(batch: Any) -> None:
    (event,) = batch_of(pack(batch))
    assert isinstance(EventReader().read(event), Cleared)


def test_frames_of_what_is_published_and_of_what_is_replayed() -> None:
    seq, end = (7).to_bytes(8, "big"), b"\xff" * 8
    assert (
        frames_of([b"topic", seq, b"x"])
        == frames_of([b"", seq, b"x"])
        == frames_of([b"", b"t", seq, b"x"])
        == (7, b"x")
    )
    assert frames_of([b"", end, b""]) == frames_of([b"", b"t", end, b""]) == (-1, b"")
    assert frames_of([seq]) is frames_of([]) is frames_of([b"t", b"7", b"x"]) is None


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    for work in (batch_of, EventReader().read):
        with contextlib.suppress(ValueError):
            work(raw)
