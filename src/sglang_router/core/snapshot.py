"""What a router knows, as bytes: its workers and its prefix tree, for the router that comes after it.

    header   magic, version, length of what follows, BLAKE2b of it       made last, when both are known
    frame    length, Head in MessagePack: when, and the workers
    frame    length, some records of `core.tree_image`                   one for each bite of a walk
    frame    ...

`frames` makes them one by one, each within a fraction of a millisecond, so that whoever writes can let others have
their turn in between. `read` checks everything before anything is believed: bytes that are not, from the first to the
last, what was written are refused.

What an option said is not written but marked, and the option's value of the next start counts: a new --worker-api-key
reaches the workers that had the old one, and a worker that is no longer named by --worker-urls does not come back.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import TYPE_CHECKING

import msgspec

from sglang_router.config import parse_worker_url
from sglang_router.config.checks import bearer_key
from sglang_router.core.tree_image import Builder, Record, Walk
from sglang_router.core.worker import HealthRules, Worker, WorkerSpec
from sglang_router.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sglang_router.core.tree import Tree

MAGIC = b"sglang-router\0st"
VERSION = 1
"""To be raised whenever older or newer routers would misread a file: its shape, or how a routing text is made."""
_HEADER = struct.Struct("<16sIQ16s")
HEADER_SIZE = _HEADER.size
_LENGTH = struct.Struct("<I")
_RECORDS = 64
_BYTES = 1 << 18


class Unreadable(ValueError):
    """These bytes are not a state that this router may believe. The text completes "the state file ..."."""


class Defaults(msgspec.Struct, frozen=True):
    """What the options say of workers that nobody said more of."""

    worker_urls: tuple[str, ...] = ()
    api_key: str | None = None
    dp_aware: bool = False
    health: HealthRules = HealthRules()


class Saved(msgspec.Struct, kw_only=True):
    """A worker as it is written.

    slot         its slot in the records; -1: it has none
    given        it was named by --worker-urls
    default_key  its key is that of --worker-api-key, and not in `spec`
    default_health  its health checks are those of the options
    """

    spec: WorkerSpec
    id: str
    slot: int
    draining: bool
    given: bool
    default_key: bool
    default_health: bool

    def spec_now(self, defaults: Defaults) -> WorkerSpec:
        """With what the options say today."""
        spec = msgspec.structs.replace(self.spec)
        if self.default_key:
            spec.api_key = defaults.api_key
        if self.default_health:
            spec.health = defaults.health
        return spec

    def wanted(self, defaults: Defaults) -> bool:
        """Whether today's options still want it."""
        if not self.given:
            return True
        return self.spec.url in defaults.worker_urls and self.spec.dp_aware == defaults.dp_aware


class Head(msgspec.Struct, kw_only=True):
    """`now` is the time of the records, in seconds of the writer's clock; `written_at` the same moment since 1970."""

    now: float
    written_at: float
    workers: list[Saved]


# -- out -----------------------------------------------------------------------------------------------------------


def head_of(workers: Iterable[Worker], defaults: Defaults, now: float, written_at: float) -> Head:
    """What is written of these workers."""
    return Head(now=now, written_at=written_at, workers=[_saved(worker, defaults) for worker in workers])


def _saved(worker: Worker, defaults: Defaults) -> Saved:
    spec = worker.spec
    default_key, default_health = spec.api_key == defaults.api_key, spec.health == defaults.health
    kept = msgspec.structs.replace(
        spec,
        dp_rank=worker.dp_rank,
        api_key=None if default_key else spec.api_key,
        model_id=None if spec.model_id == worker.report.model else spec.model_id,  # its engine will tell again
        health=HealthRules() if default_health else spec.health,
    )
    return Saved(
        spec=kept,
        id=worker.id,
        slot=worker.slot,
        draining=worker.draining,
        given=spec.url in defaults.worker_urls,
        default_key=default_key,
        default_health=default_health,
    )


def frames(head: Head, tree: Tree | None) -> Iterator[bytes]:
    """All that follows the header. The tree may change between two frames."""
    encode = msgspec.msgpack.Encoder().encode
    yield _framed(encode(head))
    if tree is not None:
        walk = Walk(tree)
        while records := walk.bite(_RECORDS, _BYTES):
            yield _framed(encode(records))


def _framed(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


class Seal:
    """Makes the header: `add` all frames, one or several at once, then ask for it."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.length = 0

    def add(self, frames: bytes) -> None:
        self._hash.update(frames)
        self.length += len(frames)

    def header(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.length, self._hash.digest())


# -- in ------------------------------------------------------------------------------------------------------------


class State:
    """What `read` found."""

    def __init__(self, head: Head, frames: list[memoryview]) -> None:
        self.head = head
        self._frames = frames

    def fill(self, tree: Tree, slots: Mapping[int, int], now: float, today: float) -> None:
        """Fills an empty tree; `slots` as `Builder` takes them. `now` and `today` are this moment, as in `Head`.

        Raises: Unreadable; the tree is empty then.
        """
        away = max(0.0, today - self.head.written_at)
        builder = Builder(tree, slots, now - away - self.head.now, now)
        decode = msgspec.msgpack.Decoder(list[Record]).decode
        try:
            for frame in self._frames:
                for record in decode(frame):
                    builder.add(record)
        except ValueError as exc:  # msgspec's as well
            builder.give_up()
            raise Unreadable(f"is damaged: {exc}") from None
        builder.finish()


def read(data: bytes) -> State:
    """Checks the bytes of a state, and reads all but the tree.

    Raises: Unreadable
    """
    if len(data) < HEADER_SIZE or not data.startswith(MAGIC):
        raise Unreadable("was not written by this router")
    _, version, length, digest = _HEADER.unpack_from(data)
    if version != VERSION:
        raise Unreadable(f"is of version {version}, this router's is {VERSION}")
    content = memoryview(data)[HEADER_SIZE:]
    if len(content) != length:
        raise Unreadable(f"is damaged: it has {len(content)} bytes of content in place of {length}")
    if hashlib.blake2b(content, digest_size=16).digest() != digest:
        raise Unreadable("is damaged: its checksum is wrong")
    try:
        first, *others = _frames_in(content)
        head = msgspec.msgpack.decode(first, type=Head)
        _check(head)
    except (ValueError, ConfigError, RecursionError, struct.error) as exc:
        raise Unreadable(f"is damaged: {exc}") from None
    return State(head, others)


def _frames_in(content: memoryview) -> Iterator[memoryview]:
    at = 0
    while at < len(content):
        (length,) = _LENGTH.unpack_from(content, at)
        at += _LENGTH.size + length
        if at > len(content):
            raise ValueError("a frame is cut off")
        yield content[at - length : at]


def _check(head: Head) -> None:
    """What a registration would check as well."""
    ids, names = set(), set()
    for saved in head.workers:
        spec, rules = saved.spec, saved.spec.health
        ids.add(saved.id)
        names.add((spec.url, spec.dp_rank))
        if parse_worker_url(spec.url) != spec.url:
            raise ValueError("a URL is not in its normal form")
        if spec.api_key is not None:
            bearer_key(spec.api_key)
        if not (0 < rules.interval < math.inf and 0 < rules.timeout < math.inf and rules.endpoint.startswith("/")):
            raise ValueError("health checks that cannot be made")
        if rules.failure_threshold < 1 or rules.success_threshold < 1 or (spec.dp_rank or 0) < 0:
            raise ValueError("a number that is too small")
    if len(ids) < len(head.workers) or len(names) < len(head.workers):
        raise ValueError("a worker is there twice")
    if not (math.isfinite(head.now) and math.isfinite(head.written_at)):
        raise ValueError("a time that is none")
