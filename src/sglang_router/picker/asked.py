"""Read what Envoy says of a request: its head, which endpoints may get it, and which one has served it.

    request_of(headers, limits) --> Request     the head; pseudo-headers are its method and target
    subset_of(message)          --> the endpoints to choose from, as the gateway wants; None: any
    served_of(message)          --> the endpoint whose answer this is; "" when the gateway does not say

A head is held to what the router's own port holds it to (`wire.request`): a gateway may let more pass, and then a line
end in a field would be one in the router's answers and logs.

Where the endpoints stand is the endpoint picker protocol of the Gateway API Inference Extension (its proposal 004).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from sglang_router.errors import BadHTTP, HeadTooLarge, RouterError
from sglang_router.picker.messages import FULL_DUPLEX
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Headers, Request

DESTINATION: Final = "x-gateway-destination-endpoint"
"""The header, and the key in the metadata, that says where a request goes."""
_PEER: Final = re.compile(r"ipv[46]:(.*):[0-9]+")
_SUBSET_SPACE: Final = "envoy.lb.subset_hint"
_SUBSET: Final = "x-gateway-destination-endpoint-subset"
_SERVED_SPACE: Final = "envoy.lb"
_SERVED: Final = "x-gateway-destination-endpoint-served"
_METADATA: Final = 512 << 10
"""Most bytes of metadata that are read: the endpoints of a very large pool."""
_ANSWER_FIELDS: Final = 256
"""Fields at the head of an answer that are read; its status is one of the first."""
_PSEUDO: Final = 8
"""Pseudo-headers, which are no fields of the client."""
_NAME: Final = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")
_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET: Final = re.compile(rb"/[^\x00-\x20\x7f]*")
_STATUS: Final = re.compile(rb"[1-9][0-9][0-9]")


def request_of(message: Any, limits: Limits) -> Request:
    """Return the request whose `HttpHeaders` these are. What cannot be one, or is too large, has a refusal."""
    fields = message.headers.headers
    if len(fields) > limits.header_count + _PSEUDO or message.ByteSize() > limits.head_bytes:
        return _request({}, [], HeadTooLarge())
    found: dict[bytes, bytes] = {}
    headers: Headers = []
    refusal: RouterError | None = None
    for name, value in _pairs(fields):
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value) or name in found:
            refusal = BadHTTP("The gateway sent a header field that HTTP does not allow.")
        elif name.startswith(b":"):
            found[name] = value
        else:
            headers.append((name, value))
    lengths = [value for name, value in headers if name == b"content-length"]
    if len(lengths) > 1 or not all(map(_is_length, lengths)):
        refusal = BadHTTP("Content-Length must be one decimal number.")
        headers = [field for field in headers if field[0] != b"content-length"]
    return _request(found, headers, refusal)


def _request(found: dict[bytes, bytes], headers: Headers, refusal: RouterError | None) -> Request:
    """Make the request. found: the pseudo-headers."""
    method, target = found.get(b":method", b""), found.get(b":path", b"")
    if not _METHOD.fullmatch(method) or not _TARGET.fullmatch(target):
        refusal = refusal or BadHTTP("The gateway sent no method, or no path that begins with a slash.")
        method, target = b"GET", b"/"
    request = Request(method, target, target.partition(b"?")[0], headers)
    request.refusal = refusal
    return request


def _pairs(fields: Iterable[Any]) -> Headers:
    """Return the fields in the order they came."""
    return [(each.key.lower().encode(), each.raw_value or each.value.encode()) for each in fields]


def answered_of(message: Any) -> tuple[int, Headers]:
    """Return the status of an answer whose `HttpHeaders` these are, 0 for one that is none, and its fields."""
    fields = _pairs(islice(message.headers.headers, _ANSWER_FIELDS))
    status = next((value for name, value in fields if name == b":status"), b"")
    return int(status) if _STATUS.fullmatch(status) else 0, [field for field in fields if field[0] != b":status"]


def _is_length(value: bytes) -> bool:
    return value.isdigit() and len(value) < 19


WRONG_MODE: Final = (
    "The gateway must send bodies to the endpoint picker in full duplex: set request_body_mode and response_body_mode"
    " of its ext_proc filter to FULL_DUPLEX_STREAMED, and both trailer modes to SEND."
)


class Modes(NamedTuple):
    """How the gateway sends bodies. A gateway that does not say so is taken for one in full duplex."""

    request: int = FULL_DUPLEX
    response: int = FULL_DUPLEX


def modes_of(message: Any) -> Modes:
    """Return how the gateway sends bodies."""
    if not message.HasField("protocol_config"):
        return Modes()
    return Modes(message.protocol_config.request_body_mode, message.protocol_config.response_body_mode)


def length_of(request: Request) -> int:
    """Return the announced length of the body; -1 when there is none."""
    for name, value in request.headers:
        if name == b"content-length" and _is_length(value):
            return int(value)
    return -1


def peer_of(request: Request, gateway: Callable[[], str]) -> str:
    """Return the client's address, as the gateway tells: the last one in X-Forwarded-For, which it has added itself.

    gateway  returns its own address, as gRPC shows it, for a gateway that does not tell
    """
    for name, value in reversed(request.headers):
        if name == b"x-forwarded-for":
            return value.rpartition(b",")[2].strip()[:64].decode("latin-1")
    return _PEER.sub(r"\1", unquote(gateway())).strip("[]")


def subset_of(message: Any) -> frozenset[str] | None:
    """Return the endpoints of which one must be chosen; None when any may be.

    Raises: HeadTooLarge, when there is more metadata than is read.
    """
    if message.metadata_context.ByteSize() > _METADATA:
        raise HeadTooLarge(f"The gateway sent more than {_METADATA >> 10} KiB of metadata.")
    value = _metadata(message, _SUBSET_SPACE, _SUBSET)
    if value is None:
        return None
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return frozenset(each.strip() for each in value.string_value.split(",") if each.strip())
    return frozenset(each.string_value for each in value.list_value.values if each.string_value)


def served_of(message: Any) -> str:
    """Return the endpoint that has served the request; "" when the gateway does not say, or says too much."""
    if message.metadata_context.ByteSize() > _METADATA:
        return ""
    value = _metadata(message, _SERVED_SPACE, _SERVED)
    return "" if value is None else str(value.string_value)


def _metadata(message: Any, space: str, key: str) -> Any:
    """Return what the gateway's filters have left under a key; None: nothing."""
    for entry in message.metadata_context.filter_metadata:
        if entry.key == space and key in entry.value.fields:
            return entry.value.fields[key]
    return None
