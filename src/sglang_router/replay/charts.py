"""Line charts as SVG, for a report that needs no network and no script.

Axis       a linear or logarithmic range, with its marks and their texts
line_chart(title, series, across, up)     each series is a label and its points
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 28, 44
COLOURS = ("#0b6fb8", "#d1495b", "#2e8b57", "#b8860b", "#7d5ba6", "#008b8b", "#8b4513", "#555f6d")
_MARKS = 6

Points = Sequence[tuple[float, float]]
Series = Sequence[tuple[str, Points]]


def seconds(value: float) -> str:
    """Return a duration for people."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


class Axis:
    """A range of values.

    label  what it shows
    log    logarithmic; low must be positive
    show   the text of a mark
    """

    def __init__(
        self, label: str, low: float, high: float, *, log: bool = False, show: Callable[[float], str] = "{:g}".format
    ) -> None:
        self.label = label
        self.low = low
        self.high = high if high > low else low * 10 if log else low + 1
        self.log = log
        self.show = show

    def __repr__(self) -> str:
        return f"<Axis {self.label}: {self.low:g} to {self.high:g}{', logarithmic' * self.log}>"

    def place(self, value: float) -> float:
        """Return where a value is, from 0 to 1; one outside the range is at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        """Return the values with a mark: round ones."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
            inside = [value for value in found if self.low <= value <= self.high]
            return inside if len(inside) <= 2 * _MARKS else [value for value in inside if f"{value:e}"[0] == "1"]
        rough = (self.high - self.low) / _MARKS
        size = 10.0 ** math.floor(math.log10(rough))
        step = min((size * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def line_chart(title: str, series: Series, across: Axis, up: Axis) -> str:
    """Return a chart with one line for each series, in the colours of `COLOURS` in turn."""
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + across.place(value) * (right - _LEFT)

    def y(value: float) -> float:
        return bottom - up.place(value) * (bottom - _TOP)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
    ]
    for mark in across.marks():
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        text = escape(across.show(mark))
        parts.append(f'<text x="{x(mark):.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
    for mark in up.marks():
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        text = escape(up.show(mark))
        parts.append(f'<text x="{_LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across.label)}</text>')
    for number, (label, points) in enumerate(series):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{path}" stroke="{colour}"><title>{escape(label)}</title></polyline>')
    parts.append("</svg>")
    return "\n".join(parts)


def legend(labels: Sequence[str]) -> str:
    """Return which colour is which label."""
    items = (
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(label)}</span>'
        for number, label in enumerate(labels)
    )
    return f'<p class="legend">{"".join(items)}</p>'
