"""Data-parallel ranks: an engine that schedules on several ranks becomes several workers.

    http://h:1  --its report says 2 ranks-->  http://h:1  +  http://h:1@0, http://h:1@1 (STARTING)
                                                |                 the first of them is healthy
                                                '--removed        http://h:1@0, http://h:1@1

Each rank has its own KV cache, so each is its own worker: prefixes, load, health and breaker are kept per rank. The
worker for the whole engine serves until the first rank is healthy; requests in flight on it end by themselves. When
the engine comes back with another number of ranks, its workers change in the same order.
"""

from __future__ import annotations

import msgspec

from sglang_router.routing.fleet import Fleet
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker

MAX_RANKS = 1024
"""Ranks of one engine; a report of more is not believed."""


def follow(fleet: Fleet, worker: Worker, now: float) -> None:
    """Bring the workers of an engine in line with its report. Called each time one of them was found well and asked."""
    ranks = worker.report.ranks
    if not worker.spec.dp_aware or worker.removed or ranks is None or ranks > MAX_RANKS:
        return
    wanted: list[int | None] = [*range(ranks)] if ranks > 1 else [None]
    present = {entry.dp_rank: entry for entry in fleet.entries(worker.spec.url)}
    for rank in wanted:
        if rank not in present:  # it has the source, key and labels of its engine
            spec: WorkerSpec = msgspec.structs.replace(worker.spec, dp_rank=rank)
            added = fleet.add(spec, now)
            fleet.announced(added, worker.announced)
            fleet.set_draining(added, worker.draining)
            fleet.withhold(added, worker.withheld)
    if any(present[rank].health is Health.HEALTHY for rank in wanted if rank in present):
        for rank, entry in present.items():
            if rank not in wanted:
                fleet.remove(entry)
