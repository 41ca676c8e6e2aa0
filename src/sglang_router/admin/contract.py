"""What each handler takes and gives: the facts of the OpenAPI document that no code can tell by itself.

    CONTRACTS: handler --> Contract(answers, errors, query, body)     tests find in the code what a handler raises

Errors are declared by class: status and code are those of `errors`. What any path may give, because it comes before
the path is known (a head that is too large, a method that is not allowed) or is a fault, stands nowhere here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from sglang_router.admin import broadcast, engine_metrics, info, replicas, shapes, workers
from sglang_router.errors import (
    Conflict,
    Forbidden,
    InvalidJSON,
    InvalidRequest,
    MissingKey,
    NotFound,
    NoWorkers,
    Overload,
    QueueTimeout,
    RouterError,
    ShuttingDown,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    WorkerBroken,
    WorkerNotFound,
    WorkersStarting,
    WorkerTimeout,
    WorkerUnreachable,
)

if TYPE_CHECKING:
    from sglang_router.admin.context import Handler


class Answer(NamedTuple):
    """An answer that is no error. `shape`: a struct of `shapes`, None where it is the engine's. `location`: it has that
    field."""

    about: str
    status: str = "200"
    shape: type[msgspec.Struct] | None = None
    media: tuple[str, ...] = ("application/json",)
    location: bool = False


class Parameter(NamedTuple):
    """One of the query's."""

    name: str
    about: str
    required: bool = False


class Contract(NamedTuple):
    """What a handler takes and gives. `body`: None when none is read."""

    answers: tuple[Answer, ...]
    errors: tuple[type[RouterError], ...] = ()
    query: tuple[Parameter, ...] = ()
    body: type[msgspec.Struct] | None = None


class Anything(msgspec.Struct):
    """Whatever the engines take: it goes to all of them as it is."""


NOBODY: tuple[type[RouterError], ...] = (
    Unavailable,
    *(kind for kind in Unavailable.__subclasses__() if kind is not ShuttingDown),
)
"""No worker can be asked, for one reason or another."""
STRANGERS: tuple[type[RouterError], ...] = (MissingKey, Unauthorized, Forbidden)
"""Whoever asks may not, on every path that is not for everybody."""
WORKER_URL = "Base URL of the worker, such as `http://10.0.0.1:8000`: no credentials, query or fragment."
_TEXT = ("text/plain",)
_ANY = ("*/*",)
_PROMETHEUS = ("text/plain", "application/openmetrics-text")
_OK = Answer("`OK`", media=_TEXT)
_WORKER = Answer("The worker, as it is now.", shape=shapes.WorkerState)
_ACCEPTED = Answer("Done, or begun.", "202", shapes.Accepted)


def _spread(shape: type[msgspec.Struct]) -> tuple[Answer, ...]:
    """The answers to what was sent to all workers."""
    abouts = {"200": "All workers did it.", "206": "Some did.", "502": "None did."}
    return tuple(Answer(about, status, shape) for status, about in abouts.items())


_OWN_WORDS = Contract(
    (Answer("The engine's own words."), Answer("What the engine answered instead.", "4XX", media=_ANY)),
    (WorkerUnreachable, *NOBODY),
)
_TO_ALL = Contract(_spread(shapes.Told), (NoWorkers,), body=Anything)

CONTRACTS: dict[Handler, Contract] = {
    info.health: Contract((_OK,)),
    info.readiness: Contract(
        (Answer("Ready.", shape=shapes.Readiness), Answer("No worker takes requests.", "503", shapes.Readiness))
    ),
    info.health_generate: Contract((_OK,), NOBODY),
    info.models: Contract((Answer("All models.", shape=shapes.Models),), NOBODY),
    info.model: Contract((Answer("The model, as its engine describes it."),), (NotFound, *NOBODY)),
    info.from_a_worker: _OWN_WORDS,
    info.loads: Contract((Answer("All workers.", shape=shapes.Loads),)),
    info.metrics: Contract((Answer("The exposition, in the format that Accept prefers.", media=_PROMETHEUS),)),
    engine_metrics.merged: Contract(
        (Answer("The exposition.", media=_TEXT),), (WorkerUnreachable, NoWorkers, WorkersStarting)
    ),
    broadcast.flush_cache: Contract(_spread(shapes.Flushed)),
    broadcast.update_weights: _TO_ALL,
    broadcast.broadcast: _TO_ALL,
    workers.add: Contract(
        (Answer("It is healthy and takes requests.", media=_TEXT),),
        (InvalidRequest, ShuttingDown),
        (Parameter("url", WORKER_URL, True), Parameter("api_key", "What the router shows it: visible ASCII.")),
    ),
    workers.remove: Contract(
        (Answer("It gets no new requests.", media=_TEXT),),
        (InvalidRequest, WorkerNotFound),
        (Parameter("url", "As it was added; with `@N` a single rank.", True),),
    ),
    workers.urls: Contract((Answer("All URLs.", shape=shapes.URLs),)),
    workers.create: Contract(
        (Answer("It is registered, and is now being checked.", "202", shapes.Registered, location=True),),
        (InvalidRequest, InvalidJSON, Conflict, Unprocessable),
        body=workers.Registration,
    ),
    workers.index: Contract((Answer("All workers.", shape=shapes.WorkerList),)),
    workers.show: Contract((_WORKER,), (WorkerNotFound,)),
    workers.change: Contract((_ACCEPTED,), (InvalidJSON, WorkerNotFound, Unprocessable), body=workers.Change),
    workers.delete: Contract((_ACCEPTED,), (WorkerNotFound,)),
    workers.drain: Contract((_WORKER,), (WorkerNotFound,)),
    workers.resume: Contract((_WORKER,), (WorkerNotFound,)),
    replicas.restart: Contract((_ACCEPTED,), (WorkerNotFound, Conflict)),
    replicas.restart_all: Contract((Answer("Begun.", "202", shapes.RollingAccepted, location=True),), (Conflict,)),
    replicas.rolling: Contract((Answer("How far it is.", shape=shapes.Rolling),), (Conflict,)),
    replicas.scale: Contract((Answer("The last decision, and those before.", shape=shapes.Scale),), (Conflict,)),
}
"""Every handler of `admin.app.ROUTES`, but the one of this document."""

RELAYED: tuple[type[RouterError], ...] = (
    *STRANGERS,
    InvalidJSON,
    UnsupportedMediaType,
    QueueTimeout,
    *Overload.__subclasses__(),
    WorkerBroken,
    *WorkerBroken.__subclasses__(),
    *NOBODY,
    WorkerTimeout,
)
"""What the router itself answers on a relayed path."""
