"""The chart by itself: what helm and the schemas of Kubernetes say of it, and the router of its configuration."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from scripts import reporting
from scripts.deploy import chart, tools
from scripts.deploy.report import Failure, Report, run

from certificates import Authority
from documented import blocks

EVERYTHING = (
    "autoscaling.enabled=true",
    "engineScaling.enabled=true",
    "metrics.serviceMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
    "networkPolicy.enabled=true",
    "keys.clients.secret=keys",
    "keys.operators.secret=keys",
    "tls.secret=certificate",
    "sharedState.secret=valkey",
    "discovery.allNamespaces=true",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "everything": EVERYTHING,
    "engines by HPA": ("engineScaling.enabled=true", "engineScaling.by=hpa", "discovery.namespace=engines"),
    "pairs": ("discovery.prefillSelector[0]=role=prefill", "discovery.decodeSelector[0]=role=decode"),
    "no discovery": ("discovery.enabled=false", "config.worker-urls[0]=http://engine:8000", "listen=::"),
    "a store that keeps the key": ("sharedState.secret=valkey", "sharedState.fleetKey="),
    "several processes": ("config.relay-processes=4", "config.models=null", "image.tag=next", "replicaCount=1"),
}
PAGE = reporting.ROOT / "docs" / "deploy-kubernetes.md"
VERSIONS = ("1.30", "1.37")
"""Those whose schemas the manifests must fit."""
MISTAKES = {
    "replicacount=3": "replicacount",
    "discovery.selector[0]=engine": "pattern",
    "image.pullPolicy=Sometimes": "one of",
    "engineScaling.enabled=true,engineScaling.by=hpa,engineScaling.min=0": "minimum",
}


def check(report: Report) -> None:
    """Run all of it. Raises: Failure, Missing."""
    run([tools.helm(), "lint", "--strict", "--namespace", chart.NAMESPACE, chart.CHART])
    report.ok("helm lint --strict")
    for name, sets in VARIANTS.items():
        _variant(report, name, *sets)
    (example,) = (each for each in blocks(PAGE) if each.marks.get("title") == "values.yaml")
    _variant(report, f"the example at {example.where}", values=example.text)
    for wrong, why in MISTAKES.items():
        _refused(wrong, why)
    report.ok(f"{len(MISTAKES)} mistakes in values are refused, with the reason")
    if chart.MANIFESTS.read_text("utf-8") != chart.manifests():
        raise Failure(f"{chart.MANIFESTS.name} is not what the chart makes: python -m scripts.deploy.chart")
    report.ok("deploy/kubernetes/router.yaml is what the chart makes")


def _variant(report: Report, name: str, *sets: str, values: str = "") -> None:
    for version in VERSIONS:
        documents = chart.documents(chart.rendered(*sets, version=version, values=values))
        _fit(documents, version)
    report.ok(f"{name}: {len(documents)} objects fit the schemas of Kubernetes {' and '.join(VERSIONS)}")
    _can_start(documents)
    report.ok(f"{name}: the router accepts the configuration inside")


def _fit(documents: list[dict[str, Any]], version: str) -> None:
    words = [sys.executable, Path(__file__).with_name("schemas.py"), version]
    run(words, text=json.dumps(documents), variables={"PYTHONPATH": str(tools.validators())})


def _refused(sets: str, why: str) -> None:
    words = [tools.helm(), "template", "x", chart.CHART, "--set", sets]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode == 0 or why not in done.stderr:
        raise Failure(f"--set {sets} was to be refused because of {why}: {done.stderr}")


def configuration(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the router's options in the ConfigMap."""
    (found,) = (each["data"]["router.yaml"] for each in documents if each["kind"] == "ConfigMap")
    return dict(yaml.safe_load(found))


def container(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the router's container in the Deployment."""
    (found,) = (each["spec"]["template"]["spec"]["containers"][0] for each in documents if each["kind"] == "Deployment")
    return dict(found)


def _can_start(documents: list[dict[str, Any]]) -> None:
    """Let the router check the configuration, as its container has it, with files where Secrets would be."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, key in (("clients", "alice secret-1"), ("operators", "id:name:admin:secret-2")):
            (folder / name).mkdir()
            (folder / name / name).write_text(f"{key}\n")
            (folder / name / name).chmod(0o600)
        pair = Authority(folder / "ca").issue("router", "DNS:router")
        (folder / "tls").mkdir()
        (folder / "tls" / "tls.crt").write_bytes(Path(pair.cert).read_bytes())
        (folder / "tls" / "tls.key").write_bytes(Path(pair.key).read_bytes())
        (folder / "fleet").mkdir()
        (folder / "fleet" / "fleet-key").write_text(f"{'5a' * 32}\n")
        (folder / "fleet" / "fleet-key").chmod(0o600)
        (folder / "kubeconfig").write_text(_KUBECONFIG)
        (folder / "kubeconfig").chmod(0o600)
        text = yaml.safe_dump(configuration(documents)).replace("/etc/sglang-router", str(folder))
        (folder / "config").mkdir()
        (folder / "config" / "router.yaml").write_text(text)
        described = container(documents)
        flags = [str(word).replace("/etc/sglang-router", str(folder)) for word in described["args"]]
        variables = {each["name"]: each.get("value", _STORE) for each in described["env"]} | {
            "KUBECONFIG": str(folder / "kubeconfig")
        }
        words = [sys.executable, "-m", "sglang_router", *flags, "--check-config"]
        run(words, variables={**variables, "PYTHONPATH": str(reporting.ROOT / "src")})


_STORE = "redis://:secret-3@127.0.0.1:1"
"""What the Secret of the store holds, the only one that becomes a variable."""
_KUBECONFIG = """
current-context: x
clusters: [{name: x, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: x, user: {token: x}}]
contexts: [{name: x, context: {cluster: x, user: x}}]
"""
