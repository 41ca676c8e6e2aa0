"""The figures of many runs, in a file of JSON lines: so tables can be made again, and a part can be run again.

The last line for a load and a contender counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from scripts.benchmark.options import PLACE
from scripts.routing_suite.rows import SuiteError

REPLAYS, PROCESSES, REAL = "replays", "processes", "engines"
FILE = PLACE / "routing.jsonl"

LATE = 0.1
"""Seconds by which a client may send its slowest hundredth too late, before times are called disturbed."""
Figures = dict[str, dict[str, float | None]]
"""By name: "mean" over the seeds, and "half_width" of its confidence interval, None with one seed."""


class Cell(msgspec.Struct):
    """One load with one contender.

    kind     REPLAYS, PROCESSES or REAL
    reasons  why requests failed, and how many
    loaded   load average of the machine when it began
    began    when it began, in seconds since 1970: the same for those that ran side by side
    """

    kind: str
    load: str
    contender: str
    seeds: int
    figures: Figures
    reasons: dict[str, int] = {}
    loaded: float = 0.0
    began: float = 0.0

    def mean(self, figure: str) -> float:
        """Return the mean of a figure."""
        return self.figures[figure]["mean"] or 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other programs delayed the client, so that times say little."""
        late = self.figures.get("late_p99")
        return late is not None and (late["mean"] or 0.0) > LATE

    def half(self, figure: str) -> float:
        """Return the half-width of its confidence interval; 0.0 when there is none."""
        return self.figures[figure]["half_width"] or 0.0


class About(msgspec.Struct):
    """How runs of a kind were made: command, day, and machine with version."""

    kind: str
    command: str
    day: str
    machine: str


class Line(msgspec.Struct):
    """One line of the file: one of both."""

    cell: Cell | None = None
    about: About | None = None


class Samples:
    """See the module. Raises: OSError; SuiteError for a file of another version."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._lines = [_LINE.decode(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        except msgspec.DecodeError as error:
            raise SuiteError(f"{path} was not written by this version: {error}; remove it") from None

    def __repr__(self) -> str:
        return f"<Samples {self._path.name}: {len(self._lines)} lines>"

    def forget(self, kind: str) -> None:
        """Drop what there is of a kind."""
        self._lines = [
            line for line in self._lines if all(each.kind != kind for each in (line.cell, line.about) if each)
        ]
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in self._lines))

    def add(self, found: Cell | About) -> None:
        """Keep what was found, also in the file."""
        line = Line(cell=found) if isinstance(found, Cell) else Line(about=found)
        self._lines.append(line)
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")

    def about(self, kind: str) -> str:
        """Return how the runs of a kind were made; the machine is that of the latest. "" when there are none."""
        told = [line.about for line in self._lines if line.about and line.about.kind == kind]
        commands = dict.fromkeys(f"`{each.command}` ({each.day})" for each in told)
        return f"{', '.join(commands)}. {told[-1].machine}" if told else ""

    def grid(self, kind: str, loads: Iterable[str], contenders: Sequence[str] = ()) -> dict[str, dict[str, Cell]]:
        """Return the cells by load and contender, in this order; without contenders, all in the order of the file."""
        cells = [line.cell for line in self._lines if line.cell and line.cell.kind == kind]
        names = contenders or list(dict.fromkeys(cell.contender for cell in cells))
        latest = {(cell.load, cell.contender): cell for cell in cells}
        found = {load: {n: latest[load, n] for n in names if (load, n) in latest} for load in loads}
        return {load: row for load, row in found.items() if row}


_LINE = msgspec.json.Decoder(Line)
