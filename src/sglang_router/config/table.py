"""The table of all options and of their other names, derived once from the declarations; and values read by
name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sglang_router.config.option import Alias, Option, aliases_of, options_of
from sglang_router.config.reserved import ReservedOptions
from sglang_router.errors import ConfigError

OPTIONS: Mapping[str, Option] = MappingProxyType(options_of(ReservedOptions))
ALIASES: Mapping[str, Alias] = MappingProxyType(aliases_of(ReservedOptions))


def other_flags(name: str) -> list[str]:
    """The flags that are other names of an option; one that stands for a value reads `--flag (= value)`."""
    return [
        other.flag if other.means is None else f"{other.flag} (= {other.means})"
        for other in ALIASES.values()
        if other.target == name
    ]


def accept(name: str, value: object, where: str) -> Any:
    """The value of an option or alias, typed and checked.

    Raises: ConfigError, one sentence that begins with `where` (the flag, variable or file and key).
    """
    entry = ALIASES.get(name)
    try:
        if entry is None:
            return OPTIONS[name].accept(value)
        if entry.means is None:
            return OPTIONS[entry.target].accept(value)
        return entry.kind.read(value)
    except ValueError as error:
        sentence = str(error) or f"{value!r} is not true or false"
        raise ConfigError(f"{where}: {sentence}") from None


def resolve_aliases(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of one source with those given by an alias put under the option's name, too.

    Raises: ConfigError if both names are there and disagree.
    """
    resolved = dict(values)
    for name in values.keys() & ALIASES.keys():
        entry, value = ALIASES[name], values[name]
        if entry.means is None:
            if values.get(entry.target, value) != value:
                both = f"{entry.target} and {name} are two names of one option"
                raise ConfigError(f"{where}: {both} and disagree; give one of them")
            resolved[entry.target] = value
        elif value:
            resolved.setdefault(entry.target, entry.means)
    return resolved


def mirror_aliases(values: dict[str, Any]) -> None:
    """Makes each alias in `values` say what its option says: another source may have had the last word."""
    for name in values.keys() & ALIASES.keys():
        entry = ALIASES[name]
        current = values.get(entry.target, OPTIONS[entry.target].default)
        values[name] = current if entry.means is None else current == entry.means
