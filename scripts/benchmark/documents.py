"""Puts the results into docs/performance.md, between marks, and the chart beside it.

    <!-- bench: tables -->
    ... is replaced ...
    <!-- end of bench -->

`sh scripts/bench --docs` does it, or with `--from FILE` for a former run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scripts.benchmark.processes import BenchError
from scripts.benchmark.results import Results
from scripts.benchmark.tables import all_tables
from scripts.benchmark.verdicts import LOSSES_HEAD, goals_head, goals_rows, losses_rows, losses_summary
from scripts.reporting import ROOT, table

from sglang_router.words import counted

PAGE = ROOT / "docs" / "performance.md"
END = "<!-- end of bench -->"
CHART = ROOT / "docs" / "performance.svg"


def about(results: Results) -> str:
    return f"{results.machine} Medians of {counted(results.rounds, 'round')} of {results.seconds:g} s."


def losses_text(results: Results, markdown: bool) -> str:
    """Return where rivals are better: a sentence for each, and the table of our figures by theirs."""
    told = losses_summary(results)
    rows = losses_rows(results)
    listed = [f"- {line}" if markdown else line for line in told]
    return "\n".join(listed) + (f"\n\n{table(LOSSES_HEAD, rows, markdown, words=2)}" if rows else "")


def goals_text(results: Results, markdown: bool) -> str:
    rows = goals_rows(results)
    return table(goals_head(results), rows, markdown, words=3) if rows else "No goal can be judged by these figures."


def sections(results: Results) -> dict[str, str]:
    """Return what stands between the marks, by their names."""
    return {
        "tables": f"{about(results)}\n\n{all_tables(results, markdown=True)}",
        "goals": goals_text(results, markdown=True),
        "losses": losses_text(results, markdown=True),
    }


def replaced(page: str, parts: Mapping[str, str]) -> str:
    """Return a page with new text between the marks. Raises: BenchError if a mark is missing."""
    for name, text in parts.items():
        before, mark, rest = page.partition(f"<!-- bench: {name} -->\n")
        _, end, after = rest.partition(END)
        if not end:
            raise BenchError(f"the page has no marks for {name}: <!-- bench: {name} --> and {END}")
        page = f"{before}{mark}\n{text}\n\n{end}{after}"
    return page


def write(page: Path, results: Results) -> None:
    """Rewrite the page. Raises: BenchError, OSError."""
    page.write_text(replaced(page.read_text(), sections(results)))
