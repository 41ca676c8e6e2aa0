"""What systemd gives to a service, and what it wants to be told. Nothing of it is used anywhere else.

    take_sockets(host, port)   socket activation: systemd listens, and its sockets outlive the router, so that a client
                               that comes during a restart waits in their queue (LISTEN_FDS; sd_listen_fds(3))
    Notifier                   Type=notify: the router says when it serves, and when it ends; with WatchdogSec= also
                               that its event loop turns (NOTIFY_SOCKET; sd_notify(3))

Both protocols are a handful of environment variables and one datagram. The packages for them need libsystemd, or wrap
these lines.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

from sglang_router.errors import ConfigError

_FIRST = 3
"""The descriptor of the first socket; the others follow."""
_EVERY = {"::": "0.0.0.0"}  # noqa: S104
"""What an address includes: `--host ::` is all addresses of both families."""
_GIVEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def take_sockets(host: str, port: int, environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the sockets that systemd listens on for this process; they are the caller's now. None without a socket
    unit. The variables are removed, so that nobody takes them twice.

    Raises: ConfigError, when they are not what --host and --port say: who asks the router where it listens, and its
    warnings about open access, must hear the truth.
    """
    pid, count, _ = (environ.pop(name, "") for name in _GIVEN)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    taken = [_socket(number) for number in range(_FIRST, _FIRST + int(count))]
    places = [sock.getsockname()[:2] for sock in taken]
    address = host.strip("[]")
    named = {(address, port), (_EVERY.get(address, address), port)}
    if named.issuperset(places):
        return taken
    for sock in taken:
        sock.close()
    there = ", ".join(f"{place[0]}:{place[1]}" for place in places)
    raise ConfigError(
        f"systemd listens on {there} for this router, but the options say {address}:{port}: let --host and --port name"
        " an address of the socket unit"
    )


def _socket(number: int) -> socket.socket:
    """Return the socket of a descriptor. Raises: ConfigError, when no client can connect to it by TCP."""
    try:
        os.set_inheritable(number, False)
        sock = socket.socket(fileno=number)
    except OSError:
        raise ConfigError(f"systemd passed descriptor {number}, which is no socket: see Sockets= of the unit") from None
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise ConfigError("systemd passed a socket that is not TCP: the socket unit needs ListenStream=ADDRESS:PORT")
    sock.setblocking(False)
    return sock


class Notifier:
    """Tells systemd how the router is; does nothing where nobody asked. The variables are removed, so that engines
    and commands that the router starts do not speak in its name.

    watchdog  seconds within which systemd wants to hear that the event loop turns; 0: it does not ask
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        waits = environ.pop("WATCHDOG_USEC", "")
        self.watchdog = int(waits) / 1e6 if waits.isdecimal() and address else 0.0

    def __repr__(self) -> str:
        return f"<Notifier {self._address!r}>"

    def tell(self, state: str) -> None:
        """Send a state, such as READY=1. A systemd that does not listen is no reason to fail."""
        if self._address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode(), self._address)
