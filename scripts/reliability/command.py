"""The common part of the commands `chaos` and `soak`: a folder for logs, one line for a mistake, an orderly end."""

from __future__ import annotations

import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from scripts.reliability.field import ReliabilityError


def say(line: str) -> None:
    """Print to standard error: standard output is for tables."""
    print(line, file=sys.stderr, flush=True)


_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, frame: object) -> None:
    """Interrupt the work once: each `finally` ends engines and routers, and a second Ctrl-C must not cut that short.

    It is set for SIGINT too, which a shell has the jobs in its background ignore.
    """
    for each in _ENDS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(name: str, work: Callable[[Path], bool]) -> int:
    """Return the exit status of a command: 0 if `work` returns True, 1 if False, 2 if it could not run.

    `work` gets a folder for logs, which is kept unless it returns True.
    """
    for number in _ENDS:
        signal.signal(number, _end)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = Path(tempfile.mkdtemp(prefix=f"sglang-router-{name}-"))
    try:
        if work(folder):
            shutil.rmtree(folder)
            return 0
        status = 1
    except (ReliabilityError, AssertionError, OSError) as error:
        say(f"{name}: {error}")
        status = 2
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    say(f"logs: {folder}")
    return status
