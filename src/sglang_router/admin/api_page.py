"""The OpenAPI document as a page for people: GET /docs.

    openapi.document() --> html() --> one page: no script, no file beside it, nothing from elsewhere

Each group is a section, each operation can be opened (`<details>`, which browsers and screen readers know), and each
schema has a heading to which links lead. What is in the document is escaped. The page allows itself nothing but its own
style (`HEADERS`), whose hash stands in the policy.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import msgspec

Schema = Mapping[str, Any]

_STYLE = """\
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--link:#0b62c4}
@media(prefers-color-scheme:dark){:root{--link:#7db6ff}}
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem}
a{color:var(--link)}code,pre{font:14px/1.45 ui-monospace,monospace}
pre{background:var(--soft);padding:.6rem;overflow:auto}
details{border:1px solid var(--line);border-radius:6px;margin:.4rem 0}
summary{padding:.4rem .6rem;cursor:pointer}summary b{display:inline-block;min-width:4.5rem}
details>div{padding:0 .8rem .8rem}
table{border-collapse:collapse;width:100%}
td{text-align:left;vertical-align:top;border-top:1px solid var(--line);padding:.25rem .5rem}
nav a{margin-right:1rem}
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Of the answer: what the page may do, which is nothing."""


def html(document: Schema) -> str:
    """Return the page."""
    return "".join(_page(document))


def _page(document: Schema) -> Iterator[str]:
    info, tags = document["info"], [tag["name"] for tag in document["tags"]]
    title = escape(f"{info['title']} {info['version']}: API")
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width,initial-scale=1">'
    yield f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{_text(info['description'])}</p><nav>"
    for name in (*tags, "Schemas"):
        yield f'<a href="#{_anchor(name)}">{escape(name)}</a>'
    yield '<a href="/openapi.json">openapi.json</a></nav><main>'
    for tag in tags:
        yield f'<h2 id="{_anchor(tag)}">{escape(tag)}</h2>'
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if tag in operation["tags"]:
                    yield from _operation(method, path, operation)
    yield '<h2 id="schemas">Schemas</h2>'
    for name, schema in document["components"]["schemas"].items():
        yield f'<h3 id="schema-{escape(name)}">{escape(name)}</h3><p>{_text(schema.get("description", ""))}</p>'
        yield from _properties(schema)
    yield "</main></body></html>\n"


def _operation(method: str, path: str, operation: Schema) -> Iterator[str]:
    summary = _text(operation.get("summary", ""))
    yield f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> {summary}</summary><div>"
    yield f"<p>{_text(operation.get('description', ''))} {_access(operation.get('security', []))}</p>"
    if parameters := operation.get("parameters"):
        yield "<h4>Parameters</h4><table>"
        for each in parameters:
            need = "required" if each.get("required") else "optional"
            about = _text(each.get("description", ""))
            yield f"<tr><td><code>{escape(each['name'])}</code><td>{escape(each['in'])}, {need}<td>{about}</tr>"
        yield "</table>"
    if body := operation.get("requestBody"):
        yield f"<h4>Body</h4><p>{_contents(body['content'])}</p>"
    yield "<h4>Answers</h4><table>"
    for status, answer in operation["responses"].items():
        about = _text(answer.get("description", "")) or _reference(answer)
        yield f"<tr><td><code>{escape(status)}</code><td>{about}<td>{_contents(answer.get('content', {}))}</tr>"
    yield "</table></div></details>"


def _access(security: list[Schema]) -> str:
    """Return who may ask, in words."""
    names = [(name, roles) for each in security for name, roles in each.items()]
    if not names:
        return "Needs no key."
    name, roles = names[0]
    role = f" with the role {roles[0]}" if roles else ""
    return escape(f"Needs a {name} key{role}, where keys are configured.")


def _contents(content: Schema) -> str:
    return "<br>".join(
        f"<code>{escape(media)}</code> {_reference(each.get('schema', {}))}" for media, each in content.items()
    )


def _properties(schema: Schema) -> Iterator[str]:
    fields = schema.get("properties")
    if not fields:
        yield f"<pre>{escape(msgspec.json.format(msgspec.json.encode(schema), indent=2).decode())}</pre>"
        return
    needed = schema.get("required", ())
    yield "<table>"
    for name, each in fields.items():
        about = _text(each.get("description", ""))
        need = "required" if name in needed else "optional"
        yield f"<tr><td><code>{escape(name)}</code><td>{_type(each)}<td>{need}<td>{about}</tr>"
    yield "</table>"


def _type(schema: Schema) -> str:
    """Return the type of a field, in HTML."""
    if found := _reference(schema):
        return found
    if alternatives := schema.get("anyOf"):
        return " or ".join(map(_type, alternatives))
    if "enum" in schema:
        return escape(", ".join(msgspec.json.encode(value).decode() for value in schema["enum"]))
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))


def _reference(schema: Schema) -> str:
    """Return a link to the schema that this one names; "" when it names none."""
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    if not name:
        return ""
    return f'<a href="#schema-{escape(name)}">{escape(name)}</a>' if "/schemas/" in schema["$ref"] else escape(name)


def _anchor(name: str) -> str:
    return escape(name.lower().replace(" ", "-"))


def _text(text: str) -> str:
    """Return a text in HTML; what stands between backticks is code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
