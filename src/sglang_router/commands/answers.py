"""What the commands read of the router's answers, and of which kind it must be: what has another shape is no router's.

`asking.Door.decoded` checks an answer against one of these, and hands on the answer itself: a router may tell more, and
one of another version less. Only what a command cannot do without has no default.
"""

from __future__ import annotations

from typing import Any

import msgspec


class ReplicaAnswer(msgspec.Struct):
    """The process of a worker."""

    restarts: int = 0
    state: str = ""
    reason: str | None = None


class WorkerAnswer(msgspec.Struct):
    """A worker, as lists have it."""

    url: str
    load: int = 0
    elsewhere: int = 0
    tree_size: float | None = None
    registered_secs: float = 0.0
    paused: list[str] | None = None
    replica: ReplicaAnswer | None = None


class WorkersAnswer(msgspec.Struct):
    """GET /workers."""

    workers: list[WorkerAnswer]


class ChangedWorker(WorkerAnswer, kw_only=True):
    """The worker that was changed."""

    id: str


class AcceptedAnswer(msgspec.Struct):
    """What is done to a worker later: DELETE, and POST .../restart."""

    worker_id: str
    message: str


class RollingAnswer(msgspec.Struct):
    """POST and GET /restart_workers."""

    state: str
    done: int
    total: int
    reason: str | None = None


class FleetAnswer(msgspec.Struct):
    """How a router shares what it knows with others."""

    state: str
    peers: int = 0


class ReadinessAnswer(msgspec.Struct):
    """GET /readiness, of a router that is ready or not."""

    total_workers: int
    shared_state: FleetAnswer | None = None


class AddedWorker(msgspec.Struct):
    """A worker that was registered."""

    worker_id: str


class ConfigAnswer(msgspec.Struct):
    """GET /config."""

    options: list[dict[str, Any]]


class ReloadAnswer(msgspec.Struct):
    """POST /reload."""

    changed: list[str]
    needs_restart: list[str]
    added: list[str] = []
    removed: list[str] = []
