"""Read the facts of a request and ask the decider: at once, or in steps when that could take a while.

Exchange.start --> begin --> read_and_ask --> ask --> Exchange.follow, or Exchange.queue
                                 |
                                 '-- slow: bulk.add(SlowBody.step) --> step ... step --> ask, or Exchange.refuse
                                                                         '-- the client left: no further step

`begin` names the request first: whatever becomes of it, events, logs and its answer carry the same tag.

What takes a while are bodies above `QUICK` bytes, of which many may be complete in the same turn of the event loop, and
those that the fast decoder refuses.

The session of a request is looked for only if an option asks for it: `Relay.hints` is None otherwise.
"""

from __future__ import annotations

import re
from typing import Final, Protocol
from urllib.parse import unquote_to_bytes

from sglang_router.errors import NotFound, ReservedField, RouterError
from sglang_router.relay.body import BodyHandler
from sglang_router.relay.clients import Clients
from sglang_router.relay.injected import UsageHider, wanted
from sglang_router.relay.relay import Relay
from sglang_router.relay.renaming import model_in_query
from sglang_router.relay.states import NEW, ExchangeState
from sglang_router.routing.endpoints import ID_SEGMENT, Endpoint
from sglang_router.routing.facts import LARGE, QUICK, TINY, Facts, Skimming, read_quickly, read_slowly
from sglang_router.routing.keys import bounded
from sglang_router.routing.model_names import is_name, text_of
from sglang_router.routing.plan import Plan, RequestTag, Wait
from sglang_router.routing.session_hints import Hinted
from sglang_router.wire.request import Request

_UPWARDS: Final = re.compile(rb"[/\\]\.\.?(?:[/\\]|\Z)")


class Unrouted(Protocol):
    """A new exchange, as this module uses it."""

    facts: Facts | None
    hider: UsageHider | None
    relay: Relay
    request: Request
    state: ExchangeState
    tag: RequestTag

    def handle(self, handler: BodyHandler) -> None:
        """Let a handler follow the body of the answer."""

    def follow(self, plan: Plan) -> None:
        """Send the legs of a plan."""

    def queue(self, wait: Wait) -> None:
        """Wait for the decider, which answers later."""

    def refuse(self, error: RouterError) -> None:
        """Answer with an error of the router."""


def begin(exchange: Unrouted, endpoint: Endpoint, peer: str, clients: Clients) -> None:
    """Name the request, read its facts and ask the decider.

    peer     address of the client
    clients  those of its port: they number the requests

    Raises: RouterError, when the request is refused; it has its tag then.
    """
    relay, request = exchange.relay, exchange.request
    now = relay.clock()
    named = relay.ids.read(request.headers, endpoint.id)
    route = endpoint.route or endpoint.route_of(request.method, request.path)
    number, size = next(clients.numbers), len(request.body)
    exchange.tag = RequestTag(number, named[0], now, route, peer, request.client, size, named)
    fault = request.refusal or named[3]
    if fault is not None:
        raise fault
    read_and_ask(exchange, endpoint, named[1], now)


def read_and_ask(exchange: Unrouted, endpoint: Endpoint, routing_key: bytes, now: float) -> None:
    """Read the facts and ask the decider.

    Raises: RouterError, when the request is refused.
    """
    body, most_text = exchange.request.body, exchange.relay.most_text
    size, hinted = len(body), None
    if exchange.relay.hints is not None:
        hinted = exchange.relay.hints.begin(endpoint.name, exchange.request.headers, exchange.tag.raw_id)
    hints = None if hinted is None else hinted.body
    facts: Facts | None = None
    if size <= QUICK or not endpoint.json:
        facts = read_quickly(endpoint, body, routing_key, most_text, hints)
        if facts is None and size <= TINY:
            facts = read_slowly(endpoint, body, routing_key, most_text, hints)
    if facts is not None:
        _ask(exchange, facts, now, hinted)
    else:
        exchange.relay.batch.bulk.add(SlowBody(exchange, endpoint, routing_key, hinted).step)


class SlowBody:
    """The body of an exchange that is not routed yet. `relay.bulk` calls `step`."""

    __slots__ = ("_endpoint", "_exchange", "_hinted", "_routing_key", "_skimming")

    def __init__(self, exchange: Unrouted, endpoint: Endpoint, routing_key: bytes, hinted: Hinted | None) -> None:
        self._exchange = exchange
        self._endpoint = endpoint
        self._routing_key = routing_key
        self._hinted = hinted
        self._skimming: Skimming | None = None

    def __repr__(self) -> str:
        return f"<SlowBody of {len(self._exchange.request.body)} bytes, {self._skimming!r}>"

    def step(self) -> bool:
        """Read on; return whether there is more to read."""
        exchange = self._exchange
        if exchange.state is not NEW:  # the client left
            return False
        try:
            facts = self._read()
            if facts is None:
                return True
            _ask(exchange, facts, exchange.relay.clock(), self._hinted)
        except RouterError as error:
            exchange.refuse(error)
        return False

    def _read(self) -> Facts | None:
        """Decode the body, else skim it in further steps; return the facts once they are known."""
        if self._skimming is not None:
            return self._skimming.step()
        body, most_text = self._exchange.request.body, self._exchange.relay.most_text
        hints = None if self._hinted is None else self._hinted.body
        facts = None
        if len(body) <= LARGE:
            facts = read_quickly(self._endpoint, body, self._routing_key, most_text, hints)
        if facts is None:
            self._skimming = Skimming(self._endpoint, body, self._routing_key, most_text, hints)
        return facts


def _ask(exchange: Unrouted, facts: Facts, now: float, hinted: Hinted | None) -> None:
    """Ask the decider where a request goes. hinted: what told its session so far; None: nobody wants to know it.

    Raises: RouterError, when it is refused.
    """
    relay, tag = exchange.relay, exchange.tag
    exchange.facts = facts
    if facts.endpoint.anywhere:
        _find_place(facts, exchange.request)
    if facts.reserved and not relay.forward.trusted:
        raise ReservedField(facts.reserved)
    if facts.model:
        tag.model = facts.model.decode("utf-8", "replace")
    tag.streaming = facts.streaming
    if hinted is not None:
        facts.session = hinted.found(facts.session)
    answer = relay.decider.ask(tag, facts, now)
    if facts.streaming:
        if relay.inject_usage and wanted(facts, exchange.request.body):
            exchange.hider = UsageHider()
        if (handler := relay.handlers(facts.endpoint, exchange.request.body, facts)) is not None:
            handler.hider = exchange.hider
            exchange.handle(handler)
    if isinstance(answer, Plan):
        exchange.follow(answer)
    else:
        exchange.queue(answer)


def _find_place(facts: Facts, request: Request) -> None:
    """Read what the body does not say: what is asked for, and who may answer, by the id in the path, else by the model
    in the query.

    Raises: NotFound for a path that leads upwards: a proxy in front of an engine could follow it to other paths.
    """
    if _UPWARDS.search(unquote_to_bytes(request.path)):
        raise NotFound
    if facts.endpoint.route is None:
        facts.target = b"%b %b" % (request.method, request.target)
    if facts.endpoint.about:
        facts.follows = bounded(request.path.split(b"/")[ID_SEGMENT])
    elif not facts.model and (found := model_in_query(request)) is not None and is_name(found.name):
        facts.model = text_of(found.name)
