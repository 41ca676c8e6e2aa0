"""The tables of loads and targets: aligned for a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts.benchmark import tree
from scripts.benchmark.loads import GROUPS, Group, selected
from scripts.benchmark.results import Results, Sample, spread
from scripts.benchmark.targets import BEFORE, DIRECT, REFERENCE
from scripts.reporting import table


def all_tables(results: Results, markdown: bool) -> str:
    """Return the tables of all loads that were measured, each under its title."""
    shown = [
        f"{title(group.title, markdown)}\n\n{table(head(group), rows, markdown, words=2)}"
        for group in GROUPS
        if (rows := list(rows_of(results, group)))
    ]
    if results.tree:
        heading = "The prefix tree by itself: medians of 1,000 texts, beside 4.6 us and 253 MB/s that smg publishes"
        shown.append(f"{title(heading, markdown)}\n\n{table(tree.HEAD, tree.rows(results.tree), markdown)}")
    return "\n\n".join(shown)


def title(text: str, markdown: bool) -> str:
    return f"**{text}**" if markdown else text


def head(group: Group) -> list[str]:
    unit = selected([group.name])[0].unit.removesuffix("s")
    quantiles = [f"{group.latency} p50 ms", "p99 ms", "of ref.", "p99.9 ms"]
    return ["load", "target", group.rate, *quantiles, f"CPU us/{unit}", "+-", "of ref.", "RSS MB", "errors"]


def rows_of(results: Results, group: Group) -> Iterator[list[str]]:
    for load in selected([group.name]):
        medians = results.medians(load.name)
        peer = medians.get(BEFORE) or medians.get(REFERENCE)
        for name, got in medians.items():
            samples = results.samples[load.name][name]
            yield [load.label, results.targets[name], *cells(got, peer, samples, name == DIRECT)]


def cells(got: Sample, peer: Sample | None, samples: Sequence[Sample], direct: bool) -> list[str]:
    """Return the cells of a row from the rate on. `peer`: what "of ref." refers to."""
    of_p99, of_cpu = (ratio(got.p99, peer.p99), ratio(got.cpu, peer.cpu)) if peer else ("-", "-")
    times = [milliseconds(got.p50), milliseconds(got.p99), of_p99, milliseconds(got.p999)]
    cost = [f"{got.cpu:.1f}", f"{spread(samples):.0%}", of_cpu, f"{got.memory:.0f}"]
    if direct:
        cost = ["-"] * 4
    return [f"{got.rate:,.0f}", *times, *cost, f"{got.errors:,.0f}"]


def milliseconds(value: float) -> str:
    """Return a time given in us; "-" if nothing came in the window that counts."""
    return f"{value / 1e3:.2f}" if value else "-"


def ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else "-"
