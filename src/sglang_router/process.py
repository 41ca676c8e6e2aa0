"""This process as its surroundings left it: standard descriptors, signals that must not end it, its terminal.

    open_standard_descriptors()   every door calls it before anything else
    ignore_harmless_signals()     a process that is a router, and nothing else, calls it
    die_with_parent(parent)       a process that was forked to be a part of its parent's program calls it
    has_terminal()                whether there is a controlling terminal; False once that was closed

A process may be started without descriptors 0, 1 or 2 (`2>&-`, some supervisors). The next file or socket that is
opened then gets that number, log lines go into it, and libuv aborts the process when it closes a descriptor below 3.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

HARMLESS = tuple(
    getattr(signal, name)
    for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGPOLL", "SIGPWR", "SIGSTKFLT")
    if hasattr(signal, name)
)
"""Signals that end a process that does not handle them, and that nobody sends to end one."""

_PR_SET_PDEATHSIG = 1
_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_standard_descriptors() -> None:
    """Open /dev/null on each of the descriptors 0, 1 and 2 that is closed, and give Python its stream back."""
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
        if getattr(sys, name) is None:  # Python found the descriptor closed when it started
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _open_null(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    os.set_inheritable(number, True)


def ignore_harmless_signals() -> None:
    """Let the signals that nobody means as an end do nothing: with `HARMLESS`, SIGHUP of a process without a terminal.
    Programs started by this one do not inherit that."""
    if threading.current_thread() is threading.main_thread():
        for number in HARMLESS if has_terminal() else (*HARMLESS, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends (Linux). parent: its id, when this process was forked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before that took effect
        os._exit(1)


def has_terminal() -> bool:
    """Whether this process has a controlling terminal that is open."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
        return True
    return False
