"""The systemd units in a real systemd, which boots in namespaces of its own (boot.sh), and in systemd-analyze.

    this program ──> unshare ──> boot.sh ──> systemd ──> the units, with all their restrictions
                '──> nsenter ──> unit_course.py: systemctl, clients and engines inside

Where that cannot be (no root, no overlay file system), the units are only analysed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scripts import reporting
from scripts.deploy.chart import DEPLOY
from scripts.deploy.report import Failure, Missing, Report, run

UNITS = DEPLOY / "systemd"
MOST_EXPOSED = 2.0
"""Of systemd-analyze security: 0 is best, 10 is a service without any restriction."""
BOOTS_WITHIN = 60.0
_NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup")
_HARMLESS = ("is not executable: No such file", "failed with code 16")
"""What systemd-analyze verify says where neither the router nor its manual page is installed."""


def check(report: Report) -> None:
    """Run all of it. Raises: Failure, Missing."""
    if shutil.which("systemd-analyze") is None:
        raise Missing("systemd-analyze: on Debian or Ubuntu: apt-get install systemd")
    _analysed(report)
    with _systemd() as inside:
        for line in run([*inside, sys.executable, "-m", "scripts.deploy.unit_course"]).splitlines():
            report.ok(line)


def _analysed(report: Report) -> None:
    files = sorted([*UNITS.glob("*.service"), *UNITS.glob("*.socket")])
    done = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
    wrong = [line for line in done.stderr.splitlines() if not line.endswith(_HARMLESS)]
    wrong = [line for line in wrong if not any(each in line for each in _HARMLESS) and "sglang" in line]
    if wrong:
        raise Failure("systemd-analyze verify: " + "\n".join(wrong))
    report.ok(f"systemd-analyze verify: {', '.join(path.name for path in files)}")
    service = UNITS / "sglang-router.service"
    told = run(["systemd-analyze", "security", "--no-pager", "--offline=yes", service])
    level = re.search(r"exposure level for \S+: ([\d.]+)", told)
    if level is None or float(level[1]) > MOST_EXPOSED:
        raise Failure(f"systemd-analyze security: {told.splitlines()[-1]}")
    report.ok(f"systemd-analyze security: exposure {level[1]} of 10")


@contextlib.contextmanager
def _systemd() -> Iterator[list[str]]:
    """Boot systemd; yield the words before a command that is to run inside. Raises: Missing."""
    if os.geteuid():
        raise Missing("a real systemd needs root; the units were only analysed")
    with tempfile.TemporaryDirectory(prefix="test-deploy-") as place:
        _install(Path(place) / "router")
        boot = Path(__file__).with_name("boot.sh")
        router = str(Path(place) / "router")
        words = ["unshare", "--fork", "--kill-child=KILL", *_NAMESPACES, "sh", str(boot), place, str(UNITS), router]
        words += [str(reporting.ROOT), *([sys.prefix] if sys.prefix != sys.base_prefix else [])]
        with (Path(place) / "boot.log").open("wb") as log:
            outer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            yield _inside(outer, Path(place) / "boot.log")
        finally:
            outer.kill()
            outer.wait()


def _inside(outer: subprocess.Popen[bytes], log: Path) -> list[str]:
    """Wait until systemd runs; return the words before a command that is to run inside. Raises: Missing."""
    deadline = time.monotonic() + BOOTS_WITHIN
    while time.monotonic() < deadline and outer.poll() is None:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if children:
            enter = ["nsenter", "--target", children[0], *_NAMESPACES, "--root", "--wd=/"]
            variables = f"PYTHONPATH={reporting.ROOT}/src:{reporting.ROOT}/tests:{reporting.ROOT}"
            words = [*enter, "env", "--chdir", str(reporting.ROOT), variables]
            done = subprocess.run(
                [*enter, "systemctl", "is-system-running"], capture_output=True, text=True, check=False
            )
            if done.stdout.strip() in ("running", "degraded"):
                return words
        time.sleep(0.2)
    raise Missing(f"systemd does not boot here; the units were only analysed: {log.read_text(errors='replace')[-300:]}")


def _install(place: Path) -> None:
    """Put the router and what it needs into a folder that a service without a home can read: bin, and lib."""
    library = place / "lib"
    shutil.copytree(reporting.ROOT / "src" / "sglang_router", library / "sglang_router")
    wanted, seen = ["sglang-router"], set[str]()
    while wanted:
        name = re.split(r"[ <>=!~;\[(]", wanted.pop(), maxsplit=1)[0].lower()
        if name in seen:
            continue
        seen.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.distribution(name)
            wanted += [each for each in found.requires or () if "extra ==" not in each]
            for file in found.files or () if name != "sglang-router" else ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    target = library / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(str(file.locate()), target)
    command = place / "bin" / "sglang-router"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH=/opt/sglang-router/lib exec {_python()} -m sglang_router "$@"\n')
    command.chmod(0o755)


def _python() -> str:
    """Return a Python of this version that is not below a home, which the service cannot see. Raises: Missing."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in (os.path.realpath(sys.executable), f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        if os.access(name, os.X_OK) and not name.startswith(("/root/", "/home/")):
            return name
    raise Missing(
        f"no Python {version} outside of /root and /home, where the service cannot look; the units were only analysed"
    )
