"""Keys from flags, variables and files: one grammar, clear errors, and no message that contains a key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.config.keys import (
    ClientKey,
    ControlKey,
    client_keys,
    control_keys,
    exposure,
    lines,
    load,
    one_word,
)
from sglang_router.errors import ConfigError

SECRET = "hush-hush"

visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = folder / "keys.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


@given(visible)
def test_a_key_of_any_visible_characters_is_taken_whole(key: str) -> None:
    assert client_keys([key]) == [("", key)]
    assert client_keys([f"alice {key}"]) == [("alice", key)]


@given(visible.filter(lambda key: ":admin:" not in key and ":user:" not in key))
def test_a_control_key_may_hold_any_visible_character(key: str) -> None:
    assert control_keys([f"ops:Service Account:admin:{key}"]) == [("ops", "Service Account", key, "admin")]


def test_entries_come_as_text_as_tuples_or_as_keys_already_read() -> None:
    read = client_keys(["alice one", ("bob", "two"), ClientKey("", "three")])
    assert read == client_keys(list(read)) == [("alice", "one"), ("bob", "two"), ("", "three")]
    control = control_keys(["a:A:user:x:y", ("b", "B", "z", "admin")])
    assert control == control_keys(list(control)) == [("a", "A", "x:y", "user"), ("b", "B", "z", "admin")]


def test_a_variable_holds_one_entry_in_a_line() -> None:
    assert lines(" alice one\n\n  two,three \n") == ["alice one", "two,three"]
    assert lines(["alice one"]) == ["alice one"]
    with pytest.raises(ValueError):
        lines(7)


def test_an_empty_key_is_refused_and_does_not_open_the_door() -> None:
    for value in ("", "  ", "\n"):
        with pytest.raises(ValueError, match="KEY"):
            client_keys(lines(value))
        with pytest.raises(ValueError, match="ROLE"):
            control_keys(lines(value))


def test_a_flag_takes_one_word_so_that_no_name_becomes_a_key() -> None:
    assert one_word(["alice one"]) == ["alice one"]
    with pytest.raises(ConfigError, match="'NAME KEY'"):
        one_word(["alice", "one"])


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (f"alice bob {SECRET}", "'NAME KEY'"),
        (f"alice {SECRET}é", "visible ASCII"),
        (("alice", f"{SECRET} "), "visible ASCII"),
        (("al\x00ice", SECRET), "print"),
        (("alice", 7), "texts"),
        (7, "KEY"),
    ],
)
def test_a_bad_client_key_is_refused(entry: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        client_keys(["fine", entry])
    assert str(refused.value).startswith("entry 2: ")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (SECRET, "ID:NAME:ROLE:KEY"),
        (f"ops:Ops:{SECRET}", "ID:NAME:ROLE:KEY"),
        (f"ops:Ops:root:{SECRET}", "admin or user"),
        (f"ops:Ops:{SECRET}:admin", "admin or user"),
        (f":Ops:admin:{SECRET}", "the id"),
        (f"o s:Ops:admin:{SECRET}", "the id"),
        (f"ops:O\tps:admin:{SECRET}", "print"),
        ("ops:Ops:admin:", "visible ASCII"),
        (f"ops:Ops:admin:{SECRET} x", "visible ASCII"),
        (f"ops:Ops:admin:one,dev:Dev:user:{SECRET}", "next entry"),
    ],
)
def test_a_bad_control_key_is_refused(entry: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        control_keys([entry])
    assert SECRET not in str(refused.value)


def test_keys_do_not_show_in_a_repr() -> None:
    ring = load(client_keys([f"alice {SECRET}"]), None, control_keys([f"ops:Ops:admin:{SECRET}2"]))
    assert SECRET not in f"{ring} {ring.client[0]} {ring.control!r}"
    assert "alice" in repr(ring)


def test_files_add_to_what_flags_name(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeff# of the team\r\n\r\nbob  two\r\n  th#ree\n")
    ring = load(client_keys(["one"]), path)
    assert ring.client == (("key-1", "one"), ("bob", "two"), ("key-3", "th#ree"))
    assert ring.warnings == ()
    path = written(tmp_path, "ops:Service Account:admin:a:b\n# dev\ndev:Dev:user:c")
    assert load((), None, (), path).control == (("ops", "Service Account", "a:b", "admin"), ("dev", "Dev", "c", "user"))


def test_one_client_may_have_two_keys_while_they_change() -> None:
    assert load(client_keys(["alice old", "alice new"])).client == (("alice", "old"), ("alice", "new"))


def test_a_bad_line_is_told_by_file_and_number(tmp_path: Path) -> None:
    path = written(tmp_path, f"# keys\nfine\nalice bob {SECRET}\n")
    with pytest.raises(ConfigError) as refused:
        load((), path)
    assert str(refused.value) == f"{path}:3: this is not KEY or 'NAME KEY'"
    path = written(tmp_path, f"ops:Ops:root:{SECRET}\n")
    with pytest.raises(ConfigError) as refused:
        load((), None, (), path)
    assert str(refused.value) == f"{path}:1: this is not ID:NAME:ROLE:KEY with the role admin or user"


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but this\n"])
def test_a_file_without_keys_is_refused_and_does_not_open_the_door(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="contains no keys"):
        load((), written(tmp_path, text))


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.txt cannot be read: No such file"):
        load((), str(tmp_path / "gone.txt"))
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load((), str(tmp_path))
    with pytest.raises(ConfigError, match=r"keys.txt is not UTF-8"):
        load((), written(tmp_path, b"\xff\xfe"))
    with pytest.raises(ConfigError, match=r"keys.txt is larger than 1 MiB"):
        load((), written(tmp_path, b"x" * (1 << 20) + b"\n"))


def test_what_is_there_twice_is_told_by_both_places(tmp_path: Path) -> None:
    path = written(tmp_path, f"one\nbob {SECRET}\n")
    with pytest.raises(ConfigError) as refused:
        load(client_keys(["zero", SECRET]), path)
    assert str(refused.value) == f"{path}:2: the same key as in --api-key, entry 2; give each key once only"
    with pytest.raises(ConfigError, match="entry 2: the same id as in --control-plane-api-keys, entry 1;"):
        load((), None, control_keys(["ops:A:admin:x", "ops:B:user:y"]))
    with pytest.raises(ConfigError, match="the same key as in --api-key"):
        load(client_keys(["x"]), None, control_keys(["ops:A:admin:x"]))


@pytest.mark.parametrize(("mode", "open"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_a_file_open_to_everybody_is_warned_of(tmp_path: Path, mode: int, open: bool) -> None:
    path = written(tmp_path, SECRET, mode)
    assert bool(load((), path).warnings) is open
    warning = exposure(path) or ""
    assert (path in warning) is open
    assert SECRET not in warning
    assert exposure(str(tmp_path / "gone")) is None


def test_keys_by_position_are_what_the_reference_keeps() -> None:
    assert ControlKey._fields == ("id", "name", "key", "role")
