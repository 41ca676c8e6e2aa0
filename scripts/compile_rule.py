"""The rule that says which modules mypyc compiles: those of `ROOMS` and `ALSO`, except what holds records and enums.

`ROOMS` are the way of a request. `ALSO` are the modules elsewhere that work for every request: the profile of a
compiled router showed what was left (docs/decisions/0009-compiled-wheels.md).

mypyc ignores what `msgspec.Struct` is told by class keywords, does not compile an enum with an `__init__`, and keeps of
annotations only a rough form, so that msgspec cannot decode into a compiled NamedTuple. So a module that defines a
Struct or an enum stays interpreted, and it holds nothing but records and enums. A module with a stub (.pyi) stays
interpreted as well, because mypyc reads the stub in its place.

Read by scripts/compile.py and by tests/test_compile_rule.py. The sources are parsed, not imported.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOMS = ("routing", "wire", "relay")
ALSO = (
    "app.admission",
    "observe.access",
    "observe.counts",
    "observe.deferred",
    "observe.line_parts",
    "observe.metrics",
    "observe.tallies",
    "processes.desk",
    "processes.facing",
    "processes.link",
    "processes.ports",
    "processes.remote",
    "processes.texts",
)
KINDS = {"Struct": "Struct", "Enum": "enum", "IntEnum": "enum", "Flag": "enum", "IntFlag": "enum"}
"""What a class is that has this base."""


class Module(NamedTuple):
    """One module. `interpreted`: why it is not compiled; "" for one that is."""

    name: str
    path: Path
    tree: ast.Module
    interpreted: str


def modules(package: Path) -> list[Module]:
    """All modules of the rooms, by name ("relay.client"), in order; then the others."""
    paths = [path for room in ROOMS for path in sorted((package / room).rglob("*.py"))]
    paths += [package / f"{name.replace('.', '/')}.py" for name in ALSO]
    found = []
    for path in paths:
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text("utf-8"))
        found.append(Module(name, path, tree, _why_interpreted(path, tree)))
    return found


def _why_interpreted(path: Path, tree: ast.Module) -> str:
    if path.with_suffix(".pyi").exists():
        return "has a stub"
    by_kind: dict[str, list[str]] = {}
    for each in classes(tree):
        if kind := kind_of(each):
            by_kind.setdefault(kind, []).append(each.name)
    return ", ".join(f"{kind} {', '.join(names)}" for kind, names in by_kind.items())


def classes(tree: ast.Module) -> list[ast.ClassDef]:
    """All classes of a module, wherever they stand."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def bases(node: ast.ClassDef) -> list[str]:
    """The names of the bases of a class, without their modules and parameters."""
    return [_name(base) for base in node.bases]


def _name(base: ast.expr) -> str:
    while isinstance(base, ast.Subscript):
        base = base.value
    name = ast.unparse(base)
    return name.removeprefix("msgspec.").removeprefix("enum.")


def kind_of(node: ast.ClassDef) -> str:
    """ "Struct" or "enum"; "" for a class that mypyc compiles."""
    return next((KINDS[base] for base in bases(node) if base in KINDS), "")
