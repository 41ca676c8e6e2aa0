"""Medians, spread, and results that survive the way through a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.benchmark.results import median_of, read, spread

from bench_samples import results, sample


def test_the_median_of_rounds_is_of_each_figure_by_itself() -> None:
    got = median_of([sample(cpu=30, p99=900), sample(cpu=10, p99=100), sample(cpu=20, p99=500)])
    assert (got.cpu, got.p99, got.p999) == (20, 500, 1_000)


def test_the_median_of_two_rounds_is_their_mean() -> None:
    assert median_of([sample(cpu=10), sample(cpu=20)]).cpu == 15


def test_errors_and_counts_are_summed() -> None:
    got = median_of([sample(errors=1), sample(errors=0), sample(errors=5)])
    assert (got.errors, got.count) == (6, 3_000)


def test_the_spread_is_half_of_the_range_relative_to_the_median() -> None:
    assert spread([sample(cpu=90), sample(cpu=100), sample(cpu=130)]) == pytest.approx(0.2)
    assert spread([sample(cpu=7)]) == 0
    assert spread([sample(cpu=0)]) == 0


def test_figures_do_not_count_if_more_than_one_request_in_a_thousand_failed() -> None:
    made = results(_4kB={"ours": [sample(errors=1)], "reference": [sample(errors=2)]})
    assert made.median("4kB", "ours")
    assert made.median("4kB", "reference") is None
    assert made.median("4kB", "haproxy") is None
    assert made.median("200B", "ours") is None


def test_errors_are_counted_over_all_loads() -> None:
    made = results(_4kB={"ours": [sample(errors=1)], "smg": [sample(errors=9)]}, idle={"ours": [sample(errors=2)]})
    assert made.errors(["ours", "compiled"]) == 3


def test_results_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    made = results(_4kB={"ours": [sample(), sample(cpu=3)], "direct": [sample(cpu=0)]})
    made.tree = {"insert 200": 1.5}
    made.write(tmp_path / "new" / "run.json")
    assert read(tmp_path / "new" / "run.json") == made


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": 0, "samples": {}}', "no JSON"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        read(path)
