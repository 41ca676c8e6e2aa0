"""The console command `sglang-router`, also `python -m sglang_router`: chooses among the doors.

sglang-router launch ...    the router     (as python -m sglang_router.launch_router)
sglang-router engine ...    the built-in engine     (as python -m sglang_router.engine)
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence

from sglang_router import __version__, launch_router
from sglang_router.config.option import did_you_mean
from sglang_router.errors import ConfigError

_HELP = """\
usage: sglang-router COMMAND [options]

A fast, cache-aware router for fleets of LLM engines.

commands:
  launch             start the router; `sglang-router launch --help` lists its options
  engine             start the built-in engine, a stand-in for an SGLang server that needs no GPU

options:
  -h, --help         show this text
  -V, --version      show the version
  --version-verbose  show the versions of Python and the platform as well
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return launch_router.exit_status(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    if not words:
        print(_HELP, end="")
        return 1
    command = _COMMANDS.get(words[0])
    if command is None:
        what = "flag" if words[0].startswith("-") else "command"
        raise ConfigError(f"unknown {what} {words[0]!r}{did_you_mean(words[0], _COMMANDS) or '; see --help'}")
    return command(words[1:])


def _launch(words: list[str]) -> int:
    return launch_router.main(words, prog="sglang-router launch")


def _engine(words: list[str]) -> int:
    from sglang_router.engine.__main__ import main as engine  # late: the router needs none of it

    return engine(words)


def _server(words: list[str]) -> int:
    raise ConfigError("not available in this version: server; start the engines, then `sglang-router launch`")


def _show(text: str) -> Callable[[list[str]], int]:
    def show(words: list[str]) -> int:
        print(text, end="")
        return 0

    return show


_VERSION = f"sglang-router {__version__}\n"

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "launch": _launch,
    "engine": _engine,
    "server": _server,
    "-h": _show(_HELP),
    "--help": _show(_HELP),
    "-V": _show(_VERSION),
    "--version": _show(_VERSION),
    "--version-verbose": _show(f"{_VERSION}Python {platform.python_version()}, {platform.platform()}\n"),
}


if __name__ == "__main__":
    sys.exit(main())
