"""The figures of a comparison as a table for people, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sglang_router.replay.comparison import Figure, Row


class Column(NamedTuple):
    """One column.

    title  of the column
    name   of its figure
    show   makes it readable
    best   which of several values is the best one; None: there is no best one
    """

    title: str
    name: str
    show: Callable[[float], str]
    best: Callable[[Iterable[float]], float] | None = min


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 10 else f"{value:.1f} s"


def _share(value: float) -> str:
    return f"{value * 100:.1f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column("cached", "hit", _share, max),
    Column("regret", "hit_regret", _share),
    Column("TTFT p50", "ttft_p50", _seconds),
    Column("p90", "ttft_p90", _seconds),
    Column("p99", "ttft_p99", _seconds),
    Column("mean", "ttft_mean", _seconds),
    Column("x bound", "ttft_regret", lambda value: f"{value:.2f}"),
    Column("ITL p99", "itl_p99", _seconds),
    Column("whole p90", "e2e_p90", _seconds),
    Column("tokens/s", "output_per_s", _count, max),
    Column("balance", "balance", lambda value: f"{value:.2f}"),
    Column("SLO", "slo", _share, max),
    Column("failed", "failed", _count),
)


def table(rows: Sequence[Row]) -> str:
    """Return the table, with the half-widths in a second line for each policy where there are several seeds."""
    lines = [["policy", *(column.title for column in COLUMNS)]]
    for row in rows:
        lines.append([row.label, *(column.show(row.figures[column.name].mean) for column in COLUMNS)])
        if len(row.runs) > 1:
            lines.append(["", *(_half(column, row.figures[column.name]) for column in COLUMNS)])
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "".join("  ".join(_placed(line, widths)).rstrip() + "\n" for line in lines)


def _half(column: Column, figure: Figure) -> str:
    return "+-" + column.show(figure.half)


def _placed(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(word.rjust(width) for word, width in zip(line[1:], widths[1:], strict=True))]


def as_json(load: str, rows: Sequence[Row]) -> str:
    """Return all figures of all runs. What depends on the machine, the speed of the simulation, is left out."""
    found: dict[str, Any] = {"load": load, "policies": []}
    for row in rows:
        figures = {
            name: {"mean": figure.mean, "half_width": None if math.isnan(figure.half) else figure.half}
            for name, figure in row.figures.items()
            if name != "wall_requests_per_s"
        }
        found["policies"].append({"policy": row.label, "seeds": [run.seed for run in row.runs], "figures": figures})
    return json.dumps(found, indent=2) + "\n"
