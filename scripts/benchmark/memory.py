"""--memory: the resident memory of this router while a million distinct prompts go through it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from scripts.benchmark.clients import SHARED, Natives
from scripts.benchmark.loads import Room
from scripts.benchmark.options import Options
from scripts.benchmark.processes import Processes, say
from scripts.benchmark.targets import OURS, Found

LIMIT = 300  # MB
STEPS, STEP = 10, 100_000  # distinct prompts
FLAT = 0.05  # most growth over the last three steps
KINDS = ((4_000, SHARED), (4_000, 0), (400, SHARED))
"""Bytes of a prompt, and how many shared beginnings there are."""
HEAD = ("MB after ... distinct prompts", "none", *(f"{step * STEP:,}" for step in range(1, STEPS + 1)))
HEAD += ("requests/s", "errors", f"<= {LIMIT} MB, flat")


@dataclass(frozen=True)
class Readings:
    """One row: MB before the first prompt and after each step."""

    label: str
    memory: list[float]
    rate: float
    errors: float

    @property
    def good(self) -> bool:
        flat = self.memory[-1] <= self.memory[-4] * (1 + FLAT)
        return max(self.memory) <= LIMIT and flat and not self.errors

    @property
    def row(self) -> list[str]:
        cells = [f"{each:.0f}" for each in self.memory]
        return [self.label, *cells, f"{self.rate:,.0f}", f"{self.errors:.0f}", "yes" if self.good else "NO"]


def measure(ours: Found, options: Options, processes: Processes) -> list[Readings]:
    """Measure all kinds of prompts. Raises: BenchError."""
    natives = Natives(processes.folder / "native").build()
    return [_measure_one(ours, natives, processes, size, shared) for size, shared in KINDS]


def _measure_one(ours: Found, natives: Natives, processes: Processes, size: int, shared: int) -> Readings:
    label = f"{size:,} B, {'three quarters' if shared else 'nothing'} shared"
    target = ours.start(processes, natives.workers(processes, Room(chunks=1))[1])
    assert target.name == OURS
    memory, errors, rates = [target.memory()], 0.0, []
    for step in range(1, STEPS + 1):
        told = natives.run("load", target, 300, 32, 300, size, shared, step, STEP)
        memory.append(target.memory())
        errors += told["errors"] + STEP - told["requests"]
        rates.append(told["rate"])
        say(f"{label}: {step * STEP:,} prompts: {memory[-1]:.0f} MB")
    processes.stack.close()
    return Readings(label, memory, statistics.median(rates), errors)
