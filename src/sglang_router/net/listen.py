"""Listening sockets that outlive their router: the next one takes them over, and no connection is lost in between.

    old router                                                 new router, --reuse-port too
    listens, and waits for a successor at an abstract
    Unix address that is made of host and port     <---------  connect
    `ready()`: whatever must be written first
    the sockets, by SCM_RIGHTS                     --------->  listens on the very same sockets
    `succeeded`: both accept, out of one queue     <--------   ... and waits for a successor of its own
    SIGTERM: closes its copy of the sockets                    goes on

The sockets are the same objects of the kernel, not others on the same port, so closing one copy resets nothing: who
was in the queue is still in it. With SO_REUSEPORT each router has a queue of its own, which dies with it; see
docs/restart.md for what was measured.

An abstract address lives in a network namespace, as the port does, and vanishes with its process. It knows no
permissions, so both sides ask the kernel who the other is (SO_PEERCRED): the same user, or root.

While the new router lives, the connection between them stays open: should it end first, the old one waits for
another successor.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

log = logging.getLogger("sglang_router.listen")

_VERSION = 1
_LONGEST = 65536
_MOST = 200
"""Sockets handed over at once; the system takes 253."""
_PATIENCE = 30.0
"""Seconds that the other side may take: it may have to write a large state first."""
_CREDENTIALS = struct.Struct("iII")


def _meeting_point(host: str, port: int) -> str:
    """The abstract address of the router that listens there. Digested: it may have 107 bytes, and a name 253."""
    return "\0sglang-router/" + hashlib.blake2b(f"{host} {port}".encode(), digest_size=16).hexdigest()


class Address(NamedTuple):
    """Where a router listens, in the words of its options. `sockets`: how many; a name may stand for several."""

    host: str
    port: int
    sockets: int


class Manifest(msgspec.Struct):
    """Goes with the sockets and says which are which, in their order."""

    version: int
    addresses: list[Address]


class Legacy:
    """What a predecessor left: its sockets, and the connection by which it knows whether we live.

    pid  process id of that router
    """

    def __init__(self, link: socket.socket, sockets: dict[tuple[str, int], list[socket.socket]]) -> None:
        self._link = link
        self._sockets = sockets
        self.pid, _ = _peer(link)

    def take(self, host: str, port: int) -> list[socket.socket]:
        """The sockets of one address, which are the caller's from now on; none if the predecessor did not have it."""
        return self._sockets.pop((host, port), [])

    def leave_rest(self) -> None:
        """Closes what nobody took."""
        for sockets in self._sockets.values():
            _close(*sockets)
        self._sockets.clear()

    def close(self) -> None:
        """The predecessor sees then that nobody follows it."""
        self.leave_rest()
        self._link.close()


async def take_over(loop: asyncio.AbstractEventLoop, host: str, port: int) -> Legacy | None:
    """The sockets of the router that listens there now; None when there is none that gives them.

    Raises: TimeoutError when it does not answer.
    """
    link = _called(host, port)
    if link is None:
        return None
    sockets: list[socket.socket] = []
    try:
        await asyncio.wait_for(_readable(loop, link), _PATIENCE)
        said, fds, _, _ = socket.recv_fds(link, _LONGEST, _MOST, socket.MSG_CMSG_CLOEXEC)
        sockets = [socket.socket(fileno=fd) for fd in fds]
        return Legacy(link, _sorted_out(said, sockets))
    except (ValueError, ConnectionError) as exc:  # msgspec's as well
        log.warning("the router at %s:%d gave no sockets that can be used: %s", host, port, exc)
        _close(link, *sockets)
        return None
    except asyncio.TimeoutError:
        pid, _ = _peer(link)
        _close(link)
        raise TimeoutError(f"the router there (process {pid}) does not hand over its sockets") from None
    except asyncio.CancelledError:
        _close(link)
        raise


def _sorted_out(said: bytes, sockets: list[socket.socket]) -> dict[tuple[str, int], list[socket.socket]]:
    """Raises: ValueError"""
    if not said:
        raise ValueError("it has ended")
    manifest = msgspec.json.decode(said, type=Manifest)
    if manifest.version != _VERSION or sum(address.sockets for address in manifest.addresses) != len(sockets):
        raise ValueError("it is of another version")
    rest = iter(sockets)
    return {(host, port): list(itertools.islice(rest, count)) for host, port, count in manifest.addresses}


class Bequest:
    """This router's listening sockets, for the one router that comes next.

    listening  their descriptors by host and port; the first is the one that a successor asks for
    ready      is awaited before they are given away
    succeeded  there is a router that took over, and it lives
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listening: Mapping[tuple[str, int], Sequence[int]],
        ready: Callable[[], Awaitable[object]],
    ) -> None:
        self._loop = loop
        self._host, self._port = next(iter(listening))
        self._listening = dict(listening)
        self._ready = ready
        self._door: socket.socket | None = None
        self._link: socket.socket | None = None
        self._giving: asyncio.Task[None] | None = None
        self._settled = False
        self.succeeded = False

    def offer(self) -> None:
        """Waits for a successor from now on."""
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            door.setblocking(False)
            door.bind(_meeting_point(self._host, self._port))
            door.listen(1)
        except OSError as exc:
            door.close()
            log.warning("no router can take over %s:%d from this one: %s", self._host, self._port, exc.strerror)
            return
        self._door = door
        self._loop.add_reader(door.fileno(), self._knock, door)

    def _knock(self, door: socket.socket) -> None:
        try:
            link, _ = door.accept()
        except OSError:  # it left again
            return
        if not _trusted(link):
            link.close()
            return
        link.setblocking(False)
        self._link = link
        self._close_door()  # the successor will have one there
        self._giving = self._loop.create_task(self._give(link))

    async def _give(self, link: socket.socket) -> None:
        addresses = [Address(host, port, len(fds)) for (host, port), fds in self._listening.items()]
        said = msgspec.json.encode(Manifest(_VERSION, addresses))
        await self._ready()
        try:
            socket.send_fds(link, [said], list(itertools.chain(*self._listening.values())))
        except OSError:  # it did not wait
            self._lost()
            return
        self.succeeded = True
        self._loop.add_reader(link.fileno(), self._lost)
        log.info("process %d listens on %s:%d as well", _peer(link)[0], self._host, self._port)

    def _lost(self) -> None:
        """The successor is gone, before us."""
        self._hang_up()
        if not self._settled:
            self.offer()

    def _hang_up(self) -> None:
        self.succeeded = False
        link, self._link = self._link, None
        if link is not None:
            self._loop.remove_reader(link.fileno())
            link.close()

    def _close_door(self) -> None:
        door, self._door = self._door, None
        if door is not None:
            self._loop.remove_reader(door.fileno())
            door.close()

    async def settle(self) -> bool:
        """Takes no other successor, and waits for one that is coming in; whether there is one."""
        self._settled = True
        self._close_door()
        if self._giving is not None:
            await asyncio.wait([self._giving], timeout=_PATIENCE)
        return self.succeeded

    async def close(self) -> None:
        """Ends everything."""
        self._settled = True
        self._close_door()
        if self._giving is not None:
            self._giving.cancel()
            await asyncio.gather(self._giving, return_exceptions=True)
        self._hang_up()


def _called(host: str, port: int) -> socket.socket | None:
    """A connection to the router that listens there and can be trusted."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.setblocking(False)
    try:
        link.connect(_meeting_point(host, port))
    except OSError:
        link.close()
        return None
    if not _trusted(link):
        log.warning("what claims to be the router at %s:%d belongs to another user", host, port)
        link.close()
        return None
    return link


def _close(*sockets: socket.socket) -> None:
    for sock in sockets:
        sock.close()


def _peer(link: socket.socket) -> tuple[int, int]:
    """Process id and user of the other side, as the kernel saw them."""
    pid, user, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, user


def _trusted(link: socket.socket) -> bool:
    return _peer(link)[1] in (os.geteuid(), 0)


async def _readable(loop: asyncio.AbstractEventLoop, link: socket.socket) -> None:
    """Waits for something to read, or for the end."""
    ready = asyncio.Event()
    loop.add_reader(link.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(link.fileno())
