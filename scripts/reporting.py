"""What all measuring scripts print: an aligned table, and what was measured on which machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TICK = os.sysconf("SC_CLK_TCK")
"""Units of CPU time in /proc in a second."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool, words: int = 1) -> str:
    """Return an aligned table, in Markdown if wanted. The first `words` columns hold words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    shapes = [(width, place < words) for place, width in enumerate(widths)]
    lines = [
        [cell.ljust(width) if left else cell.rjust(width) for cell, (width, left) in zip(row, shapes, strict=True)]
        for row in [head, *rows]
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width if left else "-" * (width - 1) + ":" for width, left in shapes])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(flags: Sequence[str]) -> str:
    """Describe the machine and the versions of a measurement, in a sentence."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((fact.partition(":")[2].strip() for fact in facts if "model name" in fact), platform.machine())
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}; sglang_router "
        f"{version('sglang-router')}, commit {git.stdout.strip()}, {' '.join(flags) or 'default options'}; CPU time "
        f"in ticks of {1000 / TICK:.0f} ms; load average before the start {os.getloadavg()[0]:.2f}."
    )
