"""What the control plane's handlers share: the parts of the router they need, ways to ask workers, answers.

A handler is `async def handler(context, request) -> Response`; it raises a RouterError for what it refuses.
It owns nothing: workers belong to the fleet, connections to `net.upstream`, checks to `net.probe`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang_router.core.access import Access
from sglang_router.core.fleet import Fleet
from sglang_router.core.router import Router
from sglang_router.core.worker import Health, HealthRules, Worker
from sglang_router.errors import RouterError
from sglang_router.net.fetch import Answer, FetchError, fetch
from sglang_router.net.probe import Prober
from sglang_router.net.upstream import Upstream


@dataclass
class ModelsCache:
    """The last union of models and how long it holds; one request at a time computes it."""

    workers: tuple[Worker, ...] = ()
    until: float = -math.inf
    models: dict[str, Any] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Replicas(Protocol):
    """Who runs the workers' engines on this machine, where somebody does: the supervisor of `launch_server`.

    The control plane asks; each of these returns at once.
    """

    def describe(self, worker: Worker) -> dict[str, Any] | None:
        """What is known of a worker's process; None for a worker that is run by somebody else."""

    def restart_worker(self, worker: Worker) -> None:
        """Begins to drain and restart one worker. Raises: Conflict, if that is under way or it is run by others."""

    def restart_all(self) -> None:
        """Begins to restart one after the other. Raises: Conflict, if that is under way."""

    @property
    def rolling(self) -> dict[str, Any]:
        """How far that is."""


class Scaling(Protocol):
    """Who decides how many workers there should be."""

    def explain(self) -> dict[str, Any]:
        """The answer of GET /scale."""


@dataclass
class Context:
    """The parts of the router the control plane speaks to. Times in seconds; moments are those of `clock`.

    startup_timeout    how long POST /add_worker waits for a worker to become healthy
    health             the health checks of workers that name none of their own
    worker_api_key     the key of workers that are added without one
    dp_aware           whether the ranks of workers that are added become workers of their own
    metrics_render     Accept header -> exposition and its content type
    ask_timeout        for questions to workers that are answered from memory
    generate_timeout   for one token of /health_generate, per worker asked
    broadcast_timeout  for what is sent to all workers; new weights take minutes
    access             who may look and who may change things
    replicas           who runs the engines, if this process does
    scaling            who decides how many there should be, if anybody does
    """

    fleet: Fleet
    router: Router
    upstream: Upstream
    prober: Prober
    clock: Callable[[], float]
    metrics_render: Callable[[str], tuple[bytes, str]]
    startup_timeout: float = 1800.0
    health: HealthRules = field(default_factory=HealthRules)
    worker_api_key: str | None = None
    dp_aware: bool = False
    ask_timeout: float = 5.0
    generate_timeout: float = 20.0
    broadcast_timeout: float = 1800.0
    access: Access = field(default_factory=Access)
    replicas: Replicas | None = None
    scaling: Scaling | None = None
    models: ModelsCache = field(default_factory=ModelsCache)

    def serving(self) -> tuple[Worker, ...]:
        """Workers worth asking: those that may take a request now, else those the health checks call well.

        Raises: Unavailable and its kinds when there are none.
        """
        now = self.clock()
        well = self.fleet.candidates(now) or tuple(
            worker for worker in self.fleet if worker.in_rotation and worker.health is Health.HEALTHY
        )
        if not well:
            raise self.fleet.unavailable(now)
        return well

    def engines(self) -> list[Worker]:
        """One worker of each engine: ranks share their engine's control plane."""
        return list({worker.spec.url: worker for worker in reversed(list(self.fleet))}.values())[::-1]

    def forget_prefixes(self, worker: Worker) -> None:
        """Its engine's cache is empty or worthless: the policy must not send anyone there for it."""
        for entry in self.fleet.entries(worker.spec.url):
            self.router.policy.emptied(entry)

    def take_out(self, worker: Worker) -> None:
        """Removes a worker for good. Requests under way there end by themselves."""
        self.fleet.remove(worker)
        self.prober.stop(worker)
        self.upstream.forget(worker)


Reply = Answer | FetchError
"""What became of asking a worker."""


async def ask(
    context: Context,
    worker: Worker,
    method: bytes,
    target: bytes,
    *,
    body: bytes = b"",
    content_type: bytes = b"application/json",
    timeout: float | None = None,
) -> Reply:
    """Asks one worker, with its own key. No answer is a value here: others are asked beside it."""
    limit = context.ask_timeout if timeout is None else timeout
    try:
        return await fetch(
            context.upstream, worker, method, target, body=body, content_type=content_type, timeout=limit
        )
    except FetchError as exc:
        if not worker.removed:
            context.prober.prod(worker)
        return exc


async def get_from_all(context: Context, workers: Iterable[Worker], target: bytes) -> list[tuple[Worker, Reply]]:
    """Asks several workers at the same time."""
    asked = tuple(workers)
    replies = await asyncio.gather(*(ask(context, worker, b"GET", target) for worker in asked))
    return list(zip(asked, replies, strict=True))


def trouble(reply: Reply) -> str | None:
    """What is wrong with a reply, in a few words; None for a 2xx answer."""
    if isinstance(reply, FetchError):
        return str(reply)
    return None if reply.ok else f"HTTP {reply.status}"


def decoded(reply: Reply) -> Any:
    """The JSON value in a 2xx answer, else None."""
    if isinstance(reply, FetchError) or not reply.ok:
        return None
    try:
        return msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


# -- answers ---------------------------------------------------------------------------------------------


class JSON(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def passed_on(answer: Answer) -> Response:
    """A worker's answer as the client's: status, body and its type as they are."""
    types = [value.decode("latin-1") for name, value in answer.headers if name == b"content-type"]
    headers = {"content-type": types[0]} if types else {}
    return Response(answer.body, answer.status, headers)


def error_response(error: RouterError, headers: dict[str, str] | None = None) -> Response:
    """An error of the router, in the shape all its errors have."""
    fields = {"x-smg-error-code": error.code, **(headers or {})}
    if error.challenge:
        fields["www-authenticate"] = error.challenge
    if error.retry_after is not None:
        fields["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return Response(error.body(), error.status, fields, media_type="application/json")


Handler = Callable[[Context, Request], Awaitable[Response]]
"""One row's doing: a coroutine function."""
