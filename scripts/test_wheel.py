"""The work of `scripts/test --compiled`: runs tests on the installed wheel, which scripts/wheel has built.

    .compiled/env    has the wheel and its dependencies; Python finds pytest and the like in .venv through `tools.pth`
    .venv            has the same package, editable; its own .pth files count for nothing here: src is not on the path

Tests that start `python -m sglang_router...` start the wheel as well: `sys.executable` is .compiled/env's.
tests/test_compiled.py, which is always among the tests, checks that all this is so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from scripts.compile import CHECKOUT
from scripts.wheel import ENVIRONMENT

TESTS = (
    *("tests/routing", "tests/wire", "tests/relay", "tests/observe", "tests/resume", "tests/restart"),
    *("tests/hostile", "tests/chaos", "tests/blackbox", "tests/access", "tests/app", "tests/processes"),
    "tests/test_same.py",
)
APART = (
    "autoscaling",
    "benchmark",
    "commands",
    "demo",
    "documentation",
    "llamacpp",
    "openapi",
    "page",
    "reports",
    "routing_suite",
)
"""Of the black-box tests, those of pages, scripts and rooms that are not compiled: a minute, for nothing that is."""
ALWAYS = "tests/test_compiled.py"


def main(arguments: list[str]) -> int:
    """Run pytest; return its exit status. Folders or files of tests among the arguments replace `TESTS`."""
    python = str(ENVIRONMENT / "bin/python")
    (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
    (packages / "tools.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    chosen = [*TESTS, *(f"--ignore=tests/blackbox/test_{name}.py" for name in APART)]
    if any(Path(word.partition("::")[0]).exists() for word in arguments):
        chosen = []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pytest", *arguments, ALWAYS, *chosen]
    return subprocess.run(command, cwd=CHECKOUT, env=environment | {"EXPECT": "compiled"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
