"""A gateway that speaks HTTP/2 by hand, to do what libraries do not: read nothing, answer no ping, vanish.

with raw_gateway(port, window=0) as link:      window: bytes of each stream that it lets the router send
    link.ask(1, *messages)                     opens stream 1, and sends these
    link.until(DATA)                           reads frames until one of this type; answers pings, unless `mute`

Heads are written without compression and Huffman codes (RFC 7541 6.2.2), which every server must read.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from sglang_router.picker.messages import METHOD, SERVICE

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_INITIAL_WINDOW: Final = 4
_HEAD: Final = (
    *((b":method", b"POST"), (b":scheme", b"http"), (b":path", f"/{SERVICE}/{METHOD}".encode())),
    *((b":authority", b"picker"), (b"content-type", b"application/grpc"), (b"te", b"trailers")),
)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


class RawGateway:
    """See the module. mute: it answers no pings."""

    def __init__(self, link: socket.socket, window: int) -> None:
        self.mute = False
        self._link = link
        self._heard = b""
        link.sendall(_PREFACE + _frame(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW, window)))

    def ask(self, stream: int, *messages: Any) -> None:
        """Open a stream and send messages on it."""
        head = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in _HEAD)
        self._send(HEADERS, END_HEADERS, stream, head)
        self.send(stream, *messages)

    def send(self, stream: int, *messages: Any) -> None:
        """Send messages on an open stream."""
        for message in messages:
            data = message.SerializeToString()
            self._send(DATA, 0, stream, struct.pack(">BI", 0, len(data)) + data)

    def ping(self, number: bytes) -> None:
        """Send a ping of 8 bytes."""
        self._send(PING, 0, 0, number)

    def widen(self, stream: int, more: int) -> None:
        """Let the router send so many more bytes on a stream."""
        self._send(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self._link.sendall(_frame(kind, flags, stream, payload))

    def until(self, *kinds: int) -> Frame | None:
        """Return the next frame of one of these types; None when the connection is closed before."""
        while (frame := self._next()) is not None:
            if frame.kind == SETTINGS and not frame.flags & ACK:
                self._send(SETTINGS, ACK, 0, b"")
            elif frame.kind == PING and not frame.flags & ACK and not self.mute:
                self._send(PING, ACK, 0, frame.payload)
            if frame.kind in kinds:
                return frame
        return None

    def _next(self) -> Frame | None:
        head = self._take(9)
        payload = head and self._take(int.from_bytes(head[:3], "big"))
        if not head or payload is None:
            return None
        return Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)

    def _take(self, size: int) -> bytes | None:
        while len(self._heard) < size:
            with contextlib.suppress(ConnectionResetError):
                if data := self._link.recv(65536):
                    self._heard += data
                    continue
            return None
        taken, self._heard = self._heard[:size], self._heard[size:]
        return taken


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


@contextlib.contextmanager
def raw_gateway(port: int, window: int = 65535) -> Iterator[RawGateway]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        yield RawGateway(link, window)
