"""Who listens on the port of an engine: the engine, or a stranger.

A port is chosen when it is free, but the engine listens there only when its model is loaded, minutes later. What
answers a health check meanwhile may be another program, to which the check would show the worker's key. Linux says
whose socket it is:

    /proc/net/tcp, /proc/net/tcp6     address and port of each listening socket, and its inode
    /proc/PID/fd                      the inodes that a process has open: of the engine and of all its descendants

Of several sockets with this port, the most exact address gets the connections, and IPv4 goes before IPv6, as in the
kernel's `inet_lookup_listener`. Only what is certain counts as a stranger: not on a system without /proc, not when a
process of the engine does not show its files (it runs as another user), and not when no socket is found (it is in
another network namespace).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from sglang_router.launch.warden import descendants

_PROC = Path("/proc")
_LISTEN = "0A"
_ANY = ("00000000", "0" * 32)
"""0.0.0.0 and ::, as the kernel writes them."""


def stranger_at(url: str, warden: int) -> str:
    """Return who listens at an engine's URL in its place, in words; "" if it is the engine, or nobody can tell.

    It takes some milliseconds, more on a machine with very many processes or connections: call it in a thread.

    warden  process id of the engine's warden, whose descendants the processes of the engine are
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    try:
        listening = _listening(parts.hostname, parts.port)
        if not listening:  # as long as a model is loaded
            return ""
        foreign = listening - _inodes_of([warden, *descendants(warden)])
    except OSError:  # no /proc, a name that is not resolved, or files that are not shown
        return ""
    return f"another program listens on {parts.netloc}{_named(foreign)}" if foreign else ""


def _listening(host: str, port: int) -> set[str]:
    """Return the inodes of the sockets that get connections to this address."""
    sockets: dict[str, set[str]] = {}
    for address, inode in _sockets(f"{port:04X}"):
        sockets.setdefault(address, set()).add(inode)
    for family, *_, found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        address = str(found[0])
        exact = _kernel_form(address)
        order = (exact, _kernel_form(f"::ffff:{address}"), *_ANY) if family == socket.AF_INET else (exact, _ANY[1])
        if inodes := next((sockets[each] for each in order if each in sockets), None):
            return inodes
    return set()


def _sockets(port: str) -> Iterator[tuple[str, str]]:
    """Yield the address and the inode of each socket that listens on a port."""
    for table in ("tcp", "tcp6"):
        path = _PROC / "net" / table
        if not path.exists():  # a kernel without IPv6
            continue
        with path.open(encoding="ascii") as lines:  # line by line: other threads go on meanwhile
            for line in lines:
                if f":{port} " in line:
                    _, local, _, state, *_, inode = line.split(None, 10)[:10]
                    address, _, its_port = local.partition(":")
                    if its_port == port and state == _LISTEN and inode != "0":  # some sandboxes hide the inodes
                        yield address, inode


def _kernel_form(address: str) -> str:
    """Return an address as in /proc/net/tcp: words of four bytes, each as a number of this machine."""
    packed = ipaddress.ip_address(address.partition("%")[0]).packed
    words = (packed[start : start + 4] for start in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


def _inodes_of(pids: list[int]) -> set[str]:
    """Return the inodes of all sockets of some processes. Raises: PermissionError, if one does not show its files."""
    found: set[str] = set()
    for pid in pids:
        try:
            found.update(_inodes(pid))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return found


def _inodes(pid: int) -> Iterator[str]:
    folder = f"{_PROC}/{pid}/fd"
    for name in os.listdir(folder):
        try:
            what = os.readlink(f"{folder}/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue
        if what.startswith("socket:["):
            yield what[len("socket:[") : -1]


def _named(inodes: set[str]) -> str:
    """Return the name of a program that has one of these sockets, after a colon; "" if it is another user's."""
    for pid in (int(entry) for entry in os.listdir(_PROC) if entry.isdecimal()):
        try:
            if not inodes.isdisjoint(_inodes(pid)):
                return f": {(_PROC / str(pid) / 'comm').read_text('utf-8', 'replace').strip()} (process {pid})"
        except OSError:
            continue
    return ""
