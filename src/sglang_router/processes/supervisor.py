"""The supervisor: the process that was started. It starts the decider and the relays, and restarts them; nothing else.

    bind the main port (or take it over)  -->  fork the decider, fork each relay  -->  wait for a child or a signal

    a relay ends        restarted: its sockets are here, so clients in its queue wait for the next one
    the decider ends    restarted, with its state from the state file; relays go on meanwhile
                        ... unless it has said that the router ends: then its status is the router's
    SIGTERM ...         passed on to the decider, which leads, as another signal (see `given.PASSED`)
    killed              the kernel kills all others (PR_SET_PDEATHSIG)

It runs no event loop, no thread and no log, so that a child can be forked from it at any time. Children leave its
process group: a signal from a terminal reaches the supervisor only.

A process that ends again and again within seconds is restarted after growing pauses, and at last not any more.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from sglang_router import process
from sglang_router.errors import ConfigError
from sglang_router.processes.given import BUILT, ENDING, LEADING, PASSED, READY, REFUSED, Given, Launch

_SHORT_LIFE = 10.0
"""Seconds: a process that ended earlier has failed."""
_MOST_FAILURES = 8
"""Failures in a row after which the router ends."""
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_DECIDER = -1
"""The place of the decider among the children; relays have 0, 1, ..."""

Run = Callable[[int, Launch], int]
"""Runs a child: the decider (-1) or a relay; returns its exit status."""


class RestartPatience(NamedTuple):
    """Seconds.

    first_pause    before a process is restarted that has failed twice in a row; it doubles each time
    longest_pause  the most that it grows to
    leave          that relays have to end once the decider has ended
    """

    first_pause: float = 0.1
    longest_pause: float = 5.0
    leave: float = 5.0


class _Child:
    """One place for a process. pid: 0 while none runs; starts_at: when the next one is to be started."""

    __slots__ = ("cause", "failures", "pid", "since", "starts_at")

    def __init__(self) -> None:
        self.pid = 0
        self.since = 0.0
        self.failures = 0
        self.starts_at = 0.0
        self.cause = ""


class ProcessSupervisor:
    """See the module.

    given  what all processes share
    hears  what the decider tells arrives here
    run    runs a child
    """

    def __init__(
        self, relays: int, given: Given, hears: socket.socket, run: Run, patience: RestartPatience | None = None
    ) -> None:
        self._given = given
        self._hears = hears
        self._run = run
        self._children = {place: _Child() for place in range(_DECIDER, relays)}
        self._patience = patience or RestartPatience()
        self._count = 0
        self._leave: signal.Signals | None = None  # the signal by which the decider was told to end the router
        self._built = False  # the options can be used: relays are started
        self._ready = False  # the decider has served once
        self._ending = False
        self._refusal = ""
        self._outlives_terminal = False
        self._woken, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __repr__(self) -> str:
        return f"<ProcessSupervisor {[child.pid for child in self._children.values()]}>"

    def supervise(self) -> int:
        """Run the router; return its exit status. Raises: ConfigError, when the decider cannot start."""
        self._listen()
        gc.freeze()  # what all processes have in common stays common: a collection would write into it
        try:
            status = self._loop()
        finally:
            self._end()
            gc.unfreeze()
        if self._refusal:
            raise ConfigError(self._refusal)
        return status

    def _listen(self) -> None:
        self._outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        for number in (*LEADING, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)

    def _loop(self) -> int:
        while True:
            self._wait(self._start_due(time.monotonic()))
            self._hear()
            status = self._reap(time.monotonic())
            if status is not None:
                return status

    def _wait(self, seconds: float | None) -> None:
        """Wait for a signal, the end of a child, or what the decider tells, at most so long; pass signals on."""
        poll = select.poll()
        for readable in (self._woken, self._hears.fileno()):
            poll.register(readable, select.POLLIN)
        poll.poll(None if seconds is None else max(seconds, 0.0) * 1000 + 1)
        self._pass_signals_on()

    # -- children ------------------------------------------------------------------------------------------------------

    def _start_due(self, now: float) -> float | None:
        """Launch what is due; return the seconds until more is; None: nothing."""
        pause: float | None = None
        for place, child in self._children.items():
            if child.pid or self._ending or (place != _DECIDER and not self._built):
                continue
            if child.starts_at <= now:
                self._fork(place, child, now)
            elif pause is None or child.starts_at - now < pause:
                pause = child.starts_at - now
        return pause

    def _fork(self, place: int, child: _Child, now: float) -> None:
        self._count += 1
        start = Launch(self._count, child.cause)
        until_handled = (*LEADING, *PASSED.values())
        signal.pthread_sigmask(signal.SIG_BLOCK, until_handled)  # by the child
        supervisor = os.getpid()
        child.pid = os.fork()
        if child.pid == 0:
            self._be_child(place, start, supervisor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, until_handled)
        child.since = now
        if place == _DECIDER and self._leave is not None:
            os.kill(child.pid, PASSED[self._leave])  # it waits until the child handles signals

    def _be_child(self, place: int, start: Launch, supervisor: int) -> None:
        """Run a child in this process, which was just forked. It never returns."""
        status = 1
        try:
            process.die_with_parent(supervisor)
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if self._outlives_terminal:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            os.close(self._woken)
            os.close(self._wakes)
            self._hears.close()
            if place != _DECIDER:
                self._given.tells.close()
            status = self._run(place, start)
        except ConfigError as error:
            status = 2
            if place == _DECIDER:
                self._given.tells.send(REFUSED + str(error).encode("utf-8", "surrogateescape"))
            else:
                _complain(f"relay {place + 1}: {error}")
        except BaseException:
            _complain(traceback.format_exc())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self, now: float) -> int | None:
        """Take note of processes that ended; return the router's status when it has ended."""
        places = {child.pid: place for place, child in self._children.items() if child.pid}
        for pid, place in places.items():
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = self._ended(place, self._children[place], code, now)
                if status is not None:
                    return status
        return None

    def _ended(self, place: int, child: _Child, code: int, now: float) -> int | None:
        child.pid = 0
        status = os.waitstatus_to_exitcode(code)
        child.cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._hear()  # it may have told before it ended
        if place == _DECIDER and (self._ending or not self._ready):
            return status if status >= 0 else 128 - status
        if self._refusal:  # a file that could be used at the start is not usable now: it may be again
            _complain(f"error: {self._refusal}")
            self._refusal = ""
        if self._ending:
            return None
        child.failures = child.failures + 1 if now - child.since < _SHORT_LIFE else 0
        if child.failures > _MOST_FAILURES:
            name = "the process that decides" if place == _DECIDER else f"relay {place + 1}"
            _complain(f"error: {name} {child.cause}, {child.failures} times in a row: the router ends")
            return 1
        first, most, _ = self._patience
        pause = min(first * 2.0 ** (child.failures - 2), most) if child.failures > 1 else 0.0
        child.starts_at = now + pause
        return None

    # -- what it hears -------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Take what the decider tells."""
        with contextlib.suppress(BlockingIOError):
            while told := self._hears.recv(65536):
                if told == BUILT:
                    self._built = True
                elif told == READY:
                    self._ready = True
                elif told == ENDING:
                    self._ending = True
                    self._given.close_ports()
                elif told.startswith(REFUSED):
                    self._refusal = told[len(REFUSED) :].decode("utf-8", "surrogateescape")

    def _pass_signals_on(self) -> None:
        """Pass signals on to the decider. One that means the end is for the next decider, too, if this one dies."""
        decider = self._children[_DECIDER]
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._woken, 4096):
                if number not in LEADING:
                    continue
                if number in _ENDS:
                    self._leave = self._leave or signal.Signals(number)
                if decider.pid:
                    os.kill(decider.pid, PASSED[signal.Signals(number)])

    def _end(self) -> None:
        """End all processes that still run: relays leave by themselves when the decider has ended in order."""
        deadline = time.monotonic() + (self._patience.leave if self._ending else 0.0)
        while (running := [child for child in self._children.values() if child.pid]) and time.monotonic() < deadline:
            for child in running:
                if os.waitpid(child.pid, os.WNOHANG)[0]:
                    child.pid = 0
            if any(child.pid for child in running):
                self._wait(0.02)
        for child in running:
            if child.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
        signal.set_wakeup_fd(-1)
        os.close(self._woken)
        os.close(self._wakes)
        self._hears.close()
        self._given.close()
        shutil.rmtree(self._given.folder, ignore_errors=True)


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{message.rstrip()}\n".encode("utf-8", "replace"))
