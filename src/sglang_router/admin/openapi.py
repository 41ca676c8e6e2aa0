"""The OpenAPI document of the router, made of the tables that serve it: GET /openapi.json.

    admin.app.ROUTES            method, path, group, what it is for, for whom  --.
    admin.contract.CONTRACTS    parameters, body, answers, errors                +--> document() --> {"openapi": ...}
    core.request.ENDPOINTS      relayed paths and their text fields            --'
    admin.shapes, admin.workers msgspec structs --> components

What may come of any path is the `default` answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_router import __version__
from sglang_router.admin import shapes
from sglang_router.admin.contract import (
    CONTRACTS,
    RELAYED,
    STRANGERS,
    WORKER_URL,
    Answer,
    Anything,
    Contract,
    Parameter,
)
from sglang_router.core.access import Kind
from sglang_router.core.request import ENDPOINTS, NAMESPACE, Endpoint
from sglang_router.errors import RouterError

if TYPE_CHECKING:
    from sglang_router.admin.app import Row

PATH = "/openapi.json"
_ITSELF = Contract((Answer("This document."),))

Schema = dict[str, Any]


def document(groups: Mapping[str, Iterable[Row]]) -> Schema:
    """The OpenAPI 3.1 document of these rows and of the relayed paths."""
    paths: dict[str, Schema] = {}
    for path, endpoint in ENDPOINTS.items():
        paths[path.decode()] = {"post": _relayed(path.decode(), endpoint)}
    for group, rows in groups.items():
        for row in rows:
            for method in row.methods:
                paths.setdefault(plain(row.path), {})[method.lower()] = _operation(group, row, method)
    tags = [{"name": name} for name in ("Inference", *groups)]
    about = "Every answer carries `x-request-id`. Where GET is allowed, HEAD is."
    return {
        "openapi": "3.1.0",
        "info": {"title": "sglang-router", "version": __version__, "description": about},
        "servers": [{"url": "/"}],
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "headers": _HEADERS,
            "responses": {"AnyError": _any_error()},
            "securitySchemes": _SECURITY,
        },
    }


def plain(path: str) -> str:
    """A path of Starlette's as OpenAPI has it: without the kinds of parameters."""
    return path.replace(":path", "")


_CLIENT = "A client's key: needed where the router was given any. x-api-key: KEY does as well."
_CONTROL = "A key of the control plane; where there are none, a client's. `user` may look, `admin` may change things."
_SECURITY: Schema = {
    "client": {"type": "http", "scheme": "bearer", "description": _CLIENT},
    "control": {"type": "http", "scheme": "bearer", "description": _CONTROL},
}
_KEYS: dict[Kind, list[Schema]] = {
    Kind.PUBLIC: [],
    Kind.INFERENCE: [{"client": []}, {}],
    Kind.CONTROL_READ: [{"control": ["user"]}, {}],
    Kind.CONTROL_CHANGE: [{"control": ["admin"]}, {}],
}
"""Of whom a key is asked, where there are keys; none where there are not."""
_HEADERS: Schema = {
    "ErrorCode": {"description": "The error's code.", "required": True, "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
    "Location": {"description": "Where it can be asked for.", "required": True, "schema": {"type": "string"}},
}


# -- operations --------------------------------------------------------------------------------------------------------


def _operation(group: str, row: Row, method: str) -> Schema:
    contract = _ITSELF if row.path == PATH else CONTRACTS[row.handler]
    parameters = [_path_parameter(name) for name in re.findall(r"\{(\w+)", row.path)]
    parameters += [_query_parameter(parameter) for parameter in contract.query]
    operation: Schema = {"operationId": _name(method, row.path), "tags": [group], "summary": row.about}
    if parameters:
        operation["parameters"] = parameters
    if contract.body is not None:
        known = contract.body is not Anything
        content = {"application/json": {"schema": _ref(contract.body) if known else {}}}
        operation["requestBody"] = {"required": known, "content": content}
    operation["security"] = _KEYS[row.kind]
    operation["responses"] = _responses(contract, () if row.kind is Kind.PUBLIC else STRANGERS)
    return operation


def _name(method: str, path: str) -> str:
    return "_".join((method.lower(), *re.findall(r"\w+", plain(path))))


def _path_parameter(name: str) -> Schema:
    abouts = {
        "id": "A worker's id, or its URL, percent-encoded.",
        "model": "The model's name; slashes may stand in it.",
    }
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": abouts[name],
        "schema": {"type": "string", "minLength": 1},
    }


def _query_parameter(parameter: Parameter) -> Schema:
    schema: Schema = {"type": "string", "minLength": 1} if parameter.required else {"type": "string"}
    about = {"name": parameter.name, "in": "query", "description": parameter.about}
    return {**about, "required": parameter.required, "schema": schema}


def _responses(contract: Contract, more: tuple[type[RouterError], ...]) -> Schema:
    """By status, and whatever may come of any path."""
    answers = {answer.status: _answer(answer) for answer in contract.answers}
    responses: Schema = dict(sorted({**answers, **dict(_errors((*contract.errors, *more)))}.items()))
    return responses | {"default": {"$ref": "#/components/responses/AnyError"}}


def _answer(answer: Answer) -> Schema:
    schema: Schema = {} if answer.shape is None else _ref(answer.shape)
    response: Schema = {"description": answer.about}
    if answer.location:
        response["headers"] = {"location": {"$ref": "#/components/headers/Location"}}
    response["content"] = {
        media: {"schema": {"type": "string"} if "text" in media else schema} for media in answer.media
    }
    return response


def _errors(errors: Iterable[type[RouterError]]) -> Iterator[tuple[str, Schema]]:
    codes: dict[str, list[str]] = {}
    for error in errors:
        codes.setdefault(str(error.status), []).append(f"`{error.code}`: {error.message}")
    for status, lines in codes.items():
        yield status, _error("\n".join(dict.fromkeys(f"- {line}" for line in lines)))


def _error(about: str) -> Schema:
    headers = {
        "x-smg-error-code": {"$ref": "#/components/headers/ErrorCode"},
        "retry-after": {"$ref": "#/components/headers/RetryAfter"},
    }
    return {"description": about, "headers": headers, "content": {"application/json": {"schema": _ref(shapes.Error)}}}


def _any_error() -> Schema:
    return _error("The request did not get as far as the path, or the router failed; the code says why.")


# -- relayed paths -----------------------------------------------------------------------------------------------------


def _relayed(path: str, endpoint: Endpoint) -> Schema:
    if endpoint.json:
        names = dict.fromkeys((*endpoint.text, *NAMESPACE))
        fields: Schema = {name: {} for name in names} | {"stream": {}}
        about = "The engine says what may stand in it."
        body: Schema = {"application/json": {"schema": {"type": "object", "description": about, "properties": fields}}}
    else:
        body = {"multipart/form-data": {"schema": {"type": "object"}}}
    done = {"application/json": {}, "text/event-stream": {"schema": {"type": "string"}}}
    responses: Schema = {"200": {"description": "The worker's answer, byte for byte.", "content": done}}
    for status, error in _errors(RELAYED):
        about = f"The worker's answer, or, with x-smg-error-code:\n{error['description']}"
        responses[status] = {"description": about, "content": {"application/json": {}}}
    responses["default"] = {"description": "The worker's answer, or an error of the router, with x-smg-error-code."}
    return {
        "operationId": _name("POST", path),
        "tags": ["Inference"],
        "summary": "Relayed to the worker that the policy chooses.",
        "requestBody": {"required": True, "content": body},
        "security": _KEYS[Kind.INFERENCE],
        "responses": responses,
    }


# -- components --------------------------------------------------------------------------------------------------------


def _ref(shape: type[msgspec.Struct]) -> Schema:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def structs() -> list[type[msgspec.Struct]]:
    """Every struct that an operation names."""
    named: dict[type[msgspec.Struct], None] = {shapes.Error: None}
    for contract in CONTRACTS.values():
        named.update(dict.fromkeys(answer.shape for answer in contract.answers if answer.shape is not None))
        if contract.body not in (None, Anything):
            named[contract.body] = None
    return list(named)


def _schemas() -> Schema:
    _, schemas = msgspec.json.schema_components(structs(), ref_template="#/components/schemas/{name}")
    found = {name: _for_clients(schema) for name, schema in schemas.items()}
    refined = found["Registration"]["properties"]
    refined["url"] |= {"description": WORKER_URL, "pattern": r"^https?://[^\s/?#@]+(/[^\s?#]*)?$"}
    refined["worker_type"]["enum"] = ["regular"]
    refined["bootstrap_port"] = {"type": "null"}
    return dict(sorted(found.items()))


def _for_clients(value: Any) -> Any:
    """A schema of msgspec's: strictness is for tests, and JSON Schema's regular expressions know no \\Z."""
    if isinstance(value, list):
        return [_for_clients(part) for part in value]
    if not isinstance(value, dict):
        return value
    schema = {
        name: _for_clients(part) for name, part in value.items() if (name, part) != ("additionalProperties", False)
    }
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = schema["pattern"].replace(r"\Z", "$")
    return schema
