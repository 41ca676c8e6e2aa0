"""What the page shows of one worker: the columns of its table.

A row is sent as an array, in the order of `COLUMNS`, and only when something in it has changed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_router.admin.figures import share
from sglang_router.admin.witness import Figures
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker
from sglang_router.words import counted


class WorkerRow(msgspec.Struct, array_like=True, gc=False):
    """See the module. null: nobody tells.

    state     "healthy", "starting", "unhealthy", "down", "draining", "withheld", "paused", "restarting", "ejected",
              "open" or "half open"
    why       of that state, for people; "" when there is nothing to say
    running   requests of this router there; limit: how many its engine runs at once
    waiting   queued inside the engine, else streams sent there that have no byte yet
    requests  a second, ttft in seconds, tokens of answers a second, cached share: of the last seconds
    tree      bytes of prefixes that it is believed to have cached
    kv        share of its KV cache that running requests take
    restarts  of its process, where the router runs it
    since     when it was registered or its process lost, seconds since 1970
    draining  it can be resumed; managed: it can be restarted
    """

    id: str
    url: str
    model: str
    role: str
    state: str
    why: str
    running: int
    waiting: int
    limit: int | None
    requests: float
    ttft: float | None
    tokens: float
    cached: float | None
    tree: int
    kv: float | None
    restarts: int | None
    since: float
    draining: bool
    managed: bool


COLUMNS = tuple(field.name for field in msgspec.structs.fields(WorkerRow))


def row_of(worker: Worker, figures: Figures, tree: int, epoch: float, replica: dict[str, Any] | None) -> WorkerRow:
    """Return the row of a worker.

    tree     bytes that are remembered of it
    epoch    seconds since 1970 at the moment 0 of the clock
    replica  its process, as the part that runs it describes it; None: it runs elsewhere
    """
    report = worker.report
    used, capacity = report.used_tokens, report.capacity_tokens
    state, why = state_of(worker, replica)
    requests, ttft, tokens, cached = figures
    return WorkerRow(
        id=worker.id,
        url=worker.url,
        model=worker.model or "",
        role=worker.role,
        state=state,
        why=why,
        running=worker.own_load,
        waiting=worker.waiting if report.queued is None else report.queued,
        limit=worker.window.limit or report.window,
        requests=requests,
        ttft=ttft,
        tokens=tokens,
        cached=cached,
        tree=tree,
        kv=None if used is None or capacity is None else share(used, capacity),
        restarts=None if replica is None else replica["restarts"],
        since=round(epoch + worker.since, 1),
        draining=worker.draining,
        managed=replica is not None,
    )


def state_of(worker: Worker, replica: dict[str, Any] | None) -> tuple[str, str]:
    """Return one word for the state of a worker, and the reason. What keeps it from requests longest comes first."""
    if worker.returning:
        load = worker.own_load
        after = f" after {counted(load, 'request')} in flight" if load else ""
        return "restarting", f"its engine is restarted{after}"
    if worker.draining:
        return "draining", f"no new requests; {counted(worker.own_load, 'request')} in flight"
    if worker.withheld:
        return "withheld", worker.withheld
    if worker.paused:
        return "paused", f"by the control plane: {', '.join(worker.paused)}"
    if worker.health is not Health.HEALTHY:
        exited = replica["reason"] if replica is not None else ""
        return worker.health.value, exited or worker.reason
    if worker.ejected:
        return "ejected", worker.ejected
    circuit = worker.circuit
    if circuit.state is Breaker.OPEN:
        return (
            "open",
            f"{counted(circuit.failures, 'failure')} in a row; the breaker is open for {circuit.open_for:g} s",
        )
    if circuit.state is Breaker.HALF_OPEN:
        return "half open", "one request at a time probes it"
    return "healthy", ""
