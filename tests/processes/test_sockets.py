"""One port, several sockets: bound together, refused together, and divided so that each is served."""

from __future__ import annotations

import contextlib
import errno
import socket

import pytest

from sglang_router.processes import sockets


def addresses(share: list[list[socket.socket]]) -> list[set[object]]:
    return [{sock.getsockname() for sock in each} for each in share]


@pytest.mark.parametrize("relays", [1, 2, 3])
def test_each_relay_has_a_socket_of_its_own_on_the_port(relays: int) -> None:
    bound = sockets.bind("127.0.0.1", 0, relays)
    try:
        share = sockets.divide(bound, relays)
        assert [len(each) for each in share] == [1] * relays
        assert len({sock.fileno() for each in share for sock in each}) == relays
        assert len({sock.getsockname() for sock in bound}) == 1
    finally:
        sockets.close(bound)


@pytest.mark.parametrize(("had", "relays"), [(1, 2), (2, 3), (3, 2), (2, 2)])
def test_sockets_that_were_taken_over_are_all_served(had: int, relays: int) -> None:
    bound = sockets.bind("127.0.0.1", 0, had)
    try:
        share = sockets.divide(bound, relays)
        assert {sock.fileno() for each in share for sock in each} == {sock.fileno() for sock in bound}
        assert all(share)
        assert all(len({sock.fileno() for sock in each}) == len(each) for each in share)
    finally:
        sockets.close(bound)


def test_every_relay_serves_every_address() -> None:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        bound = sockets.bind("::", 0, 2)
        try:
            share = addresses(sockets.divide(bound, 2))
            assert share[0] == share[1]
            assert len({sock.getsockname()[1] for sock in bound}) == 1
            assert {sock.family for sock in bound} == {socket.AF_INET, socket.AF_INET6}
        finally:
            sockets.close(bound)


def test_a_port_on_which_another_router_listens_is_in_use() -> None:
    """Also when that one has bound it with SO_REUSEPORT."""
    first = sockets.bind("127.0.0.1", 0, 2)
    try:
        first[0].listen()
        with pytest.raises(OSError, match="in use") as caught:
            sockets.bind("127.0.0.1", first[0].getsockname()[1], 2)
        assert caught.value.errno == errno.EADDRINUSE
    finally:
        sockets.close(first)
