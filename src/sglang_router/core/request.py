"""What routing needs of a request, read once.

`ENDPOINTS` is the table of what the router relays: for each path, the fields of the body that make up its routing text,
in the order in which the engine's template puts them before the model. The raw bytes of these fields are the routing
text: exact in order, roles and images, nothing decoded, compared at the speed of memory. What must never be matched
across (model, adapter, cache salt) is not text but *namespace*: each has a tree of its own.

    {"model":"m","tools":[...],"messages":[{"role":"system","content":"You ..."}, ...],"stream":true}
       |            |             '--- scaffold ----------------'  |                       |
       namespace    '-- text: tools, then messages ----------------'                       streaming

The scaffold (brackets, keys and role in front of the first content) is equal in all requests; it is part of the text,
but a match of nothing more counts as none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import blake2b
from operator import attrgetter
from typing import Any

import msgspec

from sglang_router.errors import InvalidJSON

_CLOSERS = b']"'
_LONG_NAMESPACE = 128
_SCAFFOLD = re.compile(
    rb'\s*\[\s*\{\s*(?:"(?:role|type)"\s*:\s*"[a-z_]{1,16}"\s*,\s*)*"(?:content|text)"\s*:\s*'
    rb'(?:\[\s*\{\s*"type"\s*:\s*"[a-z_]{1,16}"\s*,\s*"text"\s*:\s*)?'
)
"""The constant beginning of a list of messages, up to the first content."""


class Endpoint(msgspec.Struct, frozen=True, eq=False):
    """One relayed path.

    name    short name, the `endpoint` label of metrics
    text    fields of the routing text, in template order; empty where the KV cache plays no part
    json    False for bodies the router does not read at all
    id      prefix of generated request ids
    """

    name: str
    text: tuple[str, ...]
    json: bool = True
    id: bytes = b"req-"


ENDPOINTS: dict[bytes, Endpoint] = {
    b"/generate": Endpoint("generate", ("text", "input_ids", "image_data"), id=b"gnt-"),
    b"/v1/chat/completions": Endpoint("chat", ("tools", "messages"), id=b"chatcmpl-"),
    b"/v1/completions": Endpoint("completions", ("prompt",), id=b"cmpl-"),
    b"/v1/responses": Endpoint("responses", ("tools", "instructions", "input"), id=b"resp-"),
    b"/v1/messages": Endpoint("messages", ("tools", "system", "messages"), id=b"msg-"),
    b"/v1/embeddings": Endpoint("embeddings", ("input",)),
    b"/v1/classify": Endpoint("classify", ("text", "input")),
    b"/v1/score": Endpoint("score", ("query", "text_1", "items", "text_2")),
    b"/v1/rerank": Endpoint("rerank", ("query", "documents")),
    b"/rerank": Endpoint("rerank", ("query", "documents")),
    b"/v1/tokenize": Endpoint("tokenize", ()),
    b"/v1/detokenize": Endpoint("detokenize", ()),
    b"/v1/audio/transcriptions": Endpoint("transcriptions", (), json=False),
}

NAMESPACE = ("model", "lora_path", "lora_id", "cache_salt")
"""Fields that divide the engines' caches: a prefix cached for one value is worth nothing for another."""


_NOTHING = frozenset((b"", b"null", b"[]", b'""'))
"""Values that say no more than a missing field: some clients send every field they know."""


class Facts(msgspec.Struct, gc=False):
    """A request as the core sees it.

    endpoint     the row of ENDPOINTS
    namespace    model, adapter and salt; empty when none is named
    text         the routing text, bytes
    scaffold     how many bytes at its start do not count as matched
    streaming    whether the client asked for a stream
    model        the model's name as sent, JSON text, or b""
    routing_key  header x-smg-routing-key, or b""
    size         length of the body, bytes
    """

    endpoint: Endpoint
    namespace: bytes = b""
    text: bytes = b""
    scaffold: int = 0
    streaming: bool = False
    model: bytes = b""
    routing_key: bytes = b""
    size: int = 0


class _Reader(msgspec.Struct):
    """How the body of one endpoint is read: a decoder for the fields that matter, a getter of the text among them."""

    decode: Callable[[bytes], Any]
    text: Callable[[Any], tuple[msgspec.Raw, ...]]


def _reader(endpoint: Endpoint) -> _Reader:
    names = dict.fromkeys((*NAMESPACE, "stream", *endpoint.text))
    raw = msgspec.Raw(b"")
    struct = msgspec.defstruct(f"{endpoint.name}_body", [(name, msgspec.Raw, raw) for name in names], gc=False)
    # Two names more, cut off again by the reader: with fewer than two, attrgetter gives no tuple.
    text = attrgetter(*endpoint.text, "stream", "stream")
    return _Reader(msgspec.json.Decoder(struct).decode, text)


_READERS = {endpoint: _reader(endpoint) for endpoint in ENDPOINTS.values() if endpoint.json}


def read(endpoint: Endpoint, body: bytes, routing_key: bytes = b"") -> Facts:
    """The facts of one request.

    Raises: InvalidJSON when the body is not a JSON object; what is inside is the engine's to judge.
    """
    size = len(body)
    if not endpoint.json:
        return Facts(endpoint, routing_key=routing_key, size=size)
    reader = _READERS[endpoint]
    try:
        fields = reader.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise InvalidJSON(f"The body is not a JSON object: {exc}.") from None
    model = _given(fields.model)
    # The length comes first: a prompt is long, and to compare it would copy it.
    text = b"".join([p for p in reader.text(fields)[:-2] if len(p) > 4 or bytes(p) not in _NOTHING])
    scaffold = 0
    if text:
        # A chat's next turn goes on where this bracket stands: without it the turns are one text.
        if text[-1] in _CLOSERS:
            text = text[:-1]
        if match := _SCAFFOLD.match(text):
            scaffold = match.end()
    streaming = bytes(fields.stream) == b"true"
    return Facts(endpoint, _namespace(model, fields), text, scaffold, streaming, model, routing_key, size)


def _namespace(model: bytes, fields: Any) -> bytes:
    """Model, adapter and salt in one; clients choose them, so a long one is kept as its digest."""
    lora, adapter, salt = fields.lora_path, fields.lora_id, fields.cache_salt
    if lora or adapter or salt:
        divided = (_given(lora), _given(adapter), _given(salt))
        model = b"\0".join((model, *divided)) if any(divided) else model
    return model if len(model) <= _LONG_NAMESPACE else blake2b(model, digest_size=32).digest()


def _given(field: msgspec.Raw) -> bytes:
    value = bytes(field)
    return b"" if value in _NOTHING else value


def with_rank(body: bytes, rank: int) -> bytes:
    """A body that `read` has taken, with the field by which engines choose the data-parallel rank.

    It stands at the end of the object, where it wins over one of the client's; every other byte stays as it is.
    """
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip().endswith(b"{") else b","
    return b'%b%b"data_parallel_rank":%d%b' % (body[:end], comma, rank, body[end:])
