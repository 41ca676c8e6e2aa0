"""What the options name for a shared state: files that are read, and what is refused in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sglang_router.app import advice
from sglang_router.app.checking import start_problems
from sglang_router.app.shared import files_of, state_of
from sglang_router.config import RouterArgs, parse
from sglang_router.errors import ConfigError

DIGITS = "0123456789abcdef" * 4


def args(*words: str) -> RouterArgs:
    return parse(words, {}).checked()


def test_without_the_option_there_is_nothing() -> None:
    assert files_of(args()) is None


def test_key_and_password_come_from_files(tmp_path: Path) -> None:
    key, password = tmp_path / "key", tmp_path / "password"
    key.write_text(f"{DIGITS}\n")
    password.write_text("pass word\n")
    words = ("--shared-state", "redis://h", "--shared-state-key", str(key))
    found = files_of(args(*words, "--shared-state-password-file", str(password)))
    assert found is not None
    assert (found.key.own, found.key.fixed) == (bytes.fromhex(DIGITS), True)
    assert found.login.get_credentials() == ("pass word",)
    assert DIGITS not in repr(found.key)


def test_a_password_file_that_changes_is_used_for_new_connections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    found = files_of(args("--shared-state", "redis://h", "--shared-state-password-file", str(file)))
    assert found is not None
    (watched,) = found.watched
    file.write_text("second\n")
    assert watched.refresh(anyway=True)
    assert found.login.get_credentials() == ("second",)
    assert found.login.hide("AUTH first, AUTH second") == "AUTH ***, AUTH ***"
    file.write_text("\n")  # in the middle of a change
    assert not watched.refresh(anyway=True)
    assert found.login.get_credentials() == ("second",)
    assert "holds no password; the files loaded before stay in use" in caplog.text
    file.write_text("third\n")
    assert not watched.refresh()  # somebody may be writing it still
    assert watched.refresh()
    assert found.login.get_credentials() == ("third",)
    assert not {"first", "second", "third"} & set(caplog.text.split())


def test_a_user_of_the_url_keeps_its_name_and_a_url_without_a_login_sends_none(tmp_path: Path) -> None:
    found = files_of(args("--shared-state", "redis://router:pass@h"))
    assert found is not None
    assert found.login.get_credentials() == ("router", "pass")
    assert found.watched == []
    found = files_of(args("--shared-state", "redis://h"))
    assert found is not None
    assert not found.login.given


def test_without_a_file_each_start_makes_a_key_of_its_own() -> None:
    first, second = (files_of(args("--shared-state", "redis://h")) for _ in range(2))
    assert first is not None
    assert second is not None
    assert not first.key.fixed
    assert len(first.key.own) == 32
    assert first.key.own != second.key.own


def test_routers_of_one_machine_have_the_same_place_and_each_a_name_of_its_own() -> None:
    files = files_of(args("--shared-state", "redis://h"))
    first, second = (state_of(args("--shared-state", "redis://h"), files) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.rules.place == second.rules.place != b""
    assert first.rules.router != second.rules.router


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shared-state", "redis://h", "--shared-state-key", "{file}"), "must hold 64 hexadecimal digits"),
        (("--shared-state", "redis://h", "--shared-state-key", "{file}.gone"), "cannot be read"),
        (("--shared-state", "redis://:pw@h", "--shared-state-password-file", "{file}"), "give only one"),
        (("--shared-state", "redis://h", "--shared-state-password-file", "{empty}"), "holds no password"),
        (("--shared-state", "redis://h", "--shared-state-ca-cert", "{file}"), "begin its URL with rediss://"),
        (("--shared-state", "rediss://h", "--shared-state-ca-cert", "{file}"), "holds no certificate"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_without_what_it_holds(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("deadbeef")
    empty.write_text("\n")
    given = args(*(word.format(file=file, empty=empty) for word in words))
    with pytest.raises(ConfigError, match=said) as caught:
        files_of(given)
    assert "deadbeef" not in str(caught.value)
    assert str(caught.value) in start_problems(given)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(ConfigError, match=r"pip install 'sglang-router\[shared\]'"):
        files_of(args("--shared-state", "redis://h"))


def test_options_without_a_store_are_told_to_have_no_effect() -> None:
    found = advice.advice(args("--shared-state-prefix", "x"), {}, lambda path: False)
    assert "options for a shared state have no effect without --shared-state" in found


def test_fleets_with_the_same_key_but_another_prefix_are_foreign_to_each_other(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(DIGITS)
    marks = []
    for prefix in ("production", "staging", "staging"):
        given = args("--shared-state", "redis://h", "--shared-state-key", str(key), "--shared-state-prefix", prefix)
        state = state_of(given, files_of(given))
        assert state is not None
        marks.append(state.secret.mark)
    assert marks[0] != marks[1] == marks[2]
