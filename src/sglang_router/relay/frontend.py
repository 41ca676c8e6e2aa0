"""What all client connections of one port share."""

from __future__ import annotations

from collections.abc import Callable

from sglang_router.errors import RouterError
from sglang_router.relay.answers import Answers
from sglang_router.relay.batch import Batch
from sglang_router.relay.clients import Clients
from sglang_router.relay.routes import Routes
from sglang_router.relay.rules import Timeouts
from sglang_router.routing.events import Answered, Finished, Listener
from sglang_router.routing.plan import RequestTag, Route
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Request
from sglang_router.wire.upgrade import Upgrades


class Frontend:
    """What all client connections of one port share.

    routes    which exchange handles a request
    clients   the registry of the connections
    batch     does the work of one event-loop iteration in stages
    listener  hears of requests that were refused before they were complete
    answers   writes error answers
    limits    limits on one request
    timeouts  in seconds
    admit     checks each head before its body is read, see `wire.request.RequestParser`; None: no check
    upgrades  recognises requests for a WebSocket; None: there are none
    """

    __slots__ = ("admit", "answers", "batch", "clients", "limits", "listener", "routes", "timeouts", "upgrades")

    def __init__(
        self,
        routes: Routes,
        clients: Clients,
        batch: Batch,
        listener: Listener,
        answers: Answers,
        limits: Limits,
        timeouts: Timeouts,
        admit: Callable[[Request, bool], int | None] | None = None,
        upgrades: Upgrades | None = None,
    ) -> None:
        self.routes = routes
        self.clients = clients
        self.batch = batch
        self.listener = listener
        self.answers = answers
        self.limits = limits
        self.timeouts = timeouts
        self.admit = admit
        self.upgrades = upgrades

    def refusal(self, error: RouterError, peer: str, path: bytes) -> bytes:
        """Return the answer to bytes that are no request, or no complete one, and tell the listener.

        peer  address of the client
        path  as far as it is known
        """
        request_id = self.answers.ids.new(b"req-")
        tag = RequestTag(next(self.clients.numbers), request_id, self.clients.clock(), Route(), peer)
        self.listener.finished(Finished(tag, None, Answered(error.status, error.code, first_byte=0.0)))
        return self.answers.refusal(error, request_id, path)
