"""Serve gateways beside the router's own port: `sglang-router epp`.

    serve(args)        app.lifecycle.serve, with the streams of gateways as clients that are served elsewhere
    PickerFront        opens the gRPC port when the workers are registered; drains and closes it with the router's

The picker is one more front of the same decider: pools, policies, sessions, limits, keys, metrics and logs are those of
the relay, which goes on on the main port.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any, Final, NamedTuple

from sglang_router.admin.info import unready
from sglang_router.app import lifecycle, settings
from sglang_router.app.parts import App, Elsewhere
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.relay.clients import Clients, Unanswered

log = logging.getLogger("sglang_router.picker")

_INSTALL: Final = "pip install 'sglang-router[epp]'"
_SWEPT_EVERY: Final = 0.25
_LOOKED_EVERY: Final = 1.0
"""Seconds between two looks at the readiness, for those that watch it."""
_LARGEST_MESSAGE: Final = 16 << 20
"""Bytes of one message: gateways send bodies in pieces of at most a megabyte or so."""


def serve(args: RouterArgs) -> int:
    """Run a router with an endpoint picker until a signal tells it to stop; return the exit status.

    Raises: ConfigError, when it cannot start with these options.
    """
    if args.pd_disaggregation:
        raise ConfigError(
            "an endpoint picker names one worker for a request, and pairs need two: leave --pd-disaggregation out"
        )
    if args.relay_processes:
        raise ConfigError("an endpoint picker is one process: leave --relay-processes out")
    if bool(args.epp_tls_cert_path) != bool(args.epp_tls_key_path):
        raise ConfigError("--epp-tls-cert-path and --epp-tls-key-path belong together; give both")
    try:
        import grpc  # noqa: F401
        import grpc_health.v1.health  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the endpoint picker needs packages for gRPC ({error}): {_INSTALL}") from None
    return lifecycle.serve(args, None, PickerFront)


class Pings(NamedTuple):
    """When gateways with open streams are asked whether they still live, in seconds.

    every   of silence of the whole connection before a ping
    within  in which the answer must come, else all streams of the connection are over

    A gateway whose machine is gone says nothing, and would keep the places of its requests for hours. Gateways do not
    take a ping in 30 s for abuse: that is meant for clients, who may send one in five minutes.
    """

    every: float = 30.0
    within: float = 20.0


class PickerFront(Elsewhere):
    """See the module. It is made before the router, which it gets by `attach`. clients: the streams of gateways."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pings: Pings = Pings()) -> None:  # noqa: B008  (immutable)
        super().__init__()
        self._loop = loop
        self._pings = pings
        self._app: App | None = None
        self.clients: Clients | None = None
        self._unread: set[object] = set()
        self._server: Any = None
        self._stopping: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<PickerFront {self.clients!r}>"

    @property
    def connections(self) -> int:
        """Open streams of gateways."""
        return 0 if self.clients is None else len(self.clients.connections)

    @property
    def active(self) -> int:
        """Requests in flight."""
        return 0 if self.clients is None else self.clients.active

    @property
    def unread(self) -> int:
        """Streams that are over, but end only when their gateway reads."""
        return len(self._unread)

    def unanswered(self) -> Unanswered:
        """Sum up the requests without a first byte."""
        return Unanswered(0, 0, 0, 0.0) if self.clients is None else self.clients.unanswered()

    def attach(self, app: App) -> None:
        """Take the parts of the router, which is built."""
        self._app = app
        most, _ = settings.most_connections()
        self.clients = Clients(app.clock, app.clients.budget, most, self._unread.__len__, app.clients.numbers)
        self.drained = self.clients.drained

    async def open(self) -> None:
        """Serve gateways from now on. Raises: ConfigError, when the port cannot be used."""
        app, clients = self._app, self.clients
        assert app is not None
        assert clients is not None
        self._server, health = _server(app, clients, self._unread, self._pings)
        port = _listen(self._server, app.args)
        await self._server.start()
        self._tasks = [
            self._loop.create_task(_every(_SWEPT_EVERY, partial(_sweep, clients))),
            self._loop.create_task(_every(_LOOKED_EVERY, health.look)),
        ]
        log.info("endpoint picker: gateways are served on %s:%d", app.args.epp_host, port)

    def stop_accepting(self) -> None:
        """Accept no further streams; those in flight go on for the grace period."""
        if self._server is not None and self._stopping is None and self._app is not None:
            grace = self._app.args.shutdown_grace_period_secs
            self._stopping = self._loop.create_task(self._server.stop(grace))

    def drain(self, last_request_timeout: float = 0.0) -> None:
        """Have `drained` set when the last stream is closed."""
        if self.clients is not None:
            self.clients.drain(last_request_timeout)

    def cut(self) -> None:
        """Close all streams now."""
        if self.clients is not None:
            self.clients.cut()

    async def close(self) -> None:
        """End the server."""
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(None)
        if self._stopping is not None:
            await self._stopping


async def _every(seconds: float, work: Any) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:  # a fault here must not end what comes after it
            log.exception("a periodic job of the endpoint picker failed")


async def _sweep(clients: Clients) -> None:
    """Look for deadlines that have passed."""
    clients.sweep()


def _server(app: App, clients: Clients, unread: set[object], pings: Pings) -> tuple[Any, Any]:
    """Make the gRPC server with its services, and what tells its health. unread: see `Picking`."""
    import grpc
    from grpc_health.v1 import health_pb2_grpc

    from sglang_router.picker.health import PickerHealth
    from sglang_router.picker.messages import METHOD, SERVICE, ProcessingRequest, ProcessingResponse
    from sglang_router.picker.picking import Picking
    from sglang_router.picker.streams import serve_stream

    picking = Picking(app, clients, unread)

    async def process(_: Any, context: Any) -> None:
        await serve_stream(picking, context)

    handler = grpc.stream_stream_rpc_method_handler(
        process,
        request_deserializer=ProcessingRequest.FromString,
        response_serializer=ProcessingResponse.SerializeToString,
    )
    shared = int(app.args.reuse_port)  # the router that takes over listens before the one that ends lets go
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
            ("grpc.so_reuseport", shared),
            ("grpc.http2.max_ping_strikes", 0),  # gateways may ping often: by default a few end the connection
            ("grpc.keepalive_time_ms", int(pings.every * 1000)),
            ("grpc.keepalive_timeout_ms", int(pings.within * 1000)),
            ("grpc.http2.ping_timeout_ms", int(pings.within * 1000)),
            ("grpc.http2.max_pings_without_data", 0),  # an answer may be silent for long: ask on
        ]
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    health = PickerHealth(lambda: not unready(app.control))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server, health


def _listen(server: Any, args: RouterArgs) -> int:
    """Bind the port; return its number. Raises: ConfigError."""
    host = f"[{args.epp_host}]" if ":" in args.epp_host else args.epp_host
    address = f"{host}:{args.epp_port}"
    from sglang_router.picker.certificates import credentials

    try:
        if args.epp_tls_cert_path is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials(args.epp_tls_cert_path, args.epp_tls_key_path or ""))
    except RuntimeError:  # gRPC does not say why
        port = 0
    if not port:
        raise ConfigError(f"cannot listen on --epp-host and --epp-port, {address}: is the port taken?")
    return int(port)
