"""What is counted while requests run: plain integers in plain objects, so that counting costs a microsecond.

    Routed   ->  Tally   of its worker     decisions by policy and branch, bytes matched and seen
    Finished ->  Series  of its kind       kind: method, path, model, streaming, status, code
             ->  Tally   of its worker     legs by outcome

A request is counted once, in one `Series`; every family of metrics about requests is a sum over series, made
when somebody scrapes. Kinds are bounded, for their labels come from clients: `Labels` folds what it does not
know into "other".

A worker's `Tally` lives as long as the worker. What it had counted is then added to the tally of the removed,
so that totals without a worker label never go back.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

OTHER = "other"
MOST_MODELS = 100
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Histogram(msgspec.Struct, gc=False):
    """Observations by bucket, not cumulated; the last bucket has no upper bound. `sum` in seconds."""

    counts: list[int]
    sum: float = 0.0

    def add(self, other: Histogram) -> None:
        """Adds another histogram with the same bounds."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Series(msgspec.Struct, gc=False, eq=False, kw_only=True):
    """Requests of one kind. `endpoint` is "" for the control plane; the labels are bounded already.

    legs       legs sent to workers, retries included
    exhausted  requests whose last failure could have been retried, had the rules or the fleet allowed
    gone       requests whose client left before the end
    resumed    streams with which another worker went on
    """

    method: str
    path: str
    endpoint: str
    model: str
    streaming: bool
    status: int
    code: str
    duration: Histogram
    first_byte: Histogram
    received: int = 0
    sent: int = 0
    legs: int = 0
    retries: int = 0
    exhausted: int = 0
    gone: int = 0
    resumed: int = 0


class Tally(msgspec.Struct, gc=False, eq=False):
    """What happened with one worker, or with all removed ones. `matched`, `total`: bytes of routing text."""

    decisions: dict[tuple[str, str], int] = msgspec.field(default_factory=dict)  # by policy and branch
    outcomes: dict[str, int] = msgspec.field(default_factory=dict)  # by label of core.worker.Outcome
    transitions: dict[tuple[str, str], int] = msgspec.field(default_factory=dict)  # of the breaker
    matched: int = 0
    total: int = 0

    def add(self, other: Tally) -> None:
        """Adds all of another tally but its transitions, which nobody totals."""
        for decision, count in other.decisions.items():
            self.decisions[decision] = self.decisions.get(decision, 0) + count
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count
        self.matched += other.matched
        self.total += other.total


class Labels:
    """Bounds the labels that come from clients.

    `paths` are those the router knows, exact or with parameters as in "/workers/{id}". The first
    `MOST_MODELS` models that were answered without an error keep their names.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        paths = tuple(paths)
        self._exact = frozenset(path for path in paths if "{" not in path)
        self._patterns = [(_pattern(path), path) for path in paths if "{" in path]
        self._models: dict[str, str] = {"": "unknown"}

    def method(self, method: str) -> str:
        return method if method in METHODS else OTHER

    def path(self, path: str) -> str:
        if path in self._exact:
            return path
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), OTHER)

    def model(self, model: str, status: int) -> str:
        """The label of a model; `model` is JSON text as the request had it, "" when it named none."""
        label = self._models.get(model)
        if label is None:
            if not 200 <= status < 400 or len(self._models) > MOST_MODELS:
                return OTHER
            label = self._models[model] = _plain(model)
        return label


def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+(?::\w+)?)\}", path)
    fields = [".+" if name.endswith(":path") else "[^/]+" for name in parts[1::2]]
    texts = [re.escape(text) for text in parts[::2]]
    return re.compile("".join(text + field for text, field in zip(texts, [*fields, ""], strict=True)))


def _plain(model: str) -> str:
    """The name without its JSON quotes; what is not like a name is not told apart."""
    try:
        name = msgspec.json.decode(model, type=str)
    except msgspec.DecodeError:
        return OTHER
    return name if len(name) <= 128 and name.isprintable() else OTHER
