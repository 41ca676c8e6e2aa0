"""What routing needs of a request, read once.

`ENDPOINTS` is the table of what the router relays: for each path, the fields of the body that make up its routing text, in
the order in which the engine's template puts them before the model. The raw bytes of these fields are the routing text:
exact in order, roles and images, nothing decoded, compared at the speed of memory. What must never be matched across
(model, adapter, cache salt) is not text but *namespace*: each has a tree of its own.

    {"model":"m","tools":[...],"messages":[{"role":"system","content":"You ..."}, ...],"stream":true}
       |            |             '--- scaffold ----------------'  |                       |
       namespace    '-- text: tools, then messages ----------------'                       streaming

The scaffold (brackets, keys and role in front of the first content) is equal in all requests; it is part of the text,
but a match of nothing more counts as none.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from sglang_router.errors import InvalidJSON

_SCAFFOLD = re.compile(
    rb'\s*\[\s*\{\s*(?:"(?:role|type)"\s*:\s*"[a-z_]{1,16}"\s*,\s*)*"(?:content|text)"\s*:\s*'
    rb'(?:\[\s*\{\s*"type"\s*:\s*"[a-z_]{1,16}"\s*,\s*"text"\s*:\s*)?'
)
"""The constant beginning of a list of messages, up to the first content."""


class Endpoint(msgspec.Struct, frozen=True):
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


def _decoder(endpoint: Endpoint) -> msgspec.json.Decoder[Any]:
    fields = dict.fromkeys((*NAMESPACE, "stream", *endpoint.text))
    raw = msgspec.Raw(b"")
    struct = msgspec.defstruct(f"{endpoint.name}_body", [(f, msgspec.Raw, raw) for f in fields], gc=False)
    return msgspec.json.Decoder(struct)


_DECODERS = {endpoint: _decoder(endpoint) for endpoint in ENDPOINTS.values() if endpoint.json}


def read(endpoint: Endpoint, body: bytes, routing_key: bytes = b"") -> Facts:
    """The facts of one request.

    Raises: InvalidJSON when the body is not a JSON object; what is inside is the engine's to judge.
    """
    facts = Facts(endpoint, routing_key=routing_key, size=len(body))
    if not endpoint.json:
        return facts
    try:
        fields = _DECODERS[endpoint].decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise InvalidJSON(f"The body is not a JSON object: {exc}.") from None
    facts.model = model = _given(fields.model)
    lora, adapter, salt = fields.lora_path, fields.lora_id, fields.cache_salt
    if lora or adapter or salt:
        divided = (model, _given(lora), _given(adapter), _given(salt))
        facts.namespace = b"\0".join(divided) if any(divided[1:]) else model
    else:
        facts.namespace = model
    facts.streaming = bytes(fields.stream) == b"true"
    names = endpoint.text
    # The length comes first: a prompt is long, and to compare it would copy it.
    parts = [p for name in names if len(p := getattr(fields, name)) > 4 or bytes(p) not in _NOTHING]
    if parts:
        facts.text = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
        if match := _SCAFFOLD.match(facts.text):
            facts.scaffold = match.end()
    return facts


def _given(field: msgspec.Raw) -> bytes:
    value = bytes(field)
    return b"" if value in _NOTHING else value
