"""Find the id of what a worker has made and keeps, at the beginning of its answer.

    POST /v1/responses         {"id":"resp_1f3a","object":"response", ...
                               event: response.created
                               data: {"type":"response.created","response":{"id":"resp_1f3a", ...
    POST /v1/files             {"id":"file-9c","object":"file", ...           any form of id, before anything nested:
    POST /v1/batches           {"object":"batch","id":"batch_1", ...          what stands inside of `metadata` is the
    POST /v1/conversations     {"id":"conv_7", ...                            client's, and must not point elsewhere

Engines write the id first. An answer in which it does not stand where it is looked for (compressed, or cut by a chunk)
is not remembered: whoever asks about it is served all the same, by asking the workers in turn.
"""

from __future__ import annotations

import re
from typing import Final

_LOOKED_AT: Final = 4096
"""Bytes of an answer in which the id is looked for."""
_RESPONSE: Final = re.compile(rb'"id"[ \t]*:[ \t]*"(resp_[0-9A-Za-z_.~-]{1,200})"')
_OBJECT: Final = re.compile(rb'[^{\[]*\{[^{}\[\]]*?"id"[ \t]*:[ \t]*"([0-9A-Za-z_.~:-]{1,200})"')


def response_id(data: bytes) -> bytes:
    """Return the id of the response that an answer begins; b"" when it is not there."""
    match = _RESPONSE.search(data, 0, _LOOKED_AT)
    return b"" if match is None else match[1]


def object_id(data: bytes) -> bytes:
    """Return the id of the file, batch or conversation that an answer describes; b"" when it is not there."""
    match = _OBJECT.match(data, 0, _LOOKED_AT)
    return b"" if match is None else match[1]


def answered_id(endpoint: str, data: bytes) -> bytes:
    """Return the id in an answer of an endpoint that keeps things, by its name; b"" when it is not there."""
    return response_id(data) if endpoint == "responses" else object_id(data)
