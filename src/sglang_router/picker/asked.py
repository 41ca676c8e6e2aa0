"""Read what Envoy says of a request: its head, which endpoints may get it, and which one has served it.

    request_of(headers)   --> Request     the head; pseudo-headers are its method and target
    subset_of(message)    --> the endpoints to choose from, as the gateway wants; None: any
    served_of(message)    --> the endpoint whose answer this is; "" when the gateway does not say

Where they stand is the endpoint picker protocol of the Gateway API Inference Extension (its proposal 004).
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import unquote

from sglang_router.errors import BadHTTP, RouterError
from sglang_router.wire.request import Headers, Request

DESTINATION: Final = "x-gateway-destination-endpoint"
"""The header, and the key in the metadata, that says where a request goes."""
_PEER: Final = re.compile(r"ipv[46]:(.*):[0-9]+")
_SUBSET_SPACE: Final = "envoy.lb.subset_hint"
_SUBSET: Final = "x-gateway-destination-endpoint-subset"
_SERVED_SPACE: Final = "envoy.lb"
_SERVED: Final = "x-gateway-destination-endpoint-served"


def request_of(message: Any) -> Request:
    """Return the request whose `HttpHeaders` these are. What cannot be one has a refusal."""
    found: dict[bytes, bytes] = {}
    fields: Headers = []
    for name, value in headers_of(message):
        if name.startswith(b":"):
            found[name] = value
        else:
            fields.append((name, value))
    method, target = found.get(b":method", b""), found.get(b":path", b"")
    refusal: RouterError | None = None
    if not method or not target.startswith(b"/"):
        refusal = BadHTTP("The gateway sent no method, or no path that begins with a slash.")
        method, target = method or b"GET", b"/"
    request = Request(method, target, target.partition(b"?")[0], fields)
    request.refusal = refusal
    return request


def headers_of(message: Any) -> Headers:
    """Return the fields of an `HttpHeaders` in the order they came."""
    return [(each.key.lower().encode(), each.raw_value or each.value.encode()) for each in message.headers.headers]


def length_of(request: Request) -> int:
    """Return the announced length of the body; -1 when there is none."""
    for name, value in request.headers:
        if name == b"content-length" and value.isdigit() and len(value) < 19:
            return int(value)
    return -1


def peer_of(request: Request, gateway: str) -> str:
    """Return the client's address, as the gateway tells: the last one in X-Forwarded-For, which it has added itself.

    gateway  its own address, as gRPC shows it, for a gateway that does not tell
    """
    for name, value in reversed(request.headers):
        if name == b"x-forwarded-for":
            return value.rpartition(b",")[2].strip()[:64].decode("latin-1")
    return _PEER.sub(r"\1", unquote(gateway)).strip("[]")


def subset_of(message: Any) -> frozenset[str] | None:
    """Return the endpoints of which one must be chosen; None when any may be."""
    value = _metadata(message, _SUBSET_SPACE, _SUBSET)
    if value is None:
        return None
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return frozenset(each.strip() for each in value.string_value.split(",") if each.strip())
    return frozenset(each.string_value for each in value.list_value.values if each.string_value)


def served_of(message: Any) -> str:
    """Return the endpoint that has served the request; "" when the gateway does not say."""
    value = _metadata(message, _SERVED_SPACE, _SERVED)
    return "" if value is None else str(value.string_value)


def _metadata(message: Any, space: str, key: str) -> Any:
    """Return what the gateway's filters have left under a key; None: nothing."""
    for entry in message.metadata_context.filter_metadata:
        if entry.key == space and key in entry.value.fields:
            return entry.value.fields[key]
    return None
