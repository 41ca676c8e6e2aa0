"""Where values come from, and which source wins: flag > environment > file > default.

    --config FILE    --read_file-----> {name: value} --+
    SGLANG_ROUTER_*  --read_environ--> {name: value} --+--merge--> values, and which were given at all
    flags (see flags.py) ------------> {name: value} --+                and which of them a file had the last word on

Aliases are resolved within each source, so that a flag under its old name still overrides a variable under the new
name. Every error names the source of the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sglang_router.config.option import ENVIRONMENT_PREFIX, did_you_mean
from sglang_router.config.table import ALIASES, OPTIONS, accept, mirror_aliases, resolve_aliases
from sglang_router.errors import ConfigError

# A Kubernetes service named `sglang-router` sets SGLANG_ROUTER_PORT=tcp://10.0.0.7:30000 in every pod of its namespace.
# That is not an option of the router: ignore it.
_SERVICE_LINKS = ("tcp://", "udp://", "sctp://")

_SERVICE_VARIABLE = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")
_OWN_VARIABLES = frozenset(
    {
        "SGLANG_ROUTER_DESIRED_WORKERS",  # for --scale-command
        "SGLANG_ROUTER_CURRENT_WORKERS",
        "SGLANG_ROUTER_SCALE_REASON",
        "SGLANG_ROUTER_URL",  # for the command `explain`
        "SGLANG_ROUTER_COMPILE",  # for the build of the package
    }
)

# name in a file or in an environment variable -> the option or alias
_KEYS: dict[str, str] = {
    **{key: option.name for option in OPTIONS.values() for key in option.keys},
    **{name: name for name in ALIASES},
}


class MergedValues(NamedTuple):
    """The values of all sources. `given`: options that any source set; `from_file`: those whose value the file set;
    `from_environment`: those whose value a variable set; `slips`: what looks like a mistake and changes nothing."""

    values: dict[str, Any]
    given: frozenset[str]
    from_file: frozenset[str]
    from_environment: frozenset[str]
    slips: tuple[str, ...]


def merge(flags: Mapping[str, Any], environ: Mapping[str, str]) -> MergedValues:
    """Read and merge all sources.

    Raises: ConfigError for a value or file that cannot be read.
    """
    variables = read_environ(environ)
    path = flags.get("config") or variables.get("config")
    file = read_file(Path(path)) if path else {}
    line = resolve_aliases(flags, "command line")
    over = {**variables, **line}
    values = {**file, **over}
    mirror_aliases(values)
    from_file = file.keys() - over.keys()
    from_environment = variables.keys() - line.keys()
    known = OPTIONS.keys()
    return MergedValues(
        values,
        frozenset(values.keys() & known),
        frozenset(from_file & known),
        frozenset(from_environment & known),
        unknown_variables(environ),
    )


def read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """Read the options in the environment. An empty variable counts as unset."""
    values: dict[str, Any] = {}
    for key, name in _KEYS.items():
        variable = ENVIRONMENT_PREFIX + key.upper()
        text = environ.get(variable, "")
        if text.strip() and not (variable.endswith("_PORT") and text.startswith(_SERVICE_LINKS)):
            values[name] = accept(name, text, variable)
    return resolve_aliases(values, "environment")


def unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each variable that begins like an option's and is none."""
    known = {ENVIRONMENT_PREFIX + key.upper() for key in _KEYS} | _OWN_VARIABLES
    return tuple(
        f"{name} is not a variable of this router{did_you_mean(name, known)}"
        for name, text in sorted(environ.items())
        if name.startswith(ENVIRONMENT_PREFIX)
        and name not in known
        and not (text.startswith(_SERVICE_LINKS) or _SERVICE_VARIABLE.search(name))
    )


def read_file(path: Path) -> dict[str, Any]:
    """Read the options in a YAML or TOML file: a flat mapping, with `-` or `_` in its keys; null means not given.

    Raises: ConfigError.
    """
    values, errors = _read_keys(path)
    if errors:
        raise errors[0]
    return resolve_aliases(values, str(path))


def file_errors(path: str) -> list[str]:
    """Return all that is wrong with single keys of a file, a sentence each."""
    try:
        values, errors = _read_keys(Path(path))
        if not errors:
            resolve_aliases(values, path)
    except ConfigError as error:
        return [str(error)]
    return [str(error) for error in errors]


def _read_keys(path: Path) -> tuple[dict[str, Any], list[ConfigError]]:
    """Return the values of a file, and what is wrong with others. Raises: ConfigError for the file as a whole."""
    # imported here: YAML takes 10 ms, and most starts read no file
    from sglang_router.config.option_files import parse_and_find

    values: dict[str, Any] = {}
    errors: list[ConfigError] = []
    spelled: dict[str, object] = {}  # name -> the key in the file
    content, line_of = parse_and_find(path)

    def place(key: object) -> str:
        line = line_of(key)
        return str(path) if line is None else f"{path}:{line}"

    for key, value in content.items():
        name = _KEYS.get(str(key).replace("-", "_"))
        if name is None or name == "config":
            why = "cannot be set in a file" if name else f"is not an option{did_you_mean(str(key), _KEYS)}"
            errors.append(ConfigError(f"{place(key)}: {key!r} {why}"))
            continue
        if name in spelled:
            both = f"{spelled[name]!r} and {key!r}"
            errors.append(ConfigError(f"{place(key)}: {both} are one option; give only one of them"))
        spelled[name] = key
        try:
            if value is not None:
                values[name] = accept(name, value, str(key))
        except ConfigError as error:
            errors.append(ConfigError(f"{place(key)}: {error}"))
    return values, errors
