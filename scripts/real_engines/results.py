"""The results of one engine's checks: the row of the table, and what was wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from scripts.real_engines.load import Fate


@dataclass
class Results:
    """Times in seconds. `requests`, `failed` and `cut` are counts over both runs; `predicted` and `reported` are the
    cached tokens of the cache test."""

    start: float = 0.0
    requests: int = 0
    failed: int = 0
    cut: int = 0
    predicted: int = 0
    reported: int = 0
    back: float = 0.0
    rolling: float = 0.0
    end: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)
            print(f"    WRONG  {what}", flush=True)

    def count(self, fates: Counter[Fate]) -> None:
        self.requests += fates.total()
        self.failed += fates[Fate.FAILED]
        self.cut += fates[Fate.CUT]
