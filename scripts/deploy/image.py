"""The image: its Dockerfile is linted and built, and what comes out runs as an orchestrator would run it.

hadolint   what it says of the Dockerfile
buildah    builds it (no Docker engine is needed), on a base image that mmdebstrap makes of Debian's packages, because
           no registry of images need be within reach: Debian's Python stands for the one of the official image
crun       runs it as compose.yml says: not root, no capabilities, its files read-only, SIGTERM to process 1
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts import reporting
from scripts.deploy import tools
from scripts.deploy.chart import DEPLOY
from scripts.deploy.report import Failure, Missing, Report, run

from engines import engine_processes
from routers import ask, free_port

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
TAG = "localhost/sglang-router:test"
USER = 10001
_SUITE = "bookworm"
_CRUN = ("unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>&-; exec "$0" "$@"', "crun")
"""crun refuses where cgroups of both versions are mounted, even if it is to use none of them."""
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def lint(report: Report) -> None:
    """Lint the Dockerfile. Raises: Failure, Missing."""
    run([tools.hadolint(), DOCKERFILE])
    report.ok("hadolint: nothing to say of the Dockerfile")


def check(report: Report) -> None:
    """Build and run the image. Raises: Failure, Missing."""
    for program in ("buildah", "mmdebstrap", "crun"):
        if shutil.which(program) is None:
            raise Missing(f"{program}: on Debian or Ubuntu: apt-get install buildah mmdebstrap crun")
    if os.geteuid():
        raise Missing("building the image here needs root")
    with tempfile.TemporaryDirectory(prefix="test-deploy-") as place:
        builder = _Builder(Path(place))
        try:
            builder.build()
            report.ok("buildah builds the image from this checkout")
            told = builder.inside("sglang-router", "--version").strip()
            if "compiled" not in told:
                raise Failure(f"the router in the image is not compiled: {told}")
            builder.inside("python", "-c", "from sglang_router.picker import health, streams")
            report.ok("inside: it can be an endpoint picker, whose packages are an extra")
            report.ok(f"inside: {told}, {builder.size_mb()} MB with its packages, user {USER}")
            _run(report, builder, Path(place))
        finally:
            builder.close()


class _Builder:
    """buildah with a store of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._words = ["buildah", "--root", str(folder / "store"), "--runroot", str(folder / "run")]
        self._container = ""
        self.files = Path()

    def _buildah(self, *words: str | Path) -> str:
        return run([*self._words, *words]).strip()

    def build(self) -> None:
        """Make the base image, build on it, and mount what comes out at `files`."""
        name = self._base()
        words = ["bud", "--isolation", "chroot", "--pull-never", "--network", "host", "--format", "docker"]
        self._buildah(*words, "--file", DOCKERFILE, "--tag", TAG, reporting.ROOT)
        self._buildah("rmi", "--force", name)
        self._container = self._buildah("from", "--pull-never", TAG)
        self.files = Path(self._buildah("mount", self._container))

    def _base(self) -> str:
        """Make an image with the name of the official one; return the name."""
        text = DOCKERFILE.read_text("utf-8")
        version = re.findall(r"^ARG PYTHON=(\S+)", text, re.MULTILINE)[0]
        name = re.findall(r"^FROM (\S+) AS build", text, re.MULTILINE)[0].replace("${PYTHON}", version)
        packages = "python3,python3-venv,python3-pip,python3-dev,ca-certificates"
        base = self._folder / "base.tar"
        run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", _SUITE, base])
        container = self._buildah("from", "scratch")
        self._buildah("add", "--quiet", container, base, "/")
        files = Path(self._buildah("mount", container))
        (files / "usr/bin/python").symlink_to("python3")
        if Path(_CERTIFICATES).exists():  # those by which this machine reaches a package index
            shutil.copyfile(_CERTIFICATES, files / _CERTIFICATES.lstrip("/"))
        self._buildah("config", "--env", f"PIP_CERT={_CERTIFICATES}", container)
        self._buildah("commit", "--quiet", container, f"localhost/{name}")
        self._buildah("rm", container)
        base.unlink()
        return f"localhost/{name}"

    def inside(self, *words: str) -> str:
        """Run a command in the image."""
        return self._buildah("run", "--isolation", "chroot", self._container, "--", *words)

    def size_mb(self) -> int:
        return int(run(["du", "--summarize", "--block-size=1M", self.files / "opt"]).split()[0])

    def config(self) -> dict[str, Any]:
        """Return what the image says of how it is run."""
        inspected = json.loads(self._buildah("inspect", "--type", "image", TAG))
        return dict(inspected["Docker"]["config"])

    def close(self) -> None:
        if self._container:
            self._buildah("umount", self._container)
            self._buildah("rm", self._container)
        subprocess.run([*self._words, "rmi", "--all", "--force"], capture_output=True, check=False)


def _run(report: Report, builder: _Builder, folder: Path) -> None:
    """Run it by crun on this machine's loopback, with an engine, and end it as an orchestrator does."""
    config = builder.config()
    entry, command = config["Entrypoint"], config["Cmd"]
    if entry != ["sglang-router"] or config["User"] != f"{USER}:{USER}" or config["StopSignal"] != "SIGTERM":
        raise Failure(f"the image does not start the router as it should: {config}")
    port, metrics = free_port(), free_port()
    name = f"test-deploy-{os.getpid()}"
    with engine_processes(1, "--speed", "0") as workers:
        flags = ["--worker-urls", *workers, "--shutdown-drain-secs", "1", "--relay-processes", "1"]
        flags += ["--port", str(port), "--prometheus-port", str(metrics)]  # no variables: the checks must find out
        bundle = folder / "bundle"
        bundle.mkdir()
        (bundle / "config.json").write_text(
            json.dumps(_bundle(builder.files, [*entry, *command, *flags], config["Env"]))
        )
        crun = [*_CRUN, "--cgroup-manager=disabled", "--root", str(folder / "crun")]
        with (folder / "container.log").open("wb") as log:
            process = subprocess.Popen([*crun, "run", "--bundle", str(bundle), name], stdout=log, stderr=log)
        try:
            _serves(f"http://127.0.0.1:{port}", process, folder / "container.log")
            told = [config["Healthcheck"]["Test"], ["CMD", "python", "/usr/local/bin/healthcheck.py", "/readiness"]]
            for test in told:
                run([*crun, "exec", name, *test[1:]])
            if (
                subprocess.run([*crun, "exec", name, "touch", "/opt/x"], capture_output=True, check=False).returncode
                == 0
            ):
                raise Failure("the container can write to its own files")
            report.ok(
                "crun: it serves as an ordinary user without capabilities, its files read-only; both health checks hold"
            )
            began = time.monotonic()
            run([*crun, "kill", name, "TERM"])
            if process.wait(30) != 0:
                raise Failure(f"status {process.returncode} after SIGTERM:\n{(folder / 'container.log').read_text()}")
            report.ok(f"SIGTERM reaches the router: it ends with status 0 after {time.monotonic() - began:.1f} s")
        finally:
            if process.poll() is None:
                subprocess.run([*crun, "kill", name, "KILL"], capture_output=True, check=False)
                process.send_signal(signal.SIGKILL)
                process.wait()
            subprocess.run([*crun, "delete", "--force", name], capture_output=True, check=False)


def _serves(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a request is answered. Raises: Failure."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if ask(url, "POST", "/generate", {"text": "x", "sampling_params": {"max_new_tokens": 2}}).status == 200:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure(f"the container does not serve:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def _bundle(files: Path, words: list[str], variables: list[str]) -> dict[str, Any]:
    """Return how the container is run, in the form of OCI, with the restrictions of compose.yml. It has the network of
    this machine."""
    tmpfs = {"type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
    none: dict[str, list[str]] = {name: [] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")}
    return {
        "ociVersion": "1.0.0",
        "root": {"path": str(files), "readonly": True},
        "process": {
            "user": {"uid": USER, "gid": USER},
            "args": words,
            "env": variables,
            "cwd": "/var/lib/sglang-router",
            "capabilities": none,
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/tmp", **tmpfs},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    }
