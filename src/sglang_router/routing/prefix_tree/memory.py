"""The prefix tree as the memory of a policy: by worker where the tree has slots.

    policy --> TreeMemory --> Tree          cache_aware asks the tree itself, on the hot path
                  ^
                  '-- metrics, control plane, state file, scaling of replicas: `policy.memory`

A worker has one slot for as long as its cache is believed to be the same; `Worker.slot` is set here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sglang_router.routing.prefix_tree.image import Builder, Walk
from sglang_router.routing.prefix_tree.informed import Informed, KVCaches
from sglang_router.routing.prefix_tree.slot import Slot
from sglang_router.routing.prefix_tree.tree import Tree
from sglang_router.routing.worker import Worker

TEXT_SHARE: Final = 8
"""One text may take at most this part of what is remembered of a worker: so no prompt pushes out all others."""


class TreeMemory:
    """See the module; `policies.base.PrefixMemory` describes the methods.

    informed  corrects matches by what is known otherwise of the workers' caches; None: nothing is
    """

    def __init__(self, max_size: int, caches: KVCaches | None = None) -> None:
        self.tree = Tree(max_size, max_text=max(1, max_size // TEXT_SHARE))
        self.informed = None if caches is None else Informed(caches)

    def __repr__(self) -> str:
        return f"<TreeMemory {self.tree!r}>"

    # -- the policy's side -------------------------------------------------------------------------------------------

    def add(self, worker: Worker) -> int:
        """Give a worker an empty slot."""
        worker.slot = self.tree.add_slot()
        if self.informed is not None:
            self.informed.add(worker.slot, worker.id, worker.url, self.tree.max_size)
        return worker.slot

    def bound(self, worker: Worker, max_size: int) -> None:
        """Remember at most so many bytes of a worker, whose cache is known to hold less than usual."""
        self.tree.bound(worker.slot, max_size)

    def remove(self, worker: Worker) -> int:
        """Forget all that a worker holds; return the slot that it had."""
        slot, worker.slot = worker.slot, -1
        if self.informed is not None:
            self.informed.remove(slot)
        self.tree.retire(slot)
        return slot

    def tidy(self, before: float, budget: int) -> int:
        """Free the nodes of removed workers; evict what is too much, then what was last used before a time.

        Do at most `budget` steps; return how many.
        """
        done = self.tree.reclaim(budget)
        if done < budget:
            done += self.tree.trim(budget - done)
        if done < budget:
            done += self.tree.expire(before, budget - done)
        return done

    # -- PrefixMemory ------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> int:
        """Number of nodes of the tree."""
        return self.tree.nodes

    @property
    def held(self) -> int:
        """Bytes in memory; a text that several workers have is counted once."""
        return self.tree.held

    @property
    def retired_size(self) -> int:
        """Bytes of removed or emptied workers that are not freed yet."""
        return self.tree.retired_size

    def size(self, worker: Worker) -> int:
        """Bytes that a worker is believed to have cached."""
        return self._books(worker).size

    def entries(self, worker: Worker) -> int:
        """Number of texts that a worker is believed to have cached."""
        return self._books(worker).entries

    def evictions(self, worker: Worker) -> int:
        """Number of nodes of a worker that were evicted."""
        return self._books(worker).evictions

    def evicted_bytes(self, worker: Worker) -> int:
        """Bytes of those nodes."""
        return self._books(worker).evicted_bytes

    def walk(self) -> Walk:
        """Return a walk over the tree, which reads it in small steps."""
        return Walk(self.tree)

    def builder(self, slots: Mapping[int, int], shift: float, now: float) -> Builder:
        """Return what fills the empty tree with what a walk returned."""
        return Builder(self.tree, slots, shift, now)

    def _books(self, worker: Worker) -> Slot:
        return self.tree.books(worker.slot)
