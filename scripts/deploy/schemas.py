"""Validate objects of Kubernetes: standard input has JSON, standard output gets a line for each mistake.

    PYTHONPATH=VALIDATORS python schemas.py 1.30 < objects.json

Core objects by the strict schemas of kubernetes-validate, custom resources by the models of their makers' definitions.
It runs in a process of its own, because the packages are not among those of development.
"""

# mypy: ignore-errors
from __future__ import annotations

import importlib
import json
import sys

import kubernetes_validate

CUSTOM = {
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
    "PrometheusRule": "cloudcoil.models.prometheus_operator.v1",
    "ServiceMonitor": "cloudcoil.models.prometheus_operator.v1",
}
"""Kind to the module of its model; those take seconds to import."""


def unknown(value: object, known: object, path: str) -> list[str]:
    """Return the fields of a document that its model did not take."""
    if isinstance(value, dict) and isinstance(known, dict):
        names = [f"{path}.{name}" for name in value if name not in known]
        return names + [
            each for name in value if name in known for each in unknown(value[name], known[name], f"{path}.{name}")
        ]
    if isinstance(value, list) and isinstance(known, list):
        return [
            each for at, pair in enumerate(zip(value, known, strict=True)) for each in unknown(*pair, f"{path}[{at}]")
        ]
    return []


def mistakes(document: dict, version: str) -> list[str]:
    """Return what is wrong with an object."""
    kind = document["kind"]
    if kind in CUSTOM:
        taken = (
            getattr(importlib.import_module(CUSTOM[kind]), kind)
            .model_validate(document)
            .model_dump(by_alias=True, exclude_none=True, mode="json")
        )
        return unknown(document, taken, kind)
    kubernetes_validate.validate(document, version, strict=True)
    return []


def main() -> int:
    found = 0
    for document in json.load(sys.stdin):
        name = f"{document['kind']} {document['metadata']['name']}"
        try:
            wrong = mistakes(document, sys.argv[1])
        except Exception as error:  # of the validators, which have no common one: it is a mistake in the document
            wrong = [str(getattr(error, "message", error))]
        for each in wrong:
            print(f"{name}: {each}")
        found += len(wrong)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
