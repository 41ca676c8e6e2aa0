"""The console command `sglang-router`, also `python -m sglang_router`: dispatches to its subcommands.

sglang-router launch ...    the router     (as python -m sglang_router.launch_router; also without `launch`)
sglang-router serve ...     engines and the router     (as python -m sglang_router.launch_server; also `server`)
sglang-router epp ...       the router as the endpoint picker of a gateway
sglang-router engine ...    the built-in engine     (as python -m sglang_router.engine)
sglang-router status ...    and the others of `commands.operating`, `top`, `explain`: ask a running router
sglang-router check-config  checks a configuration and starts nothing
sglang-router replay ...    compare policies on a load, in virtual time
sglang-router completion    what completes all of these in a shell

`commands.manual.COMMANDS` describes them, for `--help` and for the manual page.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial

from sglang_router import launch_router, launch_server
from sglang_router.commands.manual import COMMANDS, OPERATING
from sglang_router.config.flags import new_parser
from sglang_router.config.option import did_you_mean
from sglang_router.errors import ConfigError
from sglang_router.version import version_line

_NAME = "sglang-router"


def _help() -> str:
    rows = "".join(f"  {name:<19}{about}\n" for name, about in COMMANDS.items())
    return f"""\
usage: sglang-router COMMAND [options]

A fast, cache-aware router for fleets of LLM engines.

commands:
{rows}
`sglang-router COMMAND --help` lists the options of a command. A first try without GPU and model:
`sglang-router serve --backend llamacpp`.

options:
  -h, --help         show this text
  -V, --version      show the version, and whether it runs compiled
  --version-verbose  show the versions of Python and the platform as well
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return launch_router.exit_status(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    if not words:
        print(_help(), end="")
        return 1
    command = _COMMANDS.get(words[0])
    if command is not None:
        return command(words[1:])
    if words[0].startswith("-"):  # options of the router, without a command
        return _launch(words)
    raise ConfigError(f"unknown command {words[0]!r}{did_you_mean(words[0], _COMMANDS) or '; see --help'}")


def _launch(words: list[str]) -> int:
    return launch_router.main(words, prog="sglang-router launch")


def _epp(words: list[str]) -> int:
    from sglang_router.picker.front import serve  # imported here: the other commands do not need it

    return launch_router.main(words, f"{_NAME} epp", serve)


def _engine(words: list[str]) -> int:
    from sglang_router.engine.__main__ import main as engine  # imported here: the other commands do not need it

    return engine(words)


def _replay(words: list[str]) -> int:
    from sglang_router.replay.command import main as replay  # imported here: the other commands do not need it

    return replay(words)


def _explain(words: list[str]) -> int:
    from sglang_router.explain import main as explain  # imported here: the other commands do not need it

    return explain(words, prog=f"{_NAME} explain")


def _top(words: list[str]) -> int:
    from sglang_router.commands.top import main as top  # imported here: it needs a terminal's module

    return top(words, prog=f"{_NAME} top")


def _operate(name: str, words: list[str]) -> int:
    from sglang_router.commands import operating  # imported here: the other commands do not need it

    return operating.main(name, words, f"{_NAME} {name}")


def _check(words: list[str]) -> int:
    from sglang_router.commands import checking  # imported here: the other commands do not need it

    return checking.main(words, f"{_NAME} check-config")


def _completion(words: list[str]) -> int:
    from sglang_router.commands import completion  # imported here: the other commands do not need it

    return completion.main(words, f"{_NAME} completion", parsers())


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of all commands, by name."""
    from sglang_router import explain  # imported here: only `completion` needs all of them
    from sglang_router.commands import checking, completion, operating, top
    from sglang_router.engine import options as engine
    from sglang_router.launch import options as serve
    from sglang_router.replay import options as replay

    found: dict[str, argparse.ArgumentParser] = {
        "launch": new_parser(f"{_NAME} launch"),
        "serve": serve.new_parser(f"{_NAME} serve"),
        "epp": new_parser(f"{_NAME} epp"),
        "engine": engine.new_parser(),
        **{name: operating.parser(name, f"{_NAME} {name}") for name in operating.COMMANDS},
        "top": top.parser(f"{_NAME} top"),
        "explain": explain.parser(f"{_NAME} explain"),
        "check-config": checking.parser(f"{_NAME} check-config"),
        "replay": replay.new_parser(f"{_NAME} replay"),
        "completion": completion.parser(f"{_NAME} completion"),
    }
    return found


def _serve(words: list[str]) -> int:
    return launch_server.main(words, prog="sglang-router serve")


def _show(text: str) -> Callable[[list[str]], int]:
    def show(words: list[str]) -> int:
        print(text, end="")
        return 0

    return show


_VERSION = f"{version_line()}\n"

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "launch": _launch,
    "serve": _serve,
    "server": _serve,
    "epp": _epp,
    "engine": _engine,
    "replay": _replay,
    "explain": _explain,
    "top": _top,
    "check-config": _check,
    "completion": _completion,
    **{name: partial(_operate, name) for name in OPERATING},
    "-h": _show(_help()),
    "--help": _show(_help()),
    "-V": _show(_VERSION),
    "--version": _show(_VERSION),
    "--version-verbose": _show(f"{_VERSION}Python {platform.python_version()}, {platform.platform()}\n"),
}


if __name__ == "__main__":
    sys.exit(main())
