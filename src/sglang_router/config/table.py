"""A table of options and of their other names, derived once from the declarations; and values read by name.

`ROUTER` is the router's own. A command that adds options of its own makes another `Table` of its declarations;
flags.py puts either into a parser.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sglang_router.config.option import Alias, Option, aliases_of, options_of
from sglang_router.config.reserved import ReservedOptions
from sglang_router.errors import ConfigError


class Table:
    """The options and aliases declared in a dataclass, by name, in their order.

    `given` is the attribute of a namespace with the names of those that stood on the command line.
    """

    def __init__(self, owner: type, given: str) -> None:
        self.given = given
        self.options: Mapping[str, Option] = MappingProxyType(options_of(owner))
        self.aliases: Mapping[str, Alias] = MappingProxyType(aliases_of(owner))

    def other_flags(self, name: str) -> list[str]:
        """The flags that are other names of an option; one that stands for a value reads `--flag (= value)`."""
        return [
            other.flag if other.means is None else f"{other.flag} (= {other.means})"
            for other in self.aliases.values()
            if other.target == name
        ]

    def accept(self, name: str, value: object, where: str) -> Any:
        """The value of an option or alias, typed and checked.

        Raises: ConfigError, one sentence that begins with `where` (the flag, variable or file and key).
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
        """The values of one source with those given by an alias put under the option's name, too.

        Raises: ConfigError if both names are there and disagree.
        """
        resolved = dict(values)
        for name in values.keys() & self.aliases.keys():
            entry, value = self.aliases[name], values[name]
            if entry.means is None:
                if values.get(entry.target, value) != value:
                    both = f"{entry.target} and {name} are two names of one option"
                    raise ConfigError(f"{where}: {both} and disagree; give one of them")
                resolved[entry.target] = value
            elif value:
                resolved.setdefault(entry.target, entry.means)
        return resolved

    def mirror_aliases(self, values: dict[str, Any]) -> None:
        """Makes each alias in `values` say what its option says: another source may have had the last word."""
        for name in values.keys() & self.aliases.keys():
            entry = self.aliases[name]
            current = values.get(entry.target, self.options[entry.target].default)
            values[name] = current if entry.means is None else current == entry.means


ROUTER = Table(ReservedOptions, given="router_flags_given")
OPTIONS = ROUTER.options
ALIASES = ROUTER.aliases
accept = ROUTER.accept
resolve_aliases = ROUTER.resolve_aliases
mirror_aliases = ROUTER.mirror_aliases
