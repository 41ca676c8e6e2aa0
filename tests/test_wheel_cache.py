"""scripts/wheel builds again when anything has changed that the wheel is made of, or when a build was not finished."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts import wheel
from scripts.compile import CHECKOUT

SECOND = """
import sys
from pathlib import Path
from scripts import wheel
from scripts.compile import CHECKOUT
wheel.PLACE, wheel.LOCK = map(Path, sys.argv[1:])
with wheel.alone():
    print("mine")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that holds one file of each kind, with the folders of scripts/wheel in it."""
    for name in (
        "src/package/module.py",
        "src/package/py.typed",
        "src/package/stub.pyi",
        "pyproject.toml",
        "README.md",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    for name in ("PLACE", "TOOLS", "ENVIRONMENT", "MADE", "DIST", "LOCK"):
        former: Path = getattr(wheel, name)
        monkeypatch.setattr(wheel, name, tmp_path / former.relative_to(CHECKOUT))
    monkeypatch.setattr(wheel, "CHECKOUT", tmp_path)
    wheel.PLACE.mkdir()
    return tmp_path


def complete(place: Path) -> None:
    """Make what looks like a virtual environment that was made to its end."""
    (place / "bin").mkdir(parents=True)
    (place / "bin/python").symlink_to(sys.executable)
    (place / wheel.STAMP).write_text(str(place))


@pytest.mark.parametrize("name", ["module.py", "py.typed", "stub.pyi", "new.json"])
def test_every_file_of_the_package_counts(name: str, checkout: Path) -> None:
    before = wheel.identity()
    assert wheel.identity() == before
    (checkout / "src/package" / name).write_text("after")
    assert wheel.identity() != before


def test_bytecode_does_not_count(checkout: Path) -> None:
    before = wheel.identity()
    (checkout / "src/package/__pycache__").mkdir()
    (checkout / "src/package/__pycache__/module.cpython-311.pyc").write_text("made")
    assert wheel.identity() == before


def test_the_arguments_of_the_compiler_count(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", sys.executable)
    before = wheel.identity()
    monkeypatch.setenv("CC", f"{sys.executable} -O")
    assert wheel.identity() != before


def leave(checkout: Path) -> None:
    pass


def lose_wheel(checkout: Path) -> None:
    (wheel.DIST / "a.whl").unlink()


def move_environment(checkout: Path) -> None:
    (wheel.ENVIRONMENT / wheel.STAMP).write_text("/where/the/checkout/was/.compiled/env")


def interrupt_environment(checkout: Path) -> None:
    (wheel.ENVIRONMENT / wheel.STAMP).unlink()


def lose_python(checkout: Path) -> None:
    (wheel.ENVIRONMENT / "bin/python").unlink()
    (wheel.ENVIRONMENT / "bin/python").symlink_to("/no/such/python")


@pytest.mark.parametrize(
    ("harm", "good"),
    [
        (leave, True),
        (lose_wheel, False),
        (move_environment, False),
        (interrupt_environment, False),
        (lose_python, False),
    ],
)
def test_a_wheel_is_made_when_its_environment_works_here(
    harm: Callable[[Path], None], good: bool, checkout: Path
) -> None:
    wheel.DIST.mkdir()
    (wheel.DIST / "a.whl").touch()
    wheel.MADE.write_text("this a.whl\n")
    complete(wheel.ENVIRONMENT)
    harm(checkout)
    assert (wheel.made("this") is not None) == good
    assert wheel.made("that") is None


def test_a_second_build_waits_for_the_first(checkout: Path) -> None:
    program = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(wheel.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdout.readline()
        second = subprocess.Popen(
            [sys.executable, "-c", SECOND, str(wheel.PLACE), str(wheel.LOCK)],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        with second:
            assert second.stdout is not None
            assert second.stdout.readline() == "wheel: another build runs in this checkout: waiting for it\n"
            assert second.poll() is None
            first.stdin.close()
            assert second.stdout.read() == "mine\n"


def test_a_checkout_that_cannot_be_written_is_told_in_one_line(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheel, "check_compiler", lambda: None)
    monkeypatch.setattr(wheel, "PLACE", checkout / "README.md" / "place")  # as of a file: nothing can be made there
    assert wheel.main() == 1
    assert capsys.readouterr().err.startswith("wheel: error: [Errno 20] Not a directory")
