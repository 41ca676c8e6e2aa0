"""The shapes of the control plane's answers, for its OpenAPI document.

    handler --> Response                       built from the fleet's own objects, field by field
    shape   --> schema in /openapi.json        tests decode every answer into its shape

A field that may be missing has the default UNSET; one that may be null says so. What an engine answers has no shape.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from sglang_router.autoscale.scaler import ScalingRules
from sglang_router.config.effective import EffectiveOption
from sglang_router.routing.decision_record import DecisionRecord
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.model_names import LONGEST_NAME
from sglang_router.routing.source import SourceReport
from sglang_router.routing.states import Breaker, Health

_NO_CONTROLS = r"[^\x00-\x1f\x7f-\x9f]"
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME, pattern=rf"^{_NO_CONTROLS}+\Z")]
"""What can be the name of a model, or of an adapter: one line that is not too long."""
ModelNameOrNone = Annotated[str, msgspec.Meta(max_length=LONGEST_NAME, pattern=rf"^{_NO_CONTROLS}*\Z")]
"""The same, or nothing."""


class Shape(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Decoding is strict so that tests find undeclared fields; clients must accept new ones."""


# -- errors and health -------------------------------------------------------------------------------------------------


class ErrorDetail(Shape):
    """An error."""

    message: str
    type: str
    code: str
    param: str | None


class Error(Shape):
    """Every error of the router, on any path. `code` is for programs; it is in x-smg-error-code, too."""

    error: ErrorDetail


class OllamaError(Shape):
    """Every error of the router on the paths of Ollama (/api). Its code is in x-smg-error-code."""

    error: str


class SharedStateState(Shape):
    """How the router shares its knowledge with others. `state`: `connecting`, `connected`, or what is wrong, in one
    word; `peers`: other routers that count now."""

    state: str
    peers: int


class Readiness(Shape):
    """Whether a healthy worker can take requests. `shared_state`: only with --shared-state."""

    status: Literal["ready", "not ready"]
    healthy_workers: int
    total_workers: int
    shared_state: SharedStateState | UnsetType = UNSET
    reason: str | UnsetType = UNSET


# -- information -------------------------------------------------------------------------------------------------------


class Version(Shape):
    """Which router this is. `build`: whether its hot path runs compiled."""

    version: str
    build: Literal["compiled by mypyc", "interpreted"]


class Home(Shape):
    """What the router is. `version`: for those who may read the control plane. `links`: paths by what they are."""

    name: str
    links: dict[str, str]
    version: str | UnsetType = UNSET


class Options(Shape):
    """The options in effect. `file`: the file of --config."""

    options: list[EffectiveOption]
    file: str | None


class Models(Shape):
    """The models of all healthy workers; each as the first engine that has it describes it."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class KeptObjects(Shape):
    """What all workers keep, one after the other. `unavailable_workers`: so many did not answer; missing for none."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool
    first_id: str | UnsetType = UNSET
    last_id: str | UnsetType = UNSET
    unavailable_workers: int | UnsetType = UNSET


class OllamaModels(Shape):
    """The models of all workers, as their engines describe them."""

    models: list[dict[str, Any]]
    unavailable_workers: int | UnsetType = UNSET


class WorkerLoad(Shape):
    """`load` is in tokens when `source` is the engine, else in requests, as `running` is."""

    worker: str
    load: int
    running: int
    worker_type: Literal["regular", "prefill", "decode"]
    source: Literal["engine", "router"]


class Loads(Shape):
    """The load of each worker."""

    workers: list[WorkerLoad]


class DecisionList(Shape):
    """The last decisions, the newest first. `kept`: how many the router has, requests in flight included."""

    decisions: list[DecisionRecord]
    kept: int


# -- broadcast ---------------------------------------------------------------------------------------------------------

BroadcastStatus = Literal["success", "partial_success", "failed"]
"""All workers succeeded, some, or none."""


class Adapter(msgspec.Struct):
    """An adapter (LoRA) to be loaded or unloaded; further fields are the engine's.

    lora_name  what requests call it
    lora_path  where the engine finds it; only for loading
    """

    lora_name: ModelName
    lora_path: str | None = None


class BroadcastResult(Shape):
    """What one worker answered, and how long that took. If it did not answer, `status` is null and `error` says why."""

    worker: str
    id: str
    status: int | None
    body: Any
    error: str | None
    seconds: float


class Told(Shape):
    """The results of a request that went to several workers; `success`: all did it."""

    status: BroadcastStatus
    success: bool
    message: str
    succeeded: int
    total_workers: int
    results: list[BroadcastResult]


class FlushFailure(Shape):
    """A worker whose cache was not flushed, and why."""

    worker: str
    error: str


class Flushed(Shape):
    """The result of a flush: `workers_flushed` if all workers succeeded, else the two lists."""

    status: BroadcastStatus
    message: str
    total_workers: int
    total_http_workers: int
    workers_flushed: int | UnsetType = UNSET
    successful: list[str] | UnsetType = UNSET
    failed: list[FlushFailure] | UnsetType = UNSET


# -- workers -----------------------------------------------------------------------------------------------------------


class URLs(Shape):
    """The URLs of all workers."""

    urls: list[str]


class AddWorkerJob(Shape):
    """The progress of a worker's registration, for clients of the reference."""

    job_type: Literal["AddWorker"]
    worker_url: str
    status: Literal["processing"]
    message: str
    timestamp: int


class ReplicaInfo(Shape):
    """The engine process behind a worker that launch_server runs. Times in seconds."""

    rank: int
    state: str
    pid: int | None
    restarts: int
    reason: str
    in_state_secs: float
    next_start_secs: float | None
    last_exit: int | None


class WorkerOrigin(Shape):
    """What the source that found a worker calls it: a pod, a file, a DNS name. `instance`: the pod's uid."""

    name: str
    instance: str | None


class WorkerState(Shape):
    """One worker: its description, its state, its load."""

    id: str
    url: str
    model_id: str
    priority: int
    cost: float
    worker_type: Literal["regular", "prefill", "decode"]
    is_healthy: bool
    load: int
    elsewhere: int
    waiting: int
    connection_mode: Literal["HTTP"]
    metadata: dict[str, str]
    disable_health_check: bool
    health: Health
    circuit_breaker: Breaker
    held_off: str | None
    draining: bool
    withheld: str | None
    source: str
    paused: list[str]
    weight_version: str | None
    processed: int
    tree_size: int
    last_error: str | None
    registered_secs: float
    engine: EngineReport
    base_url: str | UnsetType = UNSET
    dp_rank: int | UnsetType = UNSET
    origin: WorkerOrigin | UnsetType = UNSET
    bootstrap_port: int | UnsetType = UNSET
    runtime_type: str | UnsetType = UNSET
    replica: ReplicaInfo | UnsetType = UNSET
    job_status: AddWorkerJob | UnsetType = UNSET


class Counts(Shape):
    """The number of workers by role, and of the healthy ones."""

    prefill_count: int
    decode_count: int
    regular_count: int
    healthy_count: int


class WorkerList(Shape):
    """All workers with their state; `discovery`: the sources that look for workers, if there are any."""

    workers: list[WorkerState]
    total: int
    stats: Counts
    discovery: list[SourceReport] | UnsetType = UNSET


class Accepted(Shape):
    """The change is made or in progress."""

    status: Literal["accepted"]
    worker_id: str
    message: str


class Registered(Accepted):
    """A worker was registered; its health is checked from now on."""

    url: str
    location: str


# -- scaling -----------------------------------------------------------------------------------------------------------


class RestartProgress(Shape):
    """The progress of a rolling restart; `current` is a rank."""

    state: str
    done: int
    total: int
    current: int | None
    reason: str


class RollingAccepted(RestartProgress):
    """A rolling restart has begun."""

    status: Literal["accepted"]


class ScaleDecision(Shape):
    """The desired number of workers, and the number at that time (`current`); `at` is in UTC."""

    at: str
    desired: int
    current: int
    reason: str
    figures: dict[str, Any]


class NextScale(Shape):
    """Seconds until the number may change; null while nothing demands it."""

    up_in_seconds: float | None
    down_in_seconds: float | None


class Scale(Shape):
    """The last decision, the rules, the actuators, and the last changes, newest first. `acts`: of several routers, this
    is the one whose actuators hear the decisions."""

    desired: int
    current: int | None
    reason: str
    rules: ScalingRules
    acts: bool
    actuators: list[dict[str, Any]]
    decisions: list[ScaleDecision]
    at: str | UnsetType = UNSET
    figures: dict[str, Any] | UnsetType = UNSET
    next: NextScale | UnsetType = UNSET
