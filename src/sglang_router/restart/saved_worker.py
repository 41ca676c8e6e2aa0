"""A worker in the state file: only what its source will not tell again.

    source       kept                                                    comes back
    API          all of it: URL, changes to the defaults, id, drained    always
    FLAGS, FILE  changes made since the start, id, drained               if flags or file still name it
    KUBERNETES   the same as for API, with its name and instance there   if that source still looks for workers; it then
    and others                                                           says which of them are there
    REPLICAS     nothing: its process ends with the router               never

A value that came from an option is not kept, so the option's value of the next start counts: a new --worker-api-key
reaches the workers that had the old one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from sglang_router.config import parse_worker_url
from sglang_router.config.checks import bearer_key
from sglang_router.routing.roles import ROLES
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.spec import HIGHEST_PORT, WorkerSpec
from sglang_router.routing.worker import UPDATING, Worker
from sglang_router.workers.sources import ConfiguredWorkers


class SpecChanges(msgspec.Struct, kw_only=True):
    """The fields of a `WorkerSpec` in which a worker differs from what its source says; the others are left out."""

    api_key: str | UnsetType | None = UNSET
    model_id: str | UnsetType | None = UNSET
    priority: int | UnsetType = UNSET
    cost: float | UnsetType = UNSET
    worker_type: str | UnsetType = UNSET
    bootstrap_port: int | UnsetType | None = UNSET
    runtime: str | UnsetType | None = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    origin: str | UnsetType = UNSET
    instance: str | UnsetType = UNSET
    health: HealthRules | UnsetType = UNSET

    def known(self) -> dict[str, Any]:
        """Return those that differ, by name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}


class SavedWorker(msgspec.Struct, kw_only=True):
    """A worker as it is written.

    slot    its slot in the records of the prefix tree; -1: it has none
    paused  what the control plane has stopped or taken from its engine, but for what passes by itself; a file of an
            older router does not say it
    """

    url: str
    source: Source
    id: str
    slot: int
    draining: bool
    paused: list[str] = []
    weights: str = ""
    dp_rank: int | None
    dp_aware: bool
    changes: SpecChanges

    def spec_today(self, configured: ConfiguredWorkers) -> WorkerSpec | None:
        """Return the spec by today's options; None if the worker's source does not name it any more.

        A worker that was added by the API and is named by flags or file today belongs to these from now on.
        """
        named = configured.named(self.url)
        if self.source.looks:
            if named is not None or self.source not in configured.looking:
                return None
        elif self.source.told_again and (named is None or named.dp_aware != self.dp_aware):
            return None
        base = named or configured.defaults.spec(self.url, self.source)
        spec: WorkerSpec = msgspec.structs.replace(
            base, dp_rank=self.dp_rank, dp_aware=self.dp_aware, **self.changes.known()
        )
        return spec


def save(workers: Iterable[Worker], configured: ConfiguredWorkers) -> list[SavedWorker]:
    """Return what is to be written about these workers; `configured`: what their sources said at this start."""
    return [_saved(worker, configured) for worker in workers if worker.spec.source is not Source.REPLICAS]


def _saved(worker: Worker, configured: ConfiguredWorkers) -> SavedWorker:
    spec = worker.spec
    return SavedWorker(
        url=spec.url,
        source=spec.source,
        id=worker.id,
        slot=worker.slot,
        draining=worker.draining,
        paused=[name for name in worker.paused if name != UPDATING],
        weights=worker.weights,
        dp_rank=worker.dp_rank,
        dp_aware=spec.dp_aware,
        changes=_changes(worker, configured),
    )


def _changes(worker: Worker, configured: ConfiguredWorkers) -> SpecChanges:
    spec = worker.spec
    named = configured.named(spec.url) if spec.source.told_again else None
    before = msgspec.structs.asdict(named or configured.defaults.spec(spec.url, spec.source))
    now = msgspec.structs.asdict(spec)
    return SpecChanges(**{name: now[name] for name in SpecChanges.__struct_fields__ if now[name] != before[name]})


def check(workers: list[SavedWorker]) -> None:
    """Check what a registration would check. Raises: ValueError, ConfigError."""
    for saved in workers:
        _check_one(saved)
    if len({saved.id for saved in workers}) < len(workers):
        raise ValueError("an id is there twice")
    if len({(saved.url, saved.dp_rank) for saved in workers}) < len(workers):
        raise ValueError("a worker is there twice")


def _check_one(saved: SavedWorker) -> None:
    if parse_worker_url(saved.url) != saved.url:
        raise ValueError("a URL is not in its normal form")
    if (saved.dp_rank or 0) < 0:
        raise ValueError("a rank is too small")
    key, rules = saved.changes.api_key, saved.changes.health
    if isinstance(key, str):
        bearer_key(key)
    known = saved.changes.known()
    if known.get("worker_type", "regular") not in ROLES:
        raise ValueError("a role is unknown")
    port = known.get("bootstrap_port")
    if port is not None and not 1 <= port <= HIGHEST_PORT:
        raise ValueError("a bootstrap port is out of range")
    if rules is UNSET:
        return
    if not (0 < rules.interval < math.inf and 0 < rules.timeout < math.inf and rules.endpoint.startswith("/")):
        raise ValueError("its health checks cannot be made")
    if rules.failure_threshold < 1 or rules.success_threshold < 1:
        raise ValueError("a threshold is too small")
