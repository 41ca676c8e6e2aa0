"""The output about replicas: on a terminal (a real pty), in a log, in files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_router.errors import ConfigError
from sglang_router.launch.download import ProgressBar
from sglang_router.launch.replica import EngineCommand, EngineReplica, ReplicaState
from sglang_router.launch.report import EngineLines, LogEcho, LogFiles, ReplicaReport, ReportOutputs, manual_command
from sglang_router.launch.screen import Screen, cut
from sglang_router.observe.logs import LogWriter
from sglang_router.observe.writer import OpenFile

WITHIN = 20.0


class Terminal:
    """A pty of 40 columns and 6 rows, and its visible text: enough of a VT100 for the output of a Screen."""

    def __init__(self) -> None:
        self.master, self.fd = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 6, 40, 0, 0))
        self.rows = [""]  # all rows so far; the last six are on the screen
        self.row = 0
        self._decoded = ""

    def close(self) -> None:
        for fd in (self.master, self.fd):
            with contextlib.suppress(OSError):
                os.close(fd)

    def until(self, seen: Callable[[list[str]], bool]) -> list[str]:
        """Read until the rows are as wanted; return them."""
        deadline = time.monotonic() + WITHIN
        while not seen(self.rows):
            readable, _, _ = select.select([self.master], [], [], 0.1)
            if readable:
                self._decoded += os.read(self.master, 65536).decode()
                self._decoded = self._interpret(self._decoded)
            assert time.monotonic() < deadline, self.rows
        return self.rows

    def _interpret(self, text: str) -> str:
        while text:
            whole = re.match(r"\x1b\[(\d*)([AJ])|\r|\n|[^\x1b\r\n]+", text)
            if whole is None:
                return text  # the rest of a sequence is still to come
            self._obey(whole[0], whole[1], whole[2])
            text = text[whole.end() :]
        return ""

    def _obey(self, word: str, count: str, order: str) -> None:
        top = max(0, len(self.rows) - 6)
        if order == "A":
            self.row = max(top, self.row - int(count or 1))
        elif order == "J":
            assert not count
            del self.rows[self.row + 1 :]
            self.rows[self.row] = ""
        elif word == "\n":
            self.row += 1
            if self.row == len(self.rows):
                self.rows.append("")
        elif word != "\r":
            assert len(self.rows[self.row] + word) <= 40, "a row that wraps cannot be taken away"
            self.rows[self.row] += word


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.close()


# -- the rows ----------------------------------------------------------------------------------------------------------


def test_rows_stay_below_what_is_written(terminal: Terminal) -> None:
    screen = Screen(terminal.fd)
    screen.show(["rank 0 starting", "rank 1 starting"])
    terminal.until(lambda rows: rows == ["rank 0 starting", "rank 1 starting", ""])
    os.write(terminal.fd, b"a log line\nanother\n")
    screen.show(["rank 0 healthy", "rank 1 starting"])
    terminal.until(lambda rows: rows == ["a log line", "another", "rank 0 healthy", "rank 1 starting", ""])
    screen.show(["rank 1 healthy"])
    terminal.until(lambda rows: rows == ["a log line", "another", "rank 1 healthy", ""])
    screen.close()
    os.write(terminal.fd, b"afterwards\n")
    terminal.until(lambda rows: rows == ["a log line", "another", "afterwards", ""])


def test_many_lines_all_get_through_in_order(terminal: Terminal) -> None:
    screen = Screen(terminal.fd)
    screen.show(["one", "two"])
    for number in range(300):
        os.write(terminal.fd, f"line {number}\n".encode())
        if number % 50 == 0:
            terminal.until(lambda rows, number=number: f"line {number}" in rows)  # type: ignore[misc]
    screen.close()
    terminal.until(lambda rows: rows == [*(f"line {number}" for number in range(300)), ""])


def test_a_line_in_two_pieces_is_not_torn_by_a_row(terminal: Terminal) -> None:
    screen = Screen(terminal.fd)
    screen.show(["row"])
    terminal.until(lambda rows: rows == ["row", ""])
    os.write(terminal.fd, b"first half, ")
    screen.show(["row 2"])
    terminal.until(lambda rows: rows == ["row 2", ""])
    os.write(terminal.fd, b"second half\nno newline at the end")
    terminal.until(lambda rows: rows == ["first half, second half", "row 2", ""])
    screen.close()
    terminal.until(lambda rows: rows == ["first half, second half", "no newline at the end"])


def test_rows_fit_the_terminal(terminal: Terminal) -> None:
    screen = Screen(terminal.fd)
    screen.show([f"{number} {'x' * 50}" for number in range(9)])
    rows = terminal.until(lambda rows: len(rows) == 6)
    assert rows == [*(f"{number} {'x' * 36}…" for number in range(5)), ""]
    screen.close()
    terminal.until(lambda rows: rows == [""])


def test_closing_twice_and_showing_afterwards_do_nothing(terminal: Terminal) -> None:
    screen = Screen(terminal.fd)
    screen.close()
    screen.close()
    screen.show(["x"])
    os.write(terminal.fd, b"y\n")
    terminal.until(lambda rows: rows == ["y", ""])


def test_a_terminal_that_has_gone_holds_nobody_up(terminal: Terminal) -> None:
    screen = Screen(terminal.fd)
    screen.show(["row"])
    os.close(terminal.master)
    for _ in range(200):
        os.write(terminal.fd, b"x" * 1023 + b"\n")  # more than a pipe holds
    screen.close()


@pytest.mark.parametrize(
    ("text", "width", "seen"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("", 3, ""),
        ("你好", 4, "你好"),
        ("你好", 3, "你…"),
        ("a你好b", 4, "a你…"),
    ],
)
def test_cut(text: str, width: int, seen: str) -> None:
    assert cut(text, width) == seen


# -- the report --------------------------------------------------------------------------------------------------------


class PlayedTimer:
    """A call that is due at a time of a Stage's clock."""

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def ring(self) -> None:
        if self._call is not None:
            self._call()


class Stage:
    """A report with its own clock and timers, a pipe for its log, and replicas as a supervisor has them."""

    def __init__(
        self, size: int, form: str = "text", lines: EngineLines | None = None, screen: Screen | None = None
    ) -> None:
        self.now = 100.0
        self._timers: list[PlayedTimer] = []
        self._pipe, writing = os.pipe()
        self._writing = writing
        self.writer = LogWriter(20, form, [OpenFile(writing)])
        self.replicas = [EngineReplica(rank, self.now) for rank in range(size)]
        self.report = ReplicaReport(
            later=self._later,
            clock=lambda: self.now,
            outputs=ReportOutputs(self.writer, lines or LogEcho(self.writer), screen),
            size=size,
            url="http://h:1",
            manual_command=lambda rank: f"engine --rank {rank}",
        )

    def _later(self, seconds: float, call: Callable[[], None]) -> PlayedTimer:
        timer = PlayedTimer(self.now + seconds, call)
        self._timers.append(timer)
        return timer

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [timer for timer in self._timers if timer.at <= until]:
            first = min(due, key=lambda timer: timer.at)
            self._timers.remove(first)
            self.now = first.at
            first.ring()
        self.now = until

    def move(self, rank: int, state: ReplicaState, reason: str = "", pid: int = 0) -> None:
        replica = self.replicas[rank]
        replica.state, replica.reason, replica.pid, replica.since = state, reason, pid, self.now
        if state is ReplicaState.STARTING:
            replica.started_at = self.now
            replica.tail.clear()
        self.report.changed(replica)

    def say(self, rank: int, *texts: str) -> None:
        for text in texts:
            self.replicas[rank].tail.append(text)
            self.report.line(self.replicas[rank], text)

    def said(self) -> list[str]:
        """Return the log lines since the last call, without their time."""
        assert self.writer.flush(WITHIN)
        os.write(self._writing, b"\0")
        data = b""
        while not data.endswith(b"\0"):
            data += os.read(self._pipe, 65536)
        return re.sub(r"(?m)^\d{4}-\S+Z ", "", data[:-1].decode()).replace("sglang_router.", "").splitlines()

    def close(self) -> None:
        self.report.close()
        self.writer.close()
        for fd in (self._pipe, self._writing):
            os.close(fd)


@contextlib.contextmanager
def stage(
    size: int, form: str = "text", lines: EngineLines | None = None, screen: Screen | None = None
) -> Iterator[Stage]:
    made = Stage(size, form, lines, screen)
    try:
        yield made
    finally:
        made.close()


def test_a_start_in_a_log() -> None:
    with stage(2) as it:
        it.move(0, ReplicaState.STARTING)
        it.move(1, ReplicaState.STARTING)
        it.say(0, "loading \x1b[32mweights\x1b[0m\x07")
        it.move(0, ReplicaState.LOADING)
        it.pass_time(10)
        it.move(0, ReplicaState.HEALTHY, pid=1)
        it.pass_time(11)
        it.move(1, ReplicaState.HEALTHY, pid=1)
        assert it.said() == [
            "INFO  replicas: a replica is starting rank=0",
            "INFO  replicas: a replica is starting rank=1",
            "[rank 0] loading weights\\u0007",
            "INFO  replicas: a replica is loading rank=0",
            'INFO  replicas: a replica is still loading rank=0 seconds=10 last="loading weights\\u0007"',
            'INFO  replicas: a replica is still starting rank=1 seconds=10 last=""',
            "INFO  replicas: a replica is healthy rank=0 seconds=10.0",
            "INFO  replicas: serving on http://h:1/v1",
            'INFO  replicas: a replica is still starting rank=1 seconds=20 last=""',
            "INFO  replicas: a replica is healthy rank=1 seconds=21.0",
            "INFO  replicas: 2 of 2 replicas are healthy seconds=21.0 url=http://h:1/v1",
        ]
        it.pass_time(1000)
        assert it.said() == [], "the start is over"


def test_a_replica_that_ends_before_it_is_healthy() -> None:
    with stage(2) as it:
        for rank in (0, 1):
            it.move(rank, ReplicaState.STARTING)
        it.say(0, "Traceback", "torch.OutOfMemoryError: CUDA out of memory.")
        it.move(1, ReplicaState.HEALTHY, pid=1)
        it.said()
        it.move(0, ReplicaState.RESTARTING, "exited with status 1")
        assert it.said() == [
            'WARN  replicas: a replica will be restarted rank=0 reason="exited with status 1"',
            'ERROR replicas: a replica did not become healthy; its last lines rank=0 reason="exited with status 1"',
            "    | Traceback",
            "    | torch.OutOfMemoryError: CUDA out of memory.",
            "ERROR replicas: not enough memory: let the engine use less, or give each replica more GPUs (--tp-size);"
            " to try it by hand: engine --rank 0 rank=0",
            "WARN  replicas: 1 of 2 replicas are healthy seconds=0.0 url=http://h:1/v1",
        ]
        it.move(0, ReplicaState.FAILED, "left down")
        assert it.said() == ['ERROR replicas: a replica is left down rank=0 reason="left down"'], "explained once"


def test_none_could_be_started() -> None:
    with stage(1) as it:
        it.move(0, ReplicaState.STARTING)
        it.move(0, ReplicaState.FAILED, "cannot be started: No such file or directory")
        said = "\n".join(it.said())
        assert "did not become healthy; it printed nothing" in said
        assert "\nERROR replicas: to try it by hand: engine --rank 0 rank=0\n" in said
        assert said.endswith("no replica could be started seconds=0.0")


def test_after_the_start_only_changes_and_lines() -> None:
    with stage(1) as it:
        it.move(0, ReplicaState.STARTING)
        it.move(0, ReplicaState.HEALTHY, pid=1)
        it.said()
        it.say(0, "serving")
        it.move(0, ReplicaState.RESTARTING, "killed by SIGKILL")
        it.replicas[0].restarts = 1
        it.move(0, ReplicaState.STARTING)
        it.move(0, ReplicaState.HEALTHY, pid=2)
        it.move(0, ReplicaState.RESTARTING, "a restart was requested", pid=2)
        it.move(0, ReplicaState.STOPPING)
        it.move(0, ReplicaState.STOPPED)
        assert it.said() == [
            "[rank 0] serving",
            'WARN  replicas: a replica will be restarted rank=0 reason="killed by SIGKILL"',
            "INFO  replicas: a replica is starting rank=0 restarts=1",
            "INFO  replicas: a replica is healthy rank=0 seconds=0.0 restarts=1",
            'INFO  replicas: a replica will be restarted rank=0 reason="a restart was requested" restarts=1',
            "INFO  replicas: a replica is stopping rank=0 restarts=1",
            "INFO  replicas: a replica has stopped rank=0 restarts=1",
        ]


def test_records_where_the_log_is_json() -> None:
    with stage(1, "json") as it:
        it.move(0, ReplicaState.STARTING)
        it.say(0, "a [b]\x1b[1m")
        it.move(0, ReplicaState.FAILED, "exited with status 1")
        records = [json.loads(line) for line in it.said()]
        assert [(each["message"], each["rank"]) for each in records[:2]] == [("a replica is starting", 0), ("a [b]", 0)]
        assert records[3]["trace"] == "a [b]"


def test_a_start_on_a_terminal(terminal: Terminal) -> None:
    with stage(2, screen=Screen(terminal.fd)) as it:
        it.move(0, ReplicaState.STARTING)
        it.move(1, ReplicaState.STARTING)
        it.move(0, ReplicaState.LOADING)
        it.say(0, "\x1b[1mshards:  25%\x1b[0m of all")
        it.pass_time(3)
        rows = ["rank 0  loading        3 s  shards:  2…", "rank 1  starting       3 s", ""]
        terminal.until(lambda seen: seen == rows)
        it.move(0, ReplicaState.HEALTHY, pid=1)
        it.pass_time(2)
        terminal.until(lambda seen: seen == ["rank 0  healthy        3 s", "rank 1  starting       5 s", ""])
        it.move(1, ReplicaState.HEALTHY, pid=1)
        terminal.until(lambda seen: seen == [""])
        it.say(0, "a request")
        assert it.said() == [
            "INFO  replicas: serving on http://h:1/v1",
            "INFO  replicas: 2 of 2 replicas are healthy seconds=5.0 url=http://h:1/v1",
            "[rank 0] a request",
        ]


def test_an_end_during_the_start_takes_the_rows_away(terminal: Terminal) -> None:
    with stage(1, screen=Screen(terminal.fd)) as it:
        it.move(0, ReplicaState.STARTING)
        it.pass_time(1)
        terminal.until(lambda seen: len(seen) == 2)
        it.move(0, ReplicaState.STOPPING)
        terminal.until(lambda seen: seen == [""])


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_for_each_rank(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "here"
    for text in ("first start", "second start"):
        files = LogFiles(str(folder))
        with stage(3, lines=files) as it:
            it.say(0, text)
            it.say(2, "é\x1b[0m\r")
            assert it.said() == [], "not echoed as well"
    assert (folder / "rank-0.log").read_text() == "first start\nsecond start\n"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.log", "rank-2.log"]


def test_lines_go_to_files_while_rows_are_shown(tmp_path: Path, terminal: Terminal) -> None:
    with stage(1, lines=LogFiles(str(tmp_path)), screen=Screen(terminal.fd)) as it:
        it.move(0, ReplicaState.STARTING)
        it.say(0, "loading")
    assert (tmp_path / "rank-0.log").read_text() == "loading\n"


def test_folder_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--log-dir .*file/x: Not a directory"):
        LogFiles(str(tmp_path / "file" / "x"))


# -- odds and ends -----------------------------------------------------------------------------------------------------


def test_the_manual_command_hides_secrets() -> None:
    argv = ("py", "--api-key", "hush", "--hf-token=hush", "--model", "a b", "--tokenizer-path", "t")
    shown = manual_command(EngineCommand(argv=argv, env={"A": "1"}, url="", runtime=""))
    assert shown == "env A=1 py --api-key '***' '--hf-token=***' --model 'a b' --tokenizer-path t"
    assert manual_command(EngineCommand(argv=("py",), env={}, url="", runtime="")) == "py"


class TextStream:
    """A text stream that records what is written; a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        self.text = ""
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""


@pytest.mark.parametrize(
    ("terminal", "seen"),
    [
        (
            True,
            "\rm  [------------------------]  0 of 8 MB\rm  [######------------------]  2 of 8 MB"
            "\rm  [########################]  8 of 8 MB\n",
        ),
        (False, "m  0 % of 8 MB\nm  25 % of 8 MB\nm  100 % of 8 MB\n"),
    ],
)
def test_bar_of_a_download(terminal: bool, seen: str) -> None:
    stream = TextStream(terminal)
    bar = ProgressBar("m", stream)
    for done in (0, 1000, 2_000_000, 2_000_100, 8_000_000):
        bar(done, 8_000_000)
    bar.close()
    assert stream.text == seen


def test_no_download_leaves_no_trace() -> None:
    stream = TextStream(True)
    ProgressBar("m", stream).close()
    assert stream.text == ""
