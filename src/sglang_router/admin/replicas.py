"""Restarts of the engines that this process runs (`launch_server`), and the scaling of their number.

POST /workers/{id}/restart    drains one worker, then restarts its engine; 202, GET /workers/{id} shows the progress
POST /restart_workers         restarts all, one after the other, each once the one before is healthy again
GET  /restart_workers         the progress of that
GET  /scale                   the desired number of workers, and the last decisions with their reasons
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.context import JSON, Context, ReplicaControl
from sglang_router.admin.workers import named
from sglang_router.errors import Conflict
from sglang_router.words import counted


async def restart(context: Context, request: Request) -> Response:
    """Restart the engine of a worker after its requests in flight."""
    worker = named(context, request)
    _runner(context).restart_worker(worker)
    message = f"The worker drains {counted(worker.own_load, 'request')} in flight, then its engine is restarted"
    return JSON({"status": "accepted", "worker_id": worker.id, "message": message}, 202)


async def restart_all(context: Context, request: Request) -> Response:
    """Restart all engines, one after the other."""
    runner = _runner(context)
    runner.restart_all()
    return JSON({"status": "accepted", **runner.rolling}, 202, {"location": "/restart_workers"})


async def rolling(context: Context, request: Request) -> Response:
    """Return the progress of the rolling restart."""
    return JSON(_runner(context).rolling)


async def scale(context: Context, request: Request) -> Response:
    """Return the state of autoscaling.

    Raises: Conflict, when it is off.
    """
    if context.autoscaler is None:
        raise Conflict("Autoscaling is off: start the router with --autoscale MIN:MAX.")
    return JSON(context.autoscaler.explain())


def _runner(context: Context) -> ReplicaControl:
    if context.replicas is None:
        raise Conflict(
            "This router does not run the engines: restart them where they run (launch_server runs its own)."
        )
    return context.replicas
