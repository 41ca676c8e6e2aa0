"""Write what a picker answers to Envoy.

    chosen(endpoints, sets, removes)     the answer to a request's headers: where it goes, and which fields change
    refused(status, fields, body)        the whole answer to the client; nothing reaches a worker
    headers(sets), trailers(kind)        pass the head, or the trailers, of an answer on
    piece(kind, data, end)               give a piece of a body back: in full duplex, what is not given back is lost

The endpoints stand in a header and in the metadata, because gateways read one or the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sglang_router.picker.asked import DESTINATION
from sglang_router.picker.messages import OVERWRITE, ProcessingResponse
from sglang_router.wire.request import Headers

REQUEST_BODY: Final = "request_body"
RESPONSE_BODY: Final = "response_body"
REQUEST_TRAILERS: Final = "request_trailers"
RESPONSE_TRAILERS: Final = "response_trailers"
_SPACE: Final = "envoy.lb"


def chosen(endpoints: str, sets: Headers, removes: Iterable[bytes]) -> Any:
    """Return the answer to a request's headers. endpoints: ip:port, or several with commas between, in order."""
    reply = ProcessingResponse()
    common = reply.request_headers.response
    common.clear_route_cache = True  # routes may depend on the endpoint
    mutation = common.header_mutation
    _set(mutation, [(DESTINATION.encode(), endpoints.encode()), *sets])
    mutation.remove_headers.extend([name.decode("latin-1") for name in removes])
    space = reply.dynamic_metadata.fields[_SPACE].struct_value
    space.fields[DESTINATION].string_value = endpoints
    return reply


def refused(status: int, fields: Headers, body: bytes) -> Any:
    """Return the whole answer of the router to a request."""
    reply = ProcessingResponse()
    answer = reply.immediate_response
    answer.status.code = status
    answer.body = body
    _set(answer.headers, fields)
    return reply


def headers(sets: Headers) -> Any:
    """Return the answer to the head of a worker's answer. sets: the fields that are added."""
    reply = ProcessingResponse()
    reply.response_headers.SetInParent()
    if sets:
        _set(reply.response_headers.response.header_mutation, sets)
    return reply


def trailers(kind: str) -> Any:
    """Return the answer to trailers, which pass as they are."""
    reply = ProcessingResponse()
    getattr(reply, kind).SetInParent()
    return reply


def piece(kind: str, data: bytes, end: bool) -> Any:
    """Return a piece of a body. end: it is the last, and no trailers follow."""
    reply = ProcessingResponse()
    streamed = getattr(reply, kind).response.body_mutation.streamed_response
    streamed.body = data
    streamed.end_of_stream = end
    return reply


def _set(mutation: Any, fields: Headers) -> None:
    for name, value in fields:
        option = mutation.set_headers.add(append_action=OVERWRITE)
        option.header.key = name.decode("latin-1")
        option.header.raw_value = value


def fields_of(lines: bytes) -> Headers:
    """Return the fields of a head, or of a part of one, without its start line and what frames a body in HTTP/1.1."""
    found: Headers = []
    for line in lines.split(b"\r\n"):
        name, colon, value = line.partition(b": ")
        if colon and not name.startswith(b"HTTP/") and name not in (b"content-length", b"connection"):
            found.append((name, value))
    return found
