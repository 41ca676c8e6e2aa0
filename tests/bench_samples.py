"""Results of scripts/bench for tests: made up, not measured."""

from __future__ import annotations

from scripts.benchmark.results import Results, Sample

TITLES = {
    "ours": "this router 1",
    "reference": "sglang-router 0.3.2",
    "haproxy": "HAProxy 2",
    "direct": "no router",
}


def sample(cpu: float = 50.0, p99: float = 2_000.0, memory: float = 40.0, errors: float = 0.0) -> Sample:
    """One sample; times in us, memory in MB."""
    return Sample(count=1_000, rate=500.0, p50=p99 / 2, p99=p99, p999=2 * p99, cpu=cpu, memory=memory, errors=errors)


def results(**of_load: dict[str, list[Sample]]) -> Results:
    """Results of these loads, whose names have `_` for `-`: `streams_500={"ours": [sample()]}`."""
    made = Results("2 x Processor, Linux 6; sglang_router 1, commit abc.", 3, 2.0, dict(TITLES))
    for load, by_target in of_load.items():
        for target, samples in by_target.items():
            for each in samples:
                made.add(load.lstrip("_").replace("_", "-"), target, each)
    return made
