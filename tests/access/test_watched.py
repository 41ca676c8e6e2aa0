"""Keys count as their files say, from the moment when these change; a broken file changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_router.access.permissions import Access, AccessKind
from sglang_router.app.settings import access_rules
from sglang_router.config import RouterArgs
from sglang_router.errors import AccessRefused, ConfigError


def who(access: Access, key: str, kind: AccessKind = AccessKind.INFERENCE) -> str:
    try:
        return access.check(kind, key.encode()).id
    except AccessRefused:
        return ""


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def test_case_21_keys_of_clients_and_operators(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line added to a key file, or taken from it, had no effect before a restart."""
    clients, operators = tmp_path / "clients", tmp_path / "operators"
    write(clients, "alice a\n")
    write(operators, "ops:Ops:admin:o\n")
    access, files = access_rules(RouterArgs(api_key_file=str(clients), control_plane_api_keys_file=str(operators)))
    assert (who(access, "a"), who(access, "b"), files.refresh()) == ("alice", "", False)

    write(clients, "bob b\n")
    write(operators, "dev:Dev:user:d\n")
    assert files.refresh()
    assert (who(access, "a"), who(access, "b")) == ("", "bob")
    assert who(access, "o", AccessKind.CONTROL_READ) == ""
    assert who(access, "d", AccessKind.CONTROL_READ) == "dev"
    assert who(access, "d", AccessKind.CONTROL_CHANGE) == ""

    for text in ("", "carol c\ncarol c\n", "one two three\n"):
        write(clients, text)
        assert not files.refresh()
        assert (who(access, "b"), who(access, "c")) == ("bob", "")
    clients.unlink()
    assert not files.refresh()
    assert not files.refresh()
    assert len([each for each in caplog.messages if "the files loaded before stay in use" in each]) == 4
    assert access.consumes_key
    write(clients, "carol c\n")
    assert files.refresh()
    assert (who(access, "b"), who(access, "c")) == ("", "carol")
    assert files.refresh(anyway=True)


def test_case_12_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The event loop waited for the pipe's writer, for ever: no client was served any more."""
    path = tmp_path / "clients"
    write(path, "alice a\n")
    access, files = access_rules(RouterArgs(api_key_file=str(path)))
    path.unlink()
    os.mkfifo(path, 0o600)
    for _ in range(2):
        assert not files.refresh(anyway=True)
    assert who(access, "a") == "alice"
    assert [each for each in caplog.messages if each.startswith(f"keys: {path} is a pipe")] == caplog.messages[-1:]


def test_without_files_there_is_nothing_to_read_again(tmp_path: Path) -> None:
    access, files = access_rules(RouterArgs())
    assert not files.refresh(anyway=True)
    assert not access.consumes_key
    with pytest.raises(ConfigError, match="cannot be read"):
        access_rules(RouterArgs(api_key_file=str(tmp_path / "none")))


def test_a_list_of_which_only_the_first_half_is_written_does_not_count(tmp_path: Path) -> None:
    """It is a list too: the clients in its second half were refused."""
    path, now = tmp_path / "clients", [0.0]
    write(path, "alice a\nbob b\n")
    access, files = access_rules(RouterArgs(api_key_file=str(path)), wall=lambda: now[0])
    now[0] = path.stat().st_ctime_ns / 1e9 + 0.5
    write(path, "alice a\n")
    assert not files.refresh()
    write(path, "alice a\nbob b\ncarol c\n")
    assert not files.refresh(), "it changes still"
    assert (who(access, "b"), who(access, "c")) == ("bob", "")
    assert files.refresh(), "it looks as it did at the call before"
    assert (who(access, "b"), who(access, "c")) == ("bob", "carol")
    write(path, "bob b\n")
    now[0] += 3600.0
    assert files.refresh(), "nobody has written for a while"
    assert (who(access, "a"), who(access, "b")) == ("", "bob")
    now[0] -= 3600.0
    write(path, "alice a\n")
    assert files.refresh(anyway=True), "somebody says that it is complete"
