"""The warden: a small program between the launcher and one engine.

When the warden or the launcher ends, all processes of the engine end as well.

    python -I -S warden.py COMMAND [ARGUMENT ...]         (standard library only: it starts in 15 ms and uses 8 MB)

    launcher ==== socket, its standard input ==== warden ---- engine ---- schedulers, workers, ...
              <-- "pid 4711", "status -9"                     their orphans become children of the warden
              --> "t": SIGTERM to the engine
              --> "k", or end of file because the launcher is gone: SIGKILL to all

    the engine ends --> SIGTERM to its remaining processes --> `_GRACE` later: SIGKILL --> no child is left: exit

A killed launcher causes the end of file on any system. The parent-death signal is not used for this: it is tied to the
thread that started the warden, and has a race at the start. It only ends the engine when the warden itself dies.

SIGTERM goes to the engine's main process only, as in a container: the engine ends its children in its own order. The
warden finds the remaining processes by their parents in /proc, because they may have left the engine's process group
and session. On a system without subreapers and /proc, it ends the engine's process group.

The launcher starts the warden in its own session, so that Ctrl-C does not reach it. The engine has its own process
group.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

_CHANNEL = 0
_GRACE = 2.0
"""Seconds that the remaining processes of an engine have to end after SIGTERM, once its main process is gone."""
_ROUND = 0.02
"""Seconds between two rounds of SIGKILL: the next round kills processes that were started during the last."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PROC = "/proc"
_CANNOT_RUN = 127  # the exit status that shells use


class Warden:
    """See the module."""

    def __init__(self) -> None:
        self._pid = 0
        self._status: int | None = None  # the engine's exit status, or minus the signal that killed it
        self._kill_at = float("inf")
        self._woken = -1
        self._poll = select.poll()

    def run(self, argv: list[str]) -> int:
        """Start the engine. Return its status when none of its processes is left."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # Start the engine before setting signal handlers: it would inherit them, and lose signals before its exec.
        self._pid = _start(argv)
        self._listen()
        self._send(f"pid {self._pid}")
        while self._reap():
            left = self._kill_at - time.monotonic()
            if left <= 0:
                self._signal_all(signal.SIGKILL)
                left = _ROUND
            self._wait(left)
        if not os.path.isdir(_PROC):
            self._signal_all(signal.SIGKILL)
        return self._status or 0

    def _listen(self) -> None:
        self._woken, wake = os.pipe()
        for fd in (self._woken, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._poll.register(self._woken, select.POLLIN)
        self._poll.register(_CHANNEL, select.POLLIN)

    def _wait(self, seconds: float) -> None:
        """Wait for a signal, an order or the time to pass, and handle it."""
        ready = self._poll.poll(None if seconds == float("inf") else seconds * 1000 + 1)
        for fd, _ in ready:
            if fd == self._woken:
                if {*os.read(fd, 512)} - {signal.SIGCHLD}:
                    self._terminate()
            else:
                self._read_orders()

    def _read_orders(self) -> None:
        try:
            orders = os.read(_CHANNEL, 512)
        except OSError:  # a reset counts as end of file
            orders = b""
        if not orders:
            self._poll.unregister(_CHANNEL)
        if not orders or b"k" in orders:
            self._kill_at = 0.0
        elif b"t" in orders:
            self._terminate()

    def _send(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the launcher is gone; reading will see the end of file and act on it
            os.write(_CHANNEL, f"{text}\n".encode())

    def _terminate(self) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGTERM)

    def _reap(self) -> bool:
        """Reap children that ended. Return False when no child is left; with a subreaper that means no descendant."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._status = os.waitstatus_to_exitcode(status)
                self._send(f"status {self._status}")
                self._signal_all(signal.SIGTERM)
                self._kill_at = min(self._kill_at, time.monotonic() + _GRACE)

    def _signal_all(self, number: int) -> None:
        # A negative number is a process group.
        for pid in descendants(os.getpid()) if os.path.isdir(_PROC) else [-self._pid]:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended, or changed its user
                os.kill(pid, number)


def descendants(ancestor: int) -> list[int]:
    """Return all descendants of a process. (Not every kernel has /proc/PID/task/TID/children.)

    Raises: OSError without /proc.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir(_PROC):
        if name.isdecimal():
            try:
                with open(f"{_PROC}/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()  # a name may contain spaces and brackets
                children.setdefault(int(fields[1]), []).append(int(name))
            except (OSError, IndexError):
                continue  # it has ended
    found = list(children.get(ancestor, ()))
    for pid in found:  # the list grows inside the loop
        found += children.get(pid, ())
    return found


def _start(argv: list[str]) -> int:
    warden = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _become(argv, warden)
        finally:
            os._exit(_CANNOT_RUN)
    return pid


def _become(argv: list[str], warden: int) -> None:
    """In the child process: become the engine. Returns only if that fails."""
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != warden:  # the warden died before prctl took effect
        return
    # Python changes the handling of some signals; a shell's `nohup` and `&` ignore others. The engine would inherit it.
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, _CHANNEL)
    try:
        os.execvp(argv[0], argv)  # noqa: S606  (the user's own command)
    except OSError as error:
        os.write(2, f"cannot run {argv[0]}: {error.strerror}\n".encode())


def _prctl(option: int, value: int) -> None:
    """Linux's prctl(2); nothing elsewhere."""
    if sys.platform == "linux":
        import ctypes  # imported here because it takes 2 ms and only Linux needs it

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    status = Warden().run(sys.argv[1:])
    sys.exit(status if status >= 0 else 128 - status)
