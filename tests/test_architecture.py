"""Imports go down only. The table says who may know whom; a package that is not in it does not exist.

    errors   config
       wire     core              neither knows the other; both are pure: no I/O, clock, chance or log of their own
    observe   net   admin   scaling   state   settings
            server
    launch_router   launch                      launch starts engines and serves before them; launch_server is its door
    launch_server   cli   __main__              engine stands alone: another process, which knows only errors and config

The sources are parsed, not imported: an import inside a function counts as well. What is imported for type checkers
only keeps to the table too, but may name pure code's clock and chance, which are handed to it.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sglang_router

ROOT = Path(sglang_router.__file__).parent

BASE = {"errors", "config"}
BELOW_NET = BASE | {"wire", "core"}
BELOW_SERVER = BELOW_NET | {"observe", "net", "admin", "scaling"}
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "wire": BASE,
    "core": BASE,
    "observe": BELOW_NET,
    "net": BELOW_NET,
    "admin": BELOW_NET | {"net"},
    "scaling": BELOW_NET | {"net"},
    "state": BELOW_NET,
    "settings": BELOW_NET | {"net"},
    "server": BELOW_SERVER | {"state", "settings"},
    "engine": BASE,
    "router_args": {"config"},
    "launch_router": BASE | {"server"},
    "launch": BELOW_SERVER | {"server", "settings", "engine"},
    "launch_server": BELOW_SERVER | {"server", "launch", "launch_router"},
    "cli": BASE | {"launch_router", "launch_server", "engine"},
    "__main__": {"cli"},
    "__init__": set(),
}

PURE = ("wire", "core")
IMPURE = {
    *("asyncio", "socket", "ssl", "selectors", "threading", "subprocess", "uvloop"),
    *("time", "datetime", "random", "secrets", "uuid"),
    *("logging", "starlette", "uvicorn", "prometheus_client"),
}


class Import(NamedTuple):
    """What a source imports: a module, or a name in one. `late`: in a function; `typing`: for type checkers only."""

    name: str
    late: bool = False
    typing: bool = False


def imports_of(source: str) -> list[Import]:
    """Every import of a source, wherever it stands."""
    return list(_imports(ast.parse(source).body, late=False, typing=False))


def _imports(nodes: list[ast.stmt], late: bool, typing: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (Import(f"{node.module}.{alias.name}", late, typing) for alias in node.names)
        else:
            inside = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                yield from _imports(getattr(node, field, []), inside, typing or (checking and field == "body"))


def name_of(path: Path) -> str:
    """The module in a file: "wire.request", "core.policies", "cli"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", SOURCES)


def own(module: str) -> list[tuple[str, Import]]:
    """The modules of this package that one of them imports, without the package's name."""
    found = []
    for imported in imports_of(SOURCES[module]):
        package, _, name = imported.name.partition(".")
        if package == "sglang_router":
            found.append((name if name in SOURCES else name.rpartition(".")[0] or "__init__", imported))
    return found


@each_module
def test_imports_go_down_only(module: str) -> None:
    package = module.partition(".")[0]
    known = {name.partition(".")[0] for name, _ in own(module)}
    assert known - {package, "__init__"} <= MAY_KNOW[package]


@pytest.mark.parametrize("module", [module for module in SOURCES if module.partition(".")[0] in PURE])
def test_pure_code_has_no_io_clock_chance_or_log(module: str) -> None:
    imported = {imported.name.partition(".")[0] for imported in imports_of(SOURCES[module]) if not imported.typing}
    assert not imported & IMPURE


def test_no_import_leads_back_to_where_it_began() -> None:
    graph = {
        module: {name for name, imported in own(module) if not imported.late and not imported.typing} - {module}
        for module in SOURCES
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(graph)


def test_the_table_is_of_what_exists_and_has_no_way_up() -> None:
    assert {module.partition(".")[0] for module in SOURCES} == MAY_KNOW.keys()
    assert set(graphlib.TopologicalSorter(MAY_KNOW).static_order()) == MAY_KNOW.keys()
    assert not any("engine" in known for package, known in MAY_KNOW.items() if package not in ("cli", "launch"))


@each_module
def test_modules_are_named_for_what_they_do(module: str) -> None:
    assert not set(module.split(".")) & {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


def test_every_kind_of_import_is_seen() -> None:
    source = """
import asyncio, os.path as p
from sglang_router import core
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import random
else:
    import time
try:
    import tomllib
except ImportError:
    import tomli
class C:
    async def f(self):
        with x:
            import socket
"""
    seen = {imported.name: (imported.late, imported.typing) for imported in imports_of(source)}
    assert seen == {
        "asyncio": (False, False),
        "os.path": (False, False),
        "sglang_router.core": (False, False),
        "typing.TYPE_CHECKING": (False, False),
        "random": (False, True),
        "time": (False, False),
        "tomllib": (False, False),
        "tomli": (False, False),
        "socket": (True, False),
    }
