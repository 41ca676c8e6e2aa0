"""Files of options and of keys: YAML or TOML, by the end of their names; of keys, JSON as well, which is YAML too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from sglang_router.config import small_files
from sglang_router.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

OPTION_ENDS = (".yaml", ".yml", ".toml")


def parse(path: Path, ends: Collection[str] = OPTION_ENDS) -> dict[object, Any]:
    """Return what a file says, by key. ends: those of its name that tell a format. Raises: ConfigError."""
    if path.suffix.lower() not in ends:
        raise ConfigError(f"{path}: the name of the file must end in .yaml, .yml or .toml, which tells its format")
    content = read(path, _PARSERS[path.suffix.lower()])
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} must be a mapping of options to values, as in `port: 30000`")
    return content or {}


def read(path: Path, parser: Callable[[str], Any]) -> Any:
    """Return what a file says. Raises: ConfigError."""
    try:
        text = small_files.read(path).decode("utf-8-sig")  # editors on Windows begin a file with a mark
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    try:
        return parser(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {_first_fault(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None


def _first_fault(error: Exception) -> str:
    """Return one line of a parser's error message. YAML's says what and where on separate lines."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return str(error).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """PyYAML takes a key that is there twice, and lets some errors of the values pass, as of the date 2026-13-01."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping. Raises: yaml.YAMLError for a key that is there twice."""
        found: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in found:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            found.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Make a value. Raises: yaml.YAMLError."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise yaml.MarkedYAMLError(problem="a value cannot be read", problem_mark=node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says. Raises: yaml.YAMLError, RecursionError."""
    return yaml.load(text, _Loader)  # noqa: S506 - it is a SafeLoader


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": parse_yaml,
    ".yml": parse_yaml,
    ".json": parse_yaml,
    ".toml": tomllib.loads,
}
