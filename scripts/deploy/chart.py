"""The Helm chart, and what is made from it.

    python -m scripts.deploy.chart     writes, in this order:
        values.schema.json    the router's options into `config`; all else in it is written by hand
        README.md             of the chart, from values.schema.json and values.yaml
        files/alerts.yml      a copy of deploy/prometheus/alerts.yml
        deploy/kubernetes/router.yaml    by helm

tests/deploy checks that the first three are as they would be written, scripts/test-deploy that the last one is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import yaml
from scripts import reporting
from scripts.deploy import tools
from scripts.deploy.report import run

from sglang_router.config import OPTIONS

DEPLOY = reporting.ROOT / "deploy"
CHART = DEPLOY / "helm" / "sglang-router"
MANIFESTS = DEPLOY / "kubernetes" / "router.yaml"
SCHEMA = CHART / "values.schema.json"
ALERTS = CHART / "files" / "alerts.yml"
NAMESPACE = "llm"
_INTRODUCTION = """# The chart sglang-router

The router with what it needs in a cluster: Deployment, Services, permission to read pods, PodDisruptionBudget, and,
where asked for, autoscaling of routers and engines, ServiceMonitor, alerts, NetworkPolicy; or, with `mode: epp`, an
endpoint picker for gateways with its InferencePool ([docs/endpoint-picker.md](../../../docs/endpoint-picker.md)). How
to install and size it, what happens in a rolling update and what was measured:
[docs/deploy-kubernetes.md](../../../docs/deploy-kubernetes.md).

    helm install router deploy/helm/sglang-router --namespace llm

Made by `python -m scripts.deploy.chart`; do not edit by hand. A value that is unknown or impossible is refused.

| value | default | meaning |
|---|---|---|
"""
_HEAD = """# The router in the namespace llm, in front of its pods with the label app=engine, for `kubectl apply`.
# Made from the Helm chart by `python -m scripts.deploy.chart`; do not edit by hand. docs/deploy-kubernetes.md explains
# it, and how to make others.
"""
_OF_HELM = re.compile(r"^ *(?:app\.kubernetes\.io/managed-by|helm\.sh/chart): .*\n|^# Source: .*\n", re.MULTILINE)


def rendered(
    *sets: str, version: str = "1.30", values: str = "", release: str = "sglang-router", namespace: str = NAMESPACE
) -> str:
    """Return the manifests that helm makes. sets: values as NAME=VALUE; values: a file of them, as text; version: of
    Kubernetes."""
    words = [tools.helm(), "template", release, str(CHART), "--namespace", namespace, "--kube-version", version]
    for value in sets:
        words += ["--set", value]
    return run([*words, "--values", "-"], text=values)


def documents(text: str) -> list[dict[str, Any]]:
    """Return the objects of manifests."""
    return [document for document in yaml.safe_load_all(text) if document]


def manifests() -> str:
    """Return the plain manifests: the chart with its defaults, without what only helm needs."""
    return _HEAD + _OF_HELM.sub("", rendered())


def schema() -> str:
    """Return the chart's schema with the options of the router, and with every value required: a value that is set to
    null would otherwise be an error in the middle of a template."""
    found = json.loads(SCHEMA.read_text("utf-8"))
    found["properties"]["config"]["properties"] = {
        option.flag.lstrip("-"): {"enum": [*option.choices, None]} if option.choices else {}
        for option in OPTIONS.values()
    }
    _require(found)
    return json.dumps(found, indent=2) + "\n"


def _require(part: dict[str, Any]) -> None:
    """Require all values in an object of values, but for what helm sets, and the router's options."""
    part["required"] = [name for name in part["properties"] if name != "global"]
    for name, each in part["properties"].items():
        if "properties" in each and name != "config":
            _require(each)


def readme() -> str:
    """Return the chart's README."""
    described = json.loads(SCHEMA.read_text("utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    rows = [f"| `{name}` | `{json.dumps(value)}` | {about} |\n" for name, value, about in _rows(described, values)]
    return _INTRODUCTION + "".join(rows)


def _rows(schema: dict[str, Any], values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any, str]]:
    for name, part in schema["properties"].items():
        if "properties" in part and not part.get("description"):
            yield from _rows(part, values[name], f"{before}{name}.")
        elif name in values:
            choices = f" ({', '.join(part['enum'])})" if "enum" in part else ""
            yield before + name, values[name], part["description"].replace("|", "\\|") + choices


def main() -> int:
    SCHEMA.write_text(schema(), "utf-8")
    (CHART / "README.md").write_text(readme(), "utf-8")
    ALERTS.write_text((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"), "utf-8")
    MANIFESTS.write_text(manifests(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
