"""What schemathesis must not do, loaded into its process by `hostile.fuzz`.

It finds out which workers there are and tries everything on them: some must stay as they are, for the polite clients.
And no worker may be anywhere but at addresses of this machine where nobody listens.
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
"""Ids and URLs of the workers that must stay as they are."""
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
        for name, value in case.body.items():  # to JSON Schema 20.0 is an integer, to the router it is not
            if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
                case.body[name] = int(value)


@schemathesis.hook
def after_call(context: HookContext, case: Case[Any], response: Response) -> None:
    if case.path == "/pause_generation":
        asked = urllib.request.Request(ROUTER + "/continue_generation", data=b"{}", method="POST")
        urllib.request.urlopen(asked, timeout=20).close()


def _elsewhere(url: object) -> bool:
    """Whether the router would take this for a worker somewhere else."""
    try:
        return isinstance(url, str) and not parse_worker_url(url).startswith("http://127.0.0.")
    except ConfigError:
        return False
