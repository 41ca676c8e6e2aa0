"""The warden by itself, with real processes.

Every process that inherited the output holds it open, so end of file shows that all of them have ended, whatever group
or session they are in.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sglang_router.launch import warden

WITHIN = 20.0
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs subreapers and /proc")

AWAY = "setsid sh -c 'echo away; exec sleep 1000' & "
"""A child that leaves group and session of its engine."""
STUBBORN = "trap '' TERM; echo stubborn; while true; do sleep 0.1; done"


class Warded:
    """A warden and its engine, as their launcher sees them."""

    def __init__(self, *argv: str) -> None:
        self.process: subprocess.Popen[bytes]
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", warden.__file__, *argv],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,  # what `select` knows of
                start_new_session=True,
            )
        self.channel.settimeout(WITHIN)
        self._reports = self.channel.makefile("rb")
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.pid = int(self.report().removeprefix("pid "))

    def report(self) -> str:
        return self._reports.readline().decode().strip()

    def line(self) -> str:
        """The next line of output."""
        assert select.select([self.output], [], [], WITHIN)[0], "no output"
        return self.output.readline().decode().strip()

    def order(self, order: bytes) -> None:
        self.channel.sendall(order)

    def rest(self) -> str:
        """Return the rest of the output, once no process is left that could write to it."""
        text = self.process.communicate(timeout=WITHIN)[0].decode()
        assert self.process.returncode is not None
        return text

    def close(self) -> None:
        self._reports.close()
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.output.close()


@contextlib.contextmanager
def warded(*argv: str) -> Iterator[Warded]:
    it = Warded(*argv)
    try:
        yield it
    finally:
        it.close()


def shell(script: str) -> contextlib.AbstractContextManager[Warded]:
    return warded("sh", "-c", script)


def python(script: str) -> contextlib.AbstractContextManager[Warded]:
    return warded(sys.executable, "-I", "-S", "-u", "-c", script)


@pytest.mark.parametrize(
    ("script", "status", "exit_status"),
    [("exit 0", 0, 0), ("exit 3", 3, 3), ("kill -9 $$", -9, 137), ("exit 137", 137, 137)],
)
def test_the_status_of_the_engine_is_told_and_a_signal_is_not_taken_for_one(
    script: str, status: int, exit_status: int
) -> None:
    with shell(f"echo hello; {script}") as it:
        assert it.report() == f"status {status}"
        assert it.rest() == "hello\n"
        assert it.process.returncode == exit_status


def test_a_command_that_does_not_exist_says_so() -> None:
    with warded("no-such-engine", "--port", "1") as it:
        assert it.report() == "status 127"
        assert it.rest() == "cannot run no-such-engine: No such file or directory\n"


def test_the_engine_has_its_own_group_no_input_and_no_signal_ignored() -> None:
    script = "import os; print(os.getpgid(0) == os.getpid(), os.getsid(0) != os.getpid(), os.read(0, 1))"
    with python(script) as it:
        assert it.line() == "True True b''"
    with warded("grep", "SigIgn", "/proc/self/status") as it:
        assert int(it.line().split()[1], 16) == 0


def test_an_order_to_end_is_a_sigterm_to_the_engine_alone() -> None:
    # The child would write if it got the signal as well; only the engine gets it, and ends its child itself.
    child = "trap 'echo the child was hit; exit' TERM; while true; do sleep 0.05; done"
    engine = f"sh -c \"{child}\" & child=$!; trap 'echo bye; kill -9 $child; exit 5' TERM; echo up; wait; wait"
    with shell(engine) as it:
        assert it.line() == "up"
        it.order(b"t")
        assert it.report() == "status 5"
        assert it.rest() == "bye\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_warden_is_such_an_order(number: int) -> None:
    with shell("trap 'exit 7' TERM; echo up; while true; do sleep 0.05; done") as it:
        assert it.line() == "up"
        it.process.send_signal(number)
        assert it.report() == "status 7"


@LINUX
def test_what_a_killed_engine_leaves_behind_is_ended() -> None:
    with shell(f"{AWAY} sh -c 'echo child; exec sleep 1000' & wait") as it:
        assert sorted([it.line(), it.line()]) == ["away", "child"]
        os.kill(it.pid, signal.SIGKILL)
        assert it.report() == "status -9"
        assert it.rest() == ""


@LINUX
def test_far_descendants_are_found_and_so_are_those_born_meanwhile() -> None:
    mother = "trap 'sleep 1000 & echo born' TERM; echo up; sleep 1000 & wait; wait"
    script = f"""
import os, subprocess
subprocess.Popen(["setsid", "sh", "-c", 'setsid sh -c "$0" & wait', {mother!r}])
os.wait()
"""
    with python(script) as it:
        assert it.line() == "up"
        os.kill(it.pid, signal.SIGKILL)
        assert it.report() == "status -9"
        assert it.line() == "born"  # so SIGTERM reached its parent, two sessions away
        it.order(b"k")
        assert it.rest() == ""


@LINUX
def test_the_stubborn_are_killed_after_a_grace_period() -> None:
    with shell(f"sh -c {shlex.quote(STUBBORN)} & wait") as it:
        assert it.line() == "stubborn"
        os.kill(it.pid, signal.SIGKILL)
        assert it.report() == "status -9"
        assert it.rest() == ""


def test_an_order_to_kill_ends_all_at_once() -> None:
    with shell(STUBBORN) as it:
        assert it.line() == "stubborn"
        it.order(b"t")
        it.order(b"k")
        assert it.report() == "status -9"
        assert it.rest() == ""


@LINUX
def test_when_the_launcher_is_gone_all_ends() -> None:
    with shell(AWAY + STUBBORN) as it:
        assert sorted([it.line(), it.line()]) == ["away", "stubborn"]
        it.channel.shutdown(socket.SHUT_RDWR)  # as when the launcher was killed
        assert it.rest() == ""
        assert it.process.returncode == 137


@LINUX
def test_when_the_warden_is_killed_the_engine_ends() -> None:
    with shell("echo up; exec sleep 1000") as it:
        assert it.line() == "up"
        it.process.kill()
        assert it.rest() == ""


@LINUX
def test_orphans_of_a_running_engine_are_not_left_as_zombies() -> None:
    script = """
import os, time
ours, theirs = os.pipe()
if os.fork() == 0:
    orphan = os.fork()
    if orphan == 0:
        os._exit(0)
    os.write(theirs, b"%d" % orphan)
    os._exit(0)
orphan = int(os.read(ours, 20))
os.wait()
while os.path.exists(f"/proc/{orphan}"):
    time.sleep(0.01)
print("reaped")
"""
    with python(script) as it:
        assert it.line() == "reaped"
        assert it.report() == "status 0"
