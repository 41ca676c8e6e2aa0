"""`sglang-router check-config [FILE]` and `--check-config`: check a configuration without starting a router.

the file       each key and value                        all errors, not only the first
environment    each variable
together       options that exclude or need each other
what it names  keys, certificates, workers, tokenizer, discovery file, kubeconfig

exit status   0  it can be used      1  errors, one line each on standard error      2  the command line itself
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from sglang_router.config import HelpFormatter, RouterArgs
from sglang_router.config.flags import GIVEN, OptionParser, add_flags
from sglang_router.config.option import ENVIRONMENT_PREFIX
from sglang_router.config.sources import file_errors
from sglang_router.errors import ConfigError


class Verdict(msgspec.Struct):
    """What the check found. warnings: what looks like a mistake, and is none."""

    ok: bool
    errors: list[str]
    warnings: list[str]


def main(words: Sequence[str], prog: str) -> int:
    """Run the command; return its exit status. Raises: ConfigError, for a command line that cannot be used."""
    options = parser(prog).parse_all(words)
    found = verdict(options, os.environ)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return 0 if found.ok else 1
    for warning in found.warnings:
        print("warning:", warning, file=sys.stderr)
    for error in found.errors:
        print("error:", error, file=sys.stderr)
    if found.ok:
        print("OK")
    return 0 if found.ok else 1


def parser(prog: str) -> OptionParser:
    """Return the parser of the command line: FILE, and all options of the router."""
    made = OptionParser(
        prog=prog,
        usage="%(prog)s [FILE] [options of `sglang-router launch`]",
        description="Check flags, variables and a configuration file with all that they name, and start nothing.",
        epilog="exit status: 0 it can be used, 1 errors, 2 wrong options",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("file", metavar="FILE", nargs="?", help="the file, as for --config")
    made.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    add_flags(made)
    return made


def verdict(options: argparse.Namespace, environ: Mapping[str, str]) -> Verdict:
    """Return what is wrong with a configuration. options: as `parser` reads them."""
    if options.file is not None:
        options.config, given = options.file, getattr(options, GIVEN)
        setattr(options, GIVEN, given | {"config"})
    path = options.config or environ.get(f"{ENVIRONMENT_PREFIX}CONFIG", "").strip()
    if path and (errors := file_errors(path)):
        return Verdict(False, errors, [])
    try:
        args = RouterArgs.from_cli_args(options, environ=environ)
        checked = args.checked()
    except ConfigError as error:
        return Verdict(False, [str(error)], [])
    warnings = list(args.slips)
    if ignored := checked.without_effect():
        warnings.append(f"these options have no effect in this router: {', '.join(ignored)}")
    errors = _named(checked)
    return Verdict(not errors, errors, warnings)


def _named(args: RouterArgs) -> list[str]:
    """Return what is wrong with the files and workers that the options name."""
    from sglang_router.app.checking import problems, start_problems  # imported here: --help does not need the parts

    checks: tuple[Callable[[RouterArgs], list[str]], ...] = (problems, start_problems)
    return [error for check in checks for error in check(args)]
