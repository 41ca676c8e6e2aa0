"""`scripts/bench` on this router alone, for a fraction of a second: what is measured, shown and kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
WITHIN = 60.0

pytestmark = pytest.mark.skipif(
    shutil.which((os.environ.get("CC", "").split() or ["cc"])[0]) is None, reason="needs a C compiler"
)


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.benchmark", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN, check=False)


def test_every_client_measures_this_router_and_the_results_can_be_shown_again(tmp_path: Path) -> None:
    kept, chart = tmp_path / "run.json", tmp_path / "chart.svg"
    loads = "200B,at-once,open-200B,bursts,streams-100"
    run = bench("--only", "ours", "--loads", loads, "--rounds", "1", "--seconds", "0.2", "--json", str(kept))
    assert run.returncode == 0, run.stderr
    assert "5 loads on 1 target, 1 round of 0.2 s" in run.stderr
    samples = json.loads(kept.read_text())["samples"]
    assert list(samples) == ["200B", "open-200B", "at-once", "bursts", "streams-100"]
    for load, by_target in samples.items():
        (ours,) = by_target["ours"]
        assert ours["count"] > 0
        assert ours["errors"] == 0
        assert 0 < ours["p50"] <= ours["p99"] <= ours["p999"], load
        assert ours["memory"] > 10
    assert sum(by_target["ours"][0]["cpu"] for by_target in samples.values()) > 0
    again = bench("--from", str(kept), "--chart", str(chart), "--targets")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(run.stdout)
    assert ElementTree.parse(chart).getroot().tag.endswith("svg")


def test_workers_without_a_router_have_no_cost(tmp_path: Path) -> None:
    kept = tmp_path / "run.json"
    run = bench("--only", "direct", "--loads", "alone", "--rounds", "2", "--seconds", "0.1", "--json", str(kept))
    assert run.returncode == 0, run.stderr
    samples = json.loads(kept.read_text())["samples"]["alone"]["direct"]
    assert [(each["cpu"], each["memory"], each["errors"]) for each in samples] == [(0, 0, 0)] * 2
    assert "no router" in run.stdout


def test_a_load_or_target_that_does_not_exist_is_told() -> None:
    run = bench("--loads", "alone,no-such-load", "--only", "ours")
    assert run.returncode == 2
    assert "--loads: nothing is called no-such-load; there are 200B, " in run.stderr
    run = bench("--only", "no-such-target", "--loads", "200B")
    assert run.returncode == 2
    assert "--only: nothing is called no-such-target; there are ours, " in run.stderr
