"""Reads version 1 of the state file: what earlier routers wrote about their workers. The rest of the file is the same.

Version 1 held whole specs, and flags instead of a source and of what came from options. The layout is written down
here once more, so that it stays as it was when `WorkerSpec` changes.
"""

from __future__ import annotations

import msgspec

from sglang_router.restart.saved_worker import SavedWorker, SpecChanges
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec


class WorkerSpecV1(msgspec.Struct, kw_only=True):
    """See `routing.spec.WorkerSpec`."""

    url: str
    dp_rank: int | None = None
    dp_aware: bool = False
    api_key: str | None = None
    model_id: str | None = None
    priority: int = 50
    cost: float = 1.0
    worker_type: str = "regular"
    runtime: str | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    health: HealthRules = HealthRules()


class SavedWorkerV1(msgspec.Struct, kw_only=True):
    """A worker as version 1 wrote it.

    given           --worker-urls named it, by flag or file
    default_key     its key is that of --worker-api-key, and not in `spec`
    default_health  its health checks are those of the options, and not in `spec`
    """

    spec: WorkerSpecV1
    id: str
    slot: int
    draining: bool
    given: bool
    default_key: bool
    default_health: bool

    def upgraded(self) -> SavedWorker:
        """Return it as this version writes it."""
        spec = self.spec
        return SavedWorker(
            url=spec.url,
            source=Source.FLAGS if self.given else Source.API,
            id=self.id,
            slot=self.slot,
            draining=self.draining,
            dp_rank=spec.dp_rank,
            dp_aware=spec.dp_aware,
            changes=self._changes(),
        )

    def _changes(self) -> SpecChanges:
        before, now = msgspec.structs.asdict(WorkerSpec(url=self.spec.url)), msgspec.structs.asdict(self.spec)
        known = [name for name in SpecChanges.__struct_fields__ if name in now]
        changes = {name: now[name] for name in known if now[name] != before[name]}
        for name, default in (("api_key", self.default_key), ("health", self.default_health)):
            changes.pop(name, None)
            if not default:  # also where the worker has no key at all
                changes[name] = now[name]
        return SpecChanges(**changes)


class HeadV1(msgspec.Struct, kw_only=True):
    """See `restart.snapshot.Head`."""

    now: float
    written_at: float
    workers: list[SavedWorkerV1]
