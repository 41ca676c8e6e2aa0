"""One option of the router. Everything about it is in the line that declares it:

    port: int = option(30000, "Port to listen on.", LISTENING, check=between(1, 65535))
    ---- ---           -----   -----------------    ---------  ------------------------
    name type          default help                 group      what values it takes

and everything else is derived from it: the flag --port, the variable SGLANG_ROUTER_PORT, the key `port` of a file,
reading and checking of values from any of them, the help text and the page of documentation.

Some options belong to features that this router does not have. Their `status` says what happens when one is set to a
value other than its default: `later` is an error at the start, because the router could not do what was asked; `inert`
gives a warning, because it has no meaning for an HTTP router.

An alias is an older or other name of an option, declared the same way: `eviction_interval: float | None =
alias("eviction_interval_secs")`. It can be used wherever the option can.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sglang_router.config import units
from sglang_router.config.checks import NumberRange
from sglang_router.config.kinds import ValueKind, kind_of
from sglang_router.errors import ConfigError

T = TypeVar("T")
Status = Literal["implemented", "later", "inert"]

ENVIRONMENT_PREFIX = "SGLANG_ROUTER_"
_USER = re.compile(r"""(://|(?<=['"\s])[^\s'":/@]*:(?!//))[^\s'"]*@""")
"""User and password of a URL, as they may be in a sentence."""


@dataclass(frozen=True)
class Option:
    """One option. `flag` is its flag; `shown_default` describes a default that is computed later."""

    name: str
    kind: ValueKind
    default: Any
    help: str
    group: str
    unit: str
    flag: str
    choices: tuple[str, ...]
    check: Callable[[Any], Any] | None
    status: Status
    secret: bool
    repeat: bool
    shown_default: str
    metavar: str
    synonyms: Mapping[str, str]

    @property
    def keys(self) -> tuple[str, ...]:
        """Its names in files and in the environment: the field's name, and the flag's where it differs."""
        return tuple(dict.fromkeys((self.name, key_of(self.flag))))

    @property
    def expects(self) -> str:
        """What a value must be; completes the phrase "is not ..."."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return f"{self.kind.expects} {self.check}" if isinstance(self.check, NumberRange) else self.kind.expects

    def fresh_default(self) -> Any:
        """Return a copy of the default: some defaults are lists and must not be shared."""
        return copy.copy(self.default)

    def accept(self, value: object) -> Any:
        """Return the value, typed and checked. None means the default; so does blank where the default is None.

        Raises: ValueError with a sentence that does not name the option: the caller knows how it was spelled. It shows
        no password of a URL, also where none may be.
        """
        if value is None or (self.default is None and isinstance(value, str) and not value.strip()):
            return self.fresh_default()
        try:
            return self._accept(value)
        except ValueError as error:
            raise ValueError(_USER.sub(lambda found: f"{'://' if found[1] == '://' else ''}***@", str(error))) from None

    def _accept(self, value: object) -> Any:
        shown = "the value" if self.secret else repr(value)
        plain = units.plain_number(value, self.unit) if isinstance(value, str) and self.kind.nargs is None else value
        try:
            read = self.kind.read(plain)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{shown} is not {self.expects}") from None
        if self.choices and isinstance(read, str):
            read = self._choice(read)
        if self.choices and read not in self.choices:
            raise ValueError(f"{shown} is not {self.expects}{did_you_mean(read, self.choices)}")
        if self.check is None:
            return read
        try:
            return self.check(read)
        except (ValueError, ConfigError) as error:
            raise ValueError(str(error) or f"{shown} is not {self.expects}") from None

    def _choice(self, word: str) -> str:
        """Return the choice that a word means, in any case and with `-` for `_`; other words unchanged."""
        normal = word.lower().replace("-", "_")
        normal = self.synonyms.get(normal, normal)
        return normal if normal in self.choices else word


@dataclass(frozen=True)
class Alias:
    """Another name of the option `target`. With `means`, it is a switch that sets that value."""

    name: str
    kind: ValueKind
    target: str
    means: object = None

    @property
    def flag(self) -> str:
        return flag_of(self.name)


def option(
    default: T,
    help: str,
    group: str,
    *,
    unit: str = "",
    flag: str = "",
    choices: Iterable[str] = (),
    check: Callable[[Any], Any] | None = None,
    status: Status = "implemented",
    secret: bool = False,
    repeat: bool = False,
    shown_default: str = "",
    metavar: str = "",
    synonyms: Mapping[str, str] | None = None,
) -> T:
    """Declare a field of RouterArgs; see `Option`. With `repeat`, each use of the flag has one or more
    entries (each use of any flag with a list adds to the list). `synonyms`: other words for some of the choices."""
    declared = {
        "help": help,
        "group": group,
        "unit": unit,
        "flag": flag,
        "choices": tuple(choices),
        "check": check,
        "status": status,
        "secret": secret,
        "repeat": repeat,
        "shown_default": shown_default,
        "metavar": metavar,
        "synonyms": synonyms or {},
    }
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata={"option": declared})


def alias(target: str, means: object = None) -> Any:
    """Declare a field of RouterArgs that is another name of `target`; see `Alias`."""
    return dataclasses.field(default=None, metadata={"alias": {"target": target, "means": means}})


def options_of(owner: type) -> dict[str, Option]:
    """Return the options that a dataclass declares, by name, in their order."""
    types = typing.get_type_hints(owner)
    found: dict[str, Option] = {}
    for field in dataclasses.fields(owner):
        declared = field.metadata.get("option")
        if declared is not None and field.default_factory is not dataclasses.MISSING:
            facts = {**declared, "flag": declared["flag"] or flag_of(field.name)}
            kind = kind_of(types[field.name])
            found[field.name] = Option(name=field.name, kind=kind, default=field.default_factory(), **facts)
    return found


def aliases_of(owner: type) -> dict[str, Alias]:
    """Return the aliases that a dataclass declares, by name."""
    types = typing.get_type_hints(owner)
    return {
        field.name: Alias(name=field.name, kind=kind_of(types[field.name]), **field.metadata["alias"])
        for field in dataclasses.fields(owner)
        if "alias" in field.metadata
    }


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def key_of(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" if a known word resembles `word`, else ""."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
