"""The built-in engine as an HTTP server: assembly only. `docs/engine.md` lists the endpoints.

options ─> EngineScheduler (pure) ─> Engine (one task) <─ routes: answers · vectors · control
                                                          behind checks of API key and readiness
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_router.engine.answer import StreamedAnswer, answer_whole, error_response
from sglang_router.engine.control import EngineControl, EngineStatus
from sglang_router.engine.dialects import AnswerDialect, ChatDialect, CompletionDialect, GenerateDialect
from sglang_router.engine.events import MessagesDialect, ResponsesDialect
from sglang_router.engine.options import EngineOptions
from sglang_router.engine.parse import BodyParser, read_object
from sglang_router.engine.protocol import EngineProtocol
from sglang_router.engine.runner import Engine, EngineError, EngineLatencies
from sglang_router.engine.text import Tokenizer
from sglang_router.engine.vectors import VectorEndpoints

log = logging.getLogger(__name__)

KEEP_ALIVE = 5  # seconds; the default of uvicorn and so of SGLang and vLLM
OPEN_PATHS = ("/health", "/metrics")  # no API key needed
GENERATIVE: dict[str, tuple[str, type[AnswerDialect]]] = {
    "/generate": ("generate", GenerateDialect),
    "/v1/chat/completions": ("chat", ChatDialect),
    "/v1/completions": ("completions", CompletionDialect),
    "/v1/responses": ("responses", ResponsesDialect),
    "/v1/messages": ("messages", MessagesDialect),
}


def create_app(options: EngineOptions | None = None) -> Starlette:
    """Return the engine as an ASGI application. It computes during its lifespan; `app.state.engine` is its `Engine`."""
    options = options or EngineOptions()
    registry = CollectorRegistry()
    latencies = EngineLatencies(registry, options.model)
    engine = Engine(options.scheduler(), latencies, options.speed, options.context, options.seed)
    parser = BodyParser(Tokenizer(), options.context, options.model, options.dp_size)
    status = EngineStatus()
    app = Starlette(
        routes=[
            *(
                Route(path, _generative(engine, parser, kind, dialect), methods=["POST"])
                for path, (kind, dialect) in GENERATIVE.items()
            ),
            *EngineControl(engine, options, registry, status).routes(),
            *VectorEndpoints(engine, parser).routes(),
        ],
        middleware=[Middleware(EngineGate, api_key=options.api_key, status=status)],
        exception_handlers={EngineError: error_response},
        lifespan=lambda _: _computing(engine, status, options.startup_delay),
    )
    app.state.engine = engine
    return app


def _generative(
    engine: Engine, parser: BodyParser, kind: str, dialect: type[AnswerDialect]
) -> Callable[[Request], Awaitable[Response]]:
    parse = parser.kinds[kind]

    async def endpoint(request: Request) -> Response:
        parsed = parse(read_object(await request.body()))
        if parsed.stream:
            return StreamedAnswer(engine, parsed.jobs, dialect(parsed))
        return await answer_whole(engine, parsed.jobs, dialect(parsed), request)

    return endpoint


class EngineGate:
    """Refuses requests without the API key (401), and generation requests while the engine starts (503)."""

    def __init__(self, app: ASGIApp, api_key: str, status: EngineStatus) -> None:
        self._app = app
        self._wanted = f"Bearer {api_key}".encode() if api_key else None
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(Request(scope), refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> EngineError | None:
        path: str = scope["path"]
        if self._wanted and not path.startswith(OPEN_PATHS):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if given != [self._wanted]:
                message = "A valid API key is required: send `Authorization: Bearer KEY`."
                return EngineError(401, message, "authentication_error")
        if path in GENERATIVE and not self._status.ready:
            return EngineError(503, "The engine is not ready.", "service_unavailable")
        return None


@contextlib.asynccontextmanager
async def _computing(engine: Engine, status: EngineStatus, delay: float) -> AsyncIterator[None]:
    def ended(task: asyncio.Task[None]) -> None:
        # After a bug in the scheduler, do not let clients wait forever for a server that looks healthy.
        if not task.cancelled() and task.exception() is not None:
            log.critical("the engine's driver failed", exc_info=task.exception())
            status.failed = True
            engine.abort_all()

    driver = asyncio.create_task(engine.run())
    driver.add_done_callback(ended)
    status.ready_at = asyncio.get_running_loop().time() + delay
    yield
    driver.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await driver


class _Server(uvicorn.Server):
    """Uvicorn, except that a signal aborts running requests at once and ends the process with status 0."""

    engine: Engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        yield

    def _stop(self, number: signal.Signals) -> None:
        self.handle_exit(number, None)
        self.engine.abort_all()
        asyncio.get_running_loop().call_later(0.5, self._force_exit)

    def _force_exit(self) -> None:
        self.force_exit = True


def serve(options: EngineOptions) -> int:
    """Serve until a signal comes; return the exit status. The first line of output contains the URL."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        every = options.host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048, dualstack_ipv6=every)
    except OSError as error:
        sys.stderr.write(f"cannot listen on {options.host} port {options.port}: {error.strerror}\n")
        return 1
    host = f"[{options.host}]" if ":" in options.host else options.host
    sys.stdout.write(f"engine {options.model!r} listens on http://{host}:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    app = create_app(options)
    server = _Server(
        uvicorn.Config(
            app,
            http=EngineProtocol,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE,
            access_log=False,
            log_level=options.log_level,
        )
    )
    server.engine = app.state.engine
    with listener:
        uvloop.run(server.serve(sockets=[listener]))
    return 0
