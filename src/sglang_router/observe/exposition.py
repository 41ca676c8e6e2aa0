"""Writes metric families as text, piece by piece: Prometheus' format 0.0.4, or OpenMetrics 1.0.

    write(family, counts, openmetrics)  -->  "# HELP ...# TYPE ..."  -->  one sample  -->  one sample ...
    wanted(accept)                           which of the two formats an Accept header asks for

A family may have thousands of samples (800 workers, or 100 models), so each is a piece of its own: whoever collects the
pieces can let other work go on between two of them. An empty piece is only such a place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client.utils import floatToGoString

from sglang_router.observe.catalogue import COUNTER, HISTOGRAM, Family
from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.tallies import Histogram

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
END = "# EOF\n"
"""The last line of OpenMetrics."""
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})
_go: Callable[[float], str] = floatToGoString
_WEIGHT = re.compile(r"[01](\.[0-9]{0,3})?")
_WHOLE = 1_000_000
"""From here on, floatToGoString writes an exponent."""


def wanted(accept: str) -> bool:
    """Return whether an Accept header asks for OpenMetrics, and for no other format rather (RFC 9110 12.5.1)."""
    openmetrics = text = 0.0
    for accepted in accept.lower().split(","):
        kind, *parameters = [part.strip() for part in accepted.split(";")]
        given = {name.strip(): value.strip() for name, _, value in (each.partition("=") for each in parameters)}
        if kind in ("text/plain", "text/*", "*/*"):
            text = max(text, _weight(given))
        elif kind == "application/openmetrics-text" and given.get("version", "1.").startswith("1."):
            openmetrics = max(openmetrics, _weight(given))
    return openmetrics > 0.0 and openmetrics >= text


def _weight(parameters: dict[str, str]) -> float:
    """Return the weight of an accepted format; what is no weight counts as none given."""
    weight = parameters.get("q", "1")
    return float(weight) if _WEIGHT.fullmatch(weight) else 1.0


def write(family: Family, counts: MetricCounts, openmetrics: bool) -> Iterator[str]:
    """Yield the lines of a family: its head, then each sample."""
    name, text = family.name, family.help
    if openmetrics:
        text = text.translate(_ESCAPES)
        if family.kind == COUNTER:
            name = name.removesuffix("_total")
    yield f"# HELP {name} {text}\n# TYPE {name} {family.kind}\n"
    bounds = [*map(floatToGoString, counts.bounds), "+Inf"]
    for sample in family.reader(counts):
        if sample is None:
            yield ""
            continue
        values, value = sample
        labels = ",".join([f'{key}="{_escaped(label)}"' for key, label in zip(family.labels, values, strict=True)])
        if family.kind == HISTOGRAM:
            yield _histogram(family.name, labels, bounds, value)
        else:
            yield f"{family.name}{{{labels}}} {_number(value)}\n" if labels else f"{family.name} {_number(value)}\n"


def _histogram(name: str, labels: str, bounds: list[str], observed: Histogram) -> str:
    before, braced = (f"{labels},", f"{{{labels}}}") if labels else ("", "")
    totals = list(accumulate(observed.counts))
    lines = [f'{name}_bucket{{{before}le="{le}"}} {_number(n)}\n' for le, n in zip(bounds, totals, strict=True)]
    lines.append(f"{name}_count{braced} {_number(totals[-1])}\n{name}_sum{braced} {_number(observed.sum)}\n")
    return "".join(lines)


def _escaped(label: str) -> str:
    return label.translate(_ESCAPES) if "\\" in label or '"' in label or "\n" in label else label


def _number(value: float) -> str:
    return f"{value}.0" if type(value) is int and value < _WHOLE else _go(value)
