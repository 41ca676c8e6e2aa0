"""A minute of `scripts/chaos`: the important faults, a few seconds each. Every test is named after its fault.

There is one run, because all faults share engines and router; its results are checked fault by fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
WITHIN = 400.0
"""Seconds; it takes 90 s on two free cores."""
FAULTS = (
    *("kill -9", "SIGSTOP, SIGCONT", "connections refused", "connections reset", "black hole", "flapping"),
    *("all workers gone and back", "rolling drain with streams", "add/remove storm"),
    *("full disk for logs", "256 descriptors", "SIGTERM under load"),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the result of each fault. A gap in service may be long on a busy machine, but it ends."""
    told = tmp_path_factory.mktemp("chaos") / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chaos", "--slice", "--rate", "30", "--patience", "15", "--json", str(told)],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )
    assert told.exists(), done.stdout + done.stderr
    return {row["fault"]: row for row in json.loads(told.read_text())}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_promise_holds(rows: dict[str, dict[str, Any]], fault: str) -> None:
    row = rows[fault]
    assert row["wrong"] == []
    assert row["answered"] > 0


def test_nothing_else_was_run(rows: dict[str, dict[str, Any]]) -> None:
    assert set(rows) == set(FAULTS)
