"""Compile the modules that scripts/compile_rule.py names with mypyc, for a wheel:

    python -m scripts.compile FOLDER     from the checkout, or an unpacked source distribution

FOLDER gets the extension modules and nothing else: a small one for each compiled module, and `sglang_router__mypyc`,
which holds the code of all. The build hook (hatch_build.py) calls this and packs them beside the sources; Python
imports an extension module rather than the source of the same name.

mypyc writes one C file for each module (`multi_file`), and they are compiled on all cores. One file for all would be
compiled on one core; docs/decisions/0009-compiled-wheels.md has the figures.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from scripts.compile_rule import Module, modules

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = CHECKOUT / "src"
LIBRARY = "sglang_router"
"""The shared library's name, to which mypyc adds `__mypyc`."""


class CompileError(Exception):
    """What cannot be compiled, and why."""


class Extension(Protocol):
    """What mypyc says of one extension module: the fields of setuptools' class that are used here."""

    name: str
    sources: list[str]
    include_dirs: list[str]
    extra_compile_args: list[str]


class Unit(NamedTuple):
    """One C file, and the object file it becomes."""

    extension: Extension
    source: str
    target: Path


def words(variable: str) -> list[str]:
    """Return the words of one of Python's build variables."""
    return shlex.split(str(sysconfig.get_config_var(variable) or ""))


def compiler() -> list[str]:
    """Return the C compiler's command: of $CC, or the one that Python was built with."""
    return shlex.split(os.environ.get("CC", "")) or words("CC") or ["cc"]


def check_compiler() -> None:
    """Raises: CompileError when there is nothing to compile with."""
    name = compiler()[0]
    if shutil.which(name) is None:
        raise CompileError(f"no C compiler ({name}); on Debian or Ubuntu: apt-get install gcc libc6-dev")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise CompileError(f"no headers of Python ({header}); on Debian or Ubuntu: apt-get install python3-dev")


def write_c(wanted: Sequence[Module], work: Path) -> list[Extension]:
    """Have mypyc check the types of these modules, and write them as C. Exits when mypyc refuses one."""
    from mypyc.build import mypycify  # imported here: it is only there while a wheel is built

    os.chdir(SOURCES)  # mypyc takes the names of modules from their relative paths
    options = ["--config-file", str(CHECKOUT / "pyproject.toml"), "--cache-dir", str(work / "cache")]
    paths = [str(module.path.relative_to(SOURCES)) for module in wanted]
    return [
        *mypycify(
            [*options, *paths],
            opt_level="3",
            debug_level="0",
            multi_file=True,
            target_dir=str(work / "c"),
            group_name=LIBRARY,
        )
    ]


def compile_unit(unit: Unit) -> None:
    """Run the C compiler for one file. Raises: CompileError."""
    command = [*compiler(), *words("CFLAGS"), *words("CCSHARED"), *unit.extension.extra_compile_args]
    command += [f"-I{folder}" for folder in (*unit.extension.include_dirs, sysconfig.get_path("include"))]
    run([*command, "-c", unit.source, "-o", str(unit.target)])


def link(extension: Extension, objects: Sequence[Path], folder: Path) -> None:
    """Link one extension module, without symbols. Raises: CompileError."""
    target = folder / f"{extension.name.replace('.', '/')}{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    linker = [*compiler(), *words("LDSHARED")[len(words("CC")) :]]
    run([*linker, *map(str, objects), "-s", "-o", str(target)])


def run(command: Sequence[str]) -> None:
    """Run a compiler. Raises: CompileError with all that it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")


def build(wanted: Sequence[Module], work: Path, folder: Path) -> None:
    """Compile these modules into `folder`; `work` is for what lies between. Raises: CompileError."""
    extensions = write_c(wanted, work)
    units = {
        extension.name: [
            Unit(extension, source, work / f"{extension.name}.{number}.o")
            for number, source in enumerate(extension.sources)
        ]
        for extension in extensions
    }
    # Large files first, so that no core is left with one of them at the end.
    queued = sorted((unit for each in units.values() for unit in each), key=lambda unit: -os.stat(unit.source).st_size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as cores:
        list(cores.map(compile_unit, queued))
        list(cores.map(lambda each: link(each, [unit.target for unit in units[each.name]], folder), extensions))


def table(found: Sequence[Module]) -> str:
    """Which modules are compiled and which are not, and why."""
    lines = [f"{module.name}: interpreted: {module.interpreted}" for module in found if module.interpreted]
    return "\n".join([f"compiled: {' '.join(module.name for module in found if not module.interpreted)}", *lines])


def main(folder: Path) -> int:
    began = time.monotonic()
    found = modules(SOURCES / "sglang_router")
    wanted = [module for module in found if not module.interpreted]
    try:
        check_compiler()
        print(table(found), flush=True)
        with tempfile.TemporaryDirectory(prefix="sglang-router-compile-") as work:
            build(wanted, Path(work), folder.resolve())
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"compiled {len(wanted)} of {len(found)} modules in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
