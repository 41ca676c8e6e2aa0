"""The command line: flags derived from the table, a readable help text, errors of one line.

`add_flags` adds the flags to any argparse parser. Launchers of training frameworks do so with the prefix `--router-`;
`launch_server` also adds the flags of its own table. The namespace then holds two things: an attribute with the value
of each option, as users of argparse expect, and under the name `GIVEN` the names of the options that were on the
command line, because only these override the environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any, Final, NoReturn

from sglang_router.config.option import ENVIRONMENT_PREFIX, Alias, Option, did_you_mean
from sglang_router.config.table import ROUTER, OptionTable
from sglang_router.errors import ConfigError
from sglang_router.version import version_line

GIVEN = ROUTER.given
PREFIX = "router"

# Flags that never get the prefix: in a launcher they belong to the whole command.
_SHARED = frozenset({"worker_urls", "host", "port"})

_UNIT_METAVARS = {"s": "SECONDS", "ms": "MS", "bytes": "BYTES"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Print flags in a narrow column, with the text beside or below them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


class OptionParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError, always."""
        raise ConfigError(message.removeprefix("argument "))

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`. Raises: ConfigError for anything unknown or invalid."""
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            raise self.unknown(unknown[0])
        return namespace

    def unknown(self, word: str) -> ConfigError:
        """Return the error for a word that the parser does not know."""
        word = word.partition("=")[0]  # do not show what follows: it may be a secret
        if not word.startswith("-"):
            return ConfigError(f"unexpected argument {word!r}; see --help")
        known = [flag for action in self._actions for flag in action.option_strings]
        return ConfigError(f"unknown flag {word}{did_you_mean(word, known) or '; see --help'}")


class _Store(argparse.Action):
    """Read the words of one flag and record that it was given."""

    def __init__(self, *, table: OptionTable, entry: Option | Alias, **details: Any) -> None:
        super().__init__(**details)
        self._table = table
        self._entry = entry

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        words = [values] if isinstance(values, str) else list(values or [])
        given: frozenset[str] = getattr(namespace, self._table.given, frozenset())
        try:
            value = self._table.accept(self._entry.name, self._entry.kind.words(words), option_string or "")
        except ConfigError as error:
            raise argparse.ArgumentError(None, str(error)) from None
        if self._entry.name in given:
            value = _added(getattr(namespace, self.dest), value)
        setattr(namespace, self.dest, value)
        setattr(namespace, self._table.given, given | {self._entry.name})


def _added(before: Any, value: Any) -> Any:
    """Return what a flag means that is there twice: lists and mappings add up, of other values the last one counts."""
    if isinstance(before, list) and isinstance(value, list):
        return before + value
    if isinstance(before, dict) and isinstance(value, dict):
        return before | value
    return value


COMMON: Final = (
    *("worker_urls", "service_discovery", "selector", "discovery_file"),
    *("host", "port", "config", "relay_processes", "reuse_port", "state_file"),
    *("api_key_file", "control_plane_api_keys_file", "server_cert_path", "server_key_path"),
    *("policy", "max_concurrent_requests", "queue_size", "max_running_per_worker"),
    *("prometheus_port", "log_level", "log_dir"),
)
"""The options that --help shows; --help-all shows the others, too."""
_PICKER: Final = ("epp_host", "epp_port", "epp_tls_cert_path", "epp_tls_key_path", "epp_fallback_endpoints")
COMMON_OF: Final = {"epp": ("inference_pool", *_PICKER)}
"""Those that it shows beside them, by the last word of the command."""


class _Help(argparse.Action):
    """Print a help text and end: the one of `only` these options, or of all."""

    def __init__(self, only: Collection[str] | None = None, **details: Any) -> None:
        super().__init__(nargs=0, **details)
        self._only = only

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        new_parser(parser.prog, self._only).print_help()
        parser.exit()


def new_parser(prog: str, only: Collection[str] | None = None) -> OptionParser:
    """Return the parser of the launch command. only: names of the options that it knows; None: all."""
    more = "" if only is None else f" --help-all shows {len(ROUTER.options) - len(only)} more."
    parser = OptionParser(
        prog=prog,
        usage="%(prog)s [--worker-urls URL ...] [options]",
        description="Start the router in front of workers: SGLang, vLLM, llama.cpp or built-in engines.",
        epilog=f"Every option is also a variable {ENVIRONMENT_PREFIX}<NAME> and a key of the --config file.{more}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    details: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    common = (*COMMON, *COMMON_OF.get(prog.rpartition(" ")[2], ()))
    parser.add_argument("-h", "--help", action=_Help, only=common, help="show the options that people use", **details)
    parser.add_argument("--help-all", action=_Help, help="show all options", **details)
    about = "check the options and all that they name, start nothing; exit status 0: they can be used"
    parser.add_argument("--check-config", action="store_true", help=about)
    add_version(parser)
    add_flags(parser, only=only)
    return parser


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`."""
    parser.add_argument("--version", action="version", version=version_line(), help="show the version")


def add_flags(
    parser: argparse.ArgumentParser,
    table: OptionTable = ROUTER,
    *,
    use_router_prefix: bool = False,
    exclude_host_port: bool = False,
    only: Collection[str] | None = None,
) -> None:
    """Add a table's options to a parser, in groups; with the prefix as `--router-...`, except those in `_SHARED`.

    only  names of the options that are added; None: all
    """
    if parser.get_default(table.given) is None:
        parser.set_defaults(**{table.given: frozenset()})
    groups: dict[str, Any] = {}
    entries: list[Option | Alias] = [*table.options.values(), *table.aliases.values()]
    for entry in entries:
        if exclude_host_port and entry.name in ("host", "port"):
            continue
        if only is not None and entry.name not in only:
            continue
        target = table.options[entry.target] if isinstance(entry, Alias) else entry
        if target.group not in groups:
            groups[target.group] = parser.add_argument_group(target.group)
        prefixed = use_router_prefix and entry.name not in _SHARED
        details: dict[str, Any] = {"metavar": _metavar(entry)} if entry.kind.nargs != 0 else {}
        if target.repeat:
            details["nargs"] = "+"
        groups[target.group].add_argument(
            entry.flag.replace("--", f"--{PREFIX}-", 1) if prefixed else entry.flag,
            dest=f"{PREFIX}_{entry.name}" if prefixed else entry.name,
            action=_Store,
            table=table,
            entry=entry,
            default=None if isinstance(entry, Alias) else entry.fresh_default(),
            help=argparse.SUPPRESS if isinstance(entry, Alias) else _help(entry, table),
            **{"nargs": entry.kind.nargs, **details},
        )


def _metavar(entry: Option | Alias) -> str:
    if isinstance(entry, Option):
        by_type = "NAME" if entry.choices else _UNIT_METAVARS.get(entry.unit, entry.kind.metavar)
        return entry.metavar or by_type
    return entry.kind.metavar


def _help(option: Option, table: OptionTable) -> str:
    notes = [f"default: {default_text(option)}"]
    if option.choices:
        notes.insert(0, "one of " + ", ".join(option.choices))
    if others := table.other_flags(option.name):
        notes.append("also " + ", ".join(others))
    if option.status == "later":
        notes.append("not available yet")
    text = f"{option.help} [{'; '.join(notes)}]".replace("%", "%%")
    # This prints nothing, but it keeps ArgumentDefaultsHelpFormatter from adding the default a second time.
    return text + "%(default).0s"


def default_text(option: Option) -> str:
    """Return an option's default with its unit, for help and documentation."""
    if option.shown_default:
        return option.shown_default
    default = option.default
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default in ([], {}):
        return "none"
    text = ", ".join(map(str, default)) if isinstance(default, list) else str(default)
    if option.unit == "bytes" and default >= 1024:
        size, unit = (default / 2**20, "MiB") if default >= 2**20 else (default / 2**10, "KiB")
        return f"{text} bytes ({size:g} {unit})"
    return f"{text} {option.unit}".strip()
