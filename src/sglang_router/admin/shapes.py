"""The shapes of what the control plane answers, for its OpenAPI document.

    handler --> Response                       built from the fleet's own objects, field by field
    shape   --> schema in /openapi.json        tests decode every answer into its shape

A field that may be missing has the default UNSET, one that may be null says so. What an engine says is its own: free.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from sglang_router.admin.broadcast import Result
from sglang_router.core.report import EngineReport
from sglang_router.core.scaling import ScalingRules
from sglang_router.core.worker import Breaker, Health


class Shape(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Decoding is strict, so that a field nobody declared is found; clients must expect new ones."""


# -- errors and health -------------------------------------------------------------------------------------------------


class ErrorDetail(Shape):
    message: str
    type: str
    code: str
    param: str | None


class Error(Shape):
    """Every error that the router makes, whatever the path. `code` is for programs, and in x-smg-error-code too."""

    error: ErrorDetail


class Readiness(Shape):
    status: Literal["ready", "not ready"]
    healthy_workers: int
    total_workers: int
    reason: str | UnsetType = UNSET


# -- information -------------------------------------------------------------------------------------------------------


class Models(Shape):
    """The models of all healthy workers; each as the first engine that has it describes it."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class WorkerLoad(Shape):
    """`load` is in tokens when `source` is the engine, else in requests, as `running` is."""

    worker: str
    load: int
    running: int
    source: Literal["engine", "router"]


class Loads(Shape):
    workers: list[WorkerLoad]


# -- broadcast ---------------------------------------------------------------------------------------------------------

Spread = Literal["success", "partial_success", "failed"]
"""Whether all workers did it, some, or none."""


class Told(Shape):
    """What became of something that was sent to all workers."""

    status: Spread
    succeeded: int
    total_workers: int
    results: list[Result]


class FlushFailure(Shape):
    worker: str
    error: str


class Flushed(Shape):
    """What became of the caches: `workers_flushed` when all are empty, else the two lists."""

    status: Spread
    message: str
    total_workers: int
    total_http_workers: int
    workers_flushed: int | UnsetType = UNSET
    successful: list[str] | UnsetType = UNSET
    failed: list[FlushFailure] | UnsetType = UNSET


# -- workers -----------------------------------------------------------------------------------------------------------


class URLs(Shape):
    urls: list[str]


class Job(Shape):
    """How far the registration of a worker is, for clients of the reference."""

    job_type: Literal["AddWorker"]
    worker_url: str
    status: Literal["processing"]
    message: str
    timestamp: int


class Replica(Shape):
    """The engine process behind a worker that launch_server runs. Times in seconds."""

    rank: int
    state: str
    pid: int | None
    restarts: int
    reason: str
    in_state_secs: float
    next_start_secs: float | None
    last_exit: int | None


class WorkerState(Shape):
    """One worker: what was said of it, how it is, what it does."""

    id: str
    url: str
    model_id: str
    priority: int
    cost: float
    worker_type: str
    is_healthy: bool
    load: int
    connection_mode: Literal["HTTP"]
    metadata: dict[str, str]
    disable_health_check: bool
    health: Health
    circuit_breaker: Breaker
    held_off: str | None
    draining: bool
    processed: int
    tree_size: int
    last_error: str | None
    registered_secs: float
    engine: EngineReport
    base_url: str | UnsetType = UNSET
    dp_rank: int | UnsetType = UNSET
    runtime_type: str | UnsetType = UNSET
    replica: Replica | UnsetType = UNSET
    job_status: Job | UnsetType = UNSET


class Counts(Shape):
    prefill_count: int
    decode_count: int
    regular_count: int
    healthy_count: int


class WorkerList(Shape):
    workers: list[WorkerState]
    total: int
    stats: Counts


class Accepted(Shape):
    """The change is made or under way."""

    status: Literal["accepted"]
    worker_id: str
    message: str


class Registered(Accepted):
    url: str
    location: str


# -- scaling -----------------------------------------------------------------------------------------------------------


class Rolling(Shape):
    """How far a rolling restart is; `current` is a rank."""

    state: str
    done: int
    total: int
    current: int | None
    reason: str


class RollingAccepted(Rolling):
    status: Literal["accepted"]


class ScaleDecision(Shape):
    """How many workers there should be (`desired`) and were (`current`); `at` is in UTC."""

    at: str
    desired: int
    current: int
    reason: str
    figures: dict[str, Any]


class NextScale(Shape):
    """Seconds until the number may change; null when nothing asks for it."""

    up_in_seconds: float | None
    down_in_seconds: float | None


class Scale(Shape):
    """The last decision, the rules, who acts on it, and the last changes, newest first."""

    desired: int
    current: int | None
    reason: str
    rules: ScalingRules
    actuators: list[dict[str, Any]]
    decisions: list[ScaleDecision]
    at: str | UnsetType = UNSET
    figures: dict[str, Any] | UnsetType = UNSET
    next: NextScale | UnsetType = UNSET
