"""Sockets that pass from one router to the next: what is in their queue goes along, whoever leaves first."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest
import uvloop

from sglang_router.restart import handover
from sglang_router.restart.handover import Address, InheritedSockets, Manifest, SocketOffer, take_over

HOST = "127.0.0.1"
WITHIN = 10.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), WITHIN)

    uvloop.run(bounded())


async def ready() -> None:
    """Nothing is to be done before."""


@pytest.fixture
def door() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0)) as sock:
        yield sock


def place(sock: socket.socket) -> tuple[str, int]:
    return HOST, sock.getsockname()[1]


def offer_of(*socks: socket.socket, ready: Callable[[], Awaitable[object]] = ready) -> SocketOffer:
    offer = SocketOffer(asyncio.get_running_loop(), {place(sock): [sock.fileno()] for sock in socks}, ready)
    offer.offer()
    return offer


async def succeed(sock: socket.socket) -> InheritedSockets | None:
    return await take_over(asyncio.get_running_loop(), *place(sock))


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop run until something in progress is complete; `run` ends it."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0)


def test_who_waits_in_the_queue_is_served_by_the_next(door: socket.socket) -> None:
    async def test() -> None:
        client = socket.create_connection(place(door))  # nobody has accepted it
        offer = offer_of(door)
        inherited = await succeed(door)
        assert inherited is not None
        assert inherited.pid == os.getpid()
        await until(lambda: offer.succeeded)
        (taken,) = inherited.take(*place(door))
        assert await offer.settle()
        door.close()

        with client, taken:
            server, _ = taken.accept()
            with server:
                client.sendall(b"are you there?")
                assert server.recv(100) == b"are you there?"
        inherited.close()
        await offer.close()

    run(test)


def test_a_closed_copy_alone_would_reset_it() -> None:
    """The control: what happens to the queue of a socket that has no other copy."""
    with socket.create_server((HOST, 0)) as only:
        client = socket.create_connection(place(only))
    with client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_nobody_is_there(door: socket.socket) -> None:
    async def test() -> None:
        assert await succeed(door) is None

    run(test)


def test_addresses_are_told_apart_and_the_rest_is_closed(door: socket.socket) -> None:
    async def test() -> None:
        with socket.create_server((HOST, 0)) as metrics, socket.create_server((HOST, 0)) as other:
            offer = offer_of(door, metrics, other)
            inherited = await succeed(door)
            assert inherited is not None
            main, second = inherited.take(*place(door)), inherited.take(*place(metrics))
            assert [sock.getsockname() for sock in main + second] == [door.getsockname(), metrics.getsockname()]
            assert inherited.take(*place(metrics)) == []
            assert inherited.take("localhost", 1) == []
            inherited.close_rest()
            inherited.close()
            for sock in main + second:
                sock.close()
            await offer.close()
            unused = place(other)
        with pytest.raises(ConnectionRefusedError):  # no copy of it is left
            socket.create_connection(unused)

    run(test)


def test_a_successor_that_ends_makes_room_for_another(door: socket.socket) -> None:
    async def test() -> None:
        offer = offer_of(door)
        for _ in range(3):
            inherited = await succeed(door)
            assert inherited is not None
            await until(lambda: offer.succeeded)
            inherited.close()
            await until(lambda: not offer.succeeded)
        assert not await offer.settle()
        await offer.close()

    run(test)


def test_it_hands_over_when_it_is_ready(door: socket.socket) -> None:
    async def test() -> None:
        go = asyncio.Event()
        offer = offer_of(door, ready=go.wait)
        succeeding = asyncio.ensure_future(succeed(door))
        await until(lambda: offer.state == "handing over")
        settling = asyncio.ensure_future(offer.settle())  # it is told to stop just now
        await asyncio.sleep(0)
        assert not succeeding.done()
        go.set()
        assert await settling
        inherited = await succeeding
        assert inherited is not None
        inherited.close()
        await offer.close()

    run(test)


def test_a_successor_that_does_not_wait(door: socket.socket) -> None:
    async def test() -> None:
        go = asyncio.Event()
        offer = offer_of(door, ready=go.wait)
        succeeding = asyncio.ensure_future(succeed(door))
        await until(lambda: offer.state == "handing over")
        succeeding.cancel()
        await asyncio.gather(succeeding, return_exceptions=True)
        go.set()
        await until(lambda: offer.state == "waiting")
        assert not offer.succeeded
        inherited = await succeed(door)  # the next one gets it
        assert inherited is not None
        inherited.close()
        await offer.close()

    run(test)


def test_a_router_that_stops_hands_over_no_more(door: socket.socket) -> None:
    async def test() -> None:
        offer = offer_of(door)
        assert not await offer.settle()
        assert await succeed(door) is None
        await offer.close()

    run(test)


def test_a_router_that_ends_while_it_hands_over(door: socket.socket) -> None:
    async def test() -> None:
        offer = offer_of(door, ready=asyncio.Event().wait)
        succeeding = asyncio.ensure_future(succeed(door))
        await until(lambda: offer.state == "handing over")
        await offer.close()
        assert await succeeding is None

    run(test)


def test_the_successor_is_succeeded_in_turn(door: socket.socket) -> None:
    async def test() -> None:
        first = offer_of(door)
        inherited = await succeed(door)
        assert inherited is not None
        (taken,) = inherited.take(*place(door))
        second = offer_of(taken)
        heir = await succeed(door)
        assert heir is not None
        await until(lambda: first.succeeded and second.succeeded)
        for leaving in (inherited, heir):
            leaving.close()
        taken.close()
        await second.close()
        await first.close()

    run(test)


@pytest.mark.parametrize(
    "said",
    [
        b"hello",
        msgspec.json.encode(Manifest(2, [])),
        msgspec.json.encode(Manifest(1, [Address(HOST, 1, 5)])),
    ],
)
def test_what_is_not_understood_is_not_taken(
    said: bytes, door: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.bind(handover.unix_address(*place(door)))
            other.listen(1)
            succeeding = asyncio.ensure_future(succeed(door))
            await asyncio.sleep(0)
            link, _ = other.accept()
            with link:
                socket.send_fds(link, [said], [door.fileno()])
                assert await succeeding is None
        assert "gave no sockets that can be used" in caplog.text

    run(test)


def test_a_place_that_is_taken_is_told(door: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        offer, second = offer_of(door), offer_of(door)
        assert "no router can take over 127.0.0.1:" in caplog.text
        await second.close()
        await offer.close()

    run(test)


STRANGER = """
import os, socket, sys
os.setuid(65534)
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.settimeout(10)
link.connect("\\0" + sys.argv[1])
said, fds, _, _ = socket.recv_fds(link, 1000, 10)
print(len(said), len(fds))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_gets_nothing(door: socket.socket) -> None:
    async def test() -> None:
        offer = offer_of(door)
        words = [sys.executable, "-I", "-c", STRANGER, handover.unix_address(*place(door))[1:]]
        stranger = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
        said, _ = await stranger.communicate()
        assert (stranger.returncode, said) == (0, b"0 0\n")
        assert not offer.succeeded
        inherited = await succeed(door)  # one of ours still does
        assert inherited is not None
        inherited.close()
        await offer.close()

    run(test)
