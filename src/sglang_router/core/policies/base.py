"""What a policy is: one verb, `choose`, and three notices it may ignore.

A policy is one file here and one line in `POLICIES`. It sees the facts of the request and the candidates, decides at
once, and says why in one word (`branch`), which appears in metrics and the access log. Load need not be counted:
`worker.load` is right for every policy, because taking a lease is the counting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from sglang_router.core.request import Facts
    from sglang_router.core.worker import Worker


class PolicySettings(msgspec.Struct, frozen=True):
    """The options policies read; each takes what concerns it. Sizes in bytes, times in seconds."""

    cache_threshold: float = 0.5
    balance_abs_threshold: int = 32
    balance_rel_threshold: float = 1.0001
    max_tree_size: int = 1 << 24
    max_idle: float = 14400.0
    assignment_mode: str = "random"
    prefix_hash_bytes: int = 1024
    hash_load_factor: float = 1.25


class Choice(msgspec.Struct, frozen=True, gc=False):
    """The worker, the reason, and the bytes of routing text (of `total`) it is believed to hold already."""

    worker: Worker
    branch: str
    matched: int = 0
    total: int = 0


class Policy:
    """The base of all policies: settings, chance and a turn that serves to break ties."""

    name: ClassVar[str]

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        self.settings = settings
        self.rng = rng
        self._turn = 0

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        """One of the candidates (there is at least one, in order of registration)."""
        raise NotImplementedError

    def added(self, worker: Worker) -> None:
        """A worker was registered."""

    def removed(self, worker: Worker) -> None:
        """A worker was taken out for good."""

    def emptied(self, worker: Worker) -> None:
        """A worker's cache is empty: it restarted, or was flushed."""

    def tidy(self, now: float, budget: int) -> bool:
        """Does up to `budget` steps of upkeep; true while there is more to do. Called from a timer."""
        return False

    def rotate(self, tied: Sequence[Worker]) -> Worker:
        """One of equals, each in turn."""
        if len(tied) == 1:
            return tied[0]
        self._turn += 1
        return tied[self._turn % len(tied)]

    def least_loaded(self, workers: Sequence[Worker]) -> Worker:
        """The worker with the fewest leases; equals in turn."""
        if len(workers) == 1:
            return workers[0]
        low = min([w.load for w in workers])
        return self.rotate([w for w in workers if w.load == low])
