"""Run schemathesis against the control plane of a router process: compare the OpenAPI document with the answers.

    GET /openapi.json --strict()--> fuzz.json --> schemathesis run (a process) --> router --> engines
                                                       '-- hostile.fuzz_hooks

`strict` removes what the document leaves open: an undeclared status is a failure then, and workers are only at
addresses where nothing listens. An answer may be 502, 503 or 504 where that is declared; no other 5xx.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hostile.arena import Polite, post
from routers import RouterProcess

URL = {"type": "string", "pattern": r"^http://127\.0\.0\.[1-9]:[1-9]$"}
"""Ports of services that nobody has run for decades: the addresses that are fuzzed must not reach anything."""
CONFIG = """\
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 502, 503, 504]

# Whether a body makes sense is for the engine to say, and no worker comes up where nobody listens.
[[operations]]
include-tag = "Inference"
checks.positive_data_acceptance.enabled = false

[[operations]]
include-path = "/add_worker"
checks.positive_data_acceptance.enabled = false
"""
ENGINES = ("--speed", "0")
FLAGS = ("--worker-startup-timeout-secs", "0.05", "--disable-access-log")
"""Options of a router that is fuzzed: /add_worker waits that long for a worker that never comes."""


class Fuzzed(NamedTuple):
    """The result: exit status, output, whether it came to its end, and its counts."""

    status: int
    output: str
    complete: bool
    operations: int
    cases: int


def strict(router: RouterProcess, key: str = "") -> dict[str, Any]:
    """Return the router's document as it is tested, see the module; with a key, the control plane needs one."""
    fields = {"authorization": f"Bearer {key}"} if key else {}
    document: dict[str, Any] = router.ask("GET", "/openapi.json", **fields).json()
    for operation in operations(document):
        operation["responses"].pop("default")
        controlled = any("control" in each for each in operation["security"])
        operation["security"] = [{"control": []}] if key and controlled else []
        for parameter in operation.get("parameters", ()):
            if parameter["name"] == "url":
                parameter["schema"] = URL
    document["components"]["schemas"]["Registration"]["properties"]["url"] = URL
    return document


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        yield from methods.values()


def fuzz(
    router: RouterProcess,
    document: dict[str, Any],
    kept: Sequence[str],
    folder: Path,
    *flags: str,
    within: float = 120.0,
) -> Fuzzed:
    """Run schemathesis. The workers with the URLs `kept` are not changed; `flags` are schemathesis' own."""
    schema, config, report = folder / "fuzz.json", folder / "fuzz.toml", folder / "report.json"
    schema.write_text(json.dumps(document))
    config.write_text(CONFIG)
    names = [*kept, *(router.worker(url)["id"] for url in kept)]
    more = {"SCHEMATHESIS_HOOKS": "hostile.fuzz_hooks", "FUZZ_ROUTER": router.url, "FUZZ_KEPT": json.dumps(names)}
    command = (sys.executable, "-m", "schemathesis.cli", f"--config-file={config}", "run", schema, "--url", router.url)
    plain = ("--generation-database=none", "--warnings=off", "--no-color", "--request-timeout=20")
    done = subprocess.run(
        [*command, *plain, f"--report-json-path={report}", *flags],
        cwd=folder,  # the directory for its own files
        env=os.environ | more | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=within,
    )
    if not report.exists():
        return Fuzzed(done.returncode, done.stdout, False, 0, 0)
    told = json.loads(report.read_text())
    operations, cases = told["operations"], told["test_cases"]
    if operations is None or cases is None:  # it ended before it knew what to test
        return Fuzzed(done.returncode, done.stdout, False, 0, 0)
    complete = told["complete"] and not cases["errored"]
    return Fuzzed(done.returncode, done.stdout, complete, operations["tested"], cases["generated"])


def polite(router: RouterProcess) -> Polite:
    """Return a client that sends requests all the time. It names the engines' model: schemathesis adds others."""
    return Polite(int(router.url.rpartition(":")[2]), post("/generate", b'{"model": "built-in", "text": "polite"}'))
