"""The model in a form (multipart/form-data, RFC 7578), which is how audio is sent.

Only the beginning and the end of a body are searched, where clients put the small fields: before the file, or after it.
"""

from __future__ import annotations

import re

from sglang_router.routing.model_names import LONGEST_NAME, is_name, text_of

_SEARCHED = 1 << 14
"""Bytes that are searched at each end."""
_FIELD = re.compile(
    rb'content-disposition[ \t]*:[ \t]*form-data[ \t]*;[ \t]*name="?model"?[ \t]*\r\n'
    rb"(?:[^\r\n]{1,256}\r\n){0,8}\r\n([^\r\n]{1,%d})\r\n--" % (4 * LONGEST_NAME),
    re.IGNORECASE,
)


def model_of(body: bytes | bytearray) -> bytes:
    """Return the field `model` of a form as JSON text; b"" without one."""
    found = _FIELD.search(body, 0, _SEARCHED)
    if found is None and len(body) > _SEARCHED:
        found = _FIELD.search(body, max(_SEARCHED // 2, len(body) - _SEARCHED))
    if found is None:
        return b""
    name = found.group(1).decode("utf-8", "replace")
    return text_of(name) if is_name(name) else b""
