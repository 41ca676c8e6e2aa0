"""mypyc takes the modules of `compile_rule` as they are. What it would refuse, or compile into something slower
or different, is refused here: that takes no compiler and no minute. `sh scripts/wheel` does compile them."""

from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path

import pytest
from scripts.compile import CompileError, check_compiler
from scripts.compile_rule import ALSO, Module, bases, classes, kind_of, modules

import sglang_router

PACKAGE = Path(sglang_router.__file__).parent
ALL = {module.name: module for module in modules(PACKAGE)}
COMPILED = {name: module for name, module in ALL.items() if not module.interpreted}
OF_RECORDS = {name: module for name, module in ALL.items() if module.interpreted not in ("", "has a stub")}
NATIVE = {node.name: node for module in COMPILED.values() for node in classes(module.tree)}

FOREIGN = {"object", "Protocol", "Generic", "NamedTuple", "Exception", "LookupError", "IndexError", "ValueError"}
"""Bases from elsewhere that a compiled class may have. mypyc takes no other exception of Python."""


def of(source: str) -> Module:
    """A module of such a source."""
    tree = ast.parse(source)
    kinds = ", ".join(filter(None, map(kind_of, classes(tree))))
    return Module("sample", Path("sample.py"), tree, kinds)


def logic(module: Module) -> list[str]:
    """What a module holds besides records, enums, constants and imports."""
    passive = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    found = []
    for node in module.tree.body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        record = isinstance(node, ast.ClassDef) and (kind_of(node) or "NamedTuple" in bases(node))
        if not (text or record or isinstance(node, passive)):
            found.append(f"{module.name}:{node.lineno}: {getattr(node, 'name', type(node).__name__)}")
    return found


def refused(module: Module, native: dict[str, ast.ClassDef]) -> list[str]:
    """The classes of a module that mypyc would not make native, and why."""
    found = []
    for node in classes(module.tree):
        foreign = [base for base in bases(node) if base not in FOREIGN | native.keys()]
        found += [f"{node.name}: the base {base} is not compiled" for base in foreign]
        found += [f"{node.name}: mypyc ignores {keyword.arg}=" for keyword in node.keywords]
        found += [f"{node.name}: @{ast.unparse(each)}" for each in node.decorator_list if not is_for_mypyc(each)]
    return found


def is_for_mypyc(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "mypyc_attr"


def may_be_extended(node: ast.ClassDef) -> bool:
    return "@mypyc_attr(allow_interpreted_subclasses=True)" in [f"@{ast.unparse(each)}" for each in node.decorator_list]


@pytest.mark.parametrize("name", OF_RECORDS)
def test_a_module_of_records_and_enums_holds_nothing_else(name: str) -> None:
    assert not logic(OF_RECORDS[name])


@pytest.mark.parametrize("name", COMPILED)
def test_every_class_of_a_compiled_module_can_be_native(name: str) -> None:
    assert not refused(COMPILED[name], NATIVE)


def test_whoever_extends_a_compiled_class_from_outside_is_allowed_to() -> None:
    """An interpreted class cannot be a subclass of a compiled one that does not say so."""
    compiled = {module.path for module in COMPILED.values()}
    outside = [ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py") if path not in compiled]
    extended = {base for tree in outside for node in classes(tree) for base in bases(node)} & NATIVE.keys()
    native = [NATIVE[name] for name in extended if "Protocol" not in bases(NATIVE[name])]
    assert [node.name for node in native if not may_be_extended(node)] == []
    assert all(may_be_extended(NATIVE[name]) for name in ("Policy", "Listener")), "users extend these"


def test_msgspec_decodes_into_nothing_that_is_compiled() -> None:
    decoded = {name for path in PACKAGE.rglob("*.py") for name in decoded_by(ast.parse(path.read_text("utf-8")))}
    assert {"Record", "Head", "Fields"} <= decoded
    assert not decoded & NATIVE.keys()


def decoded_by(tree: ast.Module) -> set[str]:
    """The names of all types that a module has msgspec decode."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    types = [node.args for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "Decoder"]
    types += [[word.value for word in node.keywords if word.arg == "type"] for node in calls]
    return {node.id for each in types for one in each for node in ast.walk(one) if isinstance(node, ast.Name)}


def test_most_of_the_rooms_is_compiled() -> None:
    lines = {name: len(ast.unparse(module.tree).splitlines()) for name, module in ALL.items()}
    assert sum(lines[name] for name in COMPILED) > 0.85 * sum(lines.values())


def test_what_mypyc_refuses_is_seen() -> None:
    source = """
import msgspec, enum
from dataclasses import dataclass
class Record(msgspec.Struct, frozen=True): ...
class Kind(enum.Enum): ...
class Reader(asyncio.Protocol): ...
@dataclass
class Data: ...
class Fits(Generic[T], ValueError): ...
@mypyc_attr(allow_interpreted_subclasses=True)
class Open(Fits): ...
def work(): ...
"""
    module = of(source)
    assert module.interpreted == "Struct, enum"
    assert [each.rpartition(" ")[2] for each in logic(module)] == ["Reader", "Data", "Fits", "Open", "work"]
    native = {node.name: node for node in classes(module.tree) if node.name == "Fits"}
    assert refused(module, native) == [
        "Record: the base Struct is not compiled",
        "Record: mypyc ignores frozen=",
        "Kind: the base Enum is not compiled",
        "Reader: the base asyncio.Protocol is not compiled",
        "Data: @dataclass",
    ]
    extended = {node.name: may_be_extended(node) for node in classes(module.tree)}
    assert [name for name, open_ in extended.items() if open_] == ["Open"]


def test_without_a_compiler_or_headers_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(CompileError, match=r"^no C compiler \(no-such-compiler\); on Debian .*: apt-get install"):
        check_compiler()
    monkeypatch.setenv("CC", sys.executable)  # any command
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(CompileError, match=r"^no headers of Python \(/nowhere/Python.h\); on Debian .*: apt-get"):
        check_compiler()


def test_each_module_is_named_once() -> None:
    """A module that is renamed must not fall out of the wheel in silence: `modules` reads each."""
    assert len({module.path for module in modules(PACKAGE)}) == len(ALL)
    assert set(ALSO) <= COMPILED.keys()


def looked_up(module: Module) -> list[str]:
    """Constants of a module that compiled code would look up by name each time, because they are not Final."""
    found = []
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and not (
            isinstance(node.value, ast.Call) and "TypeVar" in ast.unparse(node.value)
        ):
            found += [target.id for target in node.targets if isinstance(target, ast.Name) and target.id.isupper()]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id.isupper():
            found += [node.target.id] * ("Final" not in ast.unparse(node.annotation))
    return found


@pytest.mark.parametrize("name", COMPILED)
def test_constants_are_final(name: str) -> None:
    assert looked_up(COMPILED[name]) == []


def test_a_constant_that_is_not_final_is_found() -> None:
    source = "A: Final = 1\n_B = 2\nC: int = 3\nT = TypeVar('T')\nSome = list[int]\nD, E = range(2)"
    assert looked_up(of(source)) == ["_B", "C"]


def literals(module: Module) -> set[str]:
    """Constants of a module that are Final literals: compiled code may hold several objects of one."""
    found = set()
    for node in module.tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            if "Final" in ast.unparse(node.annotation) and all(isinstance(part, ast.Constant) for part in parts):
                found.add(node.target.id)
    return found


SHARED = {name for module in COMPILED.values() for name in literals(module) if not name.startswith("_")}
"""Those that other modules may import."""


def identities(module: Module, of_literals: set[str]) -> list[str]:
    """Comparisons by `is` with one of these constants."""
    return [
        ast.unparse(node)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        if any(isinstance(part, ast.Name) and part.id in of_literals for part in (node.left, *node.comparators))
    ]


@pytest.mark.parametrize("name", COMPILED)
def test_a_literal_is_not_compared_by_identity(name: str) -> None:
    assert identities(COMPILED[name], SHARED | literals(COMPILED[name])) == []


def test_a_comparison_by_identity_is_found() -> None:
    sample = of("A: Final = (b'',)\nB: Final = f()\na is A\nb is not B\nc == A")
    assert identities(sample, literals(sample)) == ["a is A"]
