"""The console command `sglang-router`, also `python -m sglang_router`: dispatches to its subcommands.

sglang-router launch ...    the router     (as python -m sglang_router.launch_router; also without `launch`)
sglang-router serve ...     engines and the router     (as python -m sglang_router.launch_server; also `server`)
sglang-router engine ...    the built-in engine     (as python -m sglang_router.engine)
sglang-router replay ...    compare policies on a load, in virtual time
sglang-router explain ...   why a request got its worker
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence

from sglang_router import launch_router, launch_server
from sglang_router.config.option import did_you_mean
from sglang_router.errors import ConfigError
from sglang_router.version import version_line

_HELP = """\
usage: sglang-router COMMAND [options]

A fast, cache-aware router for fleets of LLM engines.

commands:
  serve              start engines and the router in front of them, as one OpenAI server;
                     `sglang-router serve --backend llamacpp` needs no GPU and downloads a small model
  launch             start the router in front of engines that run already (the command may be left out)
  engine             start the built-in engine, which simulates an SGLang server and needs no GPU
  replay             compare routing policies on a recorded or generated load, in virtual time
  explain            ask a running router why a request got its worker

`sglang-router COMMAND --help` lists the options of a command.

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
        print(_HELP, end="")
        return 1
    command = _COMMANDS.get(words[0])
    if command is not None:
        return command(words[1:])
    if words[0].startswith("-"):  # options of the router, without a command
        return _launch(words)
    raise ConfigError(f"unknown command {words[0]!r}{did_you_mean(words[0], _COMMANDS) or '; see --help'}")


def _launch(words: list[str]) -> int:
    return launch_router.main(words, prog="sglang-router launch")


def _engine(words: list[str]) -> int:
    from sglang_router.engine.__main__ import main as engine  # imported here: the other commands do not need it

    return engine(words)


def _replay(words: list[str]) -> int:
    from sglang_router.replay.command import main as replay  # imported here: the other commands do not need it

    return replay(words)


def _explain(words: list[str]) -> int:
    from sglang_router.explain import main as explain  # imported here: the other commands do not need it

    return explain(words, prog="sglang-router explain")


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
    "engine": _engine,
    "replay": _replay,
    "explain": _explain,
    "-h": _show(_HELP),
    "--help": _show(_HELP),
    "-V": _show(_VERSION),
    "--version": _show(_VERSION),
    "--version-verbose": _show(f"{_VERSION}Python {platform.python_version()}, {platform.platform()}\n"),
}


if __name__ == "__main__":
    sys.exit(main())
