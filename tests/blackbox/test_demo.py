"""`scripts/demo.py --simulated` as a user runs it (except for the environment that `scripts/demo` makes): what its
table shows, and that no process is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"
ENDS_WITHIN = 90.0  # it takes 12 s on two free cores


def marked() -> dict[str, str]:
    """Return an environment by which the demo's processes can be told from all others."""
    return {**os.environ, "DEMO_UNDER_TEST": uuid.uuid4().hex}


def left_running(environment: dict[str, str]) -> list[int]:
    """Return the processes that were started with this environment."""
    mark = f"DEMO_UNDER_TEST={environment['DEMO_UNDER_TEST']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def row(output: str, label: str) -> list[str]:
    """Return the two cells of a row of the table: round_robin, cache_aware."""
    found = re.search(rf"^  {re.escape(label):<34} *(\S.*)$", output, re.MULTILINE)
    assert found, f"no {label!r} in\n{output}"
    return re.split(r" {2,}", found[1].strip())


def test_the_table() -> None:
    environment = marked()
    done = subprocess.run(
        [sys.executable, str(DEMO), "--simulated"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout

    assert row(done.stdout, "") == ["round_robin", "cache_aware"]
    assert row(done.stdout, "requests") == ["96", "96"]
    assert row(done.stdout, "errors") == ["0", "0"]
    cached = [int(cell.replace(",", "")) for cell in row(done.stdout, "of these cached, say the engines")]
    assert cached[1] > 1.5 * cached[0], done.stdout
    for cell in row(done.stdout, "requests per engine"):
        assert len(cell.split()) == 4
        assert sum(map(int, cell.split())) == 96
    assert re.search(r"^  answer +\w+", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("nothing is left running\n")
    assert left_running(environment) == []


def test_ctrl_c_leaves_nothing_running() -> None:
    environment = marked()
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--simulated"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "round_robin" in line:  # a quarter is done: engines, router and clients are running
                break
        assert len(left_running(environment)) >= 6
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=ENDS_WITHIN)
        assert (process.returncode, err) == (1, "\ndemo: interrupted\n"), out
        assert left_running(environment) == []
    finally:
        process.kill()
        process.wait()
