"""The log of decisions: its lines, its chains of hashes, its files, and how little it holds up."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decision_records import A, record
from sglang_router.errors import ConfigError
from sglang_router.observe import decision_log
from sglang_router.observe.decision_line import BLOCK, FORMAT, VERSION
from sglang_router.observe.decision_log import DecisionLogWriter, HashChain, NumberedFiles, read_key

KEY = b"k" * 32


def alike(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how many members are equal from the beginning."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))])


def chain(text: bytes, key: bytes = KEY, namespace: bytes = b"") -> list[str]:
    made = HashChain(key, namespace, text)
    made.step(1 << 20)
    return made.hashes


class Turns:
    """An event loop of which a test runs each turn."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        assert seconds == 0.0
        self.calls.append(call)

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- chains ------------------------------------------------------------------------------------------------------------


@given(shared=st.integers(0, 5 * BLOCK), mine=st.binary(max_size=700), other=st.binary(max_size=700))
def test_chains_are_equal_as_far_as_the_texts_are(shared: int, mine: bytes, other: bytes) -> None:
    texts = [b"s" * shared + mine, b"s" * shared + other]
    same = alike(*texts)
    first, second = map(chain, texts)
    assert [len(first), len(second)] == [len(text) // BLOCK for text in texts]
    assert alike(first, second) == same // BLOCK
    assert not set(first[same // BLOCK :]) & set(second[same // BLOCK :])


def test_a_block_that_comes_again_later_has_another_hash() -> None:
    assert len(set(chain(b"x" * 8 * BLOCK))) == 8


def test_key_and_namespace_make_other_chains() -> None:
    text = b"x" * 3 * BLOCK
    chains = [chain(text), chain(text, key=b"o" * 32), chain(text, namespace=b'"m"')]
    assert len({each for made in chains for each in made}) == 9


@given(text=st.binary(max_size=3000), steps=st.lists(st.integers(1, 5), min_size=1))
def test_steps_make_the_same_chain(text: bytes, steps: list[int]) -> None:
    made = HashChain(KEY, b"", text)
    for blocks in steps:
        assert made.step(blocks) <= blocks
    while made.step(3) == 3:
        pass
    assert made.hashes == chain(text)


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["x\x7f", "x\x85y", "x\x9b2K", "x\u2028y", "\u202eabc"], ids=ascii)
def test_clients_cannot_break_a_line(tmp_path: Path, text: str) -> None:
    turns, path = Turns(), tmp_path / "log"
    log = DecisionLogWriter(str(path), 0, 1, KEY, turns.later)
    log.take(record(id=text, model=text), "s", b'"x"', b"")
    log.close()
    assert all(each.isprintable() for each in path.read_text().split("\n"))
    assert [lines(path)[1][name] for name in ("id", "model")] == [text, text]


def test_a_line_for_each_request_after_a_head(tmp_path: Path) -> None:
    turns, path = Turns(), tmp_path / "log"
    log = DecisionLogWriter(str(path), 0, 1, KEY, turns.later)
    text = b"a secret prompt " * 40
    log.take(record(retries=1), "s-1", b'"tiny"', text)
    log.take(record(id="r-2", worker=None, session="", retries=0, first_byte=None), "", b"", b"")
    log.close()
    head, first, second = lines(path)
    assert head == {"key": head["key"], "format": FORMAT, "version": VERSION, "block": BLOCK}
    assert first == {
        "t": 1764279852.25,
        "id": "r-1",
        "model": "tiny",
        "session": first["session"],
        "endpoint": "chat",
        "bytes": 640,
        "chain": chain(text, namespace=b'"tiny"'),
        "stream": True,
        "prompt_tokens": None,
        "cached_tokens": None,
        "completion_tokens": None,
        "worker": A,
        "policy": "cache_aware",
        "branch": "hit",
        "matched": 3000,
        "attempts": 2,
        "outcome": "served",
        "status": 200,
        "ttft": 0.095,
        "duration": 1.5,
    }
    assert second["bytes"] == 5120
    assert [second[name] for name in ("session", "chain", "worker", "attempts", "ttft")] == ["", [], None, 0, None]
    assert first["session"] not in ("", "s-1")
    assert "secret" not in path.read_text()
    assert KEY.hex() not in path.read_text()


def test_a_second_start_goes_on_with_the_file_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        log = DecisionLogWriter(str(path), 0, 1, read_key(str(path)), Turns().later)
        log.take(record(retries=1), "s-1", b"", b"x" * BLOCK)
        log.close()
    head, first, second = lines(path)
    assert head["format"] == FORMAT
    assert first == second
    assert stat.S_IMODE((tmp_path / "log.key").stat().st_mode) == 0o600


def test_one_turn_hashes_a_bounded_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "_BLOCKS", 10)
    turns, path = Turns(), tmp_path / "log"
    log = DecisionLogWriter(str(path), 0, 1, KEY, turns.later)
    log.take(record(id="long"), "s-1", b"", b"x" * 25 * BLOCK)
    log.take(record(id="short"), "s-1", b"", b"x" * 2 * BLOCK)
    rounds = 0
    while turns.calls:
        turns.turn()
        rounds += 1
    assert rounds == 3
    log.close()
    assert [(each["id"], len(each["chain"])) for each in lines(path)[1:]] == [("long", 25), ("short", 2)]


def test_what_waits_is_bounded_and_the_rest_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "_MOST_WAITING", 10_000)
    turns, path = Turns(), tmp_path / "log"
    log = DecisionLogWriter(str(path), 0, 1, KEY, turns.later)
    for number in range(5):
        log.take(record(id=f"r-{number}"), "s-1", b"", b"x" * 4000)
    assert log.lost == 4
    turns.turn()
    log.take(record(id="later"), "s-1", b"", b"x" * 4000)
    log.close()
    assert [each["id"] for each in lines(path)[1:]] == ["r-0", "later"]


def test_lines_that_cannot_be_written_are_counted_and_told(tmp_path: Path) -> None:
    path = tmp_path / "here" / "log"
    path.parent.mkdir()
    turns = Turns()
    log = DecisionLogWriter(str(path), 0, 1, KEY, turns.later)
    path.unlink()
    path.parent.rmdir()
    log.take(record(retries=1), "s-1", b"", b"")
    turns.turn()
    assert log._buffer.flush(20.0)
    assert log.lost == 1
    path.parent.mkdir()
    log.take(record(id="after"), "s-1", b"", b"")
    log.close()
    head, missing, after = lines(path)
    assert (head["format"], missing, after["id"]) == (FORMAT, {"missing": 1}, "after")


def test_sessions_that_differ_at_their_end_are_different_ones(tmp_path: Path) -> None:
    """Tokens of one issuer begin alike; a record has the first 64 characters only."""
    turns, path = Turns(), tmp_path / "log"
    log = DecisionLogWriter(str(path), 0, 1, KEY, turns.later)
    for session in ("", "s" * 64, "s" * 65, "s" * 64 + "t", "s" * 65):
        log.take(record(session=session[:64]), session, b"", b"")
    log.close()
    _, none, *others = [line.get("session") for line in lines(path)]
    assert none == ""
    assert others[1] == others[3]
    assert len(set(others)) == 3


# -- files -------------------------------------------------------------------------------------------------------------


def written(files: NumberedFiles, data: bytes) -> None:
    os.write(files.fd(), data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (1, {"log": b"H5\n"}),
        (2, {"log": b"H5\n", "log.1": b"H4\n"}),
        (3, {"log": b"H5\n", "log.1": b"H4\n", "log.2": b"H3\n"}),
        (9, {"log": b"H5\n", "log.1": b"H4\n", "log.2": b"H3\n", "log.3": b"H2\n", "log.4": b"H1\n"}),
    ],
)
def test_a_large_file_is_numbered_and_the_oldest_goes(tmp_path: Path, most: int, kept: dict[str, bytes]) -> None:
    files = NumberedFiles(str(tmp_path / "log"), 3, most, b"H")
    for number in range(1, 6):
        written(files, b"%d\n" % number)
    files.close()
    assert contents(tmp_path) == kept


def test_a_file_that_was_moved_away_is_begun_anew_with_a_head(tmp_path: Path) -> None:
    files = NumberedFiles(str(tmp_path / "log"), 0, 3, b"H")
    written(files, b"1\n")
    (tmp_path / "log").rename(tmp_path / "elsewhere")
    written(files, b"2\n")
    files.close()
    assert contents(tmp_path) == {"elsewhere": b"H1\n", "log": b"H2\n"}


def test_while_a_large_file_cannot_be_moved_nothing_is_written(tmp_path: Path) -> None:
    """Not even every other time."""
    (tmp_path / "log.1").mkdir()
    files = NumberedFiles(str(tmp_path / "log"), 3, 2, b"H")
    written(files, b"1\n")
    for _ in range(3):
        with pytest.raises(OSError, match="directory"):
            files.fd()
    (tmp_path / "log.1").rmdir()
    written(files, b"2\n")
    files.close()
    assert contents(tmp_path) == {"log": b"H2\n", "log.1": b"H1\n"}


@pytest.mark.parametrize("name", ["log", "log.key"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_are_refused_and_nobody_waits_for_a_reader(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} is not a plain file"):
        read_key(str(tmp_path / "log"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_cannot_be_opened_ends_the_start(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere" / "log")
    with pytest.raises(ConfigError, match="No such file"):
        NumberedFiles(path, 0, 1, b"")
    with pytest.raises(ConfigError, match=r"log\.key: No such file"):
        read_key(path)


@pytest.mark.parametrize("content", ["", "00", "no key", "0" * 63, "\u00e9"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.key").write_text(content)
    with pytest.raises(ConfigError, match="is not the key"):
        read_key(str(tmp_path / "log"))
