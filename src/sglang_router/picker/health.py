"""The gRPC health services of a picker (grpc.health.v1): Kubernetes and gateways ask whether it may be used.

liveness                                       serving as long as it answers
readiness, envoy.service.ext_proc.v3...., ""   as GET /readiness: a worker can take requests, and no end is near
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from grpc_health.v1 import health, health_pb2

from sglang_router.picker.messages import SERVICE

LIVENESS: Final = "liveness"
READINESS: Final = ("readiness", SERVICE, "")
_STATES: Final = health_pb2.HealthCheckResponse


class PickerHealth(health.aio.HealthServicer):  # type: ignore[misc]
    """See the module. ready: whether a request would find a worker."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        super().__init__()
        self._ready = ready

    async def look(self) -> None:
        """Take note of the state as it is now, and tell those that watch. Call it now and then."""
        await self.set(LIVENESS, _STATES.SERVING)
        state = _STATES.SERVING if self._ready() else _STATES.NOT_SERVING
        for service in READINESS:
            await self.set(service, state)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  (gRPC's name)
        """Answer with the state as it is now."""
        await self.look()
        return await super().Check(request, context)
