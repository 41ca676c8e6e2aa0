"""A comparison as one HTML file: the table, the distributions of the time to first token, and the load over time.

The charts are of the first seed; the table is of all. Nothing is loaded from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sglang_router.replay.charts import Axis, Points, legend, line_chart, seconds
from sglang_router.replay.comparison import Row
from sglang_router.replay.result import Result
from sglang_router.replay.table import COLUMNS
from sglang_router.version import version_line

_STEPS = 200
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #d5dae1; --paper: #fff; --head: #f2f4f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ec; --faint: #3a4350; --paper: #12161c; --head: #1c222b; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 84rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--faint); }
th { background: var(--head); } th:first-child, td:first-child { text-align: left; }
td small { opacity: .65; display: block; } td.best { font-weight: 700; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.2rem; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .title { font-size: 13px; font-weight: 600; }
svg .grid { stroke: var(--faint); stroke-width: 1; } svg polyline { fill: none; stroke-width: 1.8; }
.legend span { margin-right: 1.2rem; } .legend i { display: inline-block; width: 1.4em; height: .3em;
  margin-right: .4em; vertical-align: middle; }
"""
_NOTES = """
<p><b>cached</b>: prompt tokens that the engines found in their caches, of all. <b>regret</b>: what one unlimited cache,
shared by all engines and filled as soon as a request arrives, would have found besides. <b>TTFT</b>: time to first
token. <b>x bound</b>: the mean of it, divided by a bound that no placement can beat (work conservation: one engine with
the speed of all, that shared cache, and the shortest prompt first). <b>ITL</b>: pause between two tokens.
<b>balance</b>: share of time in which the busiest engine computed, divided by the mean of all. <b>SLO</b>: requests
whose TTFT and mean pause were within the goals; failed requests count as missed.</p>
"""


def report(load: str, about: str, rows: Sequence[Row]) -> str:
    """Return the document. about: the engines, in words."""
    labels = [row.label for row in rows]
    seeds = len(rows[0].runs)
    over = f"{seeds} seeds; the small figures are half-widths of 95 % confidence intervals" if seeds > 1 else "one seed"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>Replay of {escape(load)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>Replay of {escape(load)}</h1>",
            f"<p>{escape(about)}; {over}. {escape(version_line())}</p>",
            f'<div class="wide">{_table(rows)}</div>',
            _NOTES,
            "<h2>Time to first token</h2>",
            legend(labels),
            f'<div class="charts">{_times(rows)}</div>',
            "<h2>Requests in flight</h2>",
            "<p>One line for each worker.</p>",
            f'<div class="charts">{_loads(rows)}</div>',
            "</body></html>",
            "",
        ]
    )


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(column.title)}</th>" for column in COLUMNS)
    lines = [f"<table><thead><tr><th>policy</th>{head}</tr></thead><tbody>"]
    for row in rows:
        cells = []
        for column in COLUMNS:
            figure = row.figures[column.name]
            half = f"<small>±{escape(column.show(figure.half))}</small>" if len(row.runs) > 1 else ""
            best = column.best(other.figures[column.name].mean for other in rows) if column.best else None
            mark = ' class="best"' if figure.mean == best else ""
            cells.append(f"<td{mark}>{escape(column.show(figure.mean))}{half}</td>")
        lines.append(f"<tr><td>{escape(row.label)}</td>{''.join(cells)}</tr>")
    lines.append("</tbody></table>")
    return "\n".join(lines)


def _times(rows: Sequence[Row]) -> str:
    """Return the distributions: of all requests, and of the slow ones."""
    times = [(row.label, sorted(one.ttft for one in row.runs[0].served if not one.error)) for row in rows]
    some = [(label, found) for label, found in times if found]
    if not some:
        return "<p>No request was answered.</p>"
    low = max(min(found[0] for _, found in some), 1e-4)
    high = max(found[-1] for _, found in some)
    across = Axis("time to first token", low, high, log=True, show=seconds)
    whole = Axis("share of requests", 0.0, 1.0, show="{:.0%}".format)
    tail = Axis("share of requests that take longer", 1e-3, 1.0, log=True, show="{:.1%}".format)
    ranks = [(label, _distribution(found)) for label, found in times]
    slow = [(label, [(value, max(1e-3, 1 - share)) for value, share in points]) for label, points in ranks]
    return line_chart("Share of requests answered within", ranks, across, whole) + line_chart(
        "Share of requests that take longer", slow, across, tail
    )


def _distribution(found: Sequence[float]) -> Points:
    count = len(found)
    places = sorted({round(step * (count - 1) / _STEPS) for step in range(_STEPS + 1)}) if count else []
    return [(found[place], (place + 1) / count) for place in places]


def _loads(rows: Sequence[Row]) -> str:
    """Return a chart for each policy, all with the same axes."""
    runs = [row.runs[0] for row in rows]
    last = max(run.loads[-1][0] if run.loads else 0.0 for run in runs)
    most = max((max(loads, default=0) for run in runs for _, loads in run.loads), default=0)
    across, up = Axis("seconds", 0.0, last), Axis("requests", 0.0, float(most))
    charts = [line_chart(row.label, _of_workers(run), across, up) for row, run in zip(rows, runs, strict=True)]
    return "".join(charts)


def _of_workers(run: Result) -> list[tuple[str, Points]]:
    every = max(1, len(run.loads) // (2 * _STEPS))
    workers = max((len(loads) for _, loads in run.loads), default=0)
    samples = run.loads[::every]
    return [
        (f"worker {number}", [(at, float(loads[number])) for at, loads in samples if number < len(loads)])
        for number in range(workers)
    ]
