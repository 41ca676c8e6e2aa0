"""`sglang-router completion bash|zsh`: print what completes the command in a shell. The package shtab makes it.

    sglang-router completion bash > ~/.local/share/bash-completion/completions/sglang-router
    sglang-router completion zsh > ~/.zfunc/_sglang-router

The parsers of all commands are put into one, for shtab reads a tree of parsers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from sglang_router.config.flags import OptionParser
from sglang_router.config.table import OPTIONS
from sglang_router.errors import ConfigError

NAME = "sglang-router"
_SHELLS = ("bash", "zsh")
_CHOICES = {option.flag: option.choices for option in OPTIONS.values() if option.choices}
"""Words that an option of the router takes; its parser does not know them, for it takes other spellings as well."""
_PREFIX = "--router-"
"""Of the router's options where an engine has options beside them."""
_INSTALL = "pip install 'sglang-router[completion]'"


def parser(prog: str) -> OptionParser:
    """Return the parser of the command line."""
    made = OptionParser(prog=prog, description="Print what completes the command in a shell.", allow_abbrev=False)
    made.add_argument("shell", choices=_SHELLS, help="the shell")
    return made


def main(words: Sequence[str], prog: str, parsers: Mapping[str, argparse.ArgumentParser]) -> int:
    """Run the command; return its exit status. parsers: of all commands, by name.

    Raises: ConfigError, when the package shtab is missing.
    """
    shell: str = parser(prog).parse_all(words).shell
    try:
        import shtab  # imported here: an extra
    except ImportError:
        raise ConfigError(f"completion needs the package shtab: {_INSTALL}") from None
    print(shtab.complete(tree(parsers, shtab.FILE), shell=shell))
    return 0


def tree(parsers: Mapping[str, argparse.ArgumentParser], file: Mapping[str, object]) -> argparse.ArgumentParser:
    """Return one parser with all commands. file: what says that an option takes the name of a file."""
    root = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    commands = root.add_subparsers()
    for name, made in parsers.items():
        for action in made._actions:
            if action.metavar in ("FILE", "DIR"):
                action.complete = file  # type: ignore[attr-defined]
            for flag in action.option_strings:
                action.choices = _CHOICES.get(flag.replace(_PREFIX, "--", 1), action.choices)
        about = made.description or ""
        commands.add_parser(name, parents=[made], add_help=False, help=about, description=about, allow_abbrev=False)
    return root
