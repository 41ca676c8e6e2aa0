"""Log files are begun anew when they are moved away, and only as many are kept as wanted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_router.observe.log_files import DailyFile, KeepRules, PathFile
from sglang_router.observe.logs import configure

DAY = 86400.0
TODAY = 20000 * DAY  # 2024-10-04


def test_case_22_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    """After `mv`, as logrotate does it, lines went into the moved file for ever."""
    for path, file in (
        (tmp_path / "sglang-router.2024-10-04.log", DailyFile(str(tmp_path), lambda: TODAY)),
        (tmp_path / "rank-0.log", PathFile(str(tmp_path / "rank-0.log"))),
    ):
        os.write(file.fd(), b"one\n")
        path.rename(tmp_path / "moved")
        os.write(file.fd(), b"two\n")
        path.with_suffix(".other").write_text("theirs\n")
        path.with_suffix(".other").rename(path)  # another file has the name now
        os.write(file.fd(), b"three\n")
        file.close()
        assert (tmp_path / "moved").read_text() == "one\n"
        assert path.read_text() == "theirs\nthree\n"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_case_22_number_of_kept_files(tmp_path: Path) -> None:
    """The oldest go first, the current one never; files of other names are not touched."""
    (tmp_path / "sglang-router.2024-10-04.log.gz").touch()
    days = iter([TODAY + day * DAY for day in range(5)])
    file = DailyFile(str(tmp_path), lambda: next(days), KeepRules(files=2))
    for _ in range(4):
        os.write(file.fd(), b"x\n")
    file.close()
    assert names(tmp_path) == [
        "sglang-router.2024-10-04.log.gz",
        "sglang-router.2024-10-07.log",
        "sglang-router.2024-10-08.log",
    ]


def test_case_22_age_of_kept_files(tmp_path: Path) -> None:
    """A file counts from its last line."""
    for day, name in enumerate(("2024-10-01", "2024-10-02", "2024-10-03"), -3):
        path = tmp_path / f"sglang-router.{name}.log"
        path.touch()
        os.utime(path, (TODAY + day * DAY, TODAY + day * DAY))
    DailyFile(str(tmp_path), lambda: TODAY, KeepRules(days=2)).close()
    assert names(tmp_path) == [f"sglang-router.2024-10-0{day}.log" for day in (2, 3, 4)]


def test_case_22_size_of_a_file(tmp_path: Path) -> None:
    """A file that has grown too large gets the next number of its day."""
    file = DailyFile(str(tmp_path), lambda: TODAY, KeepRules(files=3, max_bytes=4))
    for number in range(5):
        os.write(file.fd(), b"line %d\n" % number)
    file.close()
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "sglang-router.2024-10-04.3.log": "line 2\n",
        "sglang-router.2024-10-04.4.log": "line 3\n",
        "sglang-router.2024-10-04.log": "line 4\n",
    }


@pytest.mark.parametrize("put", [None, ""], ids=["moved away", "and created anew"])
def test_case_22_a_large_file_that_was_moved_away(put: str | None, tmp_path: Path) -> None:
    """With --log-max-bytes, what came after `mv` of a file above that size was lost, or took a number for nothing."""
    file = DailyFile(str(tmp_path), lambda: TODAY, KeepRules(max_bytes=4))
    os.write(file.fd(), b"line 0\n")
    path = tmp_path / "sglang-router.2024-10-04.log"
    path.rename(tmp_path / "moved")
    if put is not None:
        path.write_text(put)
    os.write(file.fd(), b"line 1\n")
    file.close()
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"moved": "line 0\n", path.name: "line 1\n"}


@pytest.mark.parametrize("level", ["info", "warn", "error"])
def test_case_22_reopening_makes_the_file_at_every_level(level: str, tmp_path: Path) -> None:
    """SIGUSR1 made no new file with `--log-level warn`: its line was below the level."""
    writer = configure(level, "text", str(tmp_path))
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "moved")
    writer.tell("log files are opened again")
    writer.close()
    assert path.read_text().endswith("INFO  sglang_router: log files are opened again\n")


def test_a_level_can_change_while_lines_are_written(tmp_path: Path) -> None:
    import logging

    reading, writing = os.pipe()
    writer = configure("warn", "text", None, stderr=writing)
    log = logging.getLogger("sglang_router.test")
    log.info("one")
    writer.set_level("info")
    log.info("two")
    writer.close()
    os.close(writing)
    said = os.read(reading, 4096)
    os.close(reading)
    assert b"two" in said
    assert b"one" not in said
