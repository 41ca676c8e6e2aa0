"""The supervisor: restarts who dies, gives up on who dies again and again, and passes the end on."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PRELUDE = """
import os, signal, socket, sys, tempfile, time
from sglang_router.errors import ConfigError
from sglang_router.processes.given import BUILT, ENDING, PASSED, READY, Given
from sglang_router.processes.kept_options import KeptOptions
from sglang_router.processes.supervisor import RestartPatience, ProcessSupervisor

hears, tells = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
hears.setblocking(False)
folder = tempfile.mkdtemp()
given = Given(folder, [[], []], None, [], b"", b"", tells, KeptOptions())

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def serve_until_told():
    tells.send(BUILT)
    tells.send(READY)
    number = signal.sigwait([PASSED[signal.SIGTERM], PASSED[signal.SIGINT]])
    tells.send(ENDING)
    return next(each for each, passed in PASSED.items() if passed == number)
"""
END = """
status = ProcessSupervisor(2, given, hears, run, RestartPatience(0.001, 5.0, 0.05)).supervise()
say("status", status, os.path.exists(folder))
"""


def supervised(run: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose processes do what `run` says, until it ends."""
    program = PRELUDE + textwrap.dedent(run) + END
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30.0, check=False
    )


def test_who_dies_is_started_again_and_knows_why() -> None:
    done = supervised(
        """
        def run(place, launch):
            if place < 0:
                serve_until_told()
                return 0
            say("relay", place, launch.cause or "first")
            if place == 0 and not launch.cause:
                os.kill(os.getpid(), signal.SIGKILL)
            if place == 0:
                os.kill(os.getppid(), signal.SIGTERM)
            signal.pause()
        """
    )
    lines = done.stdout.splitlines()
    assert lines.count("relay 0 first") == 1
    assert lines.count("relay 0 was killed by signal 9") == 1
    assert lines[-1] == "status 0 False"
    assert done.stderr == ""


def test_a_relay_that_ends_again_and_again_ends_the_router() -> None:
    done = supervised(
        """
        def run(place, launch):
            if place < 0:
                return serve_until_told()
            if place == 1:
                signal.pause()
            return 3
        """
    )
    assert done.stderr == "error: relay 1 ended with status 3, 9 times in a row: the router ends\n"
    assert done.stdout.splitlines()[-1] == "status 1 False"


def test_a_decider_that_dies_after_the_signal_is_told_again() -> None:
    """Otherwise the router would go on: the signal went to a process that is no more."""
    done = supervised(
        """
        def run(place, launch):
            if place >= 0:
                signal.pause()
            if launch.cause:
                number = serve_until_told()
                say("told again", number)
                return 0
            tells.send(BUILT)
            tells.send(READY)
            os.kill(os.getppid(), signal.SIGTERM)
            signal.sigwait([PASSED[signal.SIGTERM]])
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert done.stdout.splitlines() == ["told again 15", "status 0 False"]


def test_options_that_cannot_be_used_are_the_supervisors_error() -> None:
    done = supervised(
        """
        def run(place, launch):
            say("place", place)
            raise ConfigError("no such file")
        """
    )
    assert done.stdout.splitlines() == ["place -1"], "no relay was started"
    assert done.stderr.splitlines()[-1] == "sglang_router.errors.ConfigError: no such file"
