"""Start a router: `python -m sglang_router.launch_router`, or from a program:

from sglang_router.launch_router import launch_router, parse_router_args
launch_router(parse_router_args(["--worker-urls", "http://127.0.0.1:8000"]))
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence

from sglang_router import process
from sglang_router.commands import checking
from sglang_router.config import HelpFormatter as CustomHelpFormatter
from sglang_router.config import RouterArgs, parse
from sglang_router.errors import ConfigError

__all__ = ["CustomHelpFormatter", "RouterArgs", "launch_router", "main", "parse_router_args"]

_CHECK = "--check-config"
_PROG = "python -m sglang_router.launch_router"


def parse_router_args(args: Sequence[str]) -> RouterArgs:
    """Read the options from a command line (without the program's name), the environment and a file.

    A mistake ends the program as argparse does: one line on standard error, then SystemExit(2).
    """
    try:
        return parse(args)
    except ConfigError as error:
        _complain(error)
        raise SystemExit(2) from None


def launch_router(args: object, *, serve: Callable[[RouterArgs], int] | None = None) -> int:
    """Run a router until it is stopped; return its exit status.

    `args` is a RouterArgs, or any object with the same attributes, such as a namespace. Older names of attributes work
    as well, and missing attributes get their defaults. `args` is not changed. `serve` runs the router in another way,
    as an endpoint picker does, or stands for the server in tests.

    It may run in a child process, forked or spawned. In a thread other than the main one it handles no signals, and
    ends with the process.

    Raises: ConfigError if the router cannot start with these options.
    """
    process.open_standard_descriptors()
    given = args if isinstance(args, RouterArgs) else RouterArgs.from_cli_args(args)
    checked = given.checked()
    warnings = list(given.slips)
    if ignored := checked.without_effect():
        warnings.append(f"these options have no effect in this router: {', '.join(ignored)}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if serve is None:
        from sglang_router.processes.serve import serve as run  # imported here: --help and mistakes do not need it

        serve = run
    return serve(checked)


def main(argv: Sequence[str] | None = None, prog: str = _PROG, serve: Callable[[RouterArgs], int] | None = None) -> int:
    """Run the command; return its exit status. serve: runs the router; None: as `launch_router` does."""
    words = sys.argv[1:] if argv is None else argv
    if _CHECK in words:
        left = [word for word in words if word != _CHECK]
        return exit_status(lambda: checking.main(left, f"{prog} {_CHECK}"))
    return exit_status(lambda: launch_router(parse(words, prog=prog), serve=serve))


def exit_status(command: Callable[[], int]) -> int:
    """Run a command, which is the whole of this process, and return its exit status.

    A ConfigError prints one line and gives status 2, Ctrl-C 130, a closed output pipe 141, output that cannot be
    written (a full disk) one line and 1. What the encoding of standard output lacks is written as an escape.
    """
    process.open_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    process.ignore_harmless_signals()
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except ConfigError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _give_up_output()  # its reader has gone
        return 141
    except OSError as error:
        if error.errno not in _UNWRITTEN or error.filename is not None:
            raise
        _give_up_output()
        _complain(f"the output cannot be written: {error.strerror}")
        return 1


_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _give_up_output() -> None:
    """Redirect standard output, so that Python's final flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: object) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
