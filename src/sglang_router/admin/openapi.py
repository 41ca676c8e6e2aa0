"""The OpenAPI document of the router, made from the tables that serve it: GET /openapi.json.

    admin.routes.ROUTES          method, path, group, what it is for, who may ask --.
    admin.contract.CONTRACTS     parameters, body, answers, errors                  +--> document() --> {"openapi": ...}
    admin.rows.relayed_rows      relayed paths and their text fields              --|
    admin.shapes, admin.workers  msgspec structs --> components                   --'

What any path may answer is the `default` answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from sglang_router import __version__
from sglang_router.access.permissions import AccessKind
from sglang_router.admin import shapes, workers
from sglang_router.admin.contract import (
    CONTRACTS,
    REFUSED,
    RELAYED,
    WORKER_URL,
    AnyBody,
    Contract,
    DeclaredAnswer,
    QueryParameter,
)
from sglang_router.admin.rows import ControlRow, RelayedRow, plain_path, relayed_rows
from sglang_router.errors import RouterError
from sglang_router.routing.body_reader import NAMESPACE

PATH = "/openapi.json"
PAGE = "/docs"
_KEPT = "Relayed to the worker that keeps this; when that is not known, the workers are asked in turn."
_OF_ENGINES = "4XX"
"""Declared by those that pass on what an engine answers."""
_ITSELF = {
    PATH: Contract((DeclaredAnswer("This document."),)),
    PAGE: Contract((DeclaredAnswer("This document, as a page.", media=("text/html",)),)),
}

Schema = dict[str, Any]


def document(groups: Mapping[str, Iterable[ControlRow]]) -> Schema:
    """The OpenAPI 3.1 document of these rows and of the relayed paths."""
    about = "Every answer has `x-request-id`. A path that takes GET takes HEAD as well."
    return {
        "openapi": "3.1.0",
        "info": {"title": "sglang-router", "version": __version__, "description": about},
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in ("Inference", *groups)],
        "paths": _paths(groups),
        "components": {
            "schemas": _schemas(),
            "headers": _HEADERS,
            "responses": {"AnyError": _any_error()},
            "securitySchemes": _SECURITY,
        },
    }


def _paths(groups: Mapping[str, Iterable[ControlRow]]) -> Schema:
    """All operations, by path and method."""
    paths: dict[str, Schema] = {}
    for relayed in relayed_rows():
        paths.setdefault(plain_path(relayed.path), {})[relayed.method.lower()] = _relayed(relayed)
    for group, rows in groups.items():
        for row in rows:
            for method in row.methods:
                paths.setdefault(plain_path(row.path), {})[method.lower()] = _operation(group, row, method)
    return paths


_CLIENT = "A client's key, needed if client keys are configured. The header x-api-key: KEY works, too."
_CONTROL = "A control-plane key, or a client's key if none is configured. `user` may read, `admin` may change."
_SECURITY: Schema = {
    "client": {"type": "http", "scheme": "bearer", "description": _CLIENT},
    "control": {"type": "http", "scheme": "bearer", "description": _CONTROL},
}
_KEYS: dict[AccessKind, list[Schema]] = {
    AccessKind.PUBLIC: [],
    AccessKind.INFERENCE: [{"client": []}, {}],
    AccessKind.CONTROL_READ: [{"control": ["user"]}, {}],
    AccessKind.CONTROL_CHANGE: [{"control": ["admin"]}, {}],
}
"""The key that a request needs; none if no keys are configured."""
_HEADERS: Schema = {
    "ErrorCode": {"description": "The code of the error.", "required": True, "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
    "Location": {"description": "The path of what was created.", "required": True, "schema": {"type": "string"}},
}


# -- operations --------------------------------------------------------------------------------------------------------


def _operation(group: str, row: ControlRow, method: str) -> Schema:
    contract = _ITSELF.get(row.path) or CONTRACTS[row.handler]
    parameters = _path_parameters(row.path)
    parameters += [_query_parameter(parameter) for parameter in contract.query]
    operation: Schema = {"operationId": _name(method, row.path), "tags": [group], "summary": row.about}
    if parameters:
        operation["parameters"] = parameters
    if contract.body is not None:
        known = contract.body is not AnyBody
        content = {"application/json": {"schema": _ref(contract.body) if known else {}}}
        operation["requestBody"] = {"required": known, "content": content}
    operation["security"] = _KEYS[row.kind]
    shape = shapes.OllamaError if row.path.startswith("/api/") else shapes.Error
    operation["responses"] = _responses(contract, () if row.kind is AccessKind.PUBLIC else REFUSED, shape)
    return operation


def _name(method: str, path: str) -> str:
    return "_".join((method.lower(), *re.findall(r"\w+", plain_path(path))))


_PATH_PARAMETERS = {
    "id": "The id of a worker, or its percent-encoded URL.",
    "model": "The name of a model; it may contain slashes.",
    "request": "The id of a request, percent-encoded.",
    "path": "A path of the engine, without the slash in front.",
}
_RELAYED_PARAMETERS = {
    "id": "The id that the engine gave.",
    "item": "The id of an item, which the engine gave.",
    "name": "What is parsed: `function_call` or `reasoning`.",
    "slot": "The number of a slot of one engine.",
}


def _path_parameters(path: str, abouts: Mapping[str, str] = _PATH_PARAMETERS) -> list[Schema]:
    about = {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    names = re.findall(r"\{(\w+)", path)
    return [{"name": name, **about, "description": abouts[name]} for name in names]


def _query_parameter(parameter: QueryParameter) -> Schema:
    schema: Schema = {"type": "string", "minLength": 1} if parameter.required else {"type": "string"}
    if parameter.pattern:
        schema["pattern"] = parameter.pattern
    about = {"name": parameter.name, "in": "query", "description": parameter.about}
    return {**about, "required": parameter.required, "schema": schema}


def _responses(contract: Contract, more: tuple[type[RouterError], ...], shape: type[shapes.Shape]) -> Schema:
    """The answers by status, and the one that any path may give. shape: of errors."""
    answers = {answer.status: _answer(answer) for answer in contract.answers}
    errors = dict(_errors((*contract.errors, *more), shape))
    if _OF_ENGINES in answers:  # an engine may answer with any of these, too
        errors |= {str(error.status): _either(errors[str(error.status)]) for error in contract.errors}
    responses: Schema = dict(sorted({**answers, **errors}.items()))
    return responses | {"default": {"$ref": "#/components/responses/AnyError"}}


def _either(error: Schema, media: str = "*/*") -> Schema:
    """The answer with a status that may be an error of the router or the engine's."""
    about = f"The worker's answer, or, with x-smg-error-code:\n{error['description']}"
    return {"description": about, "content": {media: {"schema": {}}}}


def _answer(answer: DeclaredAnswer) -> Schema:
    schema: Schema = {} if answer.shape is None else _ref(answer.shape)
    response: Schema = {"description": answer.about}
    if answer.location:
        response["headers"] = {"location": {"$ref": "#/components/headers/Location"}}
    response["content"] = {
        media: {"schema": {"type": "string"} if "text" in media else schema} for media in answer.media
    }
    return response


def _errors(
    errors: Iterable[type[RouterError]], shape: type[shapes.Shape] = shapes.Error
) -> Iterator[tuple[str, Schema]]:
    codes: dict[str, list[str]] = {}
    for error in errors:
        codes.setdefault(str(error.status), []).append(f"`{error.code}`: {error.message}")
    for status, lines in codes.items():
        yield status, _error("\n".join(dict.fromkeys(f"- {line}" for line in lines)), shape)


def _error(about: str, shape: type[shapes.Shape] = shapes.Error) -> Schema:
    headers = {
        "x-smg-error-code": {"$ref": "#/components/headers/ErrorCode"},
        "retry-after": {"$ref": "#/components/headers/RetryAfter"},
    }
    return {"description": about, "headers": headers, "content": {"application/json": {"schema": _ref(shape)}}}


def _any_error() -> Schema:
    return _error("The request was refused before its path was read, or the router failed; the code says why.")


# -- relayed paths -----------------------------------------------------------------------------------------------------


def _relayed(row: RelayedRow) -> Schema:
    operation: Schema = {
        "operationId": _name(row.method, row.path),
        "tags": ["Inference"],
        "summary": _KEPT if row.endpoint.about else "Relayed to the worker that the policy chooses.",
    }
    if parameters := _path_parameters(row.path, _RELAYED_PARAMETERS):
        operation["parameters"] = parameters
    if row.method == "POST" and not row.endpoint.about:
        operation["requestBody"] = {"required": True, "content": _relayed_body(row)}
    return {**operation, "security": _KEYS[AccessKind.INFERENCE], "responses": _relayed_responses()}


def _relayed_body(row: RelayedRow) -> Schema:
    endpoint = row.endpoint
    if endpoint.form:
        return {"multipart/form-data": {"schema": {"type": "object"}}}
    if not endpoint.json:
        return {"*/*": {}}
    fields: Schema = {name: {} for name in dict.fromkeys((*endpoint.text, *endpoint.links, *NAMESPACE))}
    fields["stream"] = {}
    about = "The engine decides what it may contain."
    return {"application/json": {"schema": {"type": "object", "description": about, "properties": fields}}}


def _relayed_responses() -> Schema:
    """The worker's answer or an error of the router may have the same status."""
    content = {"application/json": {}, "text/event-stream": {"schema": {"type": "string"}}, "*/*": {}}
    responses: Schema = {"200": {"description": "The worker's answer, byte for byte.", "content": content}}
    for status, error in _errors(RELAYED):
        responses[status] = _either(error, "application/json")
    responses["default"] = {"description": "The worker's answer, or an error of the router, with x-smg-error-code."}
    return responses


# -- components --------------------------------------------------------------------------------------------------------


def _ref(shape: type[msgspec.Struct]) -> Schema:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def structs() -> list[type[msgspec.Struct]]:
    """Every struct that an operation names."""
    named: dict[type[msgspec.Struct], None] = {shapes.Error: None, shapes.OllamaError: None}
    for contract in CONTRACTS.values():
        named.update(dict.fromkeys(answer.shape for answer in contract.answers if answer.shape is not None))
        if contract.body not in (None, AnyBody):
            named[contract.body] = None
    return list(named)


def _schemas() -> Schema:
    _, schemas = msgspec.json.schema_components(structs(), ref_template="#/components/schemas/{name}")
    found = {name: _for_clients(schema) for name, schema in schemas.items()}
    refined = found["Registration"]["properties"]
    refined["url"] |= {"description": WORKER_URL, "pattern": r"^https?://[^\s/?#@]+(/[^\s?#]*)?$"}
    for body in (workers.Registration, workers.Change):
        found[body.__name__]["additionalProperties"] = False
        found[body.__name__]["properties"] |= {name: {"description": "Ignored."} for name in workers.IGNORED}
    return dict(sorted(found.items()))


def _for_clients(value: Any) -> Any:
    """A schema of msgspec without strictness, which is for tests, and without \\Z, which JSON Schema does not know."""
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
