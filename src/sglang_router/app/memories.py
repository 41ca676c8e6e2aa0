"""Sum up the prefix memories of all pools' policies, for metrics."""

from __future__ import annotations

from sglang_router.routing.policies.base import PrefixMemory
from sglang_router.routing.pools import Pools
from sglang_router.routing.worker import Worker


class Memories:
    """The prefix memories of all pools. Sizes are bytes of routing text; all values of a removed worker are 0."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def _all(self) -> list[PrefixMemory]:
        return [pool.policy.memory for pool in self._pools if pool.policy.memory is not None]

    def _of(self, worker: Worker) -> PrefixMemory | None:
        return None if worker.removed else self._pools.of(worker).policy.memory

    @property
    def nodes(self) -> int:
        """Number of nodes of all memories."""
        return sum(memory.nodes for memory in self._all())

    @property
    def held(self) -> int:
        """Bytes in all memories; a text that several workers have is counted once."""
        return sum(memory.held for memory in self._all())

    @property
    def retired_size(self) -> int:
        """Bytes of removed or emptied workers that are not freed yet."""
        return sum(memory.retired_size for memory in self._all())

    def size(self, worker: Worker) -> int:
        """Bytes of prefixes that a worker is believed to have cached."""
        memory = self._of(worker)
        return 0 if memory is None else memory.size(worker)

    def entries(self, worker: Worker) -> int:
        """Number of texts that a worker is believed to have cached."""
        memory = self._of(worker)
        return 0 if memory is None else memory.entries(worker)

    def evictions(self, worker: Worker) -> int:
        """Number of nodes of a worker that were evicted since it was added or emptied."""
        memory = self._of(worker)
        return 0 if memory is None else memory.evictions(worker)

    def evicted_bytes(self, worker: Worker) -> int:
        """Bytes of those nodes."""
        memory = self._of(worker)
        return 0 if memory is None else memory.evicted_bytes(worker)


def memories_of(pools: Pools) -> Memories | None:
    """Return the memories of pools; None when no policy has one."""
    return Memories(pools) if any(pool.policy.memory is not None for pool in pools) else None
