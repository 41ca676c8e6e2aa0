"""The OpenAPI document is correct: it has every endpoint, and every answer has a declared status and shape.

Three checks: the tables against the document, the code of each handler against its declared errors, and a router that
is made to give every declared answer.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import pytest

from fake_worker import CLOSE, HANG, FakeWorker, answer
from sglang_router.access.permissions import AccessKind
from sglang_router.admin import (
    adapters,
    adding,
    ask,
    broadcast,
    context,
    contract,
    decisions,
    engine_metrics,
    engine_relay,
    home,
    info,
    lists,
    openapi,
    options,
    orders,
    replicas,
    selection,
    shapes,
    workers,
)
from sglang_router.admin.context import AskTimeouts
from sglang_router.admin.contract import CONTRACTS
from sglang_router.admin.routes import ROUTES
from sglang_router.admin.rows import ControlRow, Handler, plain_path, relayed_rows
from sglang_router.errors import (
    ConfigRefused,
    Conflict,
    ModelNotFound,
    ModelRequired,
    RateLimited,
    RouterError,
    ShuttingDown,
)
from stack import Reply, Stack, stack

ROWS = [row for rows in ROUTES.values() for row in rows]
RELAYED = {(row.method, plain_path(row.path)) for row in relayed_rows()}
DOCUMENT = openapi.document(ROUTES)
OPERATIONS = {
    (method.upper(), path): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}


# -- the document ------------------------------------------------------------------------------------------------------


def test_every_path_and_method_is_in_it_and_nothing_else() -> None:
    served = {(method, plain_path(row.path)) for row in ROWS for method in row.methods}
    assert OPERATIONS.keys() == served | RELAYED


def test_every_handler_has_a_contract_and_every_contract_a_handler() -> None:
    assert CONTRACTS.keys() == {row.handler for row in ROWS if row.path not in (openapi.PATH, openapi.PAGE)}


def test_it_is_served() -> None:
    with stack() as router:
        reply = router.get("/openapi.json")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json() == json.loads(json.dumps(DOCUMENT))


def test_every_reference_is_defined() -> None:
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(DOCUMENT)))
    assert references
    for reference in references:
        found: Any = DOCUMENT
        for step in reference.split("/"):
            found = found[step]
    used = {reference.rpartition("/")[2] for reference in references if reference.startswith("components/schemas/")}
    assert used == DOCUMENT["components"]["schemas"].keys()


def test_operations_have_unique_names_known_tags_and_all_path_parameters() -> None:
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(names) == len(set(names))
    groups = {tag["name"] for tag in DOCUMENT["tags"]}
    for (_, path), operation in OPERATIONS.items():
        assert set(operation["tags"]) <= groups
        declared = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
        assert declared == set(re.findall(r"\{(.+?)\}", path))


def test_only_public_paths_need_no_key() -> None:
    public = {(method, plain_path(row.path)) for row in ROWS for method in row.methods if row.kind is AccessKind.PUBLIC}
    assert {key for key, operation in OPERATIONS.items() if not operation["security"]} == public
    for key, operation in OPERATIONS.items():
        assert ({"401", "403"} <= operation["responses"].keys()) == (key not in public)


def test_regular_expressions_are_those_of_json_schema() -> None:
    patterns = re.findall(r'"pattern": "(.*?)"[,}]', json.dumps(DOCUMENT))
    assert patterns
    assert not any(r"\\Z" in pattern or "(?P" in pattern for pattern in patterns)


# -- the code of handlers ----------------------------------------------------------------------------------------------

MODULES = (
    *(adapters, adding, ask, broadcast, context, decisions, engine_metrics, engine_relay),
    *(home, info, lists, options, orders, replicas, selection, workers),
)
DEEPER: dict[str, tuple[type[RouterError], ...]] = {
    "unavailable": contract.NO_WORKER,
    "refusal": (ModelRequired, ModelNotFound),
    "admit": (RateLimited, ShuttingDown),
    "restart_worker": (Conflict,),
    "restart_all": (Conflict,),
    "reload": (ConfigRefused,),
}
"""Errors raised outside of `admin`, by the name of the called method."""


def functions() -> dict[tuple[str, str], ast.AsyncFunctionDef | ast.FunctionDef]:
    """All functions, by module and name."""
    found = {}
    for module in MODULES:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[module.__name__, node.name] = node
    return found


FUNCTIONS = functions()


def raised_by(handler: Handler) -> set[type[RouterError]]:
    """The errors that a handler raises, itself or in what it calls."""
    found: set[type[RouterError]] = set()
    seen: set[tuple[str, str]] = set()
    left = [(handler.__module__, handler.__name__)]
    while left:
        where = left.pop()
        if where in seen:
            continue
        seen.add(where)
        for node in ast.walk(FUNCTIONS[where]):
            if isinstance(node, ast.Raise) and node.exc is not None:
                found.update(errors_in(where[0], node.exc))
            left += called(where[0], node)
            if isinstance(node, ast.Attribute):
                found.update(DEEPER.get(node.attr, ()))
    return found


def errors_in(module: str, raised: ast.expr) -> Iterator[type[RouterError]]:
    """The classes of errors in the expression that is raised."""
    names = vars(next(each for each in MODULES if each.__name__ == module))
    for node in ast.walk(raised):
        named = names.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(named, type) and issubclass(named, RouterError):
            yield named


def called(module: str, node: ast.AST) -> list[tuple[str, str]]:
    """The functions of the control plane that a node names, and the methods of its context."""
    if isinstance(node, ast.Name):
        named = vars(next(each for each in MODULES if each.__name__ == module)).get(node.id)
        where = (getattr(named, "__module__", ""), getattr(named, "__name__", ""))
        return [where] if where in FUNCTIONS else []
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "context":
        where = (context.__name__, node.attr)
        return [where] if where in FUNCTIONS else []
    return []


@pytest.mark.parametrize("handler", CONTRACTS, ids=lambda handler: handler.__name__)
def test_the_errors_a_handler_raises_are_those_declared(handler: Handler) -> None:
    assert raised_by(handler) == set(CONTRACTS[handler].errors)


def test_the_code_is_really_read() -> None:
    assert raised_by(workers.create) >= {Conflict}
    assert raised_by(info.models) == set(contract.NO_WORKER)
    assert raised_by(info.health) == set()


# -- a router that gives every answer ----------------------------------------------------------------------------------

MODELS = answer(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})
WELL = {
    "GET /health_generate": answer(200),
    "GET /v1/models": MODELS,
    "GET /get_model_info": answer(200, {}),
    "GET /get_server_info": answer(200, {}),
    "GET /metrics": answer(200, b"up 1\n"),
    "GET /v1/files": answer(200, {"object": "list", "data": [{"id": "file-1"}], "has_more": False}),
    "GET /v1/batches": answer(200, {"object": "list", "data": []}),
    "GET /api/tags": answer(200, {"models": [{"name": "m"}]}),
    "GET /api/ps": answer(200, {"models": []}),
}
LISTS = ("/v1/files", "/v1/batches", "/api/tags", "/api/ps")
ILL = {f"GET {path}": CLOSE for path in ("/health_generate", "/metrics", "/get_model_info", "/get_server_info")}
ADAPTERS = [row.path for row in ROWS if row.handler in (adapters.load, adapters.unload)]
UNLOADS = [row.path for row in ROWS if row.handler is adapters.unload]
LOAD = "/load_lora_adapter"
TOLD = [row for row in ROWS if row.handler in (broadcast.broadcast, broadcast.question, broadcast.any_path)]
TOLD += [row for row in ROWS if row.handler is broadcast.flush_cache]
PASSED_ON = [row for row in ROWS if row.handler in (engine_relay.relay, engine_relay.relay_rl)]
BY_KEYS = {"401", "403"}
"""Answers that need keys: see the tests of access."""
ELSEWHERE = {
    "/scale": {"200"},
    "/restart_workers": {"200", "202"},
    "/workers/{id}/restart": {"202"},
    "/add_worker": {"503"},
    "/overview": {"429", "503"},
}
"""Answers that need engines run by the router, autoscaling, many viewers, or a shutdown: see the other tests."""


class Asker:
    """Sends requests, checks that the answers are declared, and keeps which ones were seen."""

    def __init__(self, router: Stack) -> None:
        self.router = router
        self.seen: set[tuple[str, str, str]] = set()

    def __call__(self, route: str, body: object = None, **path: str) -> Reply:
        method, _, target = route.partition(" ")
        template, _, query = target.partition("?")
        target = template.format(**path) + (f"?{query}" if query else "")
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        reply = self.router.ask(method, target, content)
        self.seen.add((method, template, conforms(method, template, reply)))
        return reply


def conforms(method: str, template: str, reply: Reply) -> str:
    """Check the shape of an answer; return its declared status."""
    responses = OPERATIONS[method, template]["responses"]
    status = str(reply.status) if str(reply.status) in responses else f"{reply.status // 100}XX"
    assert status in responses, (method, template, reply)
    declared = responses[status]
    media = reply.headers.get("content-type", "").partition(";")[0]
    media = media if "*/*" not in declared["content"] else "*/*"
    assert media in declared["content"], (method, template, reply)
    for name, field in declared.get("headers", {}).items():
        required = DOCUMENT["components"]["headers"][field["$ref"].rpartition("/")[2]].get("required")
        assert name in reply.headers or not required
    shape = declared["content"][media]["schema"].get("$ref", "").rpartition("/")[2]
    if "x-smg-error-code" in reply.headers and not template.startswith("/api"):
        shape = "Error"  # also where an engine may answer with this status
    if shape:
        named = {each.__name__: each for each in openapi.structs()}
        msgspec.json.decode(reply.body, type=named[shape])
    return status


def declared() -> set[tuple[str, str, str]]:
    """All answers that a router can give in this test."""
    return {
        (method, path, status)
        for (method, path), operation in OPERATIONS.items()
        if (method, path) not in RELAYED
        for status in operation["responses"].keys() - BY_KEYS - ELSEWHERE.get(path, set()) - {"default"}
    }


def test_every_answer_is_declared_and_every_declared_answer_is_given() -> None:
    with stack(startup_timeout=0.01) as router:
        ask = Asker(router)
        without_workers(ask)
        with_two_workers(ask)
        the_family(ask)
        the_decisions(ask)
        the_reload(ask)
    missing, undeclared = declared() - ask.seen, ask.seen - declared()
    assert (missing, undeclared) == (set(), set())


def without_workers(ask: Asker) -> None:
    for (method, path), operation in OPERATIONS.items():
        plain = "{" not in path and "requestBody" not in operation
        if (method, path) not in RELAYED and (method == "GET" or plain):
            ask(f"{method} {path}", id="x", model="x", request="x", path="x")
    to_all(ask)
    for path in ADAPTERS:
        ask(f"POST {path}", {"lora_name": "x"})


def to_all(ask: Asker, query: str = "") -> None:
    """Send every request for all workers."""
    for row in TOLD:
        for method in row.methods:
            ask(f"{method} {plain_path(row.path)}{query}", {}, path="x")


def with_two_workers(ask: Asker) -> None:
    """Both succeed, then one, then none."""
    done = {f"{method} {row.path}": answer(200) for row in TOLD for method in row.methods}
    done |= {f"POST {path}": answer(200) for path in ADAPTERS}
    done |= {f"{method} /x": answer(200) for method in ("GET", "POST", "PUT", "PATCH", "DELETE")}
    fakes = ask.router.fakes({**WELL, **done}, {**WELL, **done})
    to_one(ask, fakes[0])
    to_all(ask, "?selector=x")
    to_all(ask, "?selector=nobody=x")
    for number in range(3):
        to_all(ask)
        for path in ADAPTERS:
            ask(f"POST {path}", {"lora_name": "x"})
            ask(f"POST {path}", {})
            ask(f"POST {path}?model=unknown", {"lora_name": "x"})
        for path in UNLOADS:  # "y" is loaded at both, and the first one fails when it is to be unloaded
            ask(f"POST {LOAD}" if number == 0 else f"POST {path}", {"lora_name": f"y{path}"})
        if number < 2:
            for route in done:
                fakes[number].script[route] = answer(500)
    for worker in list(ask.router.fleet):
        ask.router.call(partial(ask.router.fleet.set_paused, worker, ()))
    for row in ROWS:
        if row.methods == ["GET"]:
            ask(f"GET {plain_path(row.path)}", id=ask.router.worker(fakes[0].url).id, model="m", request="x", path="x")
    ask("GET /v1/models/{model}", model="unknown")
    own_words = ("/get_model_info", "/model_info", "/get_server_info", "/server_info")
    for fake in fakes:
        for path in own_words:
            fake.script[f"GET {path}"] = answer(404)
    for path in own_words:
        ask(f"GET {path}")
    for path in LISTS:
        fakes[1].script[f"GET {path}"] = CLOSE
        assert ask(f"GET {path}").json()["unavailable_workers"] == 1
        for fake in fakes:
            fake.script[f"GET {path}"] = answer(404)
        ask(f"GET {path}")
        fakes[0].script[f"GET {path}"] = answer(422, {})
        ask(f"GET {path}")
    for path in LISTS[:2]:
        ask(f"GET {path}?limit=none")
    for fake in fakes:
        fake.script.update(ILL | {f"GET {path}": CLOSE for path in (*own_words, *LISTS)})
    for path in (*own_words, *LISTS, "/engine_metrics", "/health_generate"):
        ask(f"GET {path}")


def to_one(ask: Asker, fake: FakeWorker) -> None:
    """Send requests that an engine answers well, badly, not at all, and none."""
    name = ask.router.worker(fake.url).id
    ask.router.context.timeouts = AskTimeouts(control=0.05)
    for method, template in [(method, plain_path(row.path)) for row in PASSED_ON for method in row.methods]:
        fake.script |= {f"{method} /tea": answer(418), f"{method} /cut": CLOSE, f"{method} /never": HANG}
        for path in ("x", "tea", "cut", "never", "."):
            ask(f"{method} {template}", id=name, path=path)
        ask(f"{method} {template}", id="nobody", path="x")
    ask.router.context.timeouts = AskTimeouts()


def the_family(ask: Asker) -> None:
    fake = ask.router.fake()
    url, key = fake.url, fake.url.replace("/", "%2F")
    assert ask("POST /add_worker?url=http://127.0.0.1:9").status == 400
    rules = ask.router.context.add_rules
    ask.router.context.add_rules = msgspec.structs.replace(rules, startup_timeout=20.0)
    assert ask(f"POST /add_worker?url={url}").status == 200
    assert ask(f"POST /remove_worker?url={url}").status == 200
    ask(f"POST /remove_worker?url={url}")
    assert ask("POST /add_worker?url=http://127.0.0.1:9&wait=false").status == 202
    assert ask("POST /remove_worker?url=http://127.0.0.1:9").status == 200
    assert ask("POST /workers", {"url": url, "runtime": "x", "labels": {"a": "b"}}).status == 202
    for body in ({"url": url}, b"{", {"url": "ftp://x"}, {}):
        ask("POST /workers", body)
    ask("GET /list_workers")
    ask("GET /workers")
    for name in (key, "nobody"):
        ask("GET /workers/{id}", id=name)
        for body in (b"{}", b"{", b'{"cost": "1"}'):
            ask("PUT /workers/{id}", body, id=name)
        for action in ("drain", "resume", "restart"):
            ask(f"POST /workers/{{id}}/{action}", id=name)
        ask("DELETE /workers/{id}", id=name)


def the_decisions(ask: Asker) -> None:
    ask.router.ask("POST", "/generate", b'{"text":"x"}', content_type="application/json", x_request_id="r-1")
    assert ask("GET /decisions/{request}", request="r-1").status == 200
    ask("GET /decisions?limit=0")
    ask.router.context.decisions = None
    for path in ("/decisions", "/decisions/{request}"):
        ask(f"GET {path}", request="r-1")


def the_reload(ask: Asker) -> None:
    def refuse(why: str) -> context.ReloadReport:
        raise ConfigRefused

    ask("GET /docs")
    ask("GET /config")
    for reload in (None, refuse, lambda why: context.ReloadReport(["--policy"], [], [], [], "r.yaml")):
        ask.router.context.reload = reload
        ask("POST /reload")


def test_a_worker_that_is_a_rank_has_the_declared_shape() -> None:
    rows = [{"dp_rank": rank, "num_running_reqs": 0, "num_waiting_reqs": 0, "num_total_tokens": 0} for rank in (0, 1)]
    told = {"GET /server_info": answer(200, {"dp_size": 2}), "GET /v1/loads": answer(200, {"loads": rows})}
    with stack(dp_aware=True) as router:
        fake = router.fake(told)
        assert router.post("/add_worker", url=fake.url).status == 200
        found = msgspec.json.decode(router.get("/workers").body, type=shapes.WorkerList)
    assert [worker.base_url for worker in found.workers] == [fake.url] * 2


def test_undeclared_answers_are_found() -> None:
    """The tests here would find an undeclared answer."""
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"urls": [], "more": 1}', type=shapes.URLs)
    with pytest.raises(AssertionError):
        conforms("GET", "/health", Reply(418, {"content-type": "text/plain"}, b""))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.route)
def test_every_operation_has_the_default_answer(row: ControlRow) -> None:
    for method in row.methods:
        assert "default" in OPERATIONS[method, plain_path(row.path)]["responses"]
