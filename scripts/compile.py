"""The work of scripts/compile: copies the sources, has mypyc compile the hot path in the copy, and tests the result."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from compile_rule import ROOMS, Module, modules

CHECKOUT = Path(__file__).resolve().parent.parent
BUILD = CHECKOUT / ".compiled"
SOURCES = BUILD / "src"
LOG = BUILD / "log"
TESTS = ("tests/routing", "tests/wire", "tests/relay", "tests/resume", "tests/restart")


class CompileError(Exception):
    """What cannot be compiled, and why."""


def check_compiler() -> None:
    """Raises: CompileError when there is nothing to compile with."""
    compiler = os.environ.get("CC") or str(sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler.split()[0]) is None:
        raise CompileError(f"no C compiler ({compiler}); on Debian or Ubuntu: apt-get install gcc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise CompileError(f"no headers of Python ({header}); on Debian or Ubuntu: apt-get install python3-dev")


def copy_sources() -> None:
    """Make a fresh copy; git ignores it."""
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(CHECKOUT / "src", SOURCES, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    (BUILD / ".gitignore").write_text("*\n")


def compile_all(wanted: Sequence[Module]) -> None:
    """Have mypyc compile these modules where they are. Raises: CompileError."""
    paths = [str(module.path.relative_to(SOURCES)) for module in wanted]
    command = [sys.executable, "-m", "mypyc", "--config-file", str(CHECKOUT / "pyproject.toml"), *paths]
    with LOG.open("w") as log:
        status = subprocess.run(command, cwd=SOURCES, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        lines = LOG.read_text().splitlines()
        told = [line for line in lines if "error:" in line] or lines[-20:]
        raise CompileError("mypyc failed; all it said is in .compiled/log:\n" + "\n".join(told))


def check_compiled(wanted: Sequence[Module]) -> None:
    """Import each module from the copy. Raises: CompileError when one is not compiled code."""
    names = [f"sglang_router.{module.name}" for module in wanted]
    program = f"import importlib\nfor name in {names}: print(name, importlib.import_module(name).__file__)"
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise CompileError(f"the compiled modules cannot be imported:\n{run.stderr}")
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    plain = [line for line in run.stdout.splitlines() if not line.endswith(suffixes) or str(SOURCES) not in line]
    if plain:
        raise CompileError("not compiled, although the rule says so:\n" + "\n".join(plain))


def environment() -> dict[str, str]:
    """The environment of a process that runs the compiled code."""
    return {**os.environ, "PYTHONPATH": f"{SOURCES}{os.pathsep}{CHECKOUT / 'tests'}"}


def run_tests(arguments: Sequence[str]) -> int:
    """Run pytest on the compiled code; return its exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *TESTS]
    return subprocess.run(command, cwd=CHECKOUT, env=environment(), check=False).returncode


def table(found: Sequence[Module]) -> str:
    """Which modules are compiled and which are not, and why."""
    lines = []
    for room in ROOMS:
        compiled = [module.name for module in found if not module.interpreted and module.name.startswith(f"{room}.")]
        lines.append(f"{room}, compiled: {', '.join(name.removeprefix(f'{room}.') for name in compiled)}")
    lines += [f"{module.name}, interpreted: {module.interpreted}" for module in found if module.interpreted]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    began = time.monotonic()
    try:
        check_compiler()
        copy_sources()
        found = modules(SOURCES / "sglang_router")
        wanted = [module for module in found if not module.interpreted]
        print(table(found), flush=True)
        compile_all(wanted)
        check_compiled(wanted)
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"compiled {len(wanted)} of {len(found)} modules in {time.monotonic() - began:.0f} s", flush=True)
    if "--no-tests" in arguments:
        return 0
    began = time.monotonic()
    status = run_tests(arguments)
    print(f"the tests of the compiled code {'failed' if status else 'passed'} in {time.monotonic() - began:.0f} s")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
