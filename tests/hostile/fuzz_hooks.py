"""What schemathesis must not do; `hostile.fuzz` loads this into its process.

schemathesis lists the workers and tries every operation on them: some must not change, for the polite clients. And no
worker may be anywhere but at addresses of this machine where nothing listens.
"""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

import schemathesis
from schemathesis import Case, HookContext, Response

from sglang_router.config import parse_worker_url
from sglang_router.errors import ConfigError

ROUTER: str = os.environ["FUZZ_ROUTER"]
KEPT: list[str] = json.loads(os.environ["FUZZ_KEPT"])
"""Ids and URLs of the workers that must not change."""
NOBODY = "nobody"
NOWHERE = "http://127.0.0.1:9"


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    name, url = case.path_parameters.get("id"), case.query.get("url")
    if case.method != "GET" and name in KEPT:
        case.path_parameters["id"] = NOBODY
    if url in KEPT or _elsewhere(url):
        case.query["url"] = NOWHERE
    if isinstance(case.body, dict):
        if _elsewhere(case.body.get("url")):
            case.body["url"] = NOWHERE
        if case.body.get("disable_health_check") and not case.body.get("model_id"):
            case.body["model_id"] = NOBODY  # it gets requests although nobody listens: not those of the polite clients
        for name, value in case.body.items():  # in JSON Schema 20.0 is an integer, for the router it is not
            if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
                case.body[name] = int(value)


@schemathesis.hook
def after_call(context: HookContext, case: Case[Any], response: Response) -> None:
    if case.path == "/pause_generation":
        asked = urllib.request.Request(ROUTER + "/continue_generation", data=b"{}", method="POST")
        urllib.request.urlopen(asked, timeout=20).close()


def _elsewhere(url: object) -> bool:
    """Return whether the router would accept this as the URL of a worker on another machine."""
    try:
        return isinstance(url, str) and not parse_worker_url(url).startswith("http://127.0.0.")
    except ConfigError:
        return False
