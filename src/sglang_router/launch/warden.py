"""The warden: a small program between the launcher and one engine. Nothing of the engine outlives it, or the launcher.

    python -I -S warden.py COMMAND [ARGUMENT ...]         (standard library only: it runs after 15 ms, in 8 MB)

    launcher ==== socket, its standard input ==== warden ---- engine ---- schedulers, workers, ...
              <-- "pid 4711", "status -9"                     orphans among them become the warden's children
              --> "t": SIGTERM to the engine
              --> "k", or end of file, as the launcher is gone: SIGKILL to all

    the engine runs --> it ended: SIGTERM to what is left of it --> `_GRACE` later: SIGKILL --> no child is left: exit

End of file is what a killed launcher leaves behind on any system. The parent-death signal would be tied to the thread
that started the warden, and comes with a race at the start; it guards the engine against the warden's own death only.

SIGTERM goes to the engine's main process alone, as a container's does: it ends its children in its own order. Those
that are left are found by their parents in /proc, because they may have left group and session. On a system without
subreapers and /proc it is the engine's process group that is ended.

The launcher starts this in a session of its own, so Ctrl-C does not reach it; the engine has its own process group.
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
"""Seconds for what is left of an engine to end after SIGTERM, once its main process is gone."""
_ROUND = 0.02
"""Seconds between two rounds of SIGKILL: what was born during one is hit by the next."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PROC = "/proc"
_CANNOT_RUN = 127  # as a shell says it


class Warden:
    """See the module."""

    def __init__(self) -> None:
        self._pid = 0
        self._status: int | None = None  # of the engine: exit status, or minus the signal
        self._kill_at = float("inf")
        self._woken = -1
        self._poll = select.poll()

    def run(self, argv: list[str]) -> int:
        """Starts the engine and returns its status when nothing of it is left."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # Before the signal handlers: the child would inherit them, and lose a signal that comes before its exec.
        self._pid = _start(argv)
        self._listen()
        self._tell(f"pid {self._pid}")
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
        """Waits for a signal, an order or the time, and does what is asked."""
        ready = self._poll.poll(None if seconds == float("inf") else seconds * 1000 + 1)
        for fd, _ in ready:
            if fd == self._woken:
                if {*os.read(fd, 512)} - {signal.SIGCHLD}:
                    self._terminate()
            else:
                self._hear()

    def _hear(self) -> None:
        try:
            orders = os.read(_CHANNEL, 512)
        except OSError:  # a reset is an end as well
            orders = b""
        if not orders:
            self._poll.unregister(_CHANNEL)
        if not orders or b"k" in orders:
            self._kill_at = 0.0
        elif b"t" in orders:
            self._terminate()

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody is there to hear it: reading tells so too, and has consequences
            os.write(_CHANNEL, f"{text}\n".encode())

    def _terminate(self) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGTERM)

    def _reap(self) -> bool:
        """Takes note of who ended. False when no child is left; as a subreaper, that is no descendant."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._status = os.waitstatus_to_exitcode(status)
                self._tell(f"status {self._status}")
                self._signal_all(signal.SIGTERM)
                self._kill_at = min(self._kill_at, time.monotonic() + _GRACE)

    def _signal_all(self, number: int) -> None:
        for pid in _descendants() if os.path.isdir(_PROC) else [-self._pid]:  # a negative one is a process group
            with contextlib.suppress(ProcessLookupError, PermissionError):  # ended by itself; became another user's
                os.kill(pid, number)


def _descendants() -> list[int]:
    """All processes below this one. (The kernel's own lists of children are not compiled in everywhere.)"""
    children: dict[int, list[int]] = {}
    for name in os.listdir(_PROC):
        if name.isdecimal():
            try:
                with open(f"{_PROC}/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()  # a name may hold blanks and brackets
                children.setdefault(int(fields[1]), []).append(int(name))
            except (OSError, IndexError):
                continue  # it ended meanwhile
    found = list(children.get(os.getpid(), ()))
    for pid in found:  # grows as it goes
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
    """In the child: becomes the engine. Returns if that cannot be."""
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != warden:  # it died before that
        return
    # Python has its own ways with some; a shell's `nohup` and `&` leave others ignored, which engines would inherit.
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
        import ctypes  # late: 2 ms that other systems need not spend

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    status = Warden().run(sys.argv[1:])
    sys.exit(status if status >= 0 else 128 - status)
