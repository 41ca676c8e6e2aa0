"""Files of options, of keys and of workers: YAML, TOML or JSON, by the end of their names.

Such a file is read again while the router serves. So YAML is read by libyaml, where PyYAML has it, which takes a sixth
of the time. PyYAML's own reader says what is wrong with a file, in the same words everywhere. JSON is far quicker.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sglang_router.config import small_files
from sglang_router.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

_QUOTED = re.compile("'[^']*'")
OPTION_ENDS = (".yaml", ".yml", ".toml")


def parse(path: Path, ends: Collection[str] = OPTION_ENDS) -> dict[object, Any]:
    """Return what a file says, by key. ends: those of its name that tell a format. Raises: ConfigError."""
    return parse_and_find(path, ends)[0]


def parse_and_find(
    path: Path, ends: Collection[str] = OPTION_ENDS
) -> tuple[dict[object, Any], Callable[[object], int | None]]:
    """Return what a file says, by key, and what tells the line of a key (None: nobody knows), for errors.

    Raises: ConfigError.
    """
    end = path.suffix.lower()
    if end not in ends:
        raise ConfigError(f"{path}: the name of the file must end in .yaml, .yml or .toml, which tells its format")
    text = _text(path)
    content = _parsed(path, text, _PARSERS[end])
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} must be a mapping of options to values, as in `port: 30000`")
    return content or {}, partial(_LINES.get(end, _no_line), text)


def read(path: Path, parser: Callable[[str], Any]) -> Any:
    """Return what a file says. Raises: ConfigError."""
    return _parsed(path, _text(path), parser)


def _text(path: Path) -> str:
    try:
        return small_files.read(path).decode("utf-8-sig")  # editors on Windows begin a file with a mark
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None


def _parsed(path: Path, text: str, parser: Callable[[str], Any]) -> Any:
    try:
        content = parser(text)
        if "\\u" in text.lower():
            _refuse_surrogates(content, set())
        return content
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {_first_fault(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None


def _first_fault(error: Exception) -> str:
    """Return one line of a parser's error message. YAML's says what and where on separate lines."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, problem = error.problem_mark, str(error.problem)
        if isinstance(error, (yaml.composer.ComposerError, yaml.constructor.ConstructorError)):
            problem = _QUOTED.sub("'***'", problem)  # `key: *5up3r` is a reference to something that is called 5up3r
        return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"
    return str(error).splitlines()[0]


def _refuse_surrogates(content: Any, seen: set[int]) -> None:
    """Refuse a text that cannot be written in UTF-8: `\\ud800` makes one. Raises: ValueError, RecursionError.

    seen  lists and mappings that were looked at: YAML may name one of them many times
    """
    if isinstance(content, str):
        if not content.isascii() and any("\ud800" <= each <= "\udfff" for each in content):
            raise ValueError("a text has half a character, as in \\ud800")
    elif isinstance(content, (dict, list)) and id(content) not in seen:
        seen.add(id(content))
        for each in content:
            _refuse_surrogates(each, seen)
            if isinstance(content, dict):
                _refuse_surrogates(content[each], seen)


class _Strict:
    """Beside a loader of PyYAML: those take a key that is there twice, and let some errors of the values pass, as of
    the date 2026-13-01."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping. Raises: yaml.YAMLError for a key that is there twice."""
        found: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in found:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            found.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        return mapping

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Make a value. Raises: yaml.YAMLError."""
        try:
            return super().construct_object(node, deep)  # type: ignore[misc]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise yaml.MarkedYAMLError(problem="a value cannot be read", problem_mark=node.start_mark) from None


class _Loader(_Strict, yaml.SafeLoader):
    """PyYAML's own reader."""


class _QuickLoader(_Strict, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml, if it is there."""


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says. Raises: yaml.YAMLError, RecursionError."""
    try:
        return yaml.load(text, _QuickLoader)  # noqa: S506 - it is a SafeLoader
    except (yaml.YAMLError, RecursionError):
        return yaml.load(text, _Loader)  # noqa: S506 - likewise


def _yaml_line(text: str, key: object) -> int | None:
    """Return the line of a key of the outermost mapping. Keys are compared as they are written."""
    root = yaml.compose(text, _QuickLoader)
    keys = [each for each, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    lines = [each.start_mark.line + 1 for each in keys if each.value == str(key)]
    return lines[0] if lines else None


def _toml_line(text: str, key: object) -> int | None:
    """Return the first line that begins with a key: the parser of TOML tells no lines."""
    found = re.search(rf"""^[ \t]*\[*[ \t]*["']?{re.escape(str(key))}["']?[ \t]*[=.\]]""", text, re.MULTILINE)
    return found and text.count("\n", 0, found.start()) + 1


def _no_line(text: str, key: object) -> int | None:
    return None


def parse_json(text: str) -> Any:
    """Return what a JSON text says. Raises: ValueError, RecursionError."""
    return json.loads(text, object_pairs_hook=_mapping)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # as in YAML
        raise ValueError("a mapping has a field twice")
    return found


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": parse_yaml,
    ".yml": parse_yaml,
    ".json": parse_json,
    ".toml": tomllib.loads,
}
_LINES: dict[str, Callable[[str, object], int | None]] = {
    ".yaml": _yaml_line,
    ".yml": _yaml_line,
    ".toml": _toml_line,
}
