"""Read what routing needs of a request, once.

The table of the relayed paths (`routing.endpoints`) names the fields of the body that make up the routing text, in the
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

from typing import Any, Final

import msgspec

from sglang_router.errors import InvalidJSON
from sglang_router.routing import sequences
from sglang_router.routing.body_reader import NOTHING, BodyReader, division_of, held, plain
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.imprint import Imprint
from sglang_router.routing.keys import LONGEST, bounded
from sglang_router.routing.model_names import LONGEST_SPELLING, LONGEST_TEXT, spelled
from sglang_router.routing.multipart import model_of
from sglang_router.routing.reserved import HOLDERS, LONGEST_HELD, RESERVED, first_reserved
from sglang_router.routing.session_hints import BodyHints
from sglang_router.routing.skim import Content, Skim
from sglang_router.routing.tolerant import in_utf8

LARGE: Final = 1 << 19
"""Bytes of a body up to which it is decoded at once, which takes 3 ms at most."""
QUICK: Final = 1 << 15
"""Bytes of a body up to which that is so quick that many are decoded in one turn of the event loop."""
TINY: Final = 1 << 12
"""Bytes of a body up to which it is read at once whatever is in it: 2 ms at most."""
MOST_TEXT: Final = 1 << 20
"""Bytes of the routing text that count: more of it takes the tree more than 2 ms."""
_CLOSERS: Final = b']"'
_TRUE: Final = msgspec.Raw(b"true")


class Facts:
    """A request as routing sees it.

    endpoint     the row of `routing.endpoints`
    namespace    model, adapter and salt, hashed when long; b"" when the request names none
    division     what of the namespace follows the model: adapter and salt, hashed when very long; b"" for neither
    text         the routing text
    scaffold     length of its scaffold in bytes, which does not count as matched
    streaming    the client asked for a stream
    model        the model's name as JSON text, in one spelling and of bounded length (`routing.model_names`), or b""
    asked        the same as the client sent it, where another name stands in `model` (`routing.naming`); else b""
    routing_key  header x-smg-routing-key, or b""
    body         the whole body, as the relay holds it; in another process what stands for it. Only a request that broke
                 workers is recognised by it
    place        of a large body: where its closing brace is, and what separates another member from those before
    name_at      of a large body: where the value of `model` begins and ends; None: it has none, or the body is small
    reserved     name of a field that only a router may set (`routing.reserved`) and that the body has, or ""
    session      the session that the request belongs to, at most 64 bytes; b"" when none is recognised, or none is
                 asked for
    sequences    1, or 2 when it wants several answers of a prompt; 0: not read yet (`routing.sequences`)
    follows      the id of what a worker keeps and the request continues, uses or is about, at most 64 bytes
    target       method and target, where the endpoint does not tell them; else b"". They tell requests without a body
                 apart
    among        the names of the only workers that may get it; None: any worker may
    """

    __slots__ = (
        "among",
        "asked",
        "body",
        "division",
        "endpoint",
        "follows",
        "model",
        "name_at",
        "namespace",
        "place",
        "reserved",
        "routing_key",
        "scaffold",
        "sequences",
        "session",
        "streaming",
        "target",
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
        self.asked = self.division = b""
        self.place: tuple[int, bytes] | None = None
        self.name_at: tuple[int, int] | None = None
        self.reserved = ""
        self.session = b""
        self.follows = b""
        self.target = b""
        self.sequences = 0
        self.among: frozenset[str] | None = None

    def __repr__(self) -> str:
        return f"<Facts {self.endpoint.name} {len(self.text)} bytes of text>"


def read(endpoint: Endpoint, body: Content, routing_key: bytes = b"", most_text: int = MOST_TEXT) -> Facts:
    """Read the facts of one request at once.

    Raises: InvalidJSON, when the body is not a JSON object; the engine checks its content.
    """
    facts = read_quickly(endpoint, body, routing_key, most_text)
    return read_slowly(endpoint, body, routing_key, most_text) if facts is None else facts


def read_quickly(
    endpoint: Endpoint, body: Content, routing_key: bytes, most_text: int, hints: BodyHints | None = None
) -> Facts | None:
    """Return the facts of one request; None when the fast decoder refuses its body.

    hints  where a body of this endpoint may name its session; None: nobody asks for it
    """
    reader = endpoint.reader if hints is None else hints.reader
    if reader is None:
        model = model_of(body) if endpoint.form else b""
        return Facts(endpoint, b"", b"", 0, False, model, routing_key, body)
    try:
        fields = reader.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    facts = _facts(endpoint, reader, fields, _text_of(reader, fields, most_text), routing_key, body)
    if hints is not None:
        facts.session = hints.session(fields)
    return facts


def read_slowly(
    endpoint: Endpoint, body: Content, routing_key: bytes, most_text: int, hints: BodyHints | None = None
) -> Facts:
    """Return the facts of one request that the fast decoder refused; see `read_quickly`.

    Raises: InvalidJSON, when the body is not a JSON object.
    """
    reader = endpoint.reader if hints is None else hints.reader
    assert reader is not None
    fields, reserved = reader.decode_slowly(body)
    facts = _facts(endpoint, reader, fields, _text_of(reader, fields, most_text), routing_key, body)
    facts.reserved = reserved
    if hints is not None:
        facts.session = hints.session(fields)
    return facts


def _text_of(reader: BodyReader, fields: Any, most_text: int) -> bytes:
    """Return the routing text that decoded fields make."""
    parts: list[msgspec.Raw | memoryview] = []
    for part in reader.text(fields):  # faster than a comprehension, which is a call, for usually two parts
        # Check the length first: comparing a long prompt would copy it.
        if len(part) > 4 or bytes(part) not in NOTHING:
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

    __slots__ = (
        "_body",
        "_endpoint",
        "_hints",
        "_most_text",
        "_readable",
        "_reader",
        "_routing_key",
        "_skim",
        "_whole",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        body: Content,
        routing_key: bytes = b"",
        most_text: int = MOST_TEXT,
        hints: BodyHints | None = None,
    ) -> None:
        reader = endpoint.reader if hints is None else hints.reader
        assert reader is not None
        self._endpoint = endpoint
        self._hints = hints
        self._reader = reader
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
        facts.sequences = sequences.among(view, skim.spans)
        if self._hints is not None:
            facts.session = self._hints.session(fields)
        if self._readable is self._body:
            facts.place = (skim.close, b"" if skim.empty else b",")
            facts.name_at = skim.spans.get(b"model")
        return facts

    def _text(self, view: memoryview) -> bytes:
        """Return the routing text as `read` does. It is copied once."""
        parts = []
        for name in self._endpoint.text:
            begin, end = self._skim.spans.get(name.encode(), (0, 0))
            if end - begin > 4 or bytes(view[begin:end]) not in NOTHING:
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


def _facts(
    endpoint: Endpoint, reader: BodyReader, fields: Any, text: bytes, routing_key: bytes, body: Content
) -> Facts:
    """Return the facts that these fields and this text make."""
    model = bytes(fields.model)
    if model in NOTHING:
        model = b""
    elif b"\\" in model and len(model) <= LONGEST_SPELLING:
        model = spelled(model)
    scaffold = reader.scaffold(text) if text else 0
    namespace, division = model, b""
    if fields.lora_path or fields.lora_id or fields.cache_salt:
        division = division_of(fields)
        namespace = b"%b\0%b" % (model, division) if division else model
    if len(namespace) > LONGEST:
        namespace = bounded(namespace)
        model = model[:LONGEST_TEXT]  # no name is longer
    streaming = fields.stream == _TRUE or (endpoint.lines and bytes(fields.stream) in NOTHING)
    facts = Facts(endpoint, namespace, text, scaffold, streaming, model, routing_key, body)
    if division:
        facts.division = division
    for name in endpoint.links:
        raw = bytes(getattr(fields, name))
        if found := plain(raw) or held(raw, "id"):
            facts.follows = bounded(found)
            break
    return facts
