"""Data-parallel ranks: an engine that schedules on several of them becomes as many workers.

    http://h:1  --its report says 2 ranks-->  http://h:1  +  http://h:1@0, http://h:1@1 (STARTING)
                                                |                 the first of them is healthy
                                                '--removed        http://h:1@0, http://h:1@1

Each rank has a KV cache of its own, so each is a worker of its own: prefixes, load, health and breaker are kept by
rank. The engine as a whole serves until the first rank can; requests under way on it end by themselves. When the
engine comes back with another number of ranks, the entries follow in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.worker import Health, WorkerSpec

if TYPE_CHECKING:
    from sglang_router.core.fleet import Fleet
    from sglang_router.core.worker import Worker

MOST = 1024
"""Ranks of one engine; a report of more is not believed."""


def follow(fleet: Fleet, worker: Worker, now: float) -> None:
    """Brings the entries of a worker's engine in line with its report. Called each time one is well and has told."""
    ranks = worker.report.ranks
    if not worker.spec.dp_aware or worker.removed or ranks is None or ranks > MOST:
        return
    wanted: list[int | None] = [*range(ranks)] if ranks > 1 else [None]
    there = {entry.dp_rank: entry for entry in fleet.entries(worker.spec.url)}
    for rank in wanted:
        if rank not in there:
            spec: WorkerSpec = msgspec.structs.replace(worker.spec, dp_rank=rank)
            fleet.set_draining(fleet.add(spec, now), worker.draining)
    if any(there[rank].health is Health.HEALTHY for rank in wanted if rank in there):
        for rank, entry in there.items():
            if rank not in wanted:
                fleet.remove(entry)
