"""How many answers a request wants of its prompt: a pair writes one only.

    "n": 2                        chat and completions
    "sampling_params": {"n": 2}   /generate; or a list of such objects

It is read of a body only where there are pairs (`of`), except that of a large body, which is skimmed anyway (`among`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from sglang_router.routing.reserved import LONGEST_HELD
from sglang_router.routing.skim import Content, Spans
from sglang_router.routing.tolerant import members

NAMES: Final = frozenset((b"n", b"best_of", b"sampling_params"))
"""The fields that are read."""
_ONE: Final = 1
_SEVERAL: Final = 2
_PARAMETERS: Final = "sampling_params"
_decode: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list: Final = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_Wanted: Final = msgspec.defstruct(
    "Wanted", [(name.decode(), msgspec.Raw, msgspec.Raw(b"")) for name in NAMES], gc=False
)
_decode_body: Final = msgspec.json.Decoder(_Wanted).decode


def of(body: Content) -> int:
    """Return 1, or 2 for a body that wants several answers; what cannot be read is the engine's to refuse.

    body  at most `facts.LARGE` bytes
    """
    try:
        found = _decode_body(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        try:
            return _most(members(bytes(body)))
        except (ValueError, RecursionError):
            return _ONE
    return _most({name.decode(): bytes(getattr(found, name.decode())) for name in NAMES})


def among(view: memoryview, spans: Spans) -> int:
    """Return the same for a body that was skimmed."""
    places = {name.decode(): spans.get(name, (0, 0)) for name in NAMES}
    return _most(
        {name: bytes(view[begin : min(end, begin + LONGEST_HELD + 1)]) for name, (begin, end) in places.items()}
    )


def _most(fields: Mapping[str, bytes]) -> int:
    if _is_several(fields.get("n", b"")) or _is_several(fields.get("best_of", b"")):
        return _SEVERAL
    raw = fields.get(_PARAMETERS, b"")
    if b"n" not in raw and b"\\" not in raw:  # a backslash may hide the name: "\\u006e"
        return _ONE
    if len(raw) > LONGEST_HELD:
        return _SEVERAL
    try:
        each = _decode_list(raw) if raw.lstrip().startswith(b"[") else [_decode(raw)]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _SEVERAL if any(map(_is_several, _counts(raw))) else _ONE
    return _SEVERAL if any(_is_several(bytes(one.get("n", b""))) for one in each) else _ONE


def _counts(raw: bytes) -> list[bytes]:
    """Return the same counts of parameters that only Python engines read, as JSON: with NaN, or half of a surrogate."""
    try:
        found: Any = json.loads(raw.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return []  # no engine can read them
    each = found if isinstance(found, list) else [found]
    return [json.dumps(one["n"]).encode() for one in each if isinstance(one, dict) and "n" in one]


def _is_several(raw: bytes) -> bool:
    """Return whether a value stands for more than one; engines read 2, 2.0, "2" and "\\u0032" alike."""
    if not raw:
        return False
    try:
        number = json.loads(raw) if raw.startswith(b'"') else raw
        return float(number) > 1.0
    except (ValueError, RecursionError):
        return False
