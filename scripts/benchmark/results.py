"""What a run has measured: samples, and their medians and spread. Written to and read from JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

FORMAT = 1
FEW = 0.001
"""The share of failed requests up to which the figures of a target count."""


@dataclass(frozen=True)
class Sample:
    """One target under one load in one round, or the medians of several rounds. Times in us, memory in MB.

    `count`: of requests or chunks that came through; `rate`: requests or whole streams in a second; `cpu`: per request
    or chunk.
    """

    count: float
    rate: float
    p50: float
    p99: float
    p999: float
    cpu: float
    memory: float
    errors: float

    @property
    def sound(self) -> bool:
        """Whether hardly any request failed, so that the other figures mean something."""
        return self.count > 0 and self.errors <= FEW * self.count


def median_of(samples: Sequence[Sample]) -> Sample:
    """Return the medians, except for errors and count: their sums."""
    middle = {each.name: statistics.median(getattr(sample, each.name) for sample in samples) for each in fields(Sample)}
    sums = {name: sum(getattr(sample, name) for sample in samples) for name in ("count", "errors")}
    return Sample(**{**middle, **sums})


def spread(samples: Sequence[Sample]) -> float:
    """Return the spread of CPU time over the rounds: half of the range, relative to the median."""
    values = [sample.cpu for sample in samples]
    middle = statistics.median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0


@dataclass
class Results:
    """All samples of a run: by the name of the load, then of the target. `targets`: how tables call each of them."""

    machine: str
    rounds: int
    seconds: float
    targets: dict[str, str]
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    tree: dict[str, float] = field(default_factory=dict)

    def add(self, load: str, target: str, sample: Sample) -> None:
        self.samples.setdefault(load, {}).setdefault(target, []).append(sample)

    def medians(self, load: str) -> dict[str, Sample]:
        """Return the medians of each target under a load; empty if it was not measured."""
        return {name: median_of(samples) for name, samples in self.samples.get(load, {}).items()}

    def median(self, load: str, target: str) -> Sample | None:
        """Return the medians of one target, or None if it was not measured, or if too many requests failed."""
        found = self.medians(load).get(target)
        return found if found and found.sound else None

    def errors(self, targets: Iterable[str]) -> float:
        """Return how many requests to these targets failed."""
        wanted = set(targets)
        return sum(
            sample.errors
            for by_target in self.samples.values()
            for name, samples in by_target.items()
            if name in wanted
            for sample in samples
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def read(path: Path) -> Results:
    """Read what `Results.write` has written. Raises: OSError, and ValueError if it is something else."""
    told = json.loads(path.read_text())
    if not isinstance(told, dict) or told.pop("format", None) != FORMAT:
        raise ValueError(f"{path} holds no results of scripts/bench, or those of another version of it")
    told["samples"] = {
        load: {target: [Sample(**each) for each in samples] for target, samples in by_target.items()}
        for load, by_target in told["samples"].items()
    }
    return Results(**told)
