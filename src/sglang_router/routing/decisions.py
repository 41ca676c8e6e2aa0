"""What was decided for one worker: plain integers that the router counts, and that a scrape of the metrics reads."""

from __future__ import annotations


class Decisions:
    """See the module.

    legs     by policy and branch
    matched  bytes of routing text that the worker was believed to have cached, of `total`
    """

    __slots__ = ("legs", "matched", "total")

    def __init__(self) -> None:
        self.legs: dict[tuple[str, str], int] = {}
        self.matched = 0
        self.total = 0

    def __repr__(self) -> str:
        return f"<Decisions {sum(self.legs.values())} legs, {self.matched}/{self.total} bytes matched>"

    def count(self, policy: str, branch: str, matched: int, total: int) -> None:
        """Count a leg."""
        kind = (policy, branch)
        self.legs[kind] = self.legs.get(kind, 0) + 1
        self.matched += matched
        self.total += total

    def add(self, other: Decisions) -> None:
        """Add those for another worker."""
        for kind, legs in other.legs.items():
            self.legs[kind] = self.legs.get(kind, 0) + legs
        self.matched += other.matched
        self.total += other.total
