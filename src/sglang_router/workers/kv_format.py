"""The KV events of SGLang and vLLM: from the frames of a message to what the index takes. Nothing here does I/O.

    [topic, seq, payload]           published; seq: 8 bytes, big-endian
    ["", (topic,) seq, payload]     replayed; the last one has seq -1
    payload, msgpack                [time, [event, ...], rank], or a map with ts, events, data_parallel_rank
    event                           {"type": "BlockStored", "block_hashes": [...], ...}
                                    older: ["BlockStored", [...], ...]

An event of a kind that is not known, or of a cache that is not compared, is left out. One that cannot be read is a
ValueError: then the cache may hold what nobody knows of.

What is compared is the attention over the whole context. An engine with layers of other kinds (sliding windows, state
spaces) tells of those blocks too, under the same hashes and another `group_idx`. The kind stands in the event that
stores; the group is remembered for those that remove. What lies in a store that all engines share is no reason to
choose one of them: medium EXTERNAL, locality REMOTE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from sglang_router.routing.kv_blocks import DEVICE, Cleared, Removed, Stored

Hash = int | bytes
"""An engine's name of a block: vLLM's are unsigned, SGLang's are signed, and with SHA-256 they are bytes."""
KVEvent = Stored | Removed | Cleared

_SEQ: Final = 8
_TIERS: Final = {None: DEVICE, "GPU": DEVICE, "CPU": 2, "CPU_PINNED": 2, "DISK": 4}
_OTHER_TIER: Final = 8
_SHARED: Final = "EXTERNAL"
_REMOTE: Final = "REMOTE"
_OTHER_KINDS: Final = ("sliding", "chunked", "mamba", "linear", "cross", "state")
_MOST_GROUPS: Final = 256
_LARGEST: Final = 1 << 16
"""Tokens of a block above which its size is nonsense."""


class _Store(msgspec.Struct):
    """The fields in the order of the older arrays; what came later has names only."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    cache_salt: str | None = None
    locality: str | None = None


class _Remove(msgspec.Struct):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _StoreMap(_Store, tag="BlockStored", tag_field="type"):
    pass


class _RemoveMap(_Remove, tag="BlockRemoved", tag_field="type"):
    pass


class _ClearMap(msgspec.Struct, tag="AllBlocksCleared", tag_field="type"):
    pass


class _StoreRow(_Store, tag="BlockStored", array_like=True):
    pass


class _RemoveRow(_Remove, tag="BlockRemoved", array_like=True):
    pass


class _ClearRow(msgspec.Struct, tag="AllBlocksCleared", array_like=True):
    pass


class _Kind(msgspec.Struct):
    type: str = ""


_KNOWN: Final = frozenset(("BlockStored", "BlockRemoved", "AllBlocksCleared"))
_MAP: Final = msgspec.msgpack.Decoder(_StoreMap | _RemoveMap | _ClearMap)
_ROW: Final = msgspec.msgpack.Decoder(_StoreRow | _RemoveRow | _ClearRow)
_MAP_KIND: Final = msgspec.msgpack.Decoder(_Kind)
_ROWS: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])
_MEMBERS: Final = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_WORD: Final = msgspec.msgpack.Decoder(str)


def frames_of(frames: Sequence[bytes]) -> tuple[int, bytes] | None:
    """Return number and payload of a message; None for one that is no batch of events."""
    if len(frames) < 2 or len(frames[-2]) != _SEQ:
        return None
    return int.from_bytes(frames[-2], "big", signed=True), frames[-1]


def batch_of(payload: bytes) -> list[msgspec.Raw]:
    """Return the events of a batch, not decoded. Raises: ValueError."""
    try:
        if _is_map(payload):
            return _ROWS.decode(_MEMBERS.decode(payload)["events"])
        return _ROWS.decode(_ROWS.decode(payload)[1])
    except (msgspec.DecodeError, LookupError, UnicodeDecodeError) as exc:
        raise ValueError(f"not a batch of KV events: {exc}") from None


class EventReader:
    """Reads the events of one stream; see the module."""

    def __init__(self) -> None:
        self._ignored: set[int] = set()  # groups of blocks that are not compared

    def read(self, raw: bytes | msgspec.Raw) -> KVEvent | None:
        """Return an event; None for one that does not count.

        Raises: ValueError.
        """
        try:
            found = _MAP.decode(raw) if _is_map(raw) else _ROW.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            if _kind_of(raw) not in _KNOWN:
                return None
            raise ValueError(f"not a KV event: {exc}") from None
        if isinstance(found, _Store):
            return self._stored(found)
        if isinstance(found, _Remove):
            return self._removed(found)
        return Cleared()

    def _stored(self, found: _Store) -> Stored | None:
        count, size = len(found.block_hashes), found.block_size
        if not 0 < size <= _LARGEST or len(found.token_ids) < count * size:
            raise ValueError(f"{len(found.token_ids)} tokens in {count} blocks of {size}")
        kind = found.kv_cache_spec_kind
        if kind is not None and any(word in kind.lower() for word in _OTHER_KINDS):
            if found.group_idx is not None and len(self._ignored) < _MOST_GROUPS:
                self._ignored.add(found.group_idx)
            return None
        if _elsewhere(found.medium, found.locality):
            return None
        adapter = found.lora_name or ("" if found.lora_id is None else f"\0{found.lora_id}")
        marks, salt = _marks(found, count)
        parent, tokens = found.parent_block_hash, found.token_ids
        return Stored(
            found.block_hashes, parent, tokens, size, _tier(found.medium), adapter, found.cache_salt or salt, marks
        )

    def _removed(self, found: _Remove) -> Removed | None:
        if found.group_idx in self._ignored or _elsewhere(found.medium, found.locality):
            return None
        return Removed(found.block_hashes, _tier(found.medium))


def _is_map(raw: bytes | msgspec.Raw) -> bool:
    first = memoryview(raw)[:1].tobytes()
    return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")


def _kind_of(raw: bytes | msgspec.Raw) -> str:
    """Return the kind of an event that could not be decoded; "" without one."""
    try:
        return _MAP_KIND.decode(raw).type if _is_map(raw) else _WORD.decode(_ROWS.decode(raw)[0])
    except (msgspec.DecodeError, LookupError, UnicodeDecodeError, RecursionError):
        return ""


def _elsewhere(medium: str | None, locality: str | None) -> bool:
    """Whether blocks lie in a store that engines share."""
    return locality == _REMOTE or (medium is not None and medium.upper() == _SHARED)


def _tier(medium: str | None) -> int:
    return _TIERS.get(medium if medium is None else medium.upper(), _OTHER_TIER)


def _marks(found: _Store, count: int) -> tuple[list[Any] | None, str]:
    """Return what belongs to the blocks beside their tokens and the adapter, and the salt.

    vLLM puts all of that into `extra_keys` without names; the salt is in those of a prompt's first block alone.
    """
    keys = found.extra_keys
    if keys is None or not any(keys):
        return None, ""
    known = (found.lora_name, found.lora_id)
    marks: list[Any] = []
    salt = ""
    for number in range(count):
        each = keys[number] if number < len(keys) else None
        own = [key for key in each if key not in known] if isinstance(each, (list, tuple)) else []
        if not number and found.parent_block_hash is None and len(own) == 1 and isinstance(own[0], str):
            salt, own = own[0], []
        marks.append(own or None)
    return (marks if any(marks) else None), salt
