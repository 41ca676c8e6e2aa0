"""Draws the results as SVG text: four panels with logarithmic scales, one line for each target.

The colours have a second set for dark mode, which browsers and GitHub choose by the reader's setting.
Each target also has its own marker, so that colours are not needed to tell them apart. A point that is missing was not
measured, or too many requests failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from scripts.benchmark.loads import RATES, SIZES, STREAMS
from scripts.benchmark.results import Results, Sample
from scripts.benchmark.targets import BEFORE, DIRECT, OURS, TARGETS

from sglang_router.words import counted

WIDTH, HEIGHT, TOP = 960, 880, 148
PANEL_WIDTH, PANEL_HEIGHT, GAP = 372, 268, 96
LEFT = 64
DRAWN = [target.name for target in TARGETS if target.name != BEFORE]
COLOURS = (  # light, dark
    ("#0b57d0", "#7cb1ff"),
    ("#c2410c", "#ff9a5c"),
    ("#15803d", "#5fd38a"),
    ("#7e22ce", "#c99bff"),
    ("#a16207", "#e8c04a"),
    ("#be185d", "#ff85b8"),
    ("#0e7490", "#56d3ea"),
    ("#57534e", "#b8b2ab"),
    ("#4d7c0f", "#b5e05a"),
)
MARKERS = (  # around 0, 0
    '<circle r="4"/>',
    '<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>',
    '<path d="M0-5 5 4H-5Z"/>',
    '<path d="M0-5.2 5.2 0 0 5.2-5.2 0Z"/>',
    '<path d="M0 5 5-4H-5Z"/>',
)
STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
.soft{font-size:12px}.title{font-weight:600;font-size:14px}.head{font-weight:600;font-size:17px}
.series .curve{stroke-width:1.6}.series.ours .curve{stroke-width:3.4}
"""
INKS = {"text": ("#1f2328", "#f0f6fc"), ".soft": ("#59636e", "#9198a1"), ".back": ("#fff", "#0d1117")}
LINES = ("#d1d9e0", "#3d444d")


@dataclass(frozen=True)
class Panel:
    """One diagram: the names of its loads with what stands below each, and what is read from a sample."""

    title: str
    axis: str
    loads: Sequence[tuple[str, str]]
    read: Callable[[Sample], float]


PANELS = (
    Panel(
        "CPU time per request, by size of the prompt",
        "us of all threads (closed loop, 32 connections)",
        [(name, label) for name, (label, _) in SIZES.items()],
        lambda sample: sample.cpu,
    ),
    Panel(
        "p99 of the latency at a fixed rate",
        "ms from the planned moment (open loop)",
        [(f"open-{name}", f"{label}, {RATES[name]:,}/s") for name, (label, _) in SIZES.items()],
        lambda sample: sample.p99 / 1e3,
    ),
    Panel(
        "CPU time per chunk, by number of streams",
        "us of all threads (a chunk every 20 ms each)",
        [(f"streams-{count}", f"{count:,}") for count in STREAMS],
        lambda sample: sample.cpu,
    ),
    Panel(
        "p99 of the delay of a chunk, by number of streams",
        "ms from worker to client",
        [(f"streams-{count}", f"{count:,}") for count in STREAMS],
        lambda sample: sample.p99 / 1e3,
    ),
)


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale from `low` to `high` on a height in pixels; y grows downwards."""

    low: float
    high: float
    height: float

    def y(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.height * (1 - share)

    def ticks(self) -> list[float]:
        """Return the marks: 1, 2 and 5 of each decade; only 1 if there are more than three decades."""
        steps = (1, 2, 5) if self.high / self.low <= 1000 else (1,)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = [step * 10.0**decade for decade in decades for step in steps]
        return [mark for mark in marks if self.low * 0.999 <= mark <= self.high * 1.001]


def scale_of(values: Sequence[float], height: float) -> Scale:
    """Return a scale that begins and ends at a mark (1, 2 or 5 of a decade) and holds all values, which are above 0."""
    low, high = min(values), max(values)
    marks = [step * 10.0**decade for decade in range(-6, 9) for step in (1, 2, 5)]
    lower = max(mark for mark in marks if mark <= low)
    upper = min(mark for mark in marks if mark >= high)
    return Scale(lower, upper if upper > lower else lower * 10, height)


def number(value: float) -> str:
    """Return a mark of an axis as a text, without an exponent: 0.05, 2, 10,000."""
    return f"{value:,.0f}" if value >= 1 else f"{value:.6f}".rstrip("0")


def draw(results: Results) -> str:
    """Return the whole SVG."""
    names = [name for name in results.targets if name not in (BEFORE, DIRECT)]
    style = f"{STYLE}{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img">',
        f"<title>{escape('CPU time and p99 of ' + ', '.join(results.targets[name] for name in names))}</title>",
        f"<style>{style}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="head" x="{LEFT}" y="30">Lower is better; all scales are logarithmic</text>',
        *legend(results, names),
    ]
    for place, panel in enumerate(PANELS):
        x = LEFT + place % 2 * (PANEL_WIDTH + GAP)
        y = TOP + place // 2 * (PANEL_HEIGHT + GAP)
        parts += [f'<g transform="translate({x} {y})">', *draw_panel(results, names, panel), "</g>"]
    parts.append(f'<text class="soft" x="{LEFT}" y="{HEIGHT - 14}">{escape(machine(results))}</text>')
    return "\n".join([*parts, "</svg>", ""])


def colours(mode: int) -> str:
    """Return the rules that give colours: of light mode (0) or dark mode (1)."""
    inks = [f"{name}{{fill:{pair[mode]}}}" for name, pair in INKS.items()]
    series = [f".s{place}{{stroke:{pair[mode]};fill:{pair[mode]}}}" for place, pair in enumerate(COLOURS)]
    return "".join([*inks, f".grid{{stroke:{LINES[mode]}}}", *series, ".series .curve{fill:none}"])


def machine(results: Results) -> str:
    """Return the first facts of the machine, as many as fit into a line."""
    first = results.machine.partition(";")[0]
    return f"{first}. Medians of {counted(results.rounds, 'round')} of {results.seconds:g} s."


def legend(results: Results, names: Sequence[str]) -> Iterator[str]:
    for place, name in enumerate(names):
        x, y = LEFT + place % 4 * 218, 56 + place // 4 * 22
        yield f'<g transform="translate({x} {y})"><g class="s{colour(name)}">{marker(name)}</g>'
        yield f'<text x="12" y="4">{escape(results.targets[name])}</text></g>'


def colour(name: str) -> int:
    """Return the place of a target in the table of targets: it looks the same in every chart."""
    return DRAWN.index(name) % len(COLOURS)


def marker(name: str) -> str:
    return MARKERS[DRAWN.index(name) % len(MARKERS)]


def draw_panel(results: Results, names: Sequence[str], panel: Panel) -> Iterator[str]:
    yield f'<text class="title" x="0" y="-20">{escape(panel.title)}</text>'
    yield f'<text class="soft" x="0" y="-5">{escape(panel.axis)}</text>'
    points = {name: list(values(results, name, panel)) for name in names}
    found = [value for line in points.values() for _, value in line]
    if not found:
        yield f'<text class="soft" x="0" y="{PANEL_HEIGHT / 2:g}">not measured</text>'
        return
    scale = scale_of(found, PANEL_HEIGHT)
    for mark in scale.ticks():
        y = scale.y(mark)
        yield f'<path class="grid" d="M0 {y:.1f}H{PANEL_WIDTH}"/>'
        yield f'<text class="soft" x="-8" y="{y + 4:.1f}" text-anchor="end">{number(mark)}</text>'
    for place, (_, label) in enumerate(panel.loads):
        for line, words in enumerate(label.split(", ")):
            y = PANEL_HEIGHT + 18 + 14 * line
            yield f'<text class="soft" x="{x_of(place, panel):.1f}" y="{y}" text-anchor="middle">{escape(words)}</text>'
    for name in reversed(names):  # this router comes last: on top
        yield from curve(name, [(x, scale.y(value)) for x, value in points[name]])


def values(results: Results, name: str, panel: Panel) -> Iterator[tuple[float, float]]:
    """Yield x in pixels and the value, for each load under which a target was measured."""
    for place, (load, _) in enumerate(panel.loads):
        got = results.median(load, name)
        if got and panel.read(got) > 0:
            yield x_of(place, panel), panel.read(got)


def x_of(place: int, panel: Panel) -> float:
    return PANEL_WIDTH * (place + 0.5) / len(panel.loads)


def curve(name: str, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    if points:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        yield f'<g class="series{" ours" if name == OURS else ""} s{colour(name)}"><path class="curve" d="M{path}"/>'
        yield from (f'<g transform="translate({x:.1f} {y:.1f})">{marker(name)}</g>' for x, y in points)
        yield "</g>"
