"""Installs what comes from PyPI: each package in an environment of its own, below .bench-venv in the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from scripts.benchmark.options import PLACE
from scripts.benchmark.processes import say

STAMP = "installed"
PATIENCE = 600  # seconds


def python_of(name: str, requirement: str) -> Path | None:
    """Return the Python that has a package, installed now if needed; None if that is not possible."""
    place = PLACE / name
    stamp = place / STAMP
    if not stamp.exists() or stamp.read_text().strip() != requirement:
        say(f"installing {requirement} into {place.relative_to(PLACE.parent)}")
        shutil.rmtree(place, ignore_errors=True)
        if not _install(place, requirement):
            shutil.rmtree(place, ignore_errors=True)
            return None
        stamp.write_text(f"{requirement}\n")
    return place / "bin" / "python"


def _install(place: Path, requirement: str) -> bool:
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, stdout=sys.stderr, timeout=PATIENCE)
        subprocess.run([*pip, requirement], check=True, stdout=sys.stderr, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
