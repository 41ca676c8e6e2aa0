"""Hand-over: the next router takes over the listening sockets of this one, and no connection is lost in between.

    old router (SocketOffer)                                   new router (take_over), --reuse-port too
    listens, and waits for a successor at an abstract
    Unix address made of host and port             <---------  connects
    `ready()`: writes what must be written first
    sends the sockets by SCM_RIGHTS                --------->  listens on the very same sockets
    `succeeded`: both accept, from one queue       <--------   ... and waits for a successor of its own
    SIGTERM: closes its copy of the sockets                    goes on

The sockets are the same objects of the kernel, not other sockets on the same port. So closing one copy resets nothing:
a connection that is queued stays queued. With SO_REUSEPORT each router has a queue of its own, which dies with it; see
docs/restart.md for what was measured.

An abstract address lives in a network namespace, as the port does, and vanishes with its process. It has no
permissions, so both sides ask the kernel who the other is (SO_PEERCRED): it must be the same user, or root.

The connection between the two stays open while the new router lives. If the new one ends first, the old one waits for
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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

log = logging.getLogger("sglang_router.listen")

_VERSION = 1
_MAX_MANIFEST = 65536
_MAX_SOCKETS = 200
"""Sockets handed over at once; the kernel allows 253."""
_TIMEOUT = 30.0
"""Seconds that the other side may take: it may have to write a large state first."""
_CREDENTIALS = struct.Struct("iII")


def unix_address(host: str, port: int) -> str:
    """Return the abstract address at which the router that listens there waits.

    It is a digest, because it may have only 107 bytes, and a host name has up to 253.
    """
    return "\0sglang-router/" + hashlib.blake2b(f"{host} {port}".encode(), digest_size=16).hexdigest()


class Address(NamedTuple):
    """Where a router listens, as its options say. `sockets`: how many; one name may stand for several addresses."""

    host: str
    port: int
    sockets: int


class Manifest(msgspec.Struct):
    """Goes with the sockets and says which are which, in their order."""

    version: int
    addresses: list[Address]


class InheritedSockets:
    """The sockets of the router before this one, and the connection by which that one knows that this one lives.

    pid  process id of that router
    """

    def __init__(self, link: socket.socket, sockets: dict[tuple[str, int], list[socket.socket]]) -> None:
        self._link = link
        self._sockets = sockets
        self.pid, _ = _peer(link)

    def take(self, host: str, port: int) -> list[socket.socket]:
        """Return the sockets of one address; they are the caller's now. None if the old router did not listen there."""
        return self._sockets.pop((host, port), [])

    def close_rest(self) -> None:
        """Close the sockets that were not taken."""
        for sockets in self._sockets.values():
            _close(*sockets)
        self._sockets.clear()

    def close(self) -> None:
        """Close what was not taken, and the connection: the old router sees that it has no successor any more."""
        self.close_rest()
        self._link.close()


async def take_over(loop: asyncio.AbstractEventLoop, host: str, port: int) -> InheritedSockets | None:
    """Get the sockets of the router that listens there now; None when there is none that hands them over.

    Raises: TimeoutError when it does not answer.
    """
    link = _connect(host, port)
    if link is None:
        return None
    sockets: list[socket.socket] = []
    try:
        await asyncio.wait_for(_readable(loop, link), _TIMEOUT)
        manifest, fds, _, _ = socket.recv_fds(link, _MAX_MANIFEST, _MAX_SOCKETS, socket.MSG_CMSG_CLOEXEC)
        sockets = [socket.socket(fileno=fd) for fd in fds]
        return InheritedSockets(link, _by_address(manifest, sockets))
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


def _by_address(data: bytes, sockets: list[socket.socket]) -> dict[tuple[str, int], list[socket.socket]]:
    """Sort the sockets by their address. Raises: ValueError."""
    if not data:
        raise ValueError("it has ended")
    manifest = msgspec.json.decode(data, type=Manifest)
    if manifest.version != _VERSION or sum(address.sockets for address in manifest.addresses) != len(sockets):
        raise ValueError("it is of another version")
    rest = iter(sockets)
    return {(host, port): list(itertools.islice(rest, count)) for host, port, count in manifest.addresses}


class SocketOffer:
    """Offers this router's listening sockets to the one router that comes next.

    listening  their descriptors by host and port; a successor asks for the first address
    ready      is awaited before they are handed over
    succeeded  a router took over, and it lives
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
        self._listener: socket.socket | None = None  # where a successor connects
        self._link: socket.socket | None = None  # to the successor
        self._handing: asyncio.Task[None] | None = None
        self._settled = False
        self.succeeded = False

    @property
    def state(self) -> str:
        """One of waiting, handing over, succeeded, closed."""
        if self.succeeded:
            return "succeeded"
        if self._listener is not None:
            return "waiting"
        return "handing over" if self._link is not None else "closed"

    def __repr__(self) -> str:
        return f"<SocketOffer {self._host}:{self._port} {self.state}>"

    def offer(self) -> None:
        """Wait for a successor from now on."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(unix_address(self._host, self._port))
            listener.listen(1)
        except OSError as exc:
            listener.close()
            log.warning("no router can take over %s:%d from this one: %s", self._host, self._port, exc.strerror)
            return
        self._listener = listener
        self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except OSError:  # it left again
            return
        if not _trusted(link):
            link.close()
            return
        link.setblocking(False)
        self._link = link
        self._close_listener()  # the successor will wait at the same address
        self._handing = self._loop.create_task(self._hand_over(link))

    async def _hand_over(self, link: socket.socket) -> None:
        addresses = [Address(host, port, len(fds)) for (host, port), fds in self._listening.items()]
        manifest = msgspec.json.encode(Manifest(_VERSION, addresses))
        await self._ready()
        try:
            socket.send_fds(link, [manifest], list(itertools.chain(*self._listening.values())))
        except OSError:  # it did not wait
            self._lost()
            return
        self.succeeded = True
        self._loop.add_reader(link.fileno(), self._lost)
        log.info("process %d listens on %s:%d as well", _peer(link)[0], self._host, self._port)

    def _lost(self) -> None:
        """The successor ended before this router did: wait for another one."""
        self._close_link()
        if not self._settled:
            self.offer()

    def _close_link(self) -> None:
        self.succeeded = False
        link, self._link = self._link, None
        if link is not None:
            self._loop.remove_reader(link.fileno())
            link.close()

    def _close_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener.fileno())
            listener.close()

    async def settle(self) -> bool:
        """Accept no other successor, wait for one that is taking over now; returns whether there is one."""
        self._settled = True
        self._close_listener()
        if self._handing is not None:
            await asyncio.wait([self._handing], timeout=_TIMEOUT)
        return self.succeeded

    async def close(self) -> None:
        """End everything."""
        self._settled = True
        self._close_listener()
        if self._handing is not None:
            self._handing.cancel()
            await asyncio.gather(self._handing, return_exceptions=True)
        self._close_link()


def _connect(host: str, port: int) -> socket.socket | None:
    """Connect to the router that listens there, if there is one that can be trusted."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.setblocking(False)
    try:
        link.connect(unix_address(host, port))
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
    """Return process id and user of the other side, as the kernel saw them."""
    pid, user, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, user


def _trusted(link: socket.socket) -> bool:
    return _peer(link)[1] in (os.geteuid(), 0)


async def _readable(loop: asyncio.AbstractEventLoop, link: socket.socket) -> None:
    """Wait for something to read, or for the end."""
    ready = asyncio.Event()
    loop.add_reader(link.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(link.fileno())
