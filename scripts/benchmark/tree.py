"""The prefix tree by itself, beside what the project that continues the reference publishes of its own tree.

Measured by the functions of scripts/bench_tree.py, in a process of its own: its collector of garbage is off there, as
in the router.
"""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys

from scripts.bench_tree import fill, make_texts, quantile
from scripts.benchmark.processes import BenchError
from scripts.reporting import ROOT

from sglang_router.routing.prefix_tree.tree import Tree

NAME = "tree"
PUBLISHED_INSERT_US, PUBLISHED_MATCH_MB_S = 4.6, 253.0
"""Of smg's tree in Rust, by its own benchmark; the size of the texts of the first figure is not told."""
SIZES = (200, 1_000, 4_000, 16_000, 64_000)
TEXTS, SLOTS = 1_000, 4


def measured() -> dict[str, float]:
    """Return medians, measured in a process: "insert 200" in us, "match 200" in MB/s, ... Raises: BenchError."""
    command = [sys.executable, "-m", "scripts.benchmark.tree"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise BenchError(f"the benchmark of the prefix tree failed: {run.stderr}")
    return dict(json.loads(run.stdout))


def _measure() -> dict[str, float]:
    found = {}
    chance = random.Random(7)
    for size in SIZES:
        tree = Tree(2 * size * TEXTS)
        slots = [tree.add_slot() for _ in range(SLOTS)]
        fill(tree, slots, make_texts(chance, size, TEXTS))
        matching, inserting = fill(tree, slots, make_texts(chance, size, TEXTS), TEXTS)
        found[f"insert {size}"] = quantile(inserting, 0.5)
        found[f"match {size}"] = size / quantile(matching, 0.5)
    return found


def rows(tree: dict[str, float]) -> list[list[str]]:
    """Return the rows of the table."""
    shown = []
    for size in SIZES:
        insert, match = tree[f"insert {size}"], tree[f"match {size}"]
        took = size / PUBLISHED_MATCH_MB_S
        shown.append([f"{size:,} B", f"{insert:.1f}", f"{match:,.0f}", f"{size / match:.1f}", f"{took:.1f}"])
    return shown


HEAD = ("text", "insert us", "match MB/s", "match us", "at 253 MB/s us")


if __name__ == "__main__":
    gc.disable()
    print(json.dumps(_measure()))
