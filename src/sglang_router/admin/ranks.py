"""Add one data-parallel rank of an engine: POST /add_worker?url=URL@1, for a rank that was removed before."""

from __future__ import annotations

import re

import msgspec

from sglang_router.admin.context import Context
from sglang_router.config import parse_worker_url
from sglang_router.errors import ConfigError, InvalidRequest
from sglang_router.routing.spec import WorkerSpec
from sglang_router.workers.ranks import MAX_RANKS

_RANK = re.compile(r"(.*)@([0-9]{1,4})/?", re.ASCII)


def rank_to_add(context: Context, url: str, key: str | None) -> WorkerSpec | None:
    """Return the spec of the rank that a URL names; None when it names an engine.

    Raises: InvalidRequest, when there cannot be such a rank, or it is there.
    """
    match = _RANK.fullmatch(url)
    if match is None:
        return None
    rank = int(match[2])
    try:
        base = parse_worker_url(match[1])
    except ConfigError as error:
        raise InvalidRequest(str(error), param="url") from None
    others, rules = context.fleet.entries(base), context.add_rules
    ranks = min((entry.report.ranks for entry in others if entry.report.ranks), default=MAX_RANKS)
    name = f"{base}@{rank}"
    if any(entry.dp_rank == rank for entry in others):
        raise InvalidRequest(f"Worker {name} already exists", param="url")
    if not rules.dp_aware and not any(entry.spec.dp_aware for entry in others):
        raise InvalidRequest(f"Worker {name} is a rank: start the router with --dp-aware", param="url")
    if any(entry.dp_rank is None for entry in others):
        raise InvalidRequest(f"The ranks of worker {base} are not workers of their own", param="url")
    if rank >= ranks:
        raise InvalidRequest(f"Worker {base} has {ranks} ranks, counted from 0", param="url")
    if others:  # it has the key and labels of its engine
        known: WorkerSpec = msgspec.structs.replace(others[0].spec, dp_rank=rank)
        return known
    return WorkerSpec(url=base, api_key=key, dp_aware=True, dp_rank=rank, health=rules.health)
