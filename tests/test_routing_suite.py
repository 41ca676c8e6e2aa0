"""scripts/routing-suite: its loads can be replayed, and its tables have every load and policy."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from scripts import routing_suite as suite

from sglang_router.replay.options import parse_options
from sglang_router.replay.sources import load_of


@pytest.mark.parametrize("load", suite.LOADS, ids=[load.name for load in suite.LOADS])
def test_every_load_can_be_replayed(load: suite.Replayed) -> None:
    options = parse_options([load.trace, *load.flags, "--policies", ",".join(suite.policies())])
    if load.trace.startswith("gen:"):
        assert next(load_of(options, 1).arrivals()).prompt > 0


def test_policies_of_this_version_are_compared() -> None:
    assert {"cache_aware", "least_load", "power_of_two", "round_robin", "longest_prefix"} <= set(suite.policies())


def test_loads_of_traces_need_the_traces(tmp_path: Path) -> None:
    generated = [load.name for load in suite.loads(None, "")]
    assert [load.name for load in suite.loads(tmp_path, "")] == generated
    (tmp_path / suite.AZURE).touch()
    (further,) = [load for load in suite.loads(tmp_path, "") if load.name not in generated]
    assert further.trace == str(tmp_path / suite.AZURE)


def test_a_short_run_gives_all_tables() -> None:
    text = suite.run(argparse.Namespace(traces=None, only="hot prefix", quick=True, jobs=2))
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith("| one hot prefix")]) == 3
    for policy in suite.policies():
        assert len([line for line in lines if line.startswith(f"| {policy} ")]) == 1
    assert text.count("**") >= 6


def test_a_load_that_is_not_there_is_an_error() -> None:
    with pytest.raises(suite.SuiteError, match="no load has 'colour' in its name"):
        suite.run(argparse.Namespace(traces=None, only="colour", quick=True, jobs=1))


def test_the_page_has_markers() -> None:
    assert suite.BEGIN in suite.PAGE.read_text()
    assert suite.END in suite.PAGE.read_text()
