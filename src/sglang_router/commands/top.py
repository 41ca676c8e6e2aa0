"""`sglang-router top`: watch a running router; a table each second on a terminal, plain lines elsewhere.

    GET /metrics, GET /workers  --each second-->  frame()  --> the screen; `q` or Ctrl-C ends it
                                                  line()   --> a line, when standard output is no terminal, or TERM=dumb

Rates are those of the last ten seconds. A router that does not answer for a while is told on the screen, and asked
again; at the beginning it ends the command.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import msgspec

from sglang_router.commands.answers import WorkersAnswer
from sglang_router.commands.asking import NO_ROUTER, Door, Failed, door_of, new_parser
from sglang_router.commands.describing import state_of
from sglang_router.commands.figures import Rates, Scrape, WorkerRates, of_workers, overall
from sglang_router.commands.printable import pretty, shown
from sglang_router.commands.tables import milliseconds, size, table
from sglang_router.config.flags import OptionParser

_WINDOW = 10
"""Scrapes over which rates are taken."""
_HEAD = ("worker", "role", "state", "in flight", "req/s", "tokens/s", "cached", "prefixes", "why")
_RIGHT = ("in flight", "req/s", "tokens/s", "cached", "prefixes")
_SCREEN, _SHELL = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""Show the other screen without a cursor; come back."""
_HOME, _CLEAR = "\x1b[H", "\x1b[J"


class Look(NamedTuple):
    """What was found at one moment."""

    workers: Sequence[Mapping[str, Any]]
    rates: Rates
    by_worker: Mapping[str, WorkerRates]


class Watch:
    """Asks the router, and keeps the last scrapes."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._scrapes: deque[Scrape] = deque(maxlen=_WINDOW + 1)

    def look(self) -> Look:
        """Ask once. Raises: Failed."""
        workers = self._door.get("/workers", WorkersAnswer).get("workers", [])
        reply = self._door.ask("GET", "/metrics")
        if reply.status != 200:
            raise self._door.refused(reply)
        try:
            new = Scrape(time.monotonic(), reply.content.decode())
        except ValueError:
            raise Failed(NO_ROUTER, f"what answers at {self._door.shown} has no metrics of a router.") from None
        self._scrapes.append(new)
        old = self._scrapes[0]
        return Look(workers, overall(old, new), of_workers(old, new))


def main(words: Sequence[str], prog: str) -> int:
    """Run the command; return its exit status."""
    options = parser(prog).parse_all(words)
    door = door_of(options)
    watch = Watch(door)
    try:
        first = watch.look()
        if options.json or options.count or not _can_draw():
            return _lines(watch, first, options)
    except Failed as failed:
        print("error:", failed, file=sys.stderr)
        return failed.status
    with contextlib.suppress(KeyboardInterrupt):
        _screen(watch, first, door.shown, options.interval)
    return 0


def _can_draw() -> bool:
    """Return whether this is a terminal on which a table can be drawn anew."""
    return sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def parser(prog: str) -> OptionParser:
    """Return the parser of the command line."""
    made = new_parser(prog, "Watch a running router: workers, requests per second, time to first byte, cached share.")
    about = "seconds between two looks; default: 1"
    made.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help=about)
    about = "print so many lines in place of a table, and end; 0: until Ctrl-C"
    made.add_argument("--count", type=int, default=0, metavar="N", help=about)
    return made


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0.1 to 3600 seconds")
    return value


# -- plain lines -------------------------------------------------------------------------------------------------------


def _lines(watch: Watch, found: Look, options: argparse.Namespace) -> int:
    """Print a line for each look. Raises: Failed."""
    left = options.count
    while True:
        if options.json:
            print(pretty(msgspec.json.encode(found)).replace("\n", " "), flush=True)
        else:
            print(line(found, datetime.now().strftime("%H:%M:%S")), flush=True)
        left -= 1
        if left == 0:
            return 0
        time.sleep(options.interval)
        found = watch.look()


def line(found: Look, moment: str) -> str:
    """Return one look as a line."""
    rates, healthy = found.rates, sum(state_of(each)[0] == "healthy" for each in found.workers)
    in_flight = sum(int(each.get("load", 0)) for each in found.workers)
    return (
        f"{moment}  workers {healthy}/{len(found.workers)}  in flight {in_flight}  {rates.requests:.1f} req/s"
        f"  {rates.errors:.1f} errors/s  ttft p50 {milliseconds(rates.first_byte_p50)}"
        f" p95 {milliseconds(rates.first_byte_p95)}  cached {_percent(rates.cached)}"
    )


# -- the screen --------------------------------------------------------------------------------------------------------


def _screen(watch: Watch, found: Look, url: str, interval: float) -> None:
    """Draw until `q`."""
    with _keys() as keyboard:
        said = ""
        while True:
            columns, rows = shutil.get_terminal_size()
            lines = frame(found, url, datetime.now().strftime("%H:%M:%S"), said, columns, rows - 1)
            sys.stdout.write(_HOME + "".join(f"{each}\x1b[K\r\n" for each in lines) + _CLEAR)
            sys.stdout.flush()
            readable, _, _ = select.select([keyboard], [], [], interval)
            if readable and os.read(keyboard, 64)[:1] in (b"q", b"Q", b""):
                return
            try:
                found, said = watch.look(), ""
            except Failed as failed:
                said = str(failed)


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Read single keys, on the other screen; whatever happens, the terminal is as before at the end."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    heard = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}  # also if a parent ignored it
    heard |= {ending: signal.signal(ending, _end) for ending in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setcbreak(keyboard)
        sys.stdout.write(_SCREEN)
        yield keyboard
    finally:
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            sys.stdout.write(_SHELL)
            sys.stdout.flush()
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        for number, handler in heard.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> NoReturn:
    """End by a signal, but leave the screen first."""
    raise SystemExit(128 + number)


def frame(found: Look, url: str, moment: str, said: str, columns: int, rows: int) -> list[str]:
    """Return the lines of the screen; no more, and no longer ones, than it has. said: what is wrong."""
    rates = found.rates
    head = [
        f"{url}   {moment}   q: end",
        line(found, "").strip() + f"  {rates.tokens:.0f} tokens/s",
        shown(f"error: {said}") if said else "",
    ]
    cells = [_row(each, found.by_worker.get(str(each.get("url")))) for each in found.workers]
    lines = [*head, *table(_HEAD, cells, _RIGHT)]
    if len(lines) > rows:
        kept = max(rows - 1, 0)
        lines = [*lines[:kept], f"and {len(lines) - kept} more"]
    return [each[:columns] for each in lines]


def _row(worker: Mapping[str, Any], rates: WorkerRates | None) -> list[str]:
    state, why = state_of(worker)
    cells = [
        str(worker.get("url", "?")),
        str(worker.get("worker_type", "")).replace("regular", ""),
        state,
        str(worker.get("load", "")),
        f"{rates.requests:.1f}" if rates else "",
        f"{rates.tokens:.0f}" if rates else "",
        _percent(rates.cached) if rates else "",
        size(worker["tree_size"]) if worker.get("tree_size") else "",
        why,
    ]
    return [shown(cell) for cell in cells]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
