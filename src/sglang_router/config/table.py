"""A table of options and aliases, derived once from their declarations; it reads and checks values by name.

`ROUTER` is the router's table. A command with options of its own makes another `OptionTable` from its declarations;
flags.py adds either to a parser.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sglang_router.config.option import Alias, Option, aliases_of, options_of
from sglang_router.config.reserved import ReservedOptions
from sglang_router.errors import ConfigError


class OptionTable:
    """The options and aliases that a dataclass declares, by name, in their order.

    `given` names the attribute of a namespace that holds the names of the options on the command line.
    """

    def __init__(self, owner: type, given: str) -> None:
        self.given = given
        self.options: Mapping[str, Option] = MappingProxyType(options_of(owner))
        self.aliases: Mapping[str, Alias] = MappingProxyType(aliases_of(owner))

    def other_flags(self, name: str) -> list[str]:
        """Return the flags of an option's aliases; an alias that sets a value reads `--flag (= value)`."""
        return [
            other.flag if other.means is None else f"{other.flag} (= {other.means})"
            for other in self.aliases.values()
            if other.target == name
        ]

    def accept(self, name: str, value: object, where: str) -> Any:
        """Return the value of an option or alias, typed and checked.

        Raises: ConfigError with one sentence that begins with `where`: the flag, the variable, or the file and key.
        """
        entry = self.aliases.get(name)
        try:
            if entry is None:
                return self.options[name].accept(value)
            if entry.means is None:
                return self.options[entry.target].accept(value)
            return entry.kind.read(value)
        except ValueError as error:
            sentence = str(error) or f"{value!r} is not true or false"
            raise ConfigError(f"{where}: {sentence}") from None

    def resolve_aliases(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the values of one source, with the value of each alias also under its option's name.

        Raises: ConfigError if both names are given with different values.
        """
        resolved = dict(values)
        for name in values.keys() & self.aliases.keys():
            entry, value = self.aliases[name], values[name]
            if entry.means is None:
                if values.get(entry.target, value) != value:
                    both = f"{entry.target} and {name} are two names of one option"
                    raise ConfigError(f"{where}: {both}, with different values; give only one of them")
                resolved[entry.target] = value
            elif value:
                resolved.setdefault(entry.target, entry.means)
        return resolved

    def mirror_aliases(self, values: dict[str, Any]) -> None:
        """Set each alias in `values` to the value of its option, which another source may have set."""
        for name in values.keys() & self.aliases.keys():
            entry = self.aliases[name]
            current = values.get(entry.target, self.options[entry.target].default)
            values[name] = current if entry.means is None else current == entry.means


ROUTER = OptionTable(ReservedOptions, given="router_flags_given")
OPTIONS = ROUTER.options
ALIASES = ROUTER.aliases
accept = ROUTER.accept
resolve_aliases = ROUTER.resolve_aliases
mirror_aliases = ROUTER.mirror_aliases
