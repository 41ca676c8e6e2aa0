"""Clients that end their sending side after a request (`nc -N`, or shutdown(SHUT_WR)), and wait for the answer.

To the router it looks the same as a client that has closed its connection, and work for a client that has left should
end at once. Nobody leaves just after a request, so an early end is believed, and looked into later:

    end within AT_ONCE of the request, no answer yet   the connection stays open for the answer    (deadline PROBE)
    PROBE_AFTER later, still no answer                 `100 Continue` is sent                      (deadline PRESENT)
    the system of a client that has left resets        the connection is aborted
    any other end                                      the client has left

`100 Continue` is harmless to all clients but those of HTTP/1.0, which get none: they are believed.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

AT_ONCE: Final = 0.1
"""Seconds after a request within which its client may end its sending side."""
PROBE_AFTER: Final = 1.0
"""Seconds until the router finds out whether such a client still reads."""


def is_half(transport: asyncio.Transport, asked: float | None, now: float) -> bool:
    """Return whether the end of what a client sends may be only that.

    asked  when the request was complete whose answer has not begun; None: there is none
    """
    secure = transport.get_extra_info("ssl_object") is not None  # TLS connections have no halves
    return not secure and asked is not None and now - asked <= AT_ONCE


def is_reset(transport: asyncio.Transport) -> bool:
    """Return whether the client's system has reset a connection that is not read any more."""
    return bool(transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
