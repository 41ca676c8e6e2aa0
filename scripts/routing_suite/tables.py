"""The tables in Markdown, and where another router is better: computed, not judged. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from scripts.reporting import table
from scripts.routing_suite.samples import Cell

Grid = Mapping[str, Mapping[str, Cell]]
"""Cells by load and contender."""
MARGIN = 0.02
"""What another router must be better by, to be listed."""
DISTURBED = "~"
FAILING = 0.01
"""What share of requests may fail before a summary tells it."""
CLEARLY = 0.2
"""What a time to first token must be better by, to be counted as clearly better."""


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def share(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


class Compared(NamedTuple):
    """A figure that is compared. better: the best of several values."""

    name: str
    title: str
    show: Callable[[float], str]
    better: Callable[[list[float]], float]

    def of(self, cell: Cell) -> str:
        """Return the figure of a cell; with a mark when it is a time, and was disturbed; with the share that failed."""
        mark = DISTURBED if cell.disturbed and self.show is seconds else ""
        failed = cell.mean("failed") / (cell.mean("requests") or 1.0)
        return f"{mark}{self.show(cell.mean(self.name))}{f', {failed:.0%} failed' if failed > FAILING else ''}"


HIT = Compared("hit", "Cached tokens, of all prompt tokens", share, max)
TTFT = Compared("ttft_p90", "Time to first token, p90", seconds, min)
WHOLE = Compared("e2e_p90", "Whole request, p90", seconds, min)
COMPARED = (HIT, TTFT, WHOLE)


def _names(grid: Grid) -> list[str]:
    """Return all contenders, in the order of the loads that had most of them."""
    rows = sorted(grid.values(), key=len, reverse=True)
    return list(dict.fromkeys(name for row in rows for name in row))


def comparable(figure: Compared, one: Cell, other: Cell) -> bool:
    """Return whether a figure of both can be compared: times, if they ran side by side, on the same busy machine."""
    return figure.show is not seconds or one.began == other.began


def summary(grid: Grid, figure: Compared) -> str:
    """Return one table: a line for each load, a column for each contender; the best in bold.

    Of times, the best of those that ran beside the first contender.
    """
    names = _names(grid)
    lines = []
    for load, row in grid.items():
        first = next(iter(row.values()))
        best = figure.better([cell.mean(figure.name) for cell in row.values() if comparable(figure, first, cell)])
        lines.append([load, *(_cell(row.get(name), figure, best) for name in names)])
    return table(["load", *names], lines, True)


def _cell(cell: Cell | None, figure: Compared, best: float) -> str:
    if cell is None:
        return "-"
    return f"**{figure.of(cell)}**" if cell.mean(figure.name) == best else figure.of(cell)


class Column(NamedTuple):
    """A column of a load's own table. half: it shows the half-width of the confidence interval."""

    title: str
    name: str
    show: Callable[[float], str]
    half: bool = False


_COMMON = (
    Column("cached", "hit", share),
    Column("+-", "hit", share, True),
    Column("TTFT p50", "ttft_p50", seconds),
    Column("p90", "ttft_p90", seconds),
    Column("+-", "ttft_p90", seconds, True),
    Column("p99", "ttft_p99", seconds),
)
_LAST = (
    Column("whole p90", "e2e_p90", seconds),
    Column("balance", "balance", lambda value: f"{value:.2f}"),
    Column("failed", "failed", lambda value: f"{value:.0f}"),
)
REPLAY_COLUMNS = (
    *_COMMON,
    Column("mean / bound", "ttft_regret", lambda value: f"{value:.2f}"),
    Column("ITL p99", "itl_p99", seconds),
    Column("SLO", "slo", percent),
    *_LAST,
)
PROCESS_COLUMNS = (
    *_COMMON,
    *_LAST,
    Column("sent late p99", "late_p99", seconds),
    Column("CPU router", "cpu_router", percent),
    Column("engines", "cpu_engines", percent),
    Column("client", "cpu_client", percent),
    Column("machine", "cpu_machine", percent),
)

REAL_COLUMNS = (
    *_COMMON,
    *_LAST,
    Column("predicted", "predicted", lambda value: share(value) if value >= 0 else "-"),
    Column("sent late p99", "late_p99", seconds),
    Column("machine", "cpu_machine", percent),
)


def details(load: str, about: str, row: Mapping[str, Cell], columns: Sequence[Column]) -> str:
    """Return the table of one load, folded, with the reasons of failures."""
    shown = [each for each in columns if not each.half or any(cell.seeds > 1 for cell in row.values())]
    lines = [
        [name, *(each.show((cell.half if each.half else cell.mean)(each.name)) for each in shown)]
        for name, cell in row.items()
    ]
    failures = [
        f"\nFailed with {name}: {', '.join(f'{count} x {why}' for why, count in cell.reasons.items())}.\n"
        for name, cell in row.items()
        if cell.reasons
    ]
    text = table(["policy" if columns is REPLAY_COLUMNS else "router", *(each.title for each in shown)], lines, True)
    return f"<details><summary>{load}</summary>\n\n{about}\n\n{text}\n{''.join(failures)}\n</details>\n"


# -- where others are better ------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A load on which a rival is better than one of ours. by: the share of our value that it is better by."""

    figure: Compared
    ours: Cell
    rival: Cell
    by: float

    @property
    def shown(self) -> list[str]:
        """Return it as a line of a table."""
        ours, rival, figure = self.ours, self.rival, self.figure
        words = [ours.contender, ours.load, figure.title]
        return [*words, figure.of(ours), rival.contender, figure.of(rival), percent(self.by)]


def losses(grid: Grid, own: Callable[[str], bool]) -> Iterator[Loss]:
    """Give, for each of ours, the loads and figures in which the best rival is better by more than `MARGIN`."""
    for ours in (name for name in _names(grid) if own(name)):
        for row in grid.values():
            for figure in (HIT, TTFT) if ours in row else ():
                mine = row[ours]
                rivals = [c for name, c in row.items() if not own(name) and comparable(figure, mine, c)]
                if not rivals:
                    continue
                value, its = mine.mean(figure.name), figure.better([cell.mean(figure.name) for cell in rivals])
                by = (its - value if figure is HIT else value - its) / (value or 1.0)
                if by > MARGIN:
                    yield Loss(figure, mine, next(cell for cell in rivals if cell.mean(figure.name) == its), by)


def wins(grid: Grid, own: Callable[[str], bool]) -> Iterator[list[str]]:
    """Give, for each of ours and each rival: loads that both had, and on how many the time to first token of ours is
    clearly better, better, and worse by more than `MARGIN`."""
    names = _names(grid)
    for ours in (name for name in names if own(name)):
        for rival in (name for name in names if not own(name)):
            pairs = [
                (row[ours].mean(TTFT.name), row[rival].mean(TTFT.name))
                for row in grid.values()
                if ours in row and rival in row and comparable(TTFT, row[ours], row[rival])
            ]
            if pairs:
                clearly = sum(value <= its * (1 - CLEARLY) for value, its in pairs)
                better = sum(value < its for value, its in pairs)
                worse = sum(value > its * (1 + MARGIN) for value, its in pairs)
                yield [ours, rival, str(len(pairs)), str(clearly), str(better), str(worse)]


_LOSSES = ("ours", "load", "figure", "ours", "best rival", "its", "better by")
_WINS = ("ours", "rival", "loads", "better by 20 %", "better", "worse by 2 %")


def verdict(grid: Grid, own: Callable[[str], bool], title: str) -> str:
    """Return the section that says where others are better, and a count of both sides."""
    found = list(losses(grid, own))
    lines = [each.shown for each in found]
    listed = table(_LOSSES, lines, True, words=3) if lines else f"None: no rival is better by more than {MARGIN:.0%}."
    counted = table(_WINS, list(wins(grid, own)), True, words=2)
    return (
        f"{title}\n\nEvery load on which the best of the others has more cached tokens, or a shorter time to first "
        f"token at p90, by more than {MARGIN:.0%}:\n\n{listed}\n\n"
        f"On how many loads the time to first token at p90 is better, or worse:\n\n{counted}\n"
    )
