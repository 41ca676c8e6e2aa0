"""The build hook ends a build that cannot be done with one line, and not with its own stack of calls after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERFACE = """
from typing import Generic, TypeVar
T = TypeVar("T")
class BuildHookInterface(Generic[T]):
    pass
"""
"""What the hook takes of hatchling, which is installed only where a wheel is built."""
BUILD = """
import sys
import hatch_build
hook = hatch_build.CompiledWheel()
hook.root = sys.argv[1]
hook.initialize("standard", {"force_include": {}})
"""


@pytest.fixture
def hatchling(tmp_path: Path) -> Path:
    """Return a folder for PYTHONPATH, with the part of hatchling that the hook imports."""
    module = tmp_path / "hatchling/builders/hooks/plugin/interface.py"
    module.parent.mkdir(parents=True)
    module.write_text(INTERFACE)
    return tmp_path


def build(hatchling: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(hatchling), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(ROOT)],
        env=os.environ | {"PYTHONPATH": paths} | variables,
        cwd=hatchling,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_last_line_says_so(hatchling: Path) -> None:
    done = build(hatchling, SGLANG_ROUTER_COMPILE="1", CC="no-such-compiler", PYTHONSAFEPATH="1")
    assert done.returncode == 1
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("error: no C compiler (no-such-compiler); on Debian or Ubuntu: apt-get install")


def test_a_wrong_value_of_the_variable_is_told_in_one_line(hatchling: Path) -> None:
    done = build(hatchling, SGLANG_ROUTER_COMPILE="yes")
    assert done.returncode == 1
    assert done.stderr == "error: SGLANG_ROUTER_COMPILE=yes: it must be 1, for a compiled wheel, or 0\n"


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_compiled_unless_it_is_asked_for(value: str, hatchling: Path) -> None:
    done = build(hatchling, SGLANG_ROUTER_COMPILE=value, CC="no-such-compiler")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
