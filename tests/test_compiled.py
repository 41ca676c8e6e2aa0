"""The code under test is what the run is about: the installed wheel, or these sources.

`sh scripts/test --compiled` sets EXPECT=compiled. Then every module that scripts/compile_rule.py names must be an
extension module, here and in processes that tests start, and the sources of the checkout must be out of reach.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from scripts.compile_rule import modules

import sglang_router
from sglang_router import version

CHECKOUT = Path(__file__).resolve().parents[1]
EXPECTED = os.environ.get("EXPECT", "interpreted")
SOURCES = CHECKOUT / "src"
WANTED = [f"sglang_router.{module.name}" for module in modules(SOURCES / "sglang_router") if not module.interpreted]
suffixes = tuple(EXTENSION_SUFFIXES)


@pytest.mark.parametrize("name", WANTED)
def test_a_module_of_the_hot_path_is_compiled_in_the_wheel_only(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    assert file.endswith(suffixes) == (EXPECTED == "compiled")


def test_processes_run_the_same_code_as_the_tests() -> None:
    program = "import sglang_router, sglang_router.version as v; print(v.build(), sglang_router.__file__, sep='\\n')"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[1] == sglang_router.__file__
    assert said.startswith(version.build())
    assert version.build() == {"compiled": "compiled by mypyc"}.get(EXPECTED, EXPECTED)


def test_only_the_wheel_can_be_imported_when_it_is_tested() -> None:
    compiled = EXPECTED == "compiled"
    assert Path(str(sglang_router.__file__)).is_relative_to(SOURCES) != compiled
    assert not (compiled and str(SOURCES) in map(os.path.abspath, sys.path))
    assert not (compiled and "PYTHONPATH" in os.environ)
