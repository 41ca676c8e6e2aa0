"""The exposition of the router's metrics, for all who ask: see `admin.shared`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sglang_router.admin.shared import Shared, joined
from sglang_router.observe import exposition
from sglang_router.observe.deferred import Deferred
from sglang_router.observe.metrics import Metrics


class Scrapes:
    """Answers scrapes; call it with the Accept header. The bytes of each format are the same for `interval` seconds."""

    def __init__(self, metrics: Metrics, deferred: Deferred, clock: Callable[[], float], interval: float) -> None:
        self._metrics = metrics
        self._deferred = deferred
        self._made: Shared[bytes] = Shared(clock, interval)

    async def __call__(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the format that the header asks for, and its content type."""
        openmetrics = exposition.wanted(accept)
        content_type = exposition.OPENMETRICS_TYPE if openmetrics else exposition.TEXT_TYPE
        return await self._made.get(content_type, partial(self._make, openmetrics)), content_type

    async def _make(self, openmetrics: bool) -> bytes:
        self._deferred.flush()  # the listeners receive the events that were kept for a batch
        return await joined(self._metrics.pieces(openmetrics))
