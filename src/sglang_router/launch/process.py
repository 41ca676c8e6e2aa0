"""One engine process on the event loop: start it under a warden, read its output as lines, end all of its processes.

    process = await EngineProcess.start(loop, command, on_line)
    process.pid                    process id of the engine
    await process.exited           the engine's exit status; some of its children may still run
    await process.gone             none of its processes is left: its port and its GPU memory are free
    await process.stop(10.0)       SIGTERM; SIGKILL ten seconds later to the processes that are left

Orders to the warden and messages from it go over a socket, see `warden`. Standard output and error share one pipe.

The event loop's own subprocesses use fork: it blocks the loop while the kernel copies the page tables of a router with
a large tree, 30 to 50 ms at 500 MB. `subprocess.Popen` uses vfork, which copies nothing and takes 0.3 ms. So this
module uses Popen and two readers of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sglang_router.launch.replica import EngineCommand

LONGEST = 4096
"""Most bytes of a line; the rest of a longer line is dropped."""
_WARDEN = str(Path(__file__).with_name("warden.py"))
_LAST = 5.0
"""Seconds to wait after SIGKILL. A process that hangs in a driver ignores even that and is left behind."""
_POLL = 0.002
"""Seconds between two checks whether the warden has ended."""
_LINGER = 1.0
"""Seconds to wait for output after the warden's end: without subreapers, a left-over process may hold the pipe open."""


class LineSplitter:
    """Splits a stream of bytes into lines of text, without empty ones.

    A carriage return ends a line as well, because progress bars use it. Of several such lines in one read, only the
    last is returned.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False  # the rest of a line that was too long

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the lines that end in these bytes."""
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
        """Yield the text after the last end of a line."""
        yield from self.feed(b"\n")


def _text(line: bytes) -> str:
    """Return what a terminal finally shows of a line: the text after its last carriage return before other text."""
    shown = line.rstrip().rpartition(b"\r")[2]
    text = shown[:LONGEST].decode("utf-8", "replace")
    return f"{text} …" if len(shown) > LONGEST else text


class EngineProcess:
    """See the module. Made by `start`.

    pid     process id of the engine; 0 if not even its warden could run
    exited  done when the engine has ended: its exit status, or minus the signal that killed it
    gone    done when none of its processes is left and all of its output has been read
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
        self._message = b""  # the start of an incomplete message of the warden
        self._started = asyncio.Event()
        self._output = warden.stdout
        self._on_line = on_line
        self._lines = LineSplitter()
        os.set_blocking(self._output.fileno(), False)
        loop.add_reader(channel, self._read_messages)
        loop.add_reader(self._output, self._read_output)

    @classmethod
    async def start(
        cls, loop: asyncio.AbstractEventLoop, command: EngineCommand, on_line: Callable[[str], None]
    ) -> EngineProcess:
        """Start an engine; return when its pid is known. `on_line` is called with each line, without the newline.

        An engine that cannot be run at all writes a line with the reason and exits with status 127.

        Raises: OSError when the system cannot start another process.
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
            await process._started.wait()
        except asyncio.CancelledError:
            process.kill()
            raise
        return process

    def __repr__(self) -> str:
        state = f"ended with {self.exited.result()}" if self.exited.done() else "running"
        return f"<EngineProcess {self.pid}: {state}{', gone' * self.gone.done()}>"

    @property
    def warden_pid(self) -> int:
        """The process id of its warden: all processes of the engine are descendants of it."""
        return self._warden.pid

    # -- its end -----------------------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """Ask the engine to end: SIGTERM to its main process."""
        self._order(b"t")

    def kill(self) -> None:
        """End the engine and all of its descendants at once: SIGKILL."""
        self._order(b"k")

    async def stop(self, grace: float) -> int:
        """Send SIGTERM, and `grace` seconds later SIGKILL to all that is left. Return the engine's status."""
        self.terminate()
        await asyncio.wait({self.gone}, timeout=grace)
        self.kill()
        await asyncio.wait({self.gone}, timeout=_LAST)
        return self.exited.result() if self.exited.done() else -signal.SIGKILL

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(OSError):  # the warden and the engine are gone already
            self._channel.send(order)

    # -- events ------------------------------------------------------------------------------------------------------

    def _read_messages(self) -> None:
        """Read messages of the warden. End of file means that the warden ends."""
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
        *messages, self._message = (self._message + data).split(b"\n")
        for message in messages:
            what, _, number = message.partition(b" ")
            if what == b"pid":
                self.pid = int(number)
                self._started.set()
            else:
                self.exited.set_result(int(number))

    def _read_output(self) -> None:
        """Read output of the engine."""
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
        """Reap the warden. It has closed its socket, so it has ended or is about to."""
        if self._warden.poll() is None:
            self._loop.call_later(_POLL, self._reap)
            return
        if not self.exited.done():
            self._warden_was_killed()
        self._started.set()
        timer = self._loop.call_later(_LINGER, self._end_output)
        self.gone.add_done_callback(lambda _: timer.cancel())
        self._finish()

    def _warden_was_killed(self) -> None:
        """Clean up after a warden that was killed: the engine died with it; kill its process group."""
        status = self._warden.returncode
        if self.pid:
            status = -signal.SIGKILL
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.exited.set_result(status)

    def _finish(self) -> None:
        if self._output.closed and self._warden.returncode is not None:
            self.gone.set_result(None)
