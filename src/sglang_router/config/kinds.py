"""Turn what people write into typed values: one `ValueKind` for each type an option can have.

An option arrives as words on the command line, as one string in the environment, or as a native object from a file or a
namespace. `ValueKind.read` takes all three; `ValueKind.words` only turns the words of a flag into such an object.

    --worker-urls http://a http://b      ["http://a", "http://b"]  --+
    SGLANG_ROUTER_WORKER_URLS="a, b"     "a, b"                    --+-- read --> ["http://a", "http://b"]
    worker_urls: [http://a, http://b]    ["http://a", "http://b"]  --+

A reader raises ValueError without a message: the option writes the sentence, because it knows its own name and range,
and whether its value is secret.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_router.config import keys
from sglang_router.config.keys import ClientKey, ControlKey

ModelsMapping = dict[str, dict[str, Any]]
Pairs = list[tuple[str, int | None]]
ClientKeys = list[ClientKey]
ControlKeys = list[ControlKey]

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class ValueKind:
    """How to read values of one type. `nargs` is argparse's; `expects` completes the phrase "is not ..."."""

    expects: str
    read: Callable[[object], Any]
    metavar: str = ""
    nargs: str | int | None = None
    words: Callable[[list[str]], object] = list


def kind_of(annotation: object) -> ValueKind:
    """Return the kind for a field's type; `X | None` is read as X."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return KINDS[annotation]


def _whole(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return int(value)
    raise ValueError


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else str(value)
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value.strip()


def _items(value: object) -> list[object]:
    """Return the members of a list, or of a string with spaces or commas between them."""
    if isinstance(value, str):
        return list(value.replace(",", " ").split())
    if isinstance(value, (list, tuple)):
        return list(value)
    raise ValueError


def _texts(value: object) -> list[str]:
    return [_text(item) for item in _items(value)]


def _numbers(value: object) -> list[float]:
    return [_number(item) for item in _items(value)]


def _mapping(value: object) -> dict[str, str]:
    """Read `key=value` items, or a mapping. One item may contain several pairs, as in "app=llm tier=gpu"."""
    if isinstance(value, Mapping):
        return {_text(key): _text(item) for key, item in value.items()}
    found: dict[str, str] = {}
    for item in _texts(value):
        parts = item.split()
        for pair in parts if all("=" in part for part in parts) else [item]:
            key, equals, rest = pair.partition("=")
            if not (key and equals):
                raise ValueError
            found[key] = rest
    return found


def _models(value: object) -> ModelsMapping:
    """Read a mapping of names to mappings, or the same as JSON."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, Mapping):
        raise ValueError
    found: ModelsMapping = {}
    for name, settings in value.items():
        if not isinstance(settings, Mapping | None):
            raise ValueError
        found[_text(name)] = {_text(key).replace("-", "_"): item for key, item in (settings or {}).items()}
    return found


def _pairs(value: object) -> Pairs:
    """Read URLs, each with an optional port: "http://a" or ["http://a", 9000] or ["http://a", "none"]."""
    pairs: Pairs = []
    for item in _items(value):
        parts = [item] if isinstance(item, str) else _items(item)
        port = parts[1] if len(parts) > 1 else None
        pairs.append((_text(parts[0]), None if port in (None, "none", "None") else _whole(port)))
    return pairs


def _only(words: list[str]) -> object:
    return words[0]


KINDS: dict[object, ValueKind] = {
    int: ValueKind("a whole number", _whole, "N", words=_only),
    float: ValueKind("a number", _number, "X", words=_only),
    bool: ValueKind("true or false", _switch, nargs=0, words=lambda _: True),
    str: ValueKind("a text", _text, "TEXT", words=_only),
    list[str]: ValueKind("a list of texts", _texts, "TEXT", "*"),
    list[float]: ValueKind("a list of numbers", _numbers, "X", "*"),
    dict[str, str]: ValueKind("a list of key=value", _mapping, "KEY=VALUE", "*"),
    ModelsMapping: ValueKind("a mapping of models to their settings", _models, "JSON", words=_only),
    Pairs: ValueKind("a URL with an optional port number or 'none'", _pairs, "URL", "+", words=lambda words: [words]),
    ClientKeys: ValueKind("a list of keys, each KEY or 'NAME KEY'", keys.lines, "KEY", words=keys.one_word),
    ControlKeys: ValueKind("a list of " + keys.CONTROL_FORM, keys.lines, "ID:NAME:ROLE:KEY", "*"),
}
