"""The files and names that the documents point to exist: `relay/leg.py`, `relay/leg.py: Leg.send`, `Leg.send`."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import TypeGuard

import pytest

import sglang_router

SOURCE = Path(sglang_router.__file__).parent
ROOT = SOURCE.parent.parent
DOCUMENTS = [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
FILE = re.compile(r"([\w/]+/\w+\.py)(?:: ([\w.]+))?")
METHOD = re.compile(r"([A-Z][a-z]\w+)\.([a-z_]\w+)")


def is_own(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def names_in(tree: ast.AST) -> set[str]:
    """Every class, function, variable and attribute in a source, methods also as Class.method."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name, body=body):
                defined = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
                fields = [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
                held = [inner.attr for inner in ast.walk(node) if is_own(inner)]
                found |= {name, *(f"{name}.{inner}" for inner in (*defined, *fields, *held))}
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
    return found


@functools.cache
def names_of(path: Path) -> set[str]:
    return names_in(ast.parse(path.read_text("utf-8")))


@functools.cache
def names_everywhere() -> set[str]:
    return set().union(*map(names_of, SOURCE.rglob("*.py")))


def missing(text: str) -> list[str]:
    """What a document names and the sources do not have."""
    found = []
    for name in re.findall(r"`([^`\n]+)`", text):
        if match := FILE.fullmatch(name):
            path = next((root / match[1] for root in (SOURCE, ROOT) if (root / match[1]).exists()), None)
            known = path is not None and (match[2] is None or match[2] in names_of(path))
        elif match := METHOD.fullmatch(name):
            known = name in names_everywhere()
        else:
            continue
        if not known:
            found.append(name)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_what_exists(document: Path) -> None:
    assert missing(document.read_text("utf-8")) == []


TEXTS = [
    path
    for place in ("*.md", "*.toml", "docs/**/*.md", "docs/**/*.svg", "scripts/**/*", "tests/**/*.txt")
    for path in sorted(ROOT.glob(place))
    if path.is_file() and path.suffix != ".pyc"
]
"""Files that no program reads so that it would notice what a merge has left behind."""
CONFLICT = re.compile(r"^(<{7}|>{7}|\|{7}|={7}$)", re.MULTILINE)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_merge_has_left_nothing_behind(text: Path) -> None:
    assert CONFLICT.search(text.read_text("utf-8")) is None


def test_what_a_merge_leaves_behind_is_found() -> None:
    lines = [sign * 7 for sign in "<|=>"]
    assert [bool(CONFLICT.search(f"text\n{line}\ntext")) for line in lines] == [True] * 4
    assert not CONFLICT.search("a\n========\nTitle ======= here\n")


def test_what_does_not_exist_is_found() -> None:
    text = "`relay/leg.py: Leg.send` `relay/leg.py: Leg.fly` `relay/none.py` `Leg.abort` `Leg.sing` `--flag`"
    assert missing(text) == ["relay/leg.py: Leg.fly", "relay/none.py", "Leg.sing"]
