"""A failure in one of several processes of tests is told, whatever its message is made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HALF = '"\\ud800"'
FAILURES = {
    "printed": f"print({HALF}); assert False",
    "logged": f"logging.warning({HALF}); assert False",
    "compared": f'assert {HALF} == "b"',
    "raised": f"raise ValueError({HALF})",
}
COMMAND = (
    "-m",
    "pytest",
    "-n",
    "1",
    "--continue-on-collection-errors",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:schemathesis",
)


def test_a_failure_with_half_of_a_surrogate_pair_reaches_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    tests = "".join(f"def test_{name}():\n    {body}\n" for name, body in FAILURES.items())
    (tmp_path / "test_it.py").write_text(f"import logging\n{tests}")
    (tmp_path / "test_none.py").write_text(f"raise SystemError({HALF})\n")
    command = (sys.executable, *COMMAND)
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    for name in FAILURES:
        assert f"FAILED test_it.py::test_{name}" in told, told
    assert "ERROR test_none.py" in told, told
    assert "4 failed, 1 error" in told, told
