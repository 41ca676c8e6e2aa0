"""What an operator says of a worker: a record that is read from JSON and written to the state file."""

from __future__ import annotations

from typing import Final

import msgspec

from sglang_router.routing.roles import REGULAR
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source

HIGHEST_PORT: Final = 65535


class WorkerSpec(msgspec.Struct, kw_only=True):
    """What is known of a worker before its engine is asked.

    The policy `cost` reads `priority` and `cost`: half the cost, or twice the priority, makes it worth twice the wait.

    url             base URL of the engine
    dp_rank         which of the engine's data-parallel ranks this is; None for an engine as a whole
    dp_aware        each rank of the engine becomes a worker of its own, see `workers.ranks`
    worker_type     its role, one of `routing.roles.ROLES`
    bootstrap_port  where a prefill worker tells decode workers how to fetch its KV cache; None: the engine's default
    source          what made the worker known, and so owns it
    origin          its name there: namespace and name of a pod, a file, a DNS name; "" where the source has none
    instance        differs for another process at the same URL, as far as its source knows: a pod's uid; "": it cannot
    """

    url: str
    dp_rank: int | None = None
    dp_aware: bool = False
    api_key: str | None = None
    model_id: str | None = None
    priority: int = 50
    cost: float = 1.0
    worker_type: str = REGULAR
    bootstrap_port: int | None = None
    runtime: str | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    health: HealthRules = HealthRules()
    source: Source = Source.API
    origin: str = ""
    instance: str = ""
