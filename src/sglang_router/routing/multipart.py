"""The model in a form (multipart/form-data, RFC 7578), which is how audio is sent: its name, and where it stands.

    --boundary            the first line; each later delimiter has a line break in front
    header lines          one of them names the field
                          an empty line
    value
    --boundary--

A form is walked from one delimiter to the next, so that nothing inside a value is taken for a field. Of a large form
the beginning and the end are walked, where clients put the small fields: before the file, or after it. Of several
fields `model` the last one counts, as for engines.

A key may be for some models only, so a form must not name one model here and another one to an engine. Where readers of
forms differ (two names of one field, `name*`, long header lines, very many parts), it names none.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from sglang_router.routing.model_names import is_name, text_of

_WALKED: Final = 1 << 19
"""Bytes that are walked at each end: no step of the event loop may grow with a body."""
_MOST_PARTS: Final = 256
"""Parts that are looked at, at each end."""
_FIRST_LINE: Final = re.compile(rb"(?:\r\n)?(--[^\r\n]{1,200}?)[ \t]*\r\n")
_LONGEST_HEAD: Final = 4096
"""Bytes of the header lines of a part."""
_LONGEST_LINE: Final = 1536
"""Bytes of the one that names the field: a file's name may be in it twice."""
_DISPOSITION: Final = re.compile(rb"(?:\A|[\r\n])content-disposition[ \t]*:([^\r\n]*)", re.IGNORECASE)
_PARAMETER: Final = re.compile(rb';[ \t]*([^=;"\s]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))')


class _Unsure(Exception):
    """Engines may read another name of a field."""


def model_of(body: bytes | bytearray) -> bytes:
    """Return the field `model` of a form as JSON text; b"" without one."""
    span = span_of(body)
    if span is None:
        return b""
    name = body[span[0] : span[1]].decode("utf-8", "replace")
    return text_of(name) if is_name(name) else b""


def span_of(body: bytes | bytearray) -> tuple[int, int] | None:
    """Return where the value of the field `model` of a form begins and ends; None without one, and where nobody can
    tell what engines take for one."""
    first = _FIRST_LINE.match(body, 0, 256)
    if first is None:
        return None
    delimiter = b"\r\n" + first[1]
    tail = len(body) - _WALKED
    try:
        span = _model(body, delimiter, first.end(), len(body) if tail <= _WALKED else _WALKED)
        if tail > _WALKED and (at := body.find(delimiter, tail)) >= 0:
            span = _model(body, delimiter, _after_line(body, at + len(delimiter)), len(body)) or span
    except _Unsure:
        return None
    return span


def _model(body: bytes | bytearray, delimiter: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Return where the value is of the last field `model` of the parts from `at`, where the header lines of one begin,
    to `end`. Raises: _Unsure."""
    found = None
    for _ in range(_MOST_PARTS):
        next_one = body.find(delimiter, at - 2, end) if at else -1
        if next_one < 0:
            return found
        value = body.find(b"\r\n\r\n", at - 2, min(next_one, at + _LONGEST_HEAD))
        if value < 0 and next_one - at >= _LONGEST_HEAD:
            raise _Unsure
        if value >= 0 and _field(bytes(body[at:value])) == b"model":
            found = (value + 4, next_one)
        at = _after_line(body, next_one + len(delimiter))
    raise _Unsure


def _after_line(body: bytes | bytearray, at: int) -> int:
    """Return where the line behind a delimiter begins; 0 behind the last one."""
    end = -1 if body.startswith(b"--", at) else body.find(b"\r\n", at, at + 256)
    return end + 2 if end >= 0 else 0


def _field(head: bytes) -> bytes:
    """Return the name of the field that these header lines describe. Raises: _Unsure, when they have several."""
    lines = _DISPOSITION.findall(head)
    if len(lines) > 1 or (lines and len(lines[0]) > _LONGEST_LINE):
        raise _Unsure
    parameters = _PARAMETER.findall(lines[0]) if lines else ()
    names = {quoted or plain for key, quoted, plain in parameters if key.lower() == b"name"}
    names |= {_decoded(quoted or plain) for key, quoted, plain in parameters if key.lower().startswith(b"name*")}
    if len(names) > 1:
        raise _Unsure
    return names.pop() if names else b""


def _decoded(value: bytes) -> bytes:
    """Return the value of a parameter `name*` (RFC 8187): charset'language'text."""
    return unquote_to_bytes(value.rpartition(b"'")[2])
