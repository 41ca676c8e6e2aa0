"""docs/routing.md: what stands between its markers."""

from __future__ import annotations

from pathlib import Path

from scripts.reporting import ROOT
from scripts.routing_suite.replays import policies
from scripts.routing_suite.routers import OWN
from scripts.routing_suite.rows import ENGINED, LIVED, REPLAYED, SuiteError
from scripts.routing_suite.samples import PROCESSES, REAL, REPLAYS, Samples
from scripts.routing_suite.tables import (
    COMPARED,
    PROCESS_COLUMNS,
    REAL_COLUMNS,
    REPLAY_COLUMNS,
    Grid,
    details,
    summary,
    verdict,
)

PAGE = ROOT / "docs" / "routing.md"
SUBJECT = "cost"
"""Policies whose names begin with this word are compared with the others, in replays."""


def _tables(grid: Grid) -> list[str]:
    return [f"{figure.title}:\n\n{summary(grid, figure)}\n" for figure in COMPARED]


def replays_text(samples: Samples) -> str:
    """Return what is said about replays; "" without any."""
    grid = samples.grid(REPLAYS, [load.name for load in REPLAYED], policies())
    if not grid:
        return ""
    abouts = {load.name: " ".join((Path(load.trace).name, *load.flags)) for load in REPLAYED}
    folded = []
    for load, row in grid.items():
        seeds = max(cell.seeds for cell in row.values())
        folded.append(details(load, f"`sglang-router replay {abouts[load]} --seeds {seeds}`", row, REPLAY_COLUMNS))
    subject = SUBJECT if any(name.startswith(SUBJECT) for row in grid.values() for name in row) else "cache_aware"
    judged = verdict(grid, lambda name: name.startswith(subject), f"### Where `{subject}` loses in replays")
    return "\n".join([f"{samples.about(REPLAYS)}\n", *_tables(grid), judged, *folded])


def processes_text(samples: Samples) -> str:
    """Return what is said about routers as processes; "" without any."""
    grid = samples.grid(PROCESSES, [load.name for load in LIVED])
    if not grid:
        return ""
    cells = [cell for row in grid.values() for cell in row.values()]
    loaded = [cell.loaded for cell in cells]
    busy = [cell.mean("cpu_machine") for cell in cells]
    noise = (
        f"Load average when the runs began: {min(loaded):.1f} to {max(loaded):.1f}; share of all cores that was "
        f"busy during them: {min(busy):.0%} to {max(busy):.0%}."
    )
    abouts = {load.name: load.about for load in LIVED}
    folded = [details(load, abouts[load], row, PROCESS_COLUMNS) for load, row in grid.items()]
    judged = verdict(grid, lambda name: name.startswith(OWN), "### Where we lose")
    return "\n".join([f"{samples.about(PROCESSES)} {noise}\n", *_tables(grid), judged, *folded])


def engines_text(samples: Samples) -> str:
    """Return what is said about real engines; "" without any."""
    grid = samples.grid(REAL, [load.name for load in ENGINED])
    if not grid:
        return ""
    abouts = {load.name: load.about for load in ENGINED}
    folded = [details(load, abouts[load], row, REAL_COLUMNS) for load, row in grid.items()]
    return "\n".join([f"{samples.about(REAL)}\n", *_tables(grid), *folded])


TEXTS = {REPLAYS: replays_text, PROCESSES: processes_text, REAL: engines_text}
"""What makes the text of each part of the page."""


def replaced(page: str, name: str, text: str) -> str:
    """Return a page with new text between the markers of this name. Raises: SuiteError if a marker is missing."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SuiteError(f"{PAGE.name} has no markers for {name}")
    return before + begin + text + end + after


def write(samples: Samples) -> None:
    """Rewrite the page with what there is. Raises: SuiteError, OSError."""
    page = PAGE.read_text()
    for name, text_of in TEXTS.items():
        if text := text_of(samples):
            page = replaced(page, name, text)
    PAGE.write_text(page)
