"""The engine checks with llama.cpp and its tiny model: the same code as `scripts/test-engines`, without a download."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def test_llamacpp() -> None:
    """Two llama.cpp servers behind launch_server: answers, caches, kill -9, rolling restart, scaling, ends."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.test_engines", "llamacpp", "--quick"],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llamacpp: all is well" in done.stdout
