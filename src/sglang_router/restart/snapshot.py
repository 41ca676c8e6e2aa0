"""What a router knows, as bytes: its workers and its prefix tree, for the next router.

    header   magic, version, length of what follows, BLAKE2b of it       made last, when both are known
    frame    length, Head in MessagePack: times, and the workers (`restart.saved_worker`)
    frame    length, some records of `routing.prefix_tree.image`         one frame for each step of a walk
    frame    ...

`frames` makes them one by one, each within a fraction of a millisecond, so that the code that writes them can let the
event loop run in between. `read` checks everything before it uses anything: bytes that differ from what was written
are refused.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from sglang_router.errors import ConfigError
from sglang_router.restart import saved_worker
from sglang_router.restart.saved_worker import SavedWorker
from sglang_router.restart.version_1 import HeadV1
from sglang_router.routing.policies.base import PrefixMemory
from sglang_router.routing.prefix_tree.node import Record
from sglang_router.routing.worker import Worker
from sglang_router.workers.sources import ConfiguredWorkers

MAGIC = b"sglang-router\0st"
VERSION = 2
"""To be raised whenever older or newer routers would misread a file: its layout, or how a routing text is made."""
_HEADER = struct.Struct("<16sIQ16s")
HEADER_SIZE = _HEADER.size
_LENGTH = struct.Struct("<I")
_RECORDS = 64
"""Records of one frame, at most."""
_BYTES = 1 << 18
"""Bytes of text in one frame, after which no record follows."""


class Unreadable(ValueError):
    """These bytes are not a state that this router may believe. The text completes "the state file ..."."""


class Head(msgspec.Struct, kw_only=True):
    """`now`: the time of the records, in seconds of the writer's clock; `written_at`: the same moment since 1970."""

    now: float
    written_at: float
    workers: list[SavedWorker]


# -- writing -------------------------------------------------------------------------------------------------------


def head_of(workers: Iterable[Worker], configured: ConfiguredWorkers, now: float, written_at: float) -> Head:
    """Return what is written about these workers; `configured`: what flags and file said at this start."""
    return Head(now=now, written_at=written_at, workers=saved_worker.save(workers, configured))


def frames(head: Head, memory: PrefixMemory | None) -> Iterator[bytes]:
    """Make all that follows the header. The memory may change between two frames."""
    encode = msgspec.msgpack.Encoder().encode
    yield _framed(encode(head))
    if memory is not None:
        walk = memory.walk()
        while records := walk.bite(_RECORDS, _BYTES):
            yield _framed(encode(records))


def _framed(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


class HeaderBuilder:
    """Makes the header: `add` all frames, one or several at once, then `build`."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._length = 0

    def add(self, frames: bytes) -> None:
        """Add frames that follow the header."""
        self._hash.update(frames)
        self._length += len(frames)

    def build(self) -> bytes:
        """Return the header for all frames added."""
        return _HEADER.pack(MAGIC, VERSION, self._length, self._hash.digest())


# -- reading -------------------------------------------------------------------------------------------------------


class Snapshot:
    """What `read` found: the head, and frames of the prefix tree that are not decoded yet."""

    def __init__(self, head: Head, frames: list[memoryview]) -> None:
        self.head = head
        self._frames = frames

    def fill(self, memory: PrefixMemory, slots: Mapping[int, int], now: float, today: float) -> None:
        """Fill an empty memory. `slots` as `Builder` takes them; `now` and `today` are this moment, as in `Head`.

        Raises: Unreadable; the memory is empty then.
        """
        away = max(0.0, today - self.head.written_at)
        builder = memory.builder(slots, now - away - self.head.now, now)
        decode = msgspec.msgpack.Decoder(list[Record]).decode
        try:
            for frame in self._frames:
                for record in decode(frame):
                    builder.add(record)
        except ValueError as exc:  # msgspec's as well
            builder.give_up()
            raise Unreadable(f"is damaged: {exc}") from None
        builder.finish()


def read(data: bytes) -> Snapshot:
    """Check the bytes of a state, and decode all but the tree.

    Raises: Unreadable
    """
    version, content = _checked_content(data)
    try:
        first, *others = _frames_in(content)
        head = _HEADS[version](first)
        _check(head)
    except (ValueError, ConfigError, RecursionError, struct.error) as exc:
        raise Unreadable(f"is damaged: {exc}") from None
    return Snapshot(head, others)


def check_header(data: bytes, size: int) -> tuple[int, bytes]:
    """Return version and checksum of a state of `size` bytes, of which `data` is the beginning.

    Raises: Unreadable
    """
    if len(data) < HEADER_SIZE or not data.startswith(MAGIC):
        raise Unreadable("was not written by this router")
    _, version, length, digest = _HEADER.unpack_from(data)
    if version not in _HEADS:
        raise Unreadable(f"is of version {version}, this router's is {VERSION}")
    if size - HEADER_SIZE != length:
        raise Unreadable(f"is damaged: it has {size - HEADER_SIZE} bytes of content in place of {length}")
    return version, digest


def _checked_content(data: bytes) -> tuple[int, memoryview]:
    """Return the version and what follows the header. Raises: Unreadable."""
    version, digest = check_header(data, len(data))
    content = memoryview(data)[HEADER_SIZE:]
    if hashlib.blake2b(content, digest_size=16).digest() != digest:
        raise Unreadable("is damaged: its checksum is wrong")
    return version, content


def _head_of_version_1(frame: memoryview) -> Head:
    old = msgspec.msgpack.decode(frame, type=HeadV1)
    return Head(now=old.now, written_at=old.written_at, workers=[saved.upgraded() for saved in old.workers])


def _head_of_version_2(frame: memoryview) -> Head:
    return msgspec.msgpack.decode(frame, type=Head)


_HEADS: dict[int, Callable[[memoryview], Head]] = {1: _head_of_version_1, VERSION: _head_of_version_2}
"""Versions that can be read, and how. The frames behind the head are the same in all of them."""


def _frames_in(content: memoryview) -> Iterator[memoryview]:
    at = 0
    while at < len(content):
        (length,) = _LENGTH.unpack_from(content, at)
        at += _LENGTH.size + length
        if at > len(content):
            raise ValueError("a frame is cut off")
        yield content[at - length : at]


def _check(head: Head) -> None:
    """Raises: ValueError, ConfigError."""
    saved_worker.check(head.workers)
    if not (math.isfinite(head.now) and math.isfinite(head.written_at)):
        raise ValueError("a time is not finite")
