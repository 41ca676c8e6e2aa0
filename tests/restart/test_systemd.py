"""What systemd gives to a service, and what it is told: the two protocols, byte by byte."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_router.app.jobs import watchdog
from sglang_router.errors import ConfigError
from sglang_router.restart import systemd
from sglang_router.restart.systemd import Notifier, take_sockets

HOST = "127.0.0.1"


@pytest.fixture
def listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket on which "systemd" listens; a duplicate of it is the first that it passes."""
    with socket.create_server((HOST, 0)) as sock:
        monkeypatch.setattr(systemd, "_FIRST", os.dup(sock.fileno()))
        yield sock


def given(pid: int | str = "", count: int | str = 1) -> dict[str, str]:
    return {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": "x", "OTHER": "stays"}


def test_without_a_socket_unit_there_are_no_sockets() -> None:
    assert take_sockets(HOST, 30000, {}) == []


def test_the_socket_is_taken_once_and_is_the_one_that_systemd_listens_on(listens: socket.socket) -> None:
    environ, port = given(), listens.getsockname()[1]
    (taken,) = take_sockets(HOST, port, environ)
    with taken:
        assert environ == {"OTHER": "stays"}
        assert not taken.get_inheritable()
        assert not taken.getblocking()
        with socket.create_connection((HOST, port)):
            taken.accept()[0].close()
    assert take_sockets(HOST, port, environ) == []


def test_it_outlives_the_router_with_who_waits_in_its_queue(listens: socket.socket) -> None:
    port = listens.getsockname()[1]
    (taken,) = take_sockets(HOST, port, given())
    with socket.create_connection((HOST, port)) as client:
        taken.close()
        accepted, _ = listens.accept()
        with accepted:
            client.sendall(b"still here")
            assert accepted.recv(100) == b"still here"


@pytest.mark.parametrize("environ", [given(pid=1), given(count="x"), given(count=0), given(count="")])
def test_what_is_meant_for_another_process_or_makes_no_sense_is_left(
    environ: dict[str, str], listens: socket.socket
) -> None:
    """The variables are inherited by every program that a service starts."""
    assert take_sockets(HOST, listens.getsockname()[1], environ) == []
    os.close(systemd._FIRST)


@pytest.mark.parametrize("host", ["0.0.0.0", HOST])
def test_an_address_that_the_options_do_not_name_is_refused(host: str, listens: socket.socket) -> None:
    port = listens.getsockname()[1] + (host == HOST)
    with pytest.raises(ConfigError, match=rf"systemd listens on {HOST}:\d+ .*options say {host}:{port}.*--host"):
        take_sockets(host, port, given())
    with pytest.raises(OSError):
        os.fstat(systemd._FIRST)


def test_a_unit_that_listens_on_more_than_the_options_say_is_refused(
    listens: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a router that is said to serve this machine only would serve others."""
    port, base = listens.getsockname()[1], 210
    with socket.create_server(("127.0.0.2", port)) as other:
        os.dup2(listens.fileno(), base)
        os.dup2(other.fileno(), base + 1)
    os.close(systemd._FIRST)
    monkeypatch.setattr(systemd, "_FIRST", base)
    with pytest.raises(ConfigError, match=rf"systemd listens on {HOST}:{port}, 127\.0\.0\.2:{port} "):
        take_sockets(HOST, port, given(count=2))


def test_both_families_of_every_address_belong_to_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    four = socket.socket(socket.AF_INET)
    four.bind(("0.0.0.0", 0))
    port = four.getsockname()[1]
    six = socket.socket(socket.AF_INET6)
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    six.bind(("::", port))
    base = 200  # systemd's descriptors follow one another
    os.dup2(four.fileno(), base)
    os.dup2(six.fileno(), base + 1)
    monkeypatch.setattr(systemd, "_FIRST", base)
    taken = take_sockets("[::]", port, given(count=2))
    assert [sock.family for sock in taken] == [socket.AF_INET, socket.AF_INET6]
    for sock in (four, six, *taken):
        sock.close()


def test_a_socket_that_no_client_of_http_reaches_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        monkeypatch.setattr(systemd, "_FIRST", os.dup(sock.fileno()))
        with pytest.raises(ConfigError, match=r"not TCP.*ListenStream=ADDRESS:PORT"):
            take_sockets(HOST, 1, given())


def test_a_descriptor_that_is_no_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    number = os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(systemd, "_FIRST", number)
    with pytest.raises(ConfigError, match=rf"descriptor {number}, which is no socket"):
        take_sockets(HOST, 1, given())
    os.close(number)


# -- telling -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hears(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def test_systemd_is_told_and_children_do_not_speak_in_the_routers_name(hears: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": hears.getsockname(), "WATCHDOG_USEC": "30000000", "OTHER": "stays"}
    notifier = Notifier(environ)
    assert environ == {"OTHER": "stays"}
    notifier.tell("READY=1")
    assert hears.recv(100) == b"READY=1"


def test_an_abstract_address_begins_with_an_at_sign() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(b"\0sglang-router-test-%d" % os.getpid())
        sock.settimeout(10)
        Notifier({"NOTIFY_SOCKET": "@" + sock.getsockname()[1:].decode()}).tell("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_nobody_who_listens_is_no_failure(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell("READY=1")
    Notifier({}).tell("READY=1")


def test_the_watchdog_is_told_three_times_as_often_as_it_asks(hears: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": hears.getsockname(), "WATCHDOG_USEC": "30000000"})
    (job,) = watchdog(notifier)
    assert job.run() == 10.0
    assert hears.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "30000000"}, {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "?"}])
def test_no_watchdog_is_told_where_none_asks(environ: dict[str, str]) -> None:
    assert watchdog(Notifier(environ)) == ()
