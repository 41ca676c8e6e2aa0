"""Imports go down only, types included; pure modules stay pure; class names are unique; modules stay small.

    errors                     every error once;   version, words: a line each;   process: this one among others
    config                     every option once
    wire                       HTTP/1.1 bytes                      access         keys, roles, TLS
    routing                    the decision, pure
    relay                      the hot path
    resume                     body handlers for streams
    sharing                    what routers tell each other, through a store
    workers                    how workers become and stay known
    discovery                  sources that look for workers
    observe  autoscale  restart
    admin                      the control plane
    app                        assembly and life cycle
    processes                  one router in several processes
    picker                     the endpoint picker of gateways
    commands                   ask a running router; check, complete, explain the command line
    launch_router  launch  launch_server  explain  cli             doors;   engine stands alone
    replay                     what decides, with simulated engines, in virtual time

The sources are parsed, not imported: an import inside a function counts as well, and so does one for types. There is no
`if TYPE_CHECKING`: what must not be imported must not be known.
"""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sglang_router

ROOT = Path(sglang_router.__file__).parent

BELOW_RELAY = {"errors", "words", "wire", "access", "routing"}
BELOW_ADMIN = BELOW_RELAY | {"config", "relay", "workers"}
BELOW_APP = BELOW_ADMIN | {"sharing", "discovery", "process", "resume", "observe", "autoscale", "restart", "admin"}
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "words": set(),
    "process": set(),
    "config": {"errors", "version"},
    "wire": {"errors"},
    "access": {"errors", "config"},
    "routing": {"errors"},
    "relay": BELOW_RELAY,
    "resume": {"errors", "wire", "routing", "relay"},
    "sharing": {"errors", "config", "routing"},
    "workers": BELOW_RELAY | {"config", "relay"},
    "discovery": BELOW_RELAY | {"version", "config", "relay", "workers"},
    "observe": {"errors", "routing"},
    "autoscale": BELOW_ADMIN,
    "restart": {"errors", "words", "config", "routing", "workers"},
    "admin": BELOW_ADMIN | {"version", "autoscale", "sharing"},
    "app": BELOW_APP | {"version"},
    "processes": BELOW_APP | {"app"},
    "picker": BELOW_APP | {"app"},
    "engine": {"errors", "version", "config", "process"},
    "router_args": {"config"},
    "sglang_router_rs": set(),
    "router": {"launch_router", "router_args", "sglang_router_rs"},
    "mini_lb": {"router", "router_args"},
    "commands": {"errors", "words", "version", "config", "app"},
    "launch_router": {"errors", "config", "process", "processes", "commands"},
    "launch": BELOW_APP | {"app", "engine"},
    "launch_server": {"config", "process", "launch", "launch_router", "processes"},
    "replay": {"errors", "version", "config", "routing", "app", "engine"},
    "explain": {"errors", "words", "config", "routing", "commands"},
    "cli": {
        *("errors", "version", "config", "commands", "launch", "launch_router", "launch_server"),
        *("engine", "explain", "replay", "picker"),
    },
    "__main__": {"cli"},
    "__init__": {"version"},
}

PURE = (
    "errors",
    "words",
    "config.compat",
    "config.effective",
    "config.live",
    "config.units",
    "wire",
    "access.host_names",
    "access.origins",
    "access.permissions",
    "access.redaction",
    "routing",
    "relay.answers",
    "relay.body",
    "relay.budget",
    "relay.deadlines",
    "relay.injected",
    "relay.moves",
    "relay.states",
    "resume",
    "workers.engine_answers",
    "workers.kv_format",
    "workers.ranks",
    "workers.sources",
    "discovery.reconcile",
    "discovery.pods",
    "discovery.pod_answers",
    "autoscale.scaler",
    "restart.saved_worker",
    "restart.snapshot",
    "restart.version_1",
    "observe.tallies",
    "observe.live_sources",
    "observe.counts",
    "observe.kv_readings",
    "observe.readings",
    "engine.kv",
    "engine.scheduler",
    "replay.bounds",
    "replay.charts",
    "replay.engine",
    "replay.generator",
    "replay.load",
    "replay.longest_prefix",
    "replay.timeline",
    "processes.facing",
    "processes.failures",
    "processes.message",
    "processes.messages",
    "picker.asked",
    "picker.changes",
    "picker.envoy_words",
    "picker.messages",
    "picker.replies",
    "commands.describing",
    "commands.figures",
    "commands.printable",
    "commands.tables",
)
"""Rooms and modules without I/O, clock, chance or log of their own: what they need of these is an argument."""

IMPURE = {
    *("asyncio", "socket", "ssl", "selectors", "threading", "subprocess", "uvloop"),
    *("time", "datetime", "secrets", "uuid"),
    *("logging", "starlette", "uvicorn"),
}
"""`random` is missing: pure code may name the type of the generator it is given."""

TABLES = {"config.options", "observe.catalogue", "errors", "routing.prefix_tree.tree"}
"""Modules that may be longer than the others: rows, and one data structure with its essay."""
LONGEST = 400
MOST_PARAMETERS = 8
DECLARES = {"option"}
"""Functions by which a table is written, one call a row: their parameters are its columns."""


class Import(NamedTuple):
    """What a source imports: a module, or a name in one. `late`: in a function."""

    name: str
    late: bool = False


def imports_of(source: str) -> list[Import]:
    """Every import of a source, wherever it stands."""
    return list(_imports(ast.parse(source).body, late=False))


def _imports(nodes: list[ast.stmt], late: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (Import(f"{node.module}.{alias.name}", late) for alias in node.names)
        else:
            inside = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for field in ("body", "orelse", "handlers", "finalbody", "cases"):
                yield from _imports(getattr(node, field, []), inside)


def name_of(path: Path) -> str:
    """The module in a file: "wire.request", "routing.policies", "cli"."""
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


def is_pure(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in PURE)


@each_module
def test_imports_go_down_only(module: str) -> None:
    package = module.partition(".")[0]
    known = {name.partition(".")[0] for name, _ in own(module)}
    assert known - {package, "__init__"} <= MAY_KNOW[package]


@pytest.mark.parametrize("module", [*filter(is_pure, SOURCES)])
def test_pure_code_has_no_io_clock_chance_or_log(module: str) -> None:
    imported = {imported.name.partition(".")[0] for imported in imports_of(SOURCES[module])}
    assert not imported & IMPURE
    used = {
        node.attr
        for node in ast.walk(ast.parse(SOURCES[module]))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random"
    }
    assert used <= {"Random"}


@pytest.mark.parametrize("module", [*filter(is_pure, SOURCES)])
def test_pure_code_knows_only_pure_code(module: str) -> None:
    known = {name for name, _ in own(module)} - {"__init__"}
    assert not {name for name in known if not is_pure(name) and not name.startswith("config")}


def test_the_list_of_pure_modules_is_of_what_exists() -> None:
    assert all(any(module == name or module.startswith(f"{name}.") for module in SOURCES) for name in PURE)


def test_no_import_leads_back_to_where_it_began() -> None:
    graph = {module: {name for name, _ in own(module)} - {module} for module in SOURCES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(graph)


@each_module
def test_nothing_is_imported_for_types_alone(module: str) -> None:
    assert "TYPE_CHECKING" not in SOURCES[module]


def test_class_names_are_unique() -> None:
    names = Counter(
        node.name
        for source in SOURCES.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


@each_module
def test_modules_are_small(module: str) -> None:
    assert module in TABLES or SOURCES[module].count("\n") <= LONGEST


@each_module
def test_functions_take_few_parameters(module: str) -> None:
    """Records are exempt: a class whose __init__ only stores its parameters says what it holds."""
    many = {}
    for node in ast.walk(ast.parse(SOURCES[module])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _only_stores(node):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = len([each for each in arguments if each.arg not in ("self", "cls")])
            if count > MOST_PARAMETERS and node.name not in DECLARES:
                many[node.name] = count
    assert not many


def _only_stores(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether every statement is `self.x = x`, a constant, or the docstring."""
    return function.name == "__init__" and all(
        (isinstance(each, ast.Assign) and isinstance(each.value, (ast.Name, ast.Constant)))
        or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in function.body
    )


def test_the_table_is_of_what_exists_and_has_no_way_up() -> None:
    assert {module.partition(".")[0] for module in SOURCES} == MAY_KNOW.keys()
    assert set(graphlib.TopologicalSorter(MAY_KNOW).static_order()) == MAY_KNOW.keys()
    assert not any(
        "engine" in known for package, known in MAY_KNOW.items() if package not in ("cli", "launch", "replay")
    )


@each_module
def test_modules_are_named_for_what_they_do(module: str) -> None:
    assert not set(module.split(".")) & {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


def test_every_kind_of_import_is_seen() -> None:
    source = """
import asyncio, os.path as p
from sglang_router import routing
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
    seen = {imported.name: imported.late for imported in imports_of(source)}
    assert seen == {
        "asyncio": False,
        "os.path": False,
        "sglang_router.routing": False,
        "typing.TYPE_CHECKING": False,
        "random": False,
        "time": False,
        "tomllib": False,
        "tomli": False,
        "socket": True,
    }
