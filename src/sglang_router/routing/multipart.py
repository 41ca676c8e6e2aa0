"""The model in a form (multipart/form-data, RFC 7578), which is how audio is sent: its name, and where it stands.

    --boundary            the first line; each later delimiter has a line break in front
    header lines          one of them names the field
                          an empty line
    value
    --boundary--

A form is walked from one delimiter to the next, so that nothing inside a value is taken for a field. Of a large form
the beginning and the end are walked, where clients put the small fields: before the file, or after it. Of several
fields `model` the last one counts, as for engines.
"""

from __future__ import annotations

import re
from typing import Final

from sglang_router.routing.model_names import is_name, text_of

_WALKED: Final = 1 << 19
"""Bytes that are walked at each end: no step of the event loop may grow with a body."""
_MOST_PARTS: Final = 256
"""Parts that are looked at, at each end."""
_FIRST_LINE: Final = re.compile(rb"(?:\r\n)?(--[^\r\n]{1,200}?)[ \t]*\r\n")
_DISPOSITION: Final = re.compile(rb"content-disposition[ \t]*:[ \t]*form-data[ \t]*(;[^\r\n]*)", re.IGNORECASE)
_PARAMETER: Final = re.compile(rb';[ \t]*([^=;"\s]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))')


def model_of(body: bytes | bytearray) -> bytes:
    """Return the field `model` of a form as JSON text; b"" without one."""
    span = span_of(body)
    if span is None:
        return b""
    name = body[span[0] : span[1]].decode("utf-8", "replace")
    return text_of(name) if is_name(name) else b""


def span_of(body: bytes | bytearray) -> tuple[int, int] | None:
    """Return where the value of the field `model` of a form begins and ends; None without one."""
    first = _FIRST_LINE.match(body, 0, 256)
    if first is None:
        return None
    delimiter = b"\r\n" + first[1]
    span = None
    tail = len(body) - _WALKED
    if tail > _WALKED:
        at = body.find(delimiter, tail)
        span = _model(body, delimiter, _after_line(body, at + len(delimiter)), len(body)) if at >= 0 else None
    if span is None:
        span = _model(body, delimiter, first.end(), len(body) if tail <= _WALKED else _WALKED)
    return span


def _model(body: bytes | bytearray, delimiter: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Return where the value is of the last field `model` of the parts from `at`, where the header lines of one begin,
    to `end`."""
    found = None
    for _ in range(_MOST_PARTS):
        next_one = body.find(delimiter, at - 2, end) if at else -1
        if next_one < 0:
            break
        value = body.find(b"\r\n\r\n", at - 2, min(next_one, at + 4096))
        if value >= 0 and _field(bytes(body[at:value])) == b"model":
            found = (value + 4, next_one)
        at = _after_line(body, next_one + len(delimiter))
    return found


def _after_line(body: bytes | bytearray, at: int) -> int:
    """Return where the line behind a delimiter begins; 0 behind the last one."""
    end = -1 if body.startswith(b"--", at) else body.find(b"\r\n", at, at + 256)
    return end + 2 if end >= 0 else 0


def _field(head: bytes) -> bytes:
    """Return the name of the field that these header lines describe."""
    disposition = _DISPOSITION.search(head)
    parameters = _PARAMETER.findall(disposition[1]) if disposition is not None else ()
    return next((quoted or plain for key, quoted, plain in parameters if key.lower() == b"name"), b"")
