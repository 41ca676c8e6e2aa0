"""Select the header fields that are forwarded to workers, and write the head of a leg (RFC 9110 7.6.1).

The router builds each head itself: no field that concerns one connection reaches the next one, and Content-Length
always fits the body that is sent. The heads of answers are written by `relay.answers`.

Each leg ends with a Via field that holds this process's mark (RFC 9110 7.6.3), behind those of earlier proxies. A
request that brings it back goes in a circle: see `wire.request_id`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sglang_router.wire.request import Headers, Request

HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Fields that concern one connection only."""

_REBUILT: Final = frozenset(
    (b"host", b"content-length", b"expect", b"x-request-id", b"authorization", b"x-sglang-router-explain")
)
"""Request fields that the router writes itself, handles one by one, or answers."""

WHITELIST: Final = frozenset(
    (
        b"accept",
        b"content-type",
        b"request-id",
        b"traceparent",
        b"tracestate",
        b"via",
        b"x-correlation-id",
        b"x-smg-routing-key",
        b"x-trace-id",
    )
)
"""Request fields that are forwarded by default, besides authorization, x-request-id and x-request-id-*."""

ROUTING: Final = frozenset(
    (
        b"x-data-parallel-host-port",
        b"x-data-parallel-rank",
        b"x-encoder-hosts-ports",
        b"x-kv-cache-source-host-port",
        b"x-prefiller-host-port",
    )
)
"""Fields that choose an engine or a rank, as x-override-* do: only routers may set them (see `routing.reserved`)."""

OVERRIDE: Final = b"x-override-"

_PLAIN: Final = frozenset((b"close", b"keep-alive"))
"""Values of Connection that name no other field."""

_FIELDS: Final = b"sec-websocket-"
PROTOCOL: Final = b"sec-websocket-protocol"
BROWSER_KEY: Final = b"openai-insecure-api-key."
"""How a browser's client sends its key: as a subprotocol, for it cannot set Authorization."""
SWITCHES: Final = b"connection: Upgrade\r\nupgrade: websocket\r\n"
_NO_BODY: Final = b"\r\ncontent-length: 0\r\n"
_NEVER_SENT: Final = HOP_BY_HOP | _REBUILT
_LOOKED_AT: Final = WHITELIST | {b"authorization", b"connection"}
_TRACES: Final = frozenset((b"traceparent", b"tracestate"))


class UpgradeRequest(Request):
    """A request after which its connection is no longer HTTP, if the answer is 101."""

    __slots__ = ()


class ForwardRules:
    """Which request fields are forwarded to workers.

    everything  forward every end-to-end field instead of the whitelist
    guarded     clients authenticate at the router: their key is not forwarded, and the worker gets its own
    trusted     clients may choose engines and ranks (`ROUTING`, `routing.reserved`)
    withheld    says of a credential whether it is a key of this router's control plane, which no worker may see
    mark        this process in Via
    readable    workers are not asked for compressed answers, in which the router could neither write nor hide anything
    traced      traceparent and tracestate are written anew, see `routing.trace_ids`
    tail        the end of each head: the Via field, if there is a mark, and the empty line
    never_sent  names of fields that are never forwarded as they came
    looked_at   names of fields that are forwarded without a question, or handled one by one
    prefixes    beginnings of names that are forwarded, besides the whitelist
    careful     what is forwarded is not only the whitelist: see `holds_back`
    """

    __slots__ = (
        *("careful", "everything", "guarded", "looked_at", "never_sent"),
        *("prefixes", "tail", "trusted", "withheld"),
    )

    def __init__(
        self,
        everything: bool = False,
        guarded: bool = False,
        trusted: bool = False,
        withheld: Callable[[bytes], bool] | None = None,
        mark: bytes = b"",
        readable: bool = False,
        traced: bool = False,
    ) -> None:
        self.everything = everything
        self.guarded = guarded
        self.trusted = trusted
        self.withheld = withheld
        self.careful = everything or trusted
        self.prefixes = (b"x-request-id-", OVERRIDE, *ROUTING) if trusted else (b"x-request-id-",)
        self.tail = via(mark) + b"\r\n"
        never = _NEVER_SENT if trusted else _NEVER_SENT | ROUTING
        if guarded:
            never |= {b"x-api-key", b"x_api_key"}
        if readable:
            never |= {b"accept-encoding"}
        self.never_sent = never | _TRACES if traced else never
        self.looked_at = _LOOKED_AT - _TRACES if traced else _LOOKED_AT

    def holds_back(self, name: bytes, value: bytes, start: bytes) -> bool:
        """Return whether a field is kept back that would be forwarded by its name. start: of the head."""
        plain = name.replace(b"_", b"-")  # some servers take both for the same
        if plain.startswith(OVERRIDE) or plain in ROUTING:
            # The last: the router has chosen a rank.
            return not self.trusted or (plain == b"x-data-parallel-rank" and plain in start)
        return self.withheld is not None and self.withheld(value)

    def authorization(self, headers: Headers) -> bytes | None:
        """Return the Authorization of a client that a worker without a key of its own gets; None: nothing."""
        for name, value in headers:
            if name == b"authorization" and not self.guarded:
                return None if self.withheld is not None and self.withheld(value) else value
        return None


def via(mark: bytes) -> bytes:
    """Return the Via field of this process, with its CRLF; b"" without a mark."""
    return b"via: 1.1 %s\r\n" % mark if mark else b""


def request_head(
    request: Request, start: bytes, request_id: bytes, length: int, key: bytes | None, rules: ForwardRules
) -> bytes:
    """Return the head of a leg.

    start       request line and Host field, each with its CRLF (they depend on worker and path only)
    request_id  sent as x-request-id
    length      bytes of the body
    key         the worker's own API key; sent when the client sent no Authorization, and always when `rules.guarded`
    """
    lines = [start, b"x-request-id: ", request_id, b"\r\ncontent-length: %d\r\n" % length]
    authorized, never_sent, everything, prefixes = rules.guarded, rules.never_sent, rules.everything, rules.prefixes
    looked_at = rules.looked_at
    for name, value in request.headers:
        if name not in looked_at:
            if name in never_sent or not (everything or name.startswith(prefixes)):
                continue
            if rules.careful and rules.holds_back(name, value, start):
                continue
        elif name == b"authorization":
            if authorized or (rules.withheld is not None and rules.withheld(value)):
                continue
            authorized = True
        elif name == b"connection":
            if value.strip().lower() not in _PLAIN:  # it may name fields that were already copied: start again
                head = request_head(_end_to_end(request), start, request_id, length, key, rules)
                return _upgrade_head(head, request, rules) if isinstance(request, UpgradeRequest) else head
            continue
        lines += (name, b": ", value, b"\r\n")
    if key is not None and (rules.guarded or not authorized):
        lines += (b"authorization: Bearer ", key, b"\r\n")
    lines.append(rules.tail)
    return b"".join(lines)


def _end_to_end(request: Request) -> Request:
    """Return the request without its Connection fields, the fields they name, and those of a WebSocket."""
    dropped = named_by_connection(request.headers)
    headers = [field for field in request.headers if field[0] not in dropped and not field[0].startswith(_FIELDS)]
    return Request(request.method, request.target, request.path, headers)


def _upgrade_head(head: bytes, request: Request, rules: ForwardRules) -> bytes:
    """Return the head of a leg that asks for a WebSocket. head: that of the same leg without the upgrade."""
    lines = [head[:-2].replace(_NO_BODY, b"\r\n", 1)]
    for name, value in request.headers:
        kept = _without_keys(value, rules) if name == PROTOCOL else value
        if kept and name.startswith(_FIELDS):
            lines += (name, b": ", kept, b"\r\n")
    lines += (SWITCHES, b"\r\n")
    return b"".join(lines)


def _without_keys(value: bytes, rules: ForwardRules) -> bytes:
    """Return the subprotocols that a worker may see: not the client's key, where it would get no Authorization."""
    return b", ".join(part.strip() for part in value.split(b",") if not _held_back(part.strip(), rules))


def _held_back(protocol: bytes, rules: ForwardRules) -> bool:
    if not protocol.startswith(BROWSER_KEY):
        return False
    return rules.guarded or (rules.withheld is not None and rules.withheld(protocol[len(BROWSER_KEY) :]))


def named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Return the names of the fields that concern one connection only, including those listed in Connection."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    return HOP_BY_HOP | named
