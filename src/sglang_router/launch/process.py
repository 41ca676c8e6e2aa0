"""One engine process, seen from the event loop: started under its warden, its output as lines, ended without a rest.

    process = await Process.start(loop, command, on_line)
    process.pid                    of the engine itself
    await process.exited           its status: the engine has ended, though children of it may not have
    await process.gone             nothing of it is left: its port and its GPU's memory are free
    await process.stop(10.0)       SIGTERM; what is left ten seconds later gets SIGKILL

Orders to the warden and its reports go over a socket, see `warden`. Standard output and error come through one pipe.

The event loop's own subprocesses fork: the loop stands still while the kernel copies the page tables of a router with
a large tree, 30 to 50 ms at 500 MB. `subprocess.Popen` uses vfork, which copies nothing: 0.3 ms. So it is that, and two
readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang_router.launch.replica import Command

LONGEST = 4096
"""Bytes of a line that are told; the rest of it is not."""
_WARDEN = str(Path(__file__).with_name("warden.py"))
_LAST = 5.0
"""Seconds that SIGKILL may take. A process that hangs in a driver ignores even that, and is not waited for."""
_MOMENT = 0.002
_LINGER = 1.0
"""Seconds that output may come after the warden's end: where there are no subreapers, somebody may hold it."""


class Lines:
    """Cuts a stream of bytes into lines of text. Empty ones are left out.

    A carriage return ends a line too, as progress bars use it; of several in one piece only the last is told.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False  # the rest of a line that was too long

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that end in these bytes."""
        if self._skipping:
            ends = [at for at in (data.find(b"\n"), data.find(b"\r")) if at >= 0]
            if not ends:
                return
            data = data[min(ends) :]
            self._skipping = False
        *whole, rest = (self._rest + data).split(b"\n")
        bars, _, self._rest = rest.rpartition(b"\r")
        if len(self._rest) > LONGEST:
            bars, self._rest, self._skipping = self._rest, b"", True
        for line in (*whole, bars):
            if text := _text(line):
                yield text

    def end(self) -> Iterator[str]:
        """What came after the last end of a line."""
        yield from self.feed(b"\n")


def _text(line: bytes) -> str:
    """What a terminal would show of a line in the end: what follows its last carriage return that is followed by
    anything."""
    shown = line.rstrip().rpartition(b"\r")[2]
    text = shown[:LONGEST].decode("utf-8", "replace")
    return f"{text} …" if len(shown) > LONGEST else text


class Process:
    """See the module. Made by `start`.

    pid     of the engine; 0 if not even its warden could run
    exited  done when the engine has ended: its exit status, or minus the signal that killed it
    gone    done when nothing of it is left, and all that it wrote was told
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        warden: subprocess.Popen[bytes],
        channel: socket.socket,
        on_line: Callable[[str], None],
    ) -> None:
        assert warden.stdout is not None
        self.pid = 0
        self.exited: asyncio.Future[int] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._warden = warden
        self._channel = channel
        self._heard = b""
        self._begun = asyncio.Event()
        self._output = warden.stdout
        self._on_line = on_line
        self._lines = Lines()
        os.set_blocking(self._output.fileno(), False)
        loop.add_reader(channel, self._hear)
        loop.add_reader(self._output, self._read)

    @classmethod
    async def start(cls, loop: asyncio.AbstractEventLoop, command: Command, on_line: Callable[[str], None]) -> Process:
        """Starts an engine; returns when its pid is known. `on_line` hears each line, without its end.

        An engine that cannot be run at all says so in a line and exits with status 127.

        Raises: OSError when the system has no room for a process.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                warden = subprocess.Popen(  # noqa: S603, ASYNC220  (the user's own command; see the module)
                    [sys.executable, "-I", "-S", _WARDEN, *command.argv],
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    env={**os.environ, **command.env},
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        ours.setblocking(False)
        process = cls(loop, warden, ours, on_line)
        try:
            await process._begun.wait()
        except asyncio.CancelledError:
            process.kill()
            raise
        return process

    def __repr__(self) -> str:
        state = f"ended with {self.exited.result()}" if self.exited.done() else "running"
        return f"<Process {self.pid}: {state}{', gone' * self.gone.done()}>"

    # -- its end -----------------------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """Asks the engine to end: SIGTERM to its main process."""
        self._order(b"t")

    def kill(self) -> None:
        """Ends it and all of its descendants at once: SIGKILL."""
        self._order(b"k")

    async def stop(self, grace: float) -> int:
        """Ends it: SIGTERM, and `grace` seconds later SIGKILL to what is left. Returns the engine's status."""
        self.terminate()
        await asyncio.wait({self.gone}, timeout=grace)
        self.kill()
        await asyncio.wait({self.gone}, timeout=_LAST)
        return self.exited.result() if self.exited.done() else -signal.SIGKILL

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(OSError):  # the warden is gone, and all with it
            self._channel.send(order)

    # -- what is heard -----------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Reports of the warden; their end is its own."""
        try:
            data = self._channel.recv(512)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._channel)
            self._channel.close()
            self._reap()
            return
        *reports, self._heard = (self._heard + data).split(b"\n")
        for report in reports:
            what, _, number = report.partition(b" ")
            if what == b"pid":
                self.pid = int(number)
                self._begun.set()
            else:
                self.exited.set_result(int(number))

    def _read(self) -> None:
        """Output of the engine."""
        try:
            data = os.read(self._output.fileno(), 1 << 16)
        except BlockingIOError:
            return
        for line in self._lines.feed(data):
            self._on_line(line)
        if not data:
            self._end_output()

    def _end_output(self) -> None:
        if not self._output.closed:
            self._loop.remove_reader(self._output)
            self._output.close()
            for line in self._lines.end():
                self._on_line(line)
            self._finish()

    def _reap(self) -> None:
        """Takes the warden's status. It has closed its socket, so it is at its end or a moment before."""
        if self._warden.poll() is None:
            self._loop.call_later(_MOMENT, self._reap)
            return
        if not self.exited.done():
            self._killed_with_warden()
        self._begun.set()
        timer = self._loop.call_later(_LINGER, self._end_output)
        self.gone.add_done_callback(lambda _: timer.cancel())
        self._finish()

    def _killed_with_warden(self) -> None:
        """Somebody killed the warden. The engine died with it; its children are found by their group only."""
        status = self._warden.returncode
        if self.pid:
            status = -signal.SIGKILL
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.exited.set_result(status)

    def _finish(self) -> None:
        if self._output.closed and self._warden.returncode is not None:
            self.gone.set_result(None)
