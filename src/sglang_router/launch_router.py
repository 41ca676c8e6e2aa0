"""`python -m sglang_router.launch_router`: starts a router; and the same for programs.

from sglang_router.launch_router import launch_router, parse_router_args
launch_router(parse_router_args(["--worker-urls", "http://127.0.0.1:8000"]))
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from sglang_router.config import HelpFormatter as CustomHelpFormatter
from sglang_router.config import RouterArgs, parse
from sglang_router.errors import ConfigError

__all__ = ["CustomHelpFormatter", "RouterArgs", "launch_router", "main", "parse_router_args"]

_PROG = "python -m sglang_router.launch_router"


def parse_router_args(args: Sequence[str]) -> RouterArgs:
    """The options from a command line (without the program's name), the environment and a file.

    A mistake ends the program as argparse does: one line on standard error, SystemExit(2).
    """
    try:
        return parse(args)
    except ConfigError as error:
        _complain(error)
        raise SystemExit(2) from None


def launch_router(args: object, *, serve: Callable[[RouterArgs], int] | None = None) -> int:
    """Runs a router until it is told to stop; returns its exit status.

    `args` is a RouterArgs, or any object with such attributes (a namespace); older names of fields are
    understood and missing ones take their defaults. It stays as it is. `serve` replaces the server in tests.

    Raises: ConfigError if the router cannot start with these options.
    """
    given = args if isinstance(args, RouterArgs) else RouterArgs.from_cli_args(args)
    checked = given.checked()
    if ignored := checked.without_effect():
        print(f"warning: no effect in this router: {', '.join(ignored)}", file=sys.stderr)
    if serve is None:
        from sglang_router.server import serve as run  # late: --help and mistakes need none of it

        serve = run
    return serve(checked)


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """The command: options to exit status."""
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: launch_router(parse(words, prog=prog)))


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command. What its user can mend becomes one line and 2, Ctrl-C 130, a closed pipe 141."""
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
        # the reader of --help left; nothing may be flushed there when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _complain(error: ConfigError) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
