"""Start replicas of an engine and the router in front of them: `python -m sglang_router.launch_server`; in a program:

from sglang_router.launch_server import launch_server
launch_server(["--backend", "builtin", "--dp-size", "2"])

First, `launch.crew.Start` computes and checks what to start. Then one process runs the router and, on the same event
loop, the supervisor of the engines. The engines are separate processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

from sglang_router import process
from sglang_router.config import RouterArgs
from sglang_router.launch.options import CommandLine, parse
from sglang_router.launch_router import exit_status, launch_router

__all__ = ["RouterArgs", "launch_router", "launch_server", "main"]

_PROG = "python -m sglang_router.launch_server"


def launch_server(argv: Sequence[str], environ: Mapping[str, str] = os.environ, prog: str = _PROG) -> int:
    """Run engines and router until they are stopped; return the exit status, 1 if no engine could be started.

    Raises: ConfigError if they cannot start with these options; SystemExit(0) after --help.
    """
    line = parse(argv, environ, prog)
    return launch_router(line.router, serve=lambda args: _serve(line, args))


def _serve(line: CommandLine, args: RouterArgs) -> int:
    from sglang_router.launch.crew import Start  # imported here: --help and mistakes need neither server nor engines
    from sglang_router.launch.machine import LocalMachine
    from sglang_router.processes.serve import serve

    with _signals_end_process():
        start = Start(line, args, LocalMachine.here())
    return serve(args, start.crew)


@contextlib.contextmanager
def _signals_end_process() -> Iterator[None]:
    """Before the event loop handles signals, let them end the process by an exception, as Ctrl-C does: a download then
    removes its temporary files. SIGHUP ends it when the terminal was closed; there is nothing to read again yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    on_terminal = process.has_terminal()

    def end(number: int, _: object) -> None:
        if number != signal.SIGHUP or (on_terminal and not process.has_terminal()):
            raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, signal.SIGQUIT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` lets it be ignored
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """Run the command; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: launch_server(words, prog=prog))


if __name__ == "__main__":
    sys.exit(main())
