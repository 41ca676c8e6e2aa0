"""The scale command, with real processes: its environment, its order, its end."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from scaling_decisions import WITHIN, decision, until
from sglang_router.autoscale.command import ScaleCommand

RECORD = """
import os, sys
names = ("DESIRED_WORKERS", "CURRENT_WORKERS", "SCALE_REASON")
with open(sys.argv[1], "a") as file:
    file.write("|".join(os.environ["SGLANG_ROUTER_" + name] for name in names) + "\\n")
"""


def python(program: str, *words: object) -> str:
    return shlex.join([sys.executable, "-S", "-E", "-c", program, *map(str, words)])


def play(
    command: str,
    scene: Callable[[ScaleCommand], Awaitable[None]],
    timeout: float = WITHIN,
    acts: Callable[[], bool] = lambda: True,
) -> None:
    """Run a scene on the kind of event loop that the router uses."""

    async def whole() -> None:
        running = ScaleCommand(asyncio.get_running_loop(), command, timeout, acts)
        try:
            await scene(running)
        finally:
            await asyncio.wait_for(running.close(), 5.0)

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


def ran(command: ScaleCommand, times: int) -> Callable[[], bool]:
    return lambda: command.explain()["runs"] == times and not command.explain()["running"]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a killed child of a killed child is a zombie until whoever inherited it looks


def test_the_environment_tells_the_decision(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def scene(command: ScaleCommand) -> None:
        command.scale(decision(3, 1, reason="queue: 37 waiting; $(reboot) 'x'"))
        command.scale(decision(3, 1, changed=False))
        await until(ran(command, 1))
        state = command.explain()
        assert (state["to"], state["last_status"], state["last_error"]) == (sys.executable, 0, "")

    play(python(RECORD, log), scene)
    assert log.read_text() == "3|1|queue: 37 waiting; $(reboot) 'x'\n"


def test_one_at_a_time_and_the_newest_next(tmp_path: Path) -> None:
    log, gates = tmp_path / "log", [tmp_path / "gate2", tmp_path / "gate1"]
    for gate in gates:
        os.mkfifo(gate)

    async def scene(command: ScaleCommand) -> None:
        command.scale(decision(2))
        await until(lambda: log.exists())
        for desired in (3, 4, 1):
            command.scale(decision(desired))
        for gate in gates:
            await asyncio.get_running_loop().run_in_executor(None, gate.write_text, "go")
        await until(ran(command, 2))

    play(
        python(
            RECORD + "open(sys.argv[2] + os.environ['SGLANG_ROUTER_DESIRED_WORKERS']).read()", log, tmp_path / "gate"
        ),
        scene,
    )
    assert [line.split("|")[0] for line in log.read_text().splitlines()] == ["2", "1"]


def test_who_acts_no_more_does_not_run_what_waits(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    os.mkfifo(gate)
    leads = [True]

    async def scene(command: ScaleCommand) -> None:
        command.scale(decision(2))
        await until(log.exists)
        command.scale(decision(3))
        leads[0] = False
        await asyncio.get_running_loop().run_in_executor(None, gate.write_text, "go")
        await until(ran(command, 1))
        leads[0] = True
        command.scale(decision(4))
        await asyncio.get_running_loop().run_in_executor(None, gate.write_text, "go")
        await until(ran(command, 2))

    play(python(RECORD + "open(sys.argv[2]).read()", log, gate), scene, acts=lambda: leads[0])
    assert [line.split("|")[0] for line in log.read_text().splitlines()] == ["2", "4"]


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        (python("import sys; sys.exit('first\\nkubectl: no such deployment\\n')"), 1, "status 1, kubectl: no such"),
        (python("import sys; sys.exit(7)"), 7, "status 7"),
        (python("import os; os.kill(os.getpid(), 15)"), -15, "status -15"),
        ("/nowhere/scale-it --now", None, "cannot be run: No such file or directory"),
        (
            python("import os; os.write(2, b'x' * 300000 + b'\\nlast \\xff\\n'); raise SystemExit(3)"),
            3,
            "status 3, last",
        ),
    ],
)
def test_a_failure_is_told_and_the_next_decision_runs_again(
    command: str, status: int | None, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(running: ScaleCommand) -> None:
        running.scale(decision(2))
        await until(ran(running, 1))
        assert running.explain()["last_status"] == status
        assert running.explain()["last_error"].startswith(error)
        running.scale(decision(3))
        await until(ran(running, 2))

    play(command, scene)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_one_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "pids"
    program = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + "~", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + "~", sys.argv[1])
time.sleep(600)
"""

    async def scene(command: ScaleCommand) -> None:
        command.scale(decision(2))
        await until(ran(command, 1))
        assert command.explain()["last_error"] == "timed out after 2 s, killed"
        pids = [int(pid) for pid in log.read_text().split()]
        await until(lambda: not any(alive(pid) for pid in pids))

    play(python(program, log), scene, timeout=2.0)


def test_what_it_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    """A script that starts something in the background, which holds its standard error."""
    log = tmp_path / "pid"
    program = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
os.symlink(str(child.pid), sys.argv[1])
"""

    async def scene(command: ScaleCommand) -> None:
        command.scale(decision(2))
        await until(ran(command, 1))
        assert command.explain()["last_status"] == 0
        assert alive(int(os.readlink(log)))

    try:
        play(python(program, log), scene)
    finally:
        os.kill(int(os.readlink(log)), signal.SIGKILL)


def test_the_end_kills_what_runs(tmp_path: Path) -> None:
    log = tmp_path / "pid"
    program = "import os, sys, time; os.symlink(str(os.getpid()), sys.argv[1]); time.sleep(600)"

    async def scene(command: ScaleCommand) -> None:
        command.scale(decision(2))
        await until(lambda: log.is_symlink())

    play(python(program, log), scene)
    assert not alive(int(os.readlink(log)))
