"""Decode what routing needs of a JSON body, each member as raw JSON: one reader per kind of request.

    reader = BodyReader("chat", ("tools", "messages"), ("session_id",))
    fields = reader.decode(body)           the fast way: one pass of msgspec over the body, nothing else is decoded
    reader.decode_slowly(body)             the tolerant way, for what the fast decoder refuses
    plain(fields.session_id)               the text of such a member;  held(fields.metadata, "user_id"): of one inside
    reader.named(view, spans)              the same fields of a body that was skimmed, without those of the text

`routing.facts` makes facts of the fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final

import msgspec

from sglang_router.errors import InvalidJSON
from sglang_router.routing.keys import bounded
from sglang_router.routing.reserved import HOLDERS, RESERVED, first_reserved
from sglang_router.routing.sequences import NAMES as SEQUENCES
from sglang_router.routing.skim import Content, Spans
from sglang_router.routing.tolerant import members

_MOST_FIELD: Final = 1 << 16
"""Bytes of each field of a large body that count, but for those of the text: names and salts are far shorter."""
_SCAFFOLD: Final = re.compile(
    rb'\s*\[\s*\{\s*(?:"(?:role|type)"\s*:\s*"[a-z_]{1,16}"\s*,\s*)*"(?:content|text)"\s*:\s*'
    rb'(?:\[\s*\{\s*"type"\s*:\s*"[a-z_]{1,16}"\s*,\s*"text"\s*:\s*)?'
)
"""The constant beginning of a list of messages, up to the first content."""

_LONGEST_HOLDER: Final = 1 << 13
"""Bytes of an object in which a member is looked for."""
_HOLDER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_DIGITS: Final = b"0123456789-"
_QUOTE, _OPENS_OBJECT = b'"{'

NOTHING: Final = frozenset((b"", b"null", b"[]", b'""'))
"""Values that mean the same as a missing field: some clients send every field they know."""
_LONGEST_DIVISION: Final = 4096
"""Bytes of adapter and salt that are kept as they came."""
NAMESPACE: Final = ("model", "lora_path", "lora_id", "cache_salt")
"""Fields that divide the engines' caches: a prefix cached for one value is useless for another."""


_Held: Any = msgspec.defstruct("Held", [(field, None, None) for field in RESERVED])
"""What may not be in `HOLDERS`."""


class BodyReader:
    """Reads the bodies of one endpoint.

    decode  decodes the fields that routing needs, each as raw JSON; a ValidationError for a reserved one with a value
    names   of these fields, as they stand in a body
    text    returns the decoded fields that make up the routing text
    """

    __slots__ = ("_others", "_struct", "_usual", "decode", "names", "text")

    def __init__(self, name: str, text: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
        """others: further fields that are decoded."""
        self._others = (*NAMESPACE, "stream", *others)
        names = dict.fromkeys((*self._others, "nothing", *text))
        raw = msgspec.Raw(b"")
        needed: list[tuple[str, Any, Any]] = [(field, msgspec.Raw, raw) for field in names]
        # Reserved fields may only be null: so msgspec looks for them, and a usual body costs no further check.
        reserved: list[tuple[str, Any, Any]] = [(field, None, None) for field in RESERVED]
        reserved += [(holder, _Held | None, None) for holder in HOLDERS]
        self._struct = struct = msgspec.defstruct(f"{name}_body", [*needed, *reserved], gc=False)
        self.names = frozenset(field.encode() for field in (*names, *RESERVED, *HOLDERS)) | SEQUENCES
        self.decode: Callable[[Content], Any] = msgspec.json.Decoder(struct).decode
        # attrgetter returns a tuple only for two names or more, so add the name of a field that is always empty.
        self.text: Callable[[Any], tuple[msgspec.Raw, ...]] = attrgetter(*text, *(["nothing"] * (2 - len(text))))
        self._usual = b"\0"  # the last scaffold: most texts of an endpoint have the same

    def named(self, view: memoryview, spans: Spans) -> Any:
        """Return the fields at these places as `decode` does, but those of the text, and only what counts of each."""
        fields = {}
        for name in self._others:
            begin, end = spans.get(name.encode(), (0, 0))
            fields[name] = msgspec.Raw(bytes(view[begin : min(end, begin + _MOST_FIELD)]))
        return self._struct(**fields)

    def decode_slowly(self, body: Content) -> tuple[Any, str]:
        """Decode what `decode` refuses: return the fields, and the name of a reserved one that has a value.

        Raises: InvalidJSON, when a Python engine would refuse the body, too.
        """
        try:
            found = members(bytes(body))
        except (ValueError, RecursionError) as exc:
            raise InvalidJSON(f"The body is not a JSON object: {exc}.") from None
        names = self._struct.__struct_fields__
        needed = {
            name: msgspec.Raw(raw)
            for name, raw in found.items()
            if name in names and name not in RESERVED and name not in HOLDERS
        }
        return self._struct(**needed), first_reserved(found.items())

    def scaffold(self, text: bytes) -> int:
        """Return the length of a text's scaffold, in bytes; 0 without one.

        The last scaffold is tried first, which is faster than the regular expression.
        """
        usual = self._usual
        size = len(usual)
        if text.startswith(usual) and text[size : size + 1] == b'"':
            return size
        match = _SCAFFOLD.match(text)
        if match is None:
            return 0
        self._usual = match.group()
        return match.end()


def plain(raw: bytes) -> bytes:
    """Return the text of a JSON string as it stands, or a number; b"" for anything else."""
    if not raw:
        return b""
    if raw[0] == _QUOTE:
        return raw[1:-1]
    return raw if raw[0] in _DIGITS else b""


def held(raw: bytes, name: str) -> bytes:
    """Return a member of a JSON object as `plain` does; b"" without one."""
    if not raw or raw[0] != _OPENS_OBJECT or len(raw) > _LONGEST_HOLDER:
        return b""
    try:
        inner = _HOLDER.decode(raw).get(name)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return b""
    return plain(bytes(inner)) if inner else b""


def division_of(fields: Any) -> bytes:
    """Return adapter and salt joined, b"" when they are empty; what is very long as a digest."""
    divided = (_given(fields.lora_path), _given(fields.lora_id), _given(fields.cache_salt))
    division = b"\0".join(divided) if any(divided) else b""
    return division if len(division) <= _LONGEST_DIVISION else bounded(division)


def _given(field: msgspec.Raw) -> bytes:
    """Return a field's value; b"" when it means the same as a missing field."""
    value = bytes(field)
    return b"" if value in NOTHING else value
