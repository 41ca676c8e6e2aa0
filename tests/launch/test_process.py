"""Engine processes on the event loop, with real processes: output, orders, ends, and left-over processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.launch.process import LONGEST, EngineProcess, LineSplitter
from sglang_router.launch.replica import EngineCommand

WITHIN = 20.0
STUBBORN = "trap '' TERM; echo up; while true; do sleep 0.1; done"
AWAY = "setsid sh -c 'echo away; exec sleep 1000' & "


class Scene:
    """Starts processes and collects their lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._news = asyncio.Event()

    async def start(self, *argv: str, **env: str) -> EngineProcess:
        command = EngineCommand(argv=argv, env=env, url="http://127.0.0.1:1", runtime="test")
        return await EngineProcess.start(asyncio.get_running_loop(), command, self._hear)

    async def shell(self, script: str, **env: str) -> EngineProcess:
        return await self.start("sh", "-c", script, **env)

    async def python(self, script: str) -> EngineProcess:
        return await self.start(sys.executable, "-I", "-S", "-c", script)

    async def line(self, text: str) -> None:
        """Waits until that line was written."""
        while text not in self.lines:
            self._news.clear()
            await self._news.wait()

    def _hear(self, text: str) -> None:
        self.lines.append(text)
        self._news.set()


def run(scene: Callable[[Scene], Awaitable[None]]) -> None:
    """Run a test's coroutine on its own event loop."""

    async def play() -> None:
        await asyncio.wait_for(scene(Scene()), WITHIN)

    with contextlib.closing(uvloop.new_event_loop()) as loop:
        loop.run_until_complete(play())


# -- lines -------------------------------------------------------------------------------------------------------------


def lines(*pieces: bytes) -> list[str]:
    cutter = LineSplitter()
    return [line for piece in pieces for line in cutter.feed(piece)] + list(cutter.end())


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([b"one\ntwo\n"], ["one", "two"]),
        ([b"on", b"e\nt", b"wo"], ["one", "two"]),
        ([b"one\r\ntwo\r", b"\nthree"], ["one", "two", "three"]),
        ([b"\n\n  \n\r\n"], []),
        ([b"10%\r20%\r30%\r"], ["30%"]),
        ([b"\r10%", b"\r20%\r30%", b"\n"], ["20%", "30%"]),
        ([b"load 99%\rdone\nready\n"], ["done", "ready"]),
        ([b"caf\xc3", b"\xa9 \xff\n"], ["café \ufffd"]),
        ([b"  indented  \n"], ["  indented"]),
    ],
)
def test_lines(pieces: list[bytes], told: list[str]) -> None:
    assert lines(*pieces) == told


def test_a_long_line_is_cut_and_its_rest_is_not_told() -> None:
    long = b"x" * (3 * LONGEST)
    cut = "x" * LONGEST + " …"
    assert lines(long + b"\nnext\n") == [cut, "next"]
    assert lines(long, long, b"y\nnext\n") == [cut, "next"]
    assert lines(long, b"y\rnext\n") == [cut, "next"]
    assert lines(*([b"x" * 1000] * 9), b"\nnext") == [cut, "next"]
    assert lines(b"x" * LONGEST + b"\n") == ["x" * LONGEST]


@given(st.lists(st.binary(max_size=30)))
def test_without_progress_bars_it_does_not_matter_where_a_stream_is_torn(pieces: list[bytes]) -> None:
    plain = [piece.replace(b"\r", b"-") for piece in pieces]
    assert lines(*plain) == lines(b"".join(plain))


@given(st.lists(st.sampled_from([b"\r", b"\n", b"a", b"bb", b"\xc3", b"z" * 3000])))
def test_no_line_is_empty_or_holds_an_end_or_is_too_long(pieces: list[bytes]) -> None:
    for line in lines(*pieces):
        assert line
        assert not set(line) & {"\r", "\n"}
        assert len(line) <= LONGEST + 2


# -- processes ---------------------------------------------------------------------------------------------------------


def test_output_environment_and_status() -> None:
    async def scene(at: Scene) -> None:
        process = await at.shell('echo "$GREETING $HOME"; echo error >&2; exit 3', GREETING="hello")
        assert process.pid > 0
        assert await process.exited == 3
        await process.gone
        assert at.lines == [f"hello {os.environ['HOME']}", "error"]
        assert repr(process) == f"<EngineProcess {process.pid}: ended with 3, gone>"
        assert await process.stop(10.0) == 3  # it has ended already

    run(scene)


def test_the_pid_is_that_of_the_engine() -> None:
    async def scene(at: Scene) -> None:
        process = await at.shell("echo $$; exec sleep 1000")
        await at.line(str(process.pid))
        os.kill(process.pid, signal.SIGKILL)
        assert await process.exited == -signal.SIGKILL
        await process.gone

    run(scene)


def test_what_cannot_be_run_says_so_and_ends() -> None:
    async def scene(at: Scene) -> None:
        process = await at.start("no-such-engine")
        await process.gone
        assert process.exited.result() == 127
        assert at.lines == ["cannot run no-such-engine: No such file or directory"]

    run(scene)


def test_a_command_too_long_for_the_system_is_an_error() -> None:
    async def scene(at: Scene) -> None:
        with pytest.raises(OSError):
            await at.start("echo", *["x" * 100_000] * 100)

    run(scene)


def test_ten_megabytes_of_output_and_a_last_line_without_an_end() -> None:
    async def scene(at: Scene) -> None:
        process = await at.python("print(*['x' * 99] * 100_000, 'the end', sep='\\n', end='')")
        await process.gone
        assert len(at.lines) == 100_001
        assert at.lines[-1] == "the end"

    run(scene)


def test_it_is_asked_to_end_and_takes_its_time() -> None:
    async def scene(at: Scene) -> None:
        process = await at.shell("trap 'echo bye; exit 0' TERM; echo up; while true; do sleep 0.02; done")
        await at.line("up")
        assert await process.stop(WITHIN) == 0
        assert at.lines[-1] == "bye"

    run(scene)


def test_who_does_not_end_is_killed_with_all_descendants() -> None:
    async def scene(at: Scene) -> None:
        process = await at.shell(AWAY + STUBBORN)
        await at.line("up")
        await at.line("away")
        assert await process.stop(0.1) == -signal.SIGKILL
        assert process.gone.done()  # so the pipe of its output is at its end

    run(scene)


def test_a_stop_can_be_hurried() -> None:
    async def scene(at: Scene) -> None:
        process = await at.shell(STUBBORN)
        await at.line("up")
        stops = [asyncio.ensure_future(process.stop(1000.0)) for _ in range(2)]
        process.kill()
        assert await asyncio.gather(*stops) == [-signal.SIGKILL] * 2

    run(scene)


def test_the_end_of_the_engine_is_told_before_its_children_are_gone() -> None:
    async def scene(at: Scene) -> None:
        process = await at.shell(f"sh -c {shlex.quote(STUBBORN)} & wait")
        await at.line("up")
        os.kill(process.pid, signal.SIGKILL)
        assert await process.exited == -signal.SIGKILL
        assert not process.gone.done()
        process.kill()
        await process.gone

    run(scene)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split()[3])


def test_a_killed_warden_takes_the_engine_and_its_group_along(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    reading = os.open(held, os.O_RDONLY | os.O_NONBLOCK)

    async def scene(at: Scene) -> None:
        process = await at.shell(f"exec 9> {shlex.quote(str(held))}; sh -c 'echo up; exec sleep 1000' & wait")
        await at.line("up")
        os.kill(parent_of(process.pid), signal.SIGKILL)
        await process.gone
        assert process.exited.result() == -signal.SIGKILL

    with open(reading) as holders:
        run(scene)
        assert select.select([holders], [], [], WITHIN)[0]
        assert holders.read() == ""  # end of file: no process that inherited the pipe is left


LAUNCHER = """
import asyncio, uvloop
from sglang_router.launch.process import EngineProcess
from sglang_router.launch.replica import EngineCommand

async def main():
    command = EngineCommand(argv=("sh", "-c", SCRIPT), env={}, url="", runtime="")
    for _ in range(2):
        await EngineProcess.start(asyncio.get_running_loop(), command, lambda line: print(line, flush=True))
    await asyncio.sleep(1000)

uvloop.new_event_loop().run_until_complete(main())
"""


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    script = f"exec 9> {shlex.quote(str(held))}; {AWAY} {STUBBORN}"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.replace("SCRIPT", repr(script))], stdout=subprocess.PIPE, text=True
    )
    with launcher, held.open() as holders:
        assert launcher.stdout is not None
        assert sorted(launcher.stdout.readline() for _ in range(4)) == ["away\n"] * 2 + ["up\n"] * 2
        launcher.kill()
        assert holders.read() == ""  # end of file: no process that inherited the pipe is left
