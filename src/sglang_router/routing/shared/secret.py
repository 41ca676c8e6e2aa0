"""The key of the fleet: it names things so that nobody else can tell what they are, and seals messages.

    name(b"http://w0:1")        a worker, a session, a client: 64 bits of BLAKE2b with the key
    chain(namespace, text)      the names of the beginnings of a text, at the boundaries
    seal(topic, data)           data with the mark of the key and a code that only its owner can make
    open(topic, payload)        the data again; None for what this key has not sealed for this topic

No prompt, URL, session or client name leaves the process, but for workers that are added for all: their URLs are only
sealed (`routing.shared.workers`). Whoever reads the store without the key cannot even test whether a text that he knows
was there, and whoever writes to it can do no more than repeat or withhold what routers of this fleet wrote: the name of
the fleet is part of the key, so that a file with a key may serve several fleets.

Routers with another key, or another step, are foreign to each other: their payloads bear another mark.

*Boundaries* are a function of the position alone, so that all routers agree: every `step` bytes (512) up to 64 steps,
then every 64th part of the position, rounded down to a power of two. That is at most 384 boundaries of the first 2048
steps (1 MiB), where a chain ends. A text is hashed once, by one running BLAKE2b that is copied at each boundary: 8 us
for 4 kB, 1.2 ms for 1 MiB, which is as long as the prefix tree takes for such a text.

Hashing each block with the hash before it lost: it takes twice as long, because each block then has a start of its own.
"""

from __future__ import annotations

from hashlib import blake2b
from hmac import compare_digest
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

from sglang_router.routing.shared.packing import numbers

_EVERY: Final = 64
"""Steps up to which each is a boundary; and how many boundaries there are until the position has doubled."""
MOST_STEPS: Final = 2048
_MARK: Final = 4
_CODE: Final = 16
_LOCAL: Final = frozenset(("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"))
"""Names of this machine for itself; those below `localhost` as well."""


class Secret:
    """See the module. key: 32 bytes; step: of chains, in bytes of text; place, fleet: see `SharedRules`."""

    __slots__ = ("_codes", "_fleet", "_key", "_names", "_place", "_texts", "boundaries", "mark", "step")

    def __init__(self, key: bytes, step: int, place: bytes = b"", fleet: bytes = b"") -> None:
        self.step = step
        self._place = place
        self._fleet = fleet
        self.boundaries = boundaries_of(step)
        self.use(key)

    def use(self, key: bytes) -> None:
        """Name and seal by another key from now on."""
        if self._fleet:
            key = blake2b(self._fleet, key=key, person=b"fleet").digest()
        self._key = key
        self._names = blake2b(key=key, digest_size=8, person=b"name")
        self._texts = blake2b(key=key, digest_size=8, person=b"text")
        self._codes: dict[str, Any] = {}  # by topic
        self.mark = blake2b(b"%d" % self.step, key=key, digest_size=_MARK, person=b"mark").digest()

    def __repr__(self) -> str:
        return f"<Secret {self.mark.hex()}>"

    def name(self, kind: bytes, text: bytes) -> int:
        """Return the name of something. kind: of what, without a zero byte."""
        state = self._names.copy()
        state.update(kind + b"\0" + text)
        return int.from_bytes(state.digest(), "little")

    def worker(self, url: str) -> int:
        """Return the name of a worker, by its URL. One of this machine alone has a name of this machine."""
        return self.name(b"worker", url.encode() + (b"\0" + self._place if is_local(url) else b""))

    def chain(self, namespace: bytes, text: bytes) -> list[int]:
        """Return the names of the beginnings of a text, the shortest first; none for a text shorter than a step."""
        size = len(text)
        if size < self.step:
            return []
        state = self._texts.copy()
        state.update(b"%d\0" % len(namespace) + namespace)
        found = []
        start = 0
        for end in self.boundaries:
            if end > size:
                break
            state.update(text[start:end])
            found.append(state.digest())
            start = end
        return numbers(b"".join(found))

    def seal(self, topic: str, data: bytes) -> bytes:
        """Return data as it may be given to others."""
        return self.mark + self._code(topic, data) + data

    def open(self, topic: str, payload: bytes) -> bytes | None:
        """Return what was sealed; None if this key did not seal it for this topic."""
        data = payload[_MARK + _CODE :]
        return data if compare_digest(self._code(topic, data), payload[_MARK : _MARK + _CODE]) else None

    def is_ours(self, payload: bytes) -> bool:
        """Return whether a payload bears the mark of this key."""
        return payload[:_MARK] == self.mark

    def _code(self, topic: str, data: bytes) -> bytes:
        state = self._codes.get(topic)
        if state is None:
            state = self._codes[topic] = blake2b(key=self._key, digest_size=_CODE, person=topic.encode()[:16])
        state = state.copy()
        state.update(data)
        code: bytes = state.digest()
        return code


def is_local(url: str) -> bool:
    """Return whether the host of a URL means another machine on each machine: loopback, link-local and unspecified
    addresses (0.0.0.0 is this machine, too), and numbers of which only the C library knows what they mean (127.1)."""
    authority = url.partition("://")[2].partition("/")[0].partition("@")[0]  # behind it: a rank
    host = authority[1:].partition("]")[0] if authority.startswith("[") else authority.partition(":")[0].rstrip(".")
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        last = host.rpartition(".")[2]
        return last in _LOCAL or host in _LOCAL or last.isdecimal() or last.startswith("0x")
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified or address.is_link_local


def boundaries_of(step: int) -> list[int]:
    """Return all boundaries, in bytes, see the module."""
    found, position = [], 0
    while position < MOST_STEPS:
        part = position // _EVERY
        position += 1 << max(part.bit_length() - 1, 0)
        found.append(position * step)
    return found
