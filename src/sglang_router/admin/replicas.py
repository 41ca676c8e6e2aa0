"""Workers whose engines this process runs (`launch_server`): restarts; and how many workers there should be.

POST /workers/{id}/restart    drains one worker, starts its engine anew; 202, GET /workers/{id} shows how it goes
POST /restart_workers         all of them, one after the other, the next when the one before is healthy again
GET  /restart_workers         how far that is
GET  /scale                   the desired number of workers, and the last decisions with their reasons
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.context import JSON, Context, Replicas
from sglang_router.admin.workers import named
from sglang_router.errors import Conflict


async def restart(context: Context, request: Request) -> Response:
    worker = named(context, request)
    _replicas(context).restart_worker(worker)
    message = f"The worker drains {worker.load} requests and is then restarted"
    return JSON({"status": "accepted", "worker_id": worker.id, "message": message}, 202)


async def restart_all(context: Context, request: Request) -> Response:
    runner = _replicas(context)
    runner.restart_all()
    return JSON({"status": "accepted", **runner.rolling}, 202, {"location": "/restart_workers"})


async def rolling(context: Context, request: Request) -> Response:
    return JSON(_replicas(context).rolling)


async def scale(context: Context, request: Request) -> Response:
    if context.scaling is None:
        raise Conflict("Nothing is scaled here: start the router with --autoscale MIN:MAX.")
    return JSON(context.scaling.explain())


def _replicas(context: Context) -> Replicas:
    if context.replicas is None:
        raise Conflict(
            "The engines are not run by this router: restart them where they run (launch_server runs its own)."
        )
    return context.replicas
