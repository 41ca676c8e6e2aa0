"""Where workers listen, as gateways write it: `10.0.0.7:30000`, `[fd00::7]:30000`.

    await of(target)       the endpoint of a worker, after a look-up if its address is not known
    known(target)          the same at once; "" while it is not known
    workers_at(endpoints)  the names of the workers behind some endpoints: all ranks of an engine are behind one

A worker's URL may hold a name. Gateways connect to addresses, so its first address stands for it; health checks, which
connect there too, keep it known.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.plan import Target
from sglang_router.routing.worker import Worker


class Destinations:
    """See the module."""

    def __init__(self, fleet: Fleet, connections: ConnectionPool) -> None:
        self._fleet = fleet
        self._connections = connections

    def __repr__(self) -> str:
        return f"<Destinations among {len(self._fleet)} workers>"

    async def of(self, target: Target) -> str:
        """Return the endpoint of a worker.

        Raises: OSError, when the address of its name cannot be found.
        """
        origin = self._connections.origin(target)
        address = (await self._connections.addresses.of(origin.host))[0] if origin.is_name else origin.host
        return _endpoint(address, origin.port)

    def known(self, target: Target) -> str:
        """Return the endpoint of a worker; "" while the address of its name is not known."""
        origin = self._connections.origin(target)
        address = self._connections.addresses.first(origin.host) if origin.is_name else origin.host
        return address and _endpoint(address, origin.port)

    def prefix(self, target: Target) -> bytes:
        """Return the path before the worker's paths; b"" for most."""
        return self._connections.origin(target).prefix

    def workers_at(self, endpoints: Iterable[str]) -> frozenset[str]:
        """Return the names of the workers behind these endpoints. It looks at all workers."""
        wanted = frozenset(endpoints) - {""}
        return frozenset([worker.url for worker in self._fleet if self.known(worker.target) in wanted])

    def worker_at(self, endpoint: str) -> Worker | None:
        """Return the first worker behind an endpoint; None: there is none. It looks at all workers."""
        return next((worker for worker in self._fleet if self.known(worker.target) == endpoint), None)

    def after(self, target: Target, among: frozenset[str] | None, most: int, now: float) -> list[str]:
        """Return further endpoints for a request, should its worker not answer: of its pool, the least loaded first.

        among  names of the only workers that may get it; None: any may
        """
        worker = self._fleet.by_url(target.name)
        if worker is None or not most:
            return []
        first = self.known(target)
        others: dict[str, int] = {}
        for each in self._fleet.pools.of(worker).candidates(now):
            endpoint = self.known(each.target)
            if endpoint and endpoint != first and (among is None or each.url in among):
                others[endpoint] = min(each.load, others.get(endpoint, each.load))
        return heapq.nsmallest(most, others, key=others.__getitem__)


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
