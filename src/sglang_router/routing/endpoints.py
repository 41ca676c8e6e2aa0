"""The table of the relayed paths: what routing reads of their requests, and where these may go.

`ENDPOINTS` has a row for each path. The fields of the *routing text* stand in the order in which the engine's template
puts them before the model (`routing.facts` says what is made of them). Requests differ in three more ways:

    who may answer   a worker that serves the model that the body, the form or the query names: the usual case
                     `anywhere`: any worker, if the request names no model
                     `about`: the worker that keeps what the path names by an id (`routing.kept_ids`)
    what it keeps    `keeps`: its answers name something that only this worker has; `links`: fields that name such
    how often        `once`: it creates or changes something, so it is not sent again once a worker may have read it

Where paths come from: OpenAI's API, Anthropic's (/v1/messages), SGLang's, vLLM's, llama.cpp's and Ollama's (/api).
`UNKNOWN` and `UNKNOWN_READ` stand for the paths of `--relay-unknown-paths`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sglang_router.routing.body_reader import BodyReader
from sglang_router.routing.plan import Route

_NO_TEXT: Final = b"req-"
"""Prefix of the ids of requests that generate no text."""
_LINKS: Final = ("previous_response_id", "conversation")
"""What a response may continue; the first one that is given counts."""
ID_SEGMENT: Final = 3
"""Index of the id in a path about something that a worker keeps, split at its slashes: /v1/responses/{id}."""


class Traits(NamedTuple):
    """What most rows have not.

    form      the body is a form (multipart/form-data), of which the router reads the model
    keeps     an answer names something that the worker keeps
    once      never sent to a worker after another one may have read it, and always on a new connection
    anywhere  any worker may answer a request that names no model
    lines     it streams lines of JSON instead of events, and does so unless `"stream": false` is given (Ollama)
    tunnel    its requests become WebSockets
    """

    form: bool = False
    keeps: bool = False
    once: bool = False
    anywhere: bool = False
    lines: bool = False
    tunnel: bool = False


PLAIN: Final = Traits()


class Endpoint:
    """One relayed path.

    path      path, with {name} for a variable segment
    name      short name, the `endpoint` label of metrics
    text      fields of the routing text, in template order; empty where the KV cache is not used
    reader    reads the bodies; None: they are not JSON, or nobody reads them
    id        prefix of generated request ids
    methods   methods that are relayed
    links     fields that name something that a worker keeps, and the request continues or uses
    about     its requests are about something that a worker keeps; segment `ID_SEGMENT` of their path is its id
    anywhere  any worker may answer a request that names no model, or the one that keeps what it is about
    events    its streams are server-sent events
    route     the Route of all its requests, where these have one method and path; else None
    form, keeps, once, lines, tunnel: see `Traits`
    """

    __slots__ = (
        "about",
        "anywhere",
        "events",
        "form",
        "id",
        "keeps",
        "lines",
        "links",
        "methods",
        "name",
        "once",
        "path",
        "reader",
        "route",
        "text",
        "tunnel",
    )

    def __init__(
        self,
        path: bytes,
        name: str,
        text: tuple[str, ...] = (),
        json: bool = True,
        id: bytes = _NO_TEXT,
        methods: tuple[bytes, ...] = (b"POST",),
        links: tuple[str, ...] = (),
        traits: Traits = PLAIN,
    ) -> None:
        self.path = path
        self.name = name
        self.text = text
        self.links = links
        self.about = b"/{id}" in path
        self.reader = BodyReader(name, text, links) if json else None
        self.id = id
        self.methods = methods
        self.form = traits.form
        self.keeps = traits.keeps
        self.once = traits.once
        self.tunnel = traits.tunnel
        self.anywhere = traits.anywhere or traits.tunnel or self.about
        self.lines = traits.lines
        self.events = id != _NO_TEXT and not traits.lines
        one = methods == (b"POST",) and b"{" not in path
        self.route = Route("POST", path.decode(), name) if one else None

    def __repr__(self) -> str:
        return f"<Endpoint {self.path.decode()}>"

    def route_of(self, method: bytes, path: bytes) -> Route:
        """Return the Route of a request with this method and path."""
        return Route(method.decode("latin-1"), path.decode("latin-1"), self.name)

    @property
    def generates(self) -> bool:
        """Whether its answers are generated text, so that prompts stay in a cache, and requests form sessions."""
        return self.id != _NO_TEXT

    @property
    def json(self) -> bool:
        """Whether the router reads the body as JSON."""
        return self.reader is not None


_FORM: Final = Traits(form=True)
_ANYWHERE: Final = Traits(anywhere=True)
_ONCE: Final = Traits(once=True)
_CREATES: Final = Traits(keeps=True, once=True, anywhere=True)
_LINES: Final = Traits(lines=True)
_GET: Final = (b"GET",)
_GET_DELETE: Final = (b"GET", b"DELETE")

_GENERATION: Final = (
    Endpoint(b"/generate", "generate", ("text", "input_ids", "image_data"), id=b"gnt-"),
    Endpoint(b"/v1/chat/completions", "chat", ("tools", "messages"), id=b"chatcmpl-"),
    Endpoint(b"/v1/completions", "completions", ("prompt",), id=b"cmpl-"),
    Endpoint(
        b"/v1/responses",
        "responses",
        ("tools", "instructions", "input"),
        id=b"resp-",
        links=_LINKS,
        traits=Traits(keeps=True),
    ),
    Endpoint(b"/v1/messages", "messages", ("tools", "system", "messages"), id=b"msg-"),
    Endpoint(b"/v1/messages/count_tokens", "count_tokens"),
    Endpoint(
        b"/invocations",
        "invocations",
        ("tools", "system", "messages", "prompt", "text", "input_ids", "input"),
        id=b"gnt-",
    ),
    Endpoint(b"/completion", "completion", ("prompt",), id=b"cmpl-"),
    Endpoint(b"/infill", "infill", ("input_extra", "input_prefix", "input_suffix", "prompt"), id=b"cmpl-"),
    Endpoint(b"/api/generate", "api_generate", ("system", "context", "prompt", "images"), id=b"gnt-", traits=_LINES),
    Endpoint(b"/api/chat", "api_chat", ("tools", "messages"), id=b"chatcmpl-", traits=_LINES),
)
_READING: Final = (
    Endpoint(b"/v1/embeddings", "embeddings", ("input",)),
    Endpoint(b"/api/embed", "api_embed", ("input",)),
    Endpoint(b"/api/embeddings", "api_embeddings", ("prompt",)),
    Endpoint(b"/pooling", "pooling", ("messages", "input")),
    Endpoint(b"/v1/classify", "classify", ("text", "input")),
    Endpoint(b"/classify", "classify", ("text", "input")),
    Endpoint(b"/v1/score", "score", ("query", "text_1", "items", "text_2")),
    Endpoint(b"/score", "score", ("query", "text_1", "items", "text_2")),
    Endpoint(b"/v1/rerank", "rerank", ("query", "documents")),
    Endpoint(b"/rerank", "rerank", ("query", "documents")),
    Endpoint(b"/v1/moderations", "moderations", ("input",)),
)
_MEDIA: Final = (
    Endpoint(b"/v1/audio/transcriptions", "transcriptions", json=False, traits=_FORM),
    Endpoint(b"/v1/realtime", "realtime", json=False, methods=(b"GET",), traits=Traits(tunnel=True)),
    Endpoint(b"/v1/audio/translations", "translations", json=False, traits=_FORM),
    Endpoint(b"/v1/audio/speech", "speech"),
    Endpoint(b"/v1/images/generations", "images"),
    Endpoint(b"/v1/images/edits", "image_edits", json=False, traits=_FORM),
    Endpoint(b"/v1/images/variations", "image_variations", json=False, traits=_FORM),
)
_SMALL_HELP: Final = (
    Endpoint(b"/v1/tokenize", "tokenize"),
    Endpoint(b"/tokenize", "tokenize"),
    Endpoint(b"/v1/detokenize", "detokenize"),
    Endpoint(b"/detokenize", "detokenize"),
    Endpoint(b"/parse/{name}", "parse", traits=_ANYWHERE),
    Endpoint(b"/parse_function_call", "parse", traits=_ANYWHERE),
    Endpoint(b"/separate_reasoning", "parse", traits=_ANYWHERE),
    Endpoint(b"/props", "props", json=False, methods=_GET, traits=_ANYWHERE),
    Endpoint(b"/slots", "slots", json=False, methods=_GET, traits=_ANYWHERE),
    Endpoint(b"/slots/{slot}", "slot", json=False, traits=Traits(once=True, anywhere=True)),
    Endpoint(b"/api/show", "api_show"),
    Endpoint(b"/api/version", "api_version", json=False, methods=_GET, traits=_ANYWHERE),
)
_KEPT: Final = (
    Endpoint(b"/v1/responses/{id}", "response", json=False, methods=_GET_DELETE),
    Endpoint(b"/v1/responses/{id}/cancel", "response_cancel", json=False),
    Endpoint(b"/v1/responses/{id}/input_items", "response_items", json=False, methods=_GET),
    Endpoint(b"/v1/conversations", "conversations", json=False, traits=_CREATES),
    Endpoint(b"/v1/conversations/{id}", "conversation", json=False, methods=(b"GET", b"POST", b"DELETE")),
    Endpoint(
        b"/v1/conversations/{id}/items",
        "conversation_items",
        json=False,
        methods=(b"GET", b"POST"),
        traits=_ONCE,
    ),
    Endpoint(b"/v1/conversations/{id}/items/{item}", "conversation_item", json=False, methods=_GET_DELETE),
    Endpoint(b"/v1/files", "files", json=False, traits=_CREATES),
    Endpoint(b"/v1/files/{id}", "file", json=False, methods=_GET_DELETE),
    Endpoint(b"/v1/files/{id}/content", "file_content", json=False, methods=_GET),
    Endpoint(b"/v1/batches", "batches", links=("input_file_id",), traits=_CREATES),
    Endpoint(b"/v1/batches/{id}", "batch", json=False, methods=_GET),
    Endpoint(b"/v1/batches/{id}/cancel", "batch_cancel", json=False),
)

ENDPOINTS: Final[dict[bytes, Endpoint]] = {
    row.path: row for row in (*_GENERATION, *_READING, *_MEDIA, *_SMALL_HELP, *_KEPT)
}
"""The relayed endpoints, by path."""

UNKNOWN: Final = Endpoint(b"/{path}", "unknown", json=False, methods=(), traits=Traits(once=True, anywhere=True))
"""Any other path, where `--relay-unknown-paths` is set. Nothing of its bodies is read."""
UNKNOWN_READ: Final = Endpoint(b"/{path}", "unknown", json=False, methods=(), traits=_ANYWHERE)
"""The same for the methods of `READS`."""
READS: Final = frozenset((b"GET", b"HEAD", b"OPTIONS"))
"""Methods that change nothing (RFC 9110 9.2.1)."""
