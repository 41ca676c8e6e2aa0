"""Read what routing needs of a request, once.

`ENDPOINTS` is the table of the relayed paths: for each, the fields of the body that make up its routing text, in the
order in which the engine's template puts them before the model. The raw bytes of these fields are the routing text:
exact in order, roles and images, not decoded, fast to compare. Model, adapter and cache salt are not part of the text
but form the *namespace*: prefixes are never matched across namespaces, and each has its own tree.

    {"model":"m","tools":[...],"messages":[{"role":"system","content":"You ..."}, ...],"stream":true}
       |            |             '--- scaffold ----------------'  |                       |
       namespace    '-- text: tools, then messages ----------------'                       streaming

The scaffold (brackets, keys and role before the first content) is the same in all requests. It is part of the text, but
a match of only the scaffold counts as no match.

A body of up to `LARGE` bytes is decoded at once (`read_quickly`). A larger one is skimmed in steps (`Skimming`): to
decode it would hold up all other requests. So is one that the fast decoder refuses, unless it is tiny (`read`): the
tolerant reader takes up to a hundred times as long. All give the same facts. The text ends after `most_text` bytes:
more of it would not lead to a better choice, and would push other prompts out of the memory of prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final

import msgspec

from sglang_router.errors import InvalidJSON
from sglang_router.routing.imprint import Imprint
from sglang_router.routing.keys import LONGEST, bounded
from sglang_router.routing.model_names import LONGEST_TEXT, spelled
from sglang_router.routing.multipart import model_of
from sglang_router.routing.plan import Route
from sglang_router.routing.reserved import HOLDERS, LONGEST_HELD, RESERVED, first_reserved
from sglang_router.routing.skim import Content, Skim, Spans
from sglang_router.routing.tolerant import in_utf8, members

LARGE: Final = 1 << 19
"""Bytes of a body up to which it is decoded at once, which takes 3 ms at most."""
QUICK: Final = 1 << 15
"""Bytes of a body up to which that is so quick that many are decoded in one turn of the event loop."""
TINY: Final = 1 << 12
"""Bytes of a body up to which it is read at once whatever is in it: 2 ms at most."""
MOST_TEXT: Final = 1 << 20
"""Bytes of the routing text that count: more of it takes the tree more than 2 ms."""
_MOST_NAMESPACE: Final = 1 << 16
"""Bytes of each field of the namespace of a large body that count: all names and salts are far shorter."""
_CLOSERS: Final = b']"'
_TRUE: Final = msgspec.Raw(b"true")
_SCAFFOLD: Final = re.compile(
    rb'\s*\[\s*\{\s*(?:"(?:role|type)"\s*:\s*"[a-z_]{1,16}"\s*,\s*)*"(?:content|text)"\s*:\s*'
    rb'(?:\[\s*\{\s*"type"\s*:\s*"[a-z_]{1,16}"\s*,\s*"text"\s*:\s*)?'
)
"""The constant beginning of a list of messages, up to the first content."""


NAMESPACE: Final = ("model", "lora_path", "lora_id", "cache_salt")
"""Fields that divide the engines' caches: a prefix cached for one value is useless for another."""


_Held: Any = msgspec.defstruct("Held", [(field, None, None) for field in RESERVED])
"""What may not be in `HOLDERS`."""


class _Reader:
    """Reads the bodies of one endpoint.

    decode  decodes the fields that routing needs, each as raw JSON; a ValidationError for a reserved one with a value
    names   of these fields, as they stand in a body
    text    returns the decoded fields that make up the routing text
    """

    __slots__ = ("_struct", "_usual", "decode", "names", "text")

    def __init__(self, name: str, text: tuple[str, ...]) -> None:
        names = dict.fromkeys((*NAMESPACE, "stream", "nothing", *text))
        raw = msgspec.Raw(b"")
        needed: list[tuple[str, Any, Any]] = [(field, msgspec.Raw, raw) for field in names]
        # Reserved fields may only be null: so msgspec looks for them, and a usual body costs no further check.
        reserved: list[tuple[str, Any, Any]] = [(field, None, None) for field in RESERVED]
        reserved += [(holder, _Held | None, None) for holder in HOLDERS]
        self._struct = struct = msgspec.defstruct(f"{name}_body", [*needed, *reserved], gc=False)
        self.names = frozenset(field.encode() for field in (*names, *RESERVED, *HOLDERS))
        self.decode: Callable[[Content], Any] = msgspec.json.Decoder(struct).decode
        # attrgetter returns a tuple only for two names or more, so add the name of a field that is always empty.
        self.text: Callable[[Any], tuple[msgspec.Raw, ...]] = attrgetter(*text, *(["nothing"] * (2 - len(text))))
        self._usual = b"\0"  # the last scaffold: most texts of an endpoint have the same

    def named(self, view: memoryview, spans: Spans) -> Any:
        """Return the fields at these places as `decode` does, but those of the text, and only what counts of each."""
        fields = {}
        for name in (*NAMESPACE, "stream"):
            begin, end = spans.get(name.encode(), (0, 0))
            fields[name] = msgspec.Raw(bytes(view[begin : min(end, begin + _MOST_NAMESPACE)]))
        return self._struct(**fields)

    def decode_slowly(self, body: Content) -> tuple[Any, str]:
        """Decode what `decode` refuses: return the fields, and the name of a reserved one that has a value.

        Raises: InvalidJSON, when a Python engine would refuse the body, too.
        """
        try:
            found = members(bytes(body))
        except (ValueError, RecursionError) as exc:
            raise InvalidJSON(f"The body is not a JSON object: {exc}.") from None
        names = self._struct.__struct_fields__
        needed = {
            name: msgspec.Raw(raw)
            for name, raw in found.items()
            if name in names and name not in RESERVED and name not in HOLDERS
        }
        return self._struct(**needed), first_reserved(found.items())

    def scaffold(self, text: bytes) -> int:
        """Return the length of a text's scaffold, in bytes; 0 without one.

        The last scaffold is tried first, which is faster than the regular expression.
        """
        usual = self._usual
        size = len(usual)
        if text.startswith(usual) and text[size : size + 1] == b'"':
            return size
        match = _SCAFFOLD.match(text)
        if match is None:
            return 0
        self._usual = match.group()
        return match.end()


class Endpoint:
    """One relayed path.

    path     path, with {name} for a variable segment
    name     short name, the `endpoint` label of metrics
    text     fields of the routing text, in template order; empty where the KV cache is not used
    json     False for bodies of which the router reads only the model of a form
    id       prefix of generated request ids
    methods  methods that are relayed
    route    the Route of all its requests, where method and path are fixed; else None
    """

    __slots__ = ("id", "methods", "name", "path", "reader", "route", "text")

    def __init__(
        self,
        path: bytes,
        name: str,
        text: tuple[str, ...] = (),
        json: bool = True,
        id: bytes = b"req-",
        methods: tuple[bytes, ...] = (b"POST",),
    ) -> None:
        self.path = path
        self.name = name
        self.text = text
        self.reader = _Reader(name, text) if json else None
        self.id = id
        self.methods = methods
        one = len(methods) == 1 and b"{" not in path
        self.route = Route(methods[0].decode(), path.decode(), name) if one else None

    def __repr__(self) -> str:
        return f"<Endpoint {self.path.decode()}>"

    def route_of(self, method: bytes, path: bytes) -> Route:
        """Return the Route of a request with this method and path."""
        return Route(method.decode("latin-1"), path.decode("latin-1"), self.name)

    @property
    def json(self) -> bool:
        """Whether the router reads the body."""
        return self.reader is not None


_ROWS: Final = (
    Endpoint(b"/generate", "generate", ("text", "input_ids", "image_data"), id=b"gnt-"),
    Endpoint(b"/v1/chat/completions", "chat", ("tools", "messages"), id=b"chatcmpl-"),
    Endpoint(b"/v1/completions", "completions", ("prompt",), id=b"cmpl-"),
    Endpoint(b"/v1/responses", "responses", ("tools", "instructions", "input"), id=b"resp-"),
    Endpoint(b"/v1/messages", "messages", ("tools", "system", "messages"), id=b"msg-"),
    Endpoint(b"/v1/embeddings", "embeddings", ("input",)),
    Endpoint(b"/v1/classify", "classify", ("text", "input")),
    Endpoint(b"/v1/score", "score", ("query", "text_1", "items", "text_2")),
    Endpoint(b"/v1/rerank", "rerank", ("query", "documents")),
    Endpoint(b"/rerank", "rerank", ("query", "documents")),
    Endpoint(b"/v1/tokenize", "tokenize"),
    Endpoint(b"/v1/detokenize", "detokenize"),
    Endpoint(b"/v1/audio/transcriptions", "transcriptions", json=False),
)

ENDPOINTS: Final[dict[bytes, Endpoint]] = {row.path: row for row in _ROWS}
"""The relayed endpoints, by path."""

_NOTHING: Final = frozenset((b"", b"null", b"[]", b'""'))
"""Values that mean the same as a missing field: some clients send every field they know."""


class Facts:
    """A request as routing sees it.

    endpoint     the row of ENDPOINTS
    namespace    model, adapter and salt, hashed when long; b"" when the request names none
    text         the routing text
    scaffold     length of its scaffold in bytes, which does not count as matched
    streaming    the client asked for a stream
    model        the model's name as JSON text, in one spelling and of bounded length (`routing.model_names`), or b""
    routing_key  header x-smg-routing-key, or b""
    body         the whole body, as the relay holds it; in another process what stands for it. Only a request that broke
                 workers is recognised by it
    place        of a large body: where its closing brace is, and what separates another member from those before
    reserved     name of a field that only a router may set (`routing.reserved`) and that the body has, or ""
    """

    __slots__ = (
        "body",
        "endpoint",
        "model",
        "namespace",
        "place",
        "reserved",
        "routing_key",
        "scaffold",
        "streaming",
        "text",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        namespace: bytes = b"",
        text: bytes = b"",
        scaffold: int = 0,
        streaming: bool = False,
        model: bytes = b"",
        routing_key: bytes = b"",
        body: Content | Imprint = b"",
    ) -> None:
        self.endpoint = endpoint
        self.namespace = namespace
        self.text = text
        self.scaffold = scaffold
        self.streaming = streaming
        self.model = model
        self.routing_key = routing_key
        self.body = body
        self.place: tuple[int, bytes] | None = None
        self.reserved = ""

    def __repr__(self) -> str:
        return f"<Facts {self.endpoint.name} {len(self.text)} bytes of text>"


def read(endpoint: Endpoint, body: Content, routing_key: bytes = b"", most_text: int = MOST_TEXT) -> Facts:
    """Read the facts of one request at once.

    Raises: InvalidJSON, when the body is not a JSON object; the engine checks its content.
    """
    facts = read_quickly(endpoint, body, routing_key, most_text)
    return read_slowly(endpoint, body, routing_key, most_text) if facts is None else facts


def read_quickly(endpoint: Endpoint, body: Content, routing_key: bytes, most_text: int) -> Facts | None:
    """Return the facts of one request; None when the fast decoder refuses its body."""
    reader = endpoint.reader
    if reader is None:
        return Facts(endpoint, b"", b"", 0, False, model_of(body), routing_key, body)
    try:
        fields = reader.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return _facts(endpoint, reader, fields, _text_of(reader, fields, most_text), routing_key, body)


def read_slowly(endpoint: Endpoint, body: Content, routing_key: bytes, most_text: int) -> Facts:
    """Return the facts of one request that the fast decoder refused.

    Raises: InvalidJSON, when the body is not a JSON object.
    """
    reader = endpoint.reader
    assert reader is not None
    fields, reserved = reader.decode_slowly(body)
    facts = _facts(endpoint, reader, fields, _text_of(reader, fields, most_text), routing_key, body)
    facts.reserved = reserved
    return facts


def _text_of(reader: _Reader, fields: Any, most_text: int) -> bytes:
    """Return the routing text that decoded fields make."""
    parts: list[msgspec.Raw | memoryview] = []
    for part in reader.text(fields):  # faster than a comprehension, which is a call, for usually two parts
        # Check the length first: comparing a long prompt would copy it.
        if len(part) > 4 or bytes(part) not in _NOTHING:
            parts.append(part)  # noqa: PERF401
    if not parts:
        return b""
    # Drop the closing bracket: the next turn of a chat continues at this place, so its text has this one as prefix.
    last = memoryview(parts[-1])
    parts[-1] = last[:-1] if last[-1] in _CLOSERS else last
    text = b"".join(parts)  # copied once, however long it is
    return text[:most_text] if len(text) > most_text else text


class Skimming:
    """Reads the facts of a large body, or of one that the fast decoder refuses, in steps of about a millisecond.

    Raises: InvalidJSON, when it is in another encoding and no text of that.
    """

    __slots__ = ("_body", "_endpoint", "_most_text", "_readable", "_reader", "_routing_key", "_skim", "_whole")

    def __init__(self, endpoint: Endpoint, body: Content, routing_key: bytes = b"", most_text: int = MOST_TEXT) -> None:
        assert endpoint.reader is not None
        self._endpoint = endpoint
        self._reader = endpoint.reader
        self._body = body
        self._routing_key = routing_key
        self._most_text = most_text
        self._readable = body if len(body) > LARGE else _in_utf8(body)
        self._skim = Skim(self._readable, self._reader.names)
        self._whole = False  # the end of the body is reached

    def __repr__(self) -> str:
        return f"<Skimming {self._endpoint.name} {self._skim!r}>"

    def step(self) -> Facts | None:
        """Read on; return the facts in the step after the end of the body.

        Raises: InvalidJSON, when the body is not a JSON object; InvalidRequest, when it has too many members.
        """
        skim = self._skim
        if not self._whole:
            self._whole = skim.step()
            return None
        view = memoryview(self._readable)
        fields = self._reader.named(view, skim.spans)
        facts = _facts(self._endpoint, self._reader, fields, self._text(view), self._routing_key, self._body)
        spans = ((name, skim.spans.get(name.encode(), (0, 0))) for name in (*RESERVED, *HOLDERS))
        facts.reserved = first_reserved(
            (name, bytes(view[begin : min(end, begin + LONGEST_HELD + 1)])) for name, (begin, end) in spans
        )
        if self._readable is self._body:
            facts.place = (skim.close, b"" if skim.empty else b",")
        return facts

    def _text(self, view: memoryview) -> bytes:
        """Return the routing text as `read` does. It is copied once."""
        parts = []
        for name in self._endpoint.text:
            begin, end = self._skim.spans.get(name.encode(), (0, 0))
            if end - begin > 4 or bytes(view[begin:end]) not in _NOTHING:
                parts.append(view[begin:end])
        if parts and parts[-1][-1] in _CLOSERS:
            parts[-1] = parts[-1][:-1]
        room = self._most_text
        for at, part in enumerate(parts):
            parts[at] = part[:room]
            room -= len(parts[at])
        return b"".join(parts)


def _in_utf8(body: Content) -> Content:
    try:
        return in_utf8(body)
    except UnicodeDecodeError as exc:
        raise InvalidJSON(f"The body is not a JSON object: {exc.reason}.") from None


def _facts(endpoint: Endpoint, reader: _Reader, fields: Any, text: bytes, routing_key: bytes, body: Content) -> Facts:
    """Return the facts that these fields and this text make."""
    model = bytes(fields.model)
    if model in _NOTHING:
        model = b""
    elif b"\\" in model and len(model) <= LONGEST_TEXT:
        model = spelled(model)
    scaffold = reader.scaffold(text) if text else 0
    namespace = model
    if fields.lora_path or fields.lora_id or fields.cache_salt:
        namespace = _divided(model, fields)
    if len(namespace) > LONGEST:
        namespace = bounded(namespace)
        model = model[:LONGEST_TEXT]  # no name is longer
    return Facts(endpoint, namespace, text, scaffold, fields.stream == _TRUE, model, routing_key, body)


def _divided(model: bytes, fields: Any) -> bytes:
    """Return model, adapter and salt joined; only the model when the others are empty."""
    divided = (_given(fields.lora_path), _given(fields.lora_id), _given(fields.cache_salt))
    return b"\0".join((model, *divided)) if any(divided) else model


def _given(field: msgspec.Raw) -> bytes:
    """Return a field's value; b"" when it means the same as a missing field."""
    value = bytes(field)
    return b"" if value in _NOTHING else value
