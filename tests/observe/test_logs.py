"""Log lines arrive whole, and a destination that accepts none costs lines, never time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_router.errors import ConfigError
from sglang_router.observe import logs
from sglang_router.observe.line_parts import Stamp
from sglang_router.observe.log_files import DailyFile
from sglang_router.observe.writer import LineBuffer, OpenFile

LINE = "a line of sixty-four characters, newline and all, for the tests\n"
F_SETPIPE_SZ = 1031  # Linux


def notice(missing: int) -> str:
    return f"missing={missing}\n"


@contextlib.contextmanager
def small_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that holds 4,096 bytes."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    try:
        yield reading, writing
    finally:
        for fd in (reading, writing):
            with contextlib.suppress(OSError):
                os.close(fd)


def read_lines(fd: int, count: int) -> list[str]:
    data = b""
    while data.count(b"\n") < count:
        readable, _, _ = select.select([fd], [], [], 10)
        assert readable, f"only {data.count(10)} of {count} lines came"
        data += os.read(fd, 65536)
    return data.decode().splitlines(keepends=True)


def wait_until_full(fd: int) -> None:
    """Until the 4,096 bytes of a small pipe are there: then its writer is stuck."""
    deadline = time.monotonic() + 10
    while struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0] < 4096:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.001)


# -- LineBuffer ----------------------------------------------------------------------------------------------


def test_what_is_accepted_is_written_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    buffer = LineBuffer(OpenFile(fd), notice)
    expected = [f"line {number} é\n" for number in range(5000)]
    for line in expected:
        buffer.put(line)
    assert buffer.flush(10)
    assert path.read_text().splitlines(keepends=True) == expected
    buffer.put("last\n")
    buffer.close(10)
    assert path.read_text().endswith("line 4999 é\nlast\n")
    assert buffer.lost == 0
    os.close(fd)


def test_lines_from_several_threads_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    buffer = LineBuffer(OpenFile(fd), notice)

    def write(name: str) -> None:
        for number in range(500):
            buffer.put(f"{name} {number}\n")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    buffer.close(10)
    lines = path.read_text().splitlines()
    for name in "abcd":
        assert [line for line in lines if line[0] == name] == [f"{name} {n}" for n in range(500)]
    os.close(fd)


def test_a_pipe_that_nobody_reads_costs_lines_and_says_how_many() -> None:
    with small_pipe() as (reading, writing):
        buffer = LineBuffer(OpenFile(writing), notice, capacity=8192)
        for _ in range(100):
            buffer.put(LINE)
        wait_until_full(reading)
        total = 1000
        for _ in range(total - 100):  # far more than pipe and buffer hold: returns, or this test hangs
            buffer.put(LINE)
        assert buffer.lost == total - 8192 // len(LINE)
        assert not buffer.flush(0.01)
        accepted = total - buffer.lost
        assert read_lines(reading, accepted) == [LINE] * accepted
        assert buffer.flush(10)
        lost = buffer.lost
        buffer.put("again\n")
        assert read_lines(reading, 2) == [f"missing={lost}\n", "again\n"]
        assert buffer.lost == lost
        buffer.close(10)


def test_closing_does_not_wait_for_ever_for_a_blocked_pipe() -> None:
    with small_pipe() as (reading, writing):
        buffer = LineBuffer(OpenFile(writing), notice)
        for _ in range(100):
            buffer.put(LINE)
        wait_until_full(reading)
        buffer.close(0.01)  # returns
        buffer.put(LINE)
        assert buffer.lost == 1
        assert read_lines(reading, 101) == [LINE] * 100 + ["missing=1\n"]


def test_a_non_blocking_pipe_is_waited_for() -> None:
    with small_pipe() as (reading, writing):
        os.set_blocking(writing, False)
        buffer = LineBuffer(OpenFile(writing), notice)
        for _ in range(200):
            buffer.put(LINE)
        assert read_lines(reading, 200) == [LINE] * 200
        buffer.close(10)
        assert buffer.lost == 0


def test_a_full_disk_costs_lines_and_says_how_many(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    buffer = LineBuffer(OpenFile(fd), notice)
    for batch in range(2):
        for _ in range(3):
            buffer.put(LINE)
        assert buffer.flush(10)
        assert buffer.lost == 3 * (batch + 1)
    path = tmp_path / "log"
    space = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(space, fd)
    buffer.put("again\n")
    buffer.close(10)
    assert path.read_text() == "missing=6\nagain\n"
    assert buffer.lost == 6
    os.close(space)
    os.close(fd)


def test_a_line_torn_by_a_failure_is_ended_before_the_next(tmp_path: Path) -> None:
    line = "x" * 99 + "\n"
    path = tmp_path / "log"
    with small_pipe() as (reading, writing):
        buffer = LineBuffer(OpenFile(writing), notice)
        for _ in range(60):
            buffer.put(line)
        wait_until_full(reading)
        os.close(reading)
        assert buffer.flush(10)
        assert buffer.lost == 60 - 4096 // 100
        space = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(space, writing)
        buffer.put("again\n")
        buffer.close(10)
        assert path.read_text() == "\nmissing=20\nagain\n"
        os.close(space)


# -- the file of the day --------------------------------------------------------------------------------


def test_each_day_has_its_file(tmp_path: Path) -> None:
    days = iter([86400.0 * 20000, 86400.0 * 20000 + 86399, 86400.0 * 20001])
    file = DailyFile(str(tmp_path / "new" / "logs"), lambda: next(days))
    os.write(file.fd(), b"one\n")
    os.write(file.fd(), b"two\n")
    file.close()
    files = {path.name: path.read_text() for path in (tmp_path / "new" / "logs").iterdir()}
    assert files == {"sglang-router.2024-10-04.log": "one\n", "sglang-router.2024-10-05.log": "two\n"}


def test_a_file_that_was_taken_away_is_made_anew(tmp_path: Path) -> None:
    file = DailyFile(str(tmp_path), lambda: 0.0)
    os.write(file.fd(), b"one\n")
    path = tmp_path / "sglang-router.1970-01-01.log"
    path.unlink()
    os.write(file.fd(), b"two\n")
    file.close()
    assert path.read_text() == "two\n"


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--log-dir .*file/logs: Not a directory"):
        logs.configure("info", "text", str(tmp_path / "file" / "logs"))


# -- lines ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def configured(tmp_path: Path, level: str = "info", form: str = "text") -> Iterator[Path]:
    path = tmp_path / "stderr"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    writer = logs.configure(level, form, None, stderr=fd)
    try:
        yield path
    finally:
        writer.close()
        os.close(fd)


def test_stamps_are_utc_with_milliseconds() -> None:
    stamp = Stamp()
    times = [0.0, 1.9999, 1761393600.25, 1761393600.251, 1761393600.2514, 1761393601.0]
    assert [stamp(now) for now in times] == [
        "1970-01-01T00:00:00.000Z",
        "1970-01-01T00:00:01.999Z",
        "2025-10-25T12:00:00.250Z",
        "2025-10-25T12:00:00.251Z",
        "2025-10-25T12:00:00.251Z",
        "2025-10-25T12:00:01.000Z",
    ]


def test_text_lines(tmp_path: Path) -> None:
    with configured(tmp_path) as path:
        log = logging.getLogger("sglang_router.x")
        log.debug("not wanted")
        log.info("%d of %s", 3, "these", extra={"fields": {"worker": "http://w:1", "why": "no one", "n": 2}})
        log.error("bad\nline\x1b[2K")
        logging.getLogger("somebody.else").info("not wanted")
        logging.getLogger("somebody.else").warning("wanted")
    lines = [line[24:] for line in path.read_text().splitlines()]
    assert lines == [
        ' INFO  sglang_router.x: 3 of these worker=http://w:1 why="no one" n=2',
        " ERROR sglang_router.x: bad\\nline\\u001b[2K",
        " WARN  somebody.else: wanted",
    ]


def test_json_lines(tmp_path: Path) -> None:
    with configured(tmp_path, "debug", "json") as path:
        log = logging.getLogger("sglang_router.x")
        log.debug('say "hi"\n', extra={"fields": {"n": 2, "path": Path("/p"), "level": "forged"}})
        log.critical("\ud800")
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "debug", "logger": "sglang_router.x", "message": 'say "hi"\n', "n": 2, "path": "/p",
    }  # fmt: skip
    assert second["level"] == "error"


def test_a_traceback_cannot_forge_a_line(tmp_path: Path) -> None:
    with configured(tmp_path) as path:
        try:
            raise ValueError("oops\n2026-01-01T00:00:00.000Z INFO  sglang_router: all is well")
        except ValueError:
            logging.getLogger("sglang_router").exception("it failed")
    first, *rest = path.read_text().splitlines()
    assert first.endswith(" ERROR sglang_router: it failed")
    assert rest
    assert all(line.startswith("    | ") for line in rest)


def test_text_that_no_encoding_takes_is_escaped(tmp_path: Path) -> None:
    with configured(tmp_path) as path:
        logging.getLogger("sglang_router").warning("file \udcff")
    assert path.read_text().endswith(" WARN  sglang_router: file \\udcff\n")


def test_stderr_and_the_file_get_the_same(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT)
    writer = logs.configure("info", "text", str(tmp_path / "logs"), stderr=fd)
    logging.getLogger("sglang_router").info("hello")
    writer.close()
    os.close(fd)
    (file,) = (tmp_path / "logs").iterdir()
    assert file.read_text() == (tmp_path / "stderr").read_text()
    assert "hello" in file.read_text()


def test_a_blocked_stderr_does_not_hold_up_the_file(tmp_path: Path) -> None:
    with small_pipe() as (reading, writing):
        writer = logs.configure("info", "text", str(tmp_path), stderr=writing)
        try:
            for number in range(200):
                logging.getLogger("sglang_router").info("line %d", number)
            wait_until_full(reading)
            assert not writer.flush(0.3)
            (file,) = tmp_path.iterdir()
            assert file.read_text().count("\n") == 200
        finally:
            assert len(read_lines(reading, 200)) == 200
            writer.close()


PROGRAM = """
import logging, sys
from sglang_router.observe import logs
writer = logs.configure("info", "text", None)
for number in range(1000):
    logging.getLogger("sglang_router").info("line %d", number)
logging.getLogger("sglang_router").info("%d workers", "many")
sys.exit(3)
"""


def test_a_process_that_ends_has_written_all_it_accepted() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    *lines, last = done.stderr.splitlines()
    assert [line.split()[-1] for line in lines] == [str(n) for n in range(1000)]
    # Arguments that do not fit their message are a mistake of ours, and still worth a line.
    assert last.endswith("sglang_router: %d workers ('many',)")
