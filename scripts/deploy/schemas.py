"""Validate objects of Kubernetes: standard input has them as JSON, lists by the name of what they are part of; standard
output gets a line for each mistake.

    PYTHONPATH=VALIDATORS python schemas.py 1.30 < objects.json

Core objects by the strict schemas of kubernetes-validate, custom resources by the models of their makers' definitions,
and an InferencePool by inferencepools.yaml.
It runs in a process of its own, because the packages are not among those of development.
"""

# mypy: ignore-errors
from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

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


def strict(schema: dict) -> dict:
    """Return a schema that lets no unknown field pass."""
    parts = {name: strict(part) for name, part in schema.get("properties", {}).items()}
    closed = {"properties": parts, "additionalProperties": False} if parts else {}
    items = {"items": strict(schema["items"])} if "items" in schema else {}
    return {**schema, **closed, **items}


def pool_schema() -> dict:
    """Return the schema of an InferencePool."""
    definition = yaml.safe_load(Path(__file__).with_name("inferencepools.yaml").read_text("utf-8"))
    return strict(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def mistakes(document: dict, version: str) -> list[str]:
    """Return what is wrong with an object."""
    kind = document["kind"]
    if kind == "InferencePool":
        return [
            f"{each.json_path}: {each.message}"
            for each in jsonschema.Draft7Validator(pool_schema()).iter_errors(document)
        ]
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
    given = json.load(sys.stdin)
    for part, document in ((part, document) for part, documents in given.items() for document in documents):
        name = f"{part}: {document['kind']} {document['metadata']['name']}"
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
