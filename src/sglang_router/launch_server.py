"""`python -m sglang_router.launch_server`: starts replicas of an engine and the router in front of them; for programs:

from sglang_router.launch_server import launch_server
launch_server(["--backend", "builtin", "--dp-size", "2"])

What is to be started is worked out and checked first (`launch.crew.Start`). Then one process runs the router and, on
the same event loop, the supervisor of the engines; the engines are processes of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from sglang_router.launch.options import CommandLine, parse
from sglang_router.launch_router import exit_status, launch_router

if TYPE_CHECKING:
    from sglang_router.config import RouterArgs

__all__ = ["launch_server", "main"]

_PROG = "python -m sglang_router.launch_server"


def launch_server(argv: Sequence[str], environ: Mapping[str, str] = os.environ, prog: str = _PROG) -> int:
    """Runs engines and router until they are told to stop; returns the exit status, 1 if no engine could be started.

    Raises: ConfigError if it cannot be done as asked; SystemExit(0) after --help.
    """
    line = parse(argv, environ, prog)
    return launch_router(line.router, serve=lambda args: _serve(line, args))


def _serve(line: CommandLine, args: RouterArgs) -> int:
    from sglang_router.launch.crew import Start  # late: --help and mistakes need neither server nor engines
    from sglang_router.launch.machine import Machine
    from sglang_router.server import serve

    with _ended_by_signals():
        start = Start(line, args, Machine.here())
    return serve(args, start.crew)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Before there is an event loop to hear of them, signals end the process in order, as Ctrl-C does: a download
    cleans up after itself."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """The command: options to exit status."""
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: launch_server(words, prog=prog))


if __name__ == "__main__":
    sys.exit(main())
