"""Find the id of a response at the beginning of an answer to POST /v1/responses.

    {"id":"resp_1f3a","object":"response", ...
    event: response.created
    data: {"type":"response.created","response":{"id":"resp_1f3a", ...

Engines write the id first. An answer in which it does not stand where it is looked for (compressed, or cut by a chunk)
is not remembered: whoever asks about it is served all the same, by asking the workers in turn.
"""

from __future__ import annotations

import re
from typing import Final

_LOOKED_AT: Final = 4096
"""Bytes of an answer in which the id is looked for."""
_ID: Final = re.compile(rb'"id"[ \t]*:[ \t]*"(resp_[0-9A-Za-z_.~-]{1,200})"')


def response_id(data: bytes) -> bytes:
    """Return the id of the response that an answer begins; b"" when it is not there."""
    match = _ID.search(data, 0, _LOOKED_AT)
    return b"" if match is None else match[1]
