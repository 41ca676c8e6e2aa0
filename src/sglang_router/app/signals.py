"""Handle signals.

    SIGTERM              stop in order; first wait until load balancers have noticed (--shutdown-drain-secs)
    SIGINT, SIGQUIT      stop in order
    SIGHUP               the terminal of this process was closed: stop in order; else: load keys and files again
    SIGUSR1              open the log files again
    another of the first three, once the router stops: leave at once
    SIGUSR2, SIGALRM ... nothing

Where another process gets the first five for this one, they arrive as other signals, and do nothing as themselves.

A router that runs in a thread of another program handles no signals: only the main thread can, and it is not ours.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Mapping

from sglang_router import process

log = logging.getLogger("sglang_router")


def _nothing() -> None:
    """Do nothing."""


class Signals:
    """See the module.

    stop      set by the first signal to stop
    urgent    set by the second one
    patient   whether the first one leaves time for load balancers
    status    the exit status of the process; a second signal makes it 128 + its number
    reload    what SIGHUP does; reopen: what SIGUSR1 does
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, passed: Mapping[signal.Signals, int]) -> None:
        self.stop = asyncio.Event()
        self.urgent = asyncio.Event()
        self.patient = False
        self.status = 0
        self.reload: Callable[[], None] = _nothing
        self.reopen: Callable[[], None] = _nothing
        self._ends_with_terminal = False
        if threading.current_thread() is threading.main_thread():
            self._listen(loop, passed)

    def _listen(self, loop: asyncio.AbstractEventLoop, passed: Mapping[signal.Signals, int]) -> None:
        # `nohup` lets SIGHUP be ignored: the process is then meant to outlive its terminal.
        self._ends_with_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and process.has_terminal()
        for number in (*process.HARMLESS, *passed):
            loop.add_signal_handler(number, _nothing)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(passed.get(number, number), self._hear, number)
        loop.add_signal_handler(passed.get(signal.SIGHUP, signal.SIGHUP), self._hang_up)
        loop.add_signal_handler(passed.get(signal.SIGUSR1, signal.SIGUSR1), lambda: self.reopen())

    def _hear(self, number: int) -> None:
        if self.stop.is_set():
            log.warning("second signal: leaving at once")
            self.status = 128 + number
            self.urgent.set()
        self.patient = number == signal.SIGTERM and not self.urgent.is_set()
        self.stop.set()

    def _hang_up(self) -> None:
        if self.stop.is_set():
            return
        if not self._ends_with_terminal or process.has_terminal():
            self.reload()
        else:
            log.warning("the terminal was closed: stopping")
            self.stop.set()


async def first_of(loop: asyncio.AbstractEventLoop, *events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    waits = [loop.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
