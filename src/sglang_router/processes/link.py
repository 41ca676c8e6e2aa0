"""One connection between a relay and the decider: frames of messages over a Unix socket.

    put(message)     kept until the end of this turn of the event loop; put_quietly: until another message is put
    send()           all kept messages in one frame, and one write
    data_received    whole frames --> the owner's `heard(messages)`, one call for a frame

    frame = length of the rest (4 bytes, little endian) | a MessagePack array of messages

One write per turn: a write wakes the other process, and that costs more than a message.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from sglang_router.processes.message import Message
from sglang_router.processes.messages import FromDecider, FromRelay
from sglang_router.routing.native import mypyc_attr

_HEAD: Final = struct.Struct("<I")
_MOST: Final = 1 << 28
"""Most bytes of a frame; a longer one is no frame."""


class LinkOwner(Protocol):
    """What hears a link."""

    def heard(self, link: Link, messages: list[Any]) -> None:
        """Take the messages of one frame."""

    def link_lost(self, link: Link) -> None:
        """The connection is closed."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Link:
    """See the module. It has the methods of an asyncio protocol.

    owner   hears it
    decode  reads the messages of the other side
    later   calls `send` at the end of this turn
    stuck   the other side does not read
    """

    __slots__ = ("_armed", "_decode", "_later", "_out", "_owner", "_rest", "stuck", "transport")

    transport: asyncio.Transport

    def __init__(
        self, owner: LinkOwner, decode: Callable[[memoryview], list[Any]], later: Callable[[Link], None]
    ) -> None:
        self._owner = owner
        self._decode = decode
        self._later = later
        self._out: list[Message] = []
        self._armed = False
        self._rest = bytearray()
        self.stuck = False

    def __repr__(self) -> str:
        return f"<Link {len(self._out)} to send, {len(self._rest)} bytes of a frame{', stuck' * self.stuck}>"

    # -- sending -------------------------------------------------------------------------------------------------------

    def put(self, message: Message) -> None:
        """Send a message at the end of this turn."""
        self._out.append(message)
        if not self._armed:
            self._armed = True
            self._later(self)

    def put_large(self, message: Message) -> None:
        """Send a message with much in it now: frames stay small, and `stuck` is right before the next one is put."""
        self._out.append(message)
        self.send()

    def put_quietly(self, message: Message) -> None:
        """Send a message with the next one: it is not worth a write, and a wake-up of the other process, of its own."""
        self._out.append(message)

    def last(self) -> Message | None:
        """Return the message that was put last and is not sent yet."""
        return self._out[-1] if self._out else None

    def replace_last(self, message: Message) -> None:
        """Put a message in the place of the last one."""
        self._out[-1] = message

    def send(self) -> None:
        """Send what was put."""
        self._armed = False
        out = self._out
        if out:
            self._out = []
            if not self.transport.is_closing():
                self.transport.write(frame(out))

    # -- called by the event loop --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Keep the transport."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Pass the messages of whole frames on; keep the rest."""
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < 4 or len(rest) < 4 + self._size(rest, 0):
                return
            data, self._rest = bytes(rest), bytearray()
        view, at, size = memoryview(data), 0, len(data)
        while at + 4 <= size:
            end = at + 4 + self._size(data, at)
            if end > size:
                break
            self._owner.heard(self, self._decode(view[at + 4 : end]))
            at = end
        if at < size:
            self._rest += view[at:]

    def _size(self, data: bytes | bytearray, at: int) -> int:
        """Return the length of the frame that begins there; one that is none ends the link."""
        size: int = _HEAD.unpack_from(data, at)[0]
        if size > _MOST:
            self.transport.abort()
        return size

    def eof_received(self) -> bool:
        """Close: the other side has ended."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner."""
        self._owner.link_lost(self)

    def pause_writing(self) -> None:
        """Take note that the other side does not read."""
        self.stuck = True

    def resume_writing(self) -> None:
        """Take note that it reads again."""
        self.stuck = False


_encode = msgspec.msgpack.Encoder().encode_into
decode_from_relay: Callable[[memoryview], list[Any]] = msgspec.msgpack.Decoder(list[FromRelay]).decode
decode_from_decider: Callable[[memoryview], list[Any]] = msgspec.msgpack.Decoder(list[FromDecider]).decode


def frame(messages: list[Message]) -> bytearray:
    """Return one frame of messages."""
    data = bytearray(4)
    _encode(messages, data, 4)
    _HEAD.pack_into(data, 0, len(data) - 4)
    return data
