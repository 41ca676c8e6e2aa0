"""Defaults of options: where a record or a parameter repeats one, it must have the same value.

Records like `RetryRules` have defaults, so that tests can make them without options. These tests hold them equal to the
options' defaults:

- each function of `app.settings` that turns the options into a record is called with the default options, and the
  record's fields are compared with their defaults, where they have any
- the sources are searched for calls that pass an expression of `args` (the router's options) or `options` (the
  launcher's, or the built-in engine's) to a parameter with a default; evaluated with the default options, the
  expression must equal that default
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import pytest

import sglang_router
from sglang_router.app import settings
from sglang_router.config import RouterArgs
from sglang_router.engine.options import EngineOptions
from sglang_router.engine.scheduler import BatchLimits, CostModel
from sglang_router.launch.crew import supervision_rules
from sglang_router.launch.keeper import SupervisionRules
from sglang_router.launch.options import LaunchOptions

ROUTER = RouterArgs().checked()
LAUNCHER = LaunchOptions()
ENGINE = EngineOptions()

NOTHING = inspect.Parameter.empty


class Passed(NamedTuple):
    """A parameter with a default that gets an expression of options."""

    where: str
    parameter: str
    value: object
    default: object


def record_makers() -> dict[str, Callable[[RouterArgs], object]]:
    """The functions of app.settings that take nothing but the options, by name."""
    return {
        name: function
        for name, function in vars(settings).items()
        if inspect.isfunction(function)
        and function.__module__ == settings.__name__
        and list(inspect.signature(function).parameters) == ["args"]
    }


def fields_of(record: object) -> dict[str, object]:
    assert isinstance(record, msgspec.Struct)
    return {name: getattr(record, name) for name in record.__struct_fields__}


RECORD_MAKERS = {name: make for name, make in record_makers().items() if isinstance(make(ROUTER), msgspec.Struct)}


@pytest.mark.parametrize("name", RECORD_MAKERS)
def test_default_options_make_the_default_record(name: str) -> None:
    record = RECORD_MAKERS[name](ROUTER)
    assert isinstance(record, msgspec.Struct)
    for field in msgspec.structs.fields(record):
        if field.default is not msgspec.NODEFAULT:
            assert (field.name, getattr(record, field.name)) == (field.name, field.default)


def test_default_options_make_the_default_supervision() -> None:
    assert fields_of(supervision_rules(LAUNCHER, ROUTER)) == fields_of(SupervisionRules())


def test_default_options_make_the_default_engine() -> None:
    scheduler = ENGINE.scheduler()
    assert (scheduler.cost, scheduler.limits) == (CostModel(), BatchLimits())


def test_the_records_are_found() -> None:
    assert len(RECORD_MAKERS) >= 8


# -- in the sources ----------------------------------------------------------------------------------------------------


class Source:
    """One module, and the options under the names that it has for them."""

    def __init__(self, module: ModuleType) -> None:
        engine = module.__name__.startswith("sglang_router.engine")
        self.module = module
        self.options = {"options": ENGINE} if engine else {"args": ROUTER, "options": LAUNCHER}

    def passed(self) -> Iterator[Passed]:
        """The parameters with a default that get an expression of options in this module."""
        tree = OwnAttributes().visit(ast.parse(inspect.getsource(self.module)))
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and (defaults := self.defaults_of(call.func)):
                named = [(each.arg or "", each.value) for each in call.keywords]
                for name, argument in [*zip(defaults, call.args, strict=False), *named]:
                    if self.is_of_options(argument) and defaults.get(name, NOTHING) is not NOTHING:
                        where = f"{self.module.__name__}:{call.lineno}"
                        yield Passed(where, name, self.evaluate(argument), defaults[name])

    def defaults_of(self, function: ast.expr) -> dict[str, object]:
        """The parameters of a called function or class of ours, with their defaults; none for any other call."""
        if not is_dotted_name(function):
            return {}
        try:
            callee = self.evaluate(function)
            signature = inspect.signature(callee)
        except (NameError, AttributeError):  # a local variable or a method
            return {}
        except (TypeError, ValueError):  # a class like `dict` or `Exception`
            return {}
        if not str(getattr(callee, "__module__", "")).startswith("sglang_router."):
            return {}
        return {name: parameter.default for name, parameter in signature.parameters.items()}

    def is_of_options(self, expression: ast.expr) -> bool:
        """Whether an expression reads options, calls nothing, and has no other names."""
        nodes = list(ast.walk(expression))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        reads = any(isinstance(node, ast.Attribute) for node in nodes)
        calls = any(isinstance(node, ast.Call) for node in nodes)
        return reads and bool(names) and names <= self.options.keys() and not calls

    def evaluate(self, expression: ast.expr) -> Any:
        code = compile(ast.Expression(expression), "<expression>", "eval")
        return eval(code, vars(self.module), dict(self.options))


class OwnAttributes(ast.NodeTransformer):
    """`self.args` and `self._args` are read as `args`; the same for `options`."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        name = node.attr.removeprefix("_")
        if isinstance(node.value, ast.Name) and node.value.id == "self" and name in ("args", "options"):
            return ast.copy_location(ast.Name(name, ast.Load()), node)
        return node


def is_dotted_name(expression: ast.expr) -> bool:
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return isinstance(expression, ast.Name)


MODULES = [
    found.name
    for found in pkgutil.walk_packages(sglang_router.__path__, "sglang_router.")
    if not found.name.endswith("__main__")
]


@functools.cache
def passed_in(module: str) -> list[Passed]:
    return list(Source(importlib.import_module(module)).passed())


@pytest.mark.parametrize("module", MODULES)
def test_a_parameter_has_the_default_of_its_option(module: str) -> None:
    for passed in passed_in(module):
        value = tuple(passed.value) if isinstance(passed.value, list) else passed.value
        assert (passed.where, passed.parameter, passed.default) == (passed.where, passed.parameter, value)


def test_the_parameters_are_found() -> None:
    assert sum(len(passed_in(module)) for module in MODULES) >= 70
