"""What each handler takes and answers: the facts of the OpenAPI document that cannot be read from the code.

    CONTRACTS: handler --> Contract(answers, errors, query, body)     tests compare the errors with the handler's code

Errors are declared by class, which has their status and code. Errors of all paths are not declared here: those that
come before the path is known (the head is too large, the method is not allowed), and faults.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sglang_router.admin import (
    adapters,
    adding,
    broadcast,
    decisions,
    engine_metrics,
    engine_relay,
    home,
    info,
    lists,
    options,
    replicas,
    shapes,
    workers,
)
from sglang_router.admin.context import ReloadReport
from sglang_router.admin.live import Frame
from sglang_router.admin.rows import Handler
from sglang_router.errors import (
    ConfigRefused,
    Conflict,
    DecisionNotFound,
    Forbidden,
    InvalidJSON,
    InvalidRequest,
    MissingKey,
    ModelNotFound,
    ModelRequired,
    NotFound,
    NoWorkers,
    Overload,
    QueueTimeout,
    RateLimited,
    RouterError,
    ShuttingDown,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    WorkerBroken,
    WorkerInvalid,
    WorkerNotFound,
    WorkersStarting,
    WorkerTimeout,
    WorkerUnreachable,
)
from sglang_router.routing.decision_record import DecisionRecord


class DeclaredAnswer(NamedTuple):
    """An answer that is no RouterError.

    shape     a struct of `shapes`; None: the engine decides
    location  the answer has a Location field
    """

    about: str
    status: str = "200"
    shape: type[msgspec.Struct] | None = None
    media: tuple[str, ...] = ("application/json",)
    location: bool = False


class QueryParameter(NamedTuple):
    """A parameter of the query. pattern: that its value must match; "" for any."""

    name: str
    about: str
    required: bool = False
    pattern: str = ""


class Contract(NamedTuple):
    """What a handler takes and answers. `body`: None, if the handler reads none."""

    answers: tuple[DeclaredAnswer, ...]
    errors: tuple[type[RouterError], ...] = ()
    query: tuple[QueryParameter, ...] = ()
    body: type[msgspec.Struct] | None = None


class AnyBody(msgspec.Struct):
    """A body that the router does not read: it goes to all engines unchanged."""


NO_WORKER: tuple[type[RouterError], ...] = (
    Unavailable,
    *(kind for kind in Unavailable.__subclasses__() if kind is not ShuttingDown),
)
"""There is no worker to ask."""
REFUSED: tuple[type[RouterError], ...] = (MissingKey, Unauthorized, Forbidden)
"""The client may not ask: on all paths that are not public."""
WORKER_URL = "Base URL of the worker, such as `http://10.0.0.1:8000`: no credentials, query or fragment."
_TEXT = ("text/plain",)
_ANY = ("*/*",)
_PROMETHEUS = ("text/plain", "application/openmetrics-text")
_OK = DeclaredAnswer("`OK`", media=_TEXT)
_WORKER = DeclaredAnswer("The worker, as it is now.", shape=shapes.WorkerState)
_ACCEPTED = DeclaredAnswer("The change is made or in progress.", "202", shapes.Accepted)


def _broadcast(shape: type[msgspec.Struct], partly: str) -> tuple[DeclaredAnswer, ...]:
    """The answers to a request that goes to all workers. partly: the status when some succeeded."""
    abouts = {"200": "All workers succeeded.", partly: "Some workers succeeded.", "502": "No worker succeeded."}
    return tuple(DeclaredAnswer(about, status, shape) for status, about in abouts.items())


_OF_ENGINE = DeclaredAnswer("An error of the engine, unchanged.", "4XX", media=_ANY)
_PASSED_ON = Contract(
    (
        DeclaredAnswer("The answer of the engine, unchanged."),
        _OF_ENGINE,
    ),
    (WorkerUnreachable, *NO_WORKER),
)
_ADAPTER = Contract(
    _broadcast(shapes.Told, "207"),
    (InvalidRequest, ModelRequired, ModelNotFound, NoWorkers),
    (QueryParameter("model", "The model to which the adapter belongs; only needed where there are several."),),
    body=shapes.Adapter,
)
_CONDITION = r"[^,=]*[^,=\s][^,=]*=[^,]*"
_CONDITIONS = rf"^{_CONDITION}(,{_CONDITION}){{0,63}}$"
"""See `admin.selection`."""
_SELECTOR = (
    QueryParameter(
        "selector",
        "For these workers only: `id`, `url`, `model`, `role` or labels, as in `model=m,zone=a`.",
        pattern=_CONDITIONS,
    ),
)
_TO_ALL = Contract(_broadcast(shapes.Told, "207"), (InvalidRequest, WorkerNotFound, NoWorkers), _SELECTOR, body=AnyBody)
_TO_ONE = Contract(
    (
        DeclaredAnswer("The answer of the engine, without secrets.", media=_ANY),
        DeclaredAnswer("An error of the engine.", "4XX", media=_ANY),
    ),
    (InvalidRequest, WorkerNotFound, WorkerBroken, WorkerInvalid, WorkerUnreachable, WorkerTimeout),
    body=AnyBody,
)

CONTRACTS: dict[Handler, Contract] = {
    info.health: Contract((_OK,)),
    info.readiness: Contract(
        (
            DeclaredAnswer("Ready.", shape=shapes.Readiness),
            DeclaredAnswer("No worker can take a request.", "503", shapes.Readiness),
        )
    ),
    info.health_generate: Contract((_OK,), NO_WORKER),
    info.models: Contract((DeclaredAnswer("All models.", shape=shapes.Models),), NO_WORKER),
    info.model: Contract((DeclaredAnswer("The model, as its engine describes it."),), (NotFound, *NO_WORKER)),
    info.from_a_worker: _PASSED_ON,
    lists.objects: Contract(
        (DeclaredAnswer("One page.", shape=shapes.KeptObjects), _OF_ENGINE),
        (InvalidRequest, NotFound, WorkerUnreachable, *NO_WORKER),
        (
            QueryParameter(
                "limit",
                "Most entries in the answer: 1 to 10000, by default as the engines have it.",
                pattern="^([1-9][0-9]{0,3}|10000)$",
            ),
            QueryParameter("after", "The id of the last entry of the page before."),
        ),
    ),
    lists.models: Contract(
        (DeclaredAnswer("The models.", shape=shapes.OllamaModels), _OF_ENGINE),
        (NotFound, WorkerUnreachable, *NO_WORKER),
    ),
    info.loads: Contract((DeclaredAnswer("All workers.", shape=shapes.Loads),)),
    decisions.index: Contract(
        (DeclaredAnswer("Those that pass all filters, the newest first.", shape=shapes.DecisionList),),
        (InvalidRequest, Conflict),
        (
            QueryParameter("worker", "The URL of the worker of the last attempt."),
            QueryParameter("model", "The model as the request names it."),
            QueryParameter("session", "What the client calls its session."),
            QueryParameter("outcome", "`served`, `rejected`, `failed`, ... `running`, or `unrouted` without a worker."),
            QueryParameter("branch", "The policy's reason: `hit`, `miss`, ..."),
            QueryParameter(
                "limit", "Most decisions in the answer: 1 to 1000, by default 100.", pattern="^([1-9][0-9]{0,2}|1000)$"
            ),
        ),
    ),
    decisions.show: Contract((DeclaredAnswer("The decision.", shape=DecisionRecord),), (DecisionNotFound, Conflict)),
    home.home: Contract(
        (
            DeclaredAnswer(
                "The page, for Accept: text/html; else what the router is.",
                shape=shapes.Home,
                media=("application/json", "text/html"),
            ),
        )
    ),
    home.overview: Contract(
        (
            DeclaredAnswer(
                "Everything at this moment. In a stream: an event `hello`, and events whose data are such objects; each"
                " but the first has only what changed.",
                shape=Frame,
                media=("application/json", "text/event-stream"),
            ),
        ),
        (RateLimited, ShuttingDown),
    ),
    info.version: Contract((DeclaredAnswer("The version.", shape=shapes.Version),)),
    options.index: Contract((DeclaredAnswer("All options.", shape=shapes.Options),)),
    options.reload: Contract((DeclaredAnswer("What changed.", shape=ReloadReport),), (ConfigRefused, Conflict)),
    info.metrics: Contract((DeclaredAnswer("The exposition, in the format that Accept prefers.", media=_PROMETHEUS),)),
    engine_metrics.merged: Contract(
        (DeclaredAnswer("The exposition.", media=_TEXT),), (WorkerUnreachable, NoWorkers, WorkersStarting)
    ),
    broadcast.flush_cache: Contract(
        _broadcast(shapes.Flushed, "206"), (InvalidRequest, WorkerNotFound), _SELECTOR, body=AnyBody
    ),
    broadcast.broadcast: _TO_ALL,
    adapters.load: _ADAPTER,
    adapters.unload: _ADAPTER,
    broadcast.question: _TO_ALL._replace(body=None),
    broadcast.any_path: _TO_ALL,
    engine_relay.relay: _TO_ONE,
    engine_relay.relay_rl: _TO_ONE,
    adding.add: Contract(
        (
            DeclaredAnswer("The worker is healthy and takes requests.", media=_TEXT),
            DeclaredAnswer("The worker is registered, but not healthy within `wait`.", "202", None, _TEXT, True),
        ),
        (InvalidRequest, ShuttingDown),
        (
            QueryParameter("url", WORKER_URL, True),
            QueryParameter("api_key", "The key that the router sends to the worker: visible ASCII."),
            QueryParameter("wait", "How long to wait for a healthy worker: `true` (default), `false`, or seconds."),
        ),
    ),
    workers.remove: Contract(
        (DeclaredAnswer("The worker is removed; its requests in flight finish.", media=_TEXT),),
        (InvalidRequest, WorkerNotFound),
        (QueryParameter("url", "The URL as it was added; with `@N` a single rank.", True),),
    ),
    workers.urls: Contract((DeclaredAnswer("All URLs.", shape=shapes.URLs),)),
    workers.create: Contract(
        (
            DeclaredAnswer(
                "The worker is registered; its health checks begin.", "202", shapes.Registered, location=True
            ),
        ),
        (InvalidRequest, InvalidJSON, Conflict, Unprocessable),
        body=workers.Registration,
    ),
    workers.index: Contract((DeclaredAnswer("All workers.", shape=shapes.WorkerList),)),
    workers.show: Contract((_WORKER,), (WorkerNotFound,)),
    workers.change: Contract((_ACCEPTED,), (InvalidJSON, WorkerNotFound, Unprocessable), body=workers.Change),
    workers.delete: Contract((_ACCEPTED,), (WorkerNotFound,)),
    workers.drain: Contract((_WORKER,), (WorkerNotFound,)),
    workers.resume: Contract((_WORKER,), (WorkerNotFound,)),
    replicas.restart: Contract((_ACCEPTED,), (WorkerNotFound, Conflict)),
    replicas.restart_all: Contract(
        (DeclaredAnswer("The restart has begun.", "202", shapes.RollingAccepted, location=True),), (Conflict,)
    ),
    replicas.rolling: Contract(
        (DeclaredAnswer("The progress of the restart.", shape=shapes.RestartProgress),), (Conflict,)
    ),
    replicas.scale: Contract(
        (DeclaredAnswer("The last decision, and those before it.", shape=shapes.Scale),), (Conflict,)
    ),
}
"""Every handler of `admin.routes.ROUTES`, except those of the document itself."""

RELAYED: tuple[type[RouterError], ...] = (
    *REFUSED,
    InvalidJSON,
    UnsupportedMediaType,
    QueueTimeout,
    *Overload.__subclasses__(),
    WorkerBroken,
    *WorkerBroken.__subclasses__(),
    *NO_WORKER,
    WorkerTimeout,
)
"""Errors that the router itself answers on a relayed path."""
