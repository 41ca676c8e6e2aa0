"""One relay, as the decider has it: its link, and what belongs to it."""

from __future__ import annotations

import mmap
from typing import Any, Final, Protocol

from sglang_router.processes.link import Link
from sglang_router.processes.message import Message
from sglang_router.processes.messages import Stats

_NOTHING: Final = Stats(0, 0, 0, 0, 0, 0, 0.0)


class Waiting(Protocol):
    """What one relay has open, as this module keeps it: an `OpenedRequest` of `processes.desk`."""

    number: int


class RelayPort:
    """See the module.

    index     which relay it is, from 0; pid: of its process
    requests  those that it has asked for and not ended, by its numbers; owner: the desk
    leases    the same by the leases of their legs in flight; owner: the desk
    calls     of the control plane, by number; owner: `processes.control`
    stats     what it has open, as it told last
    accepts   0: it accepts clients; the error number, if it cannot; None: not known yet
    drained   which drain it has finished; 0: none
    """

    __slots__ = ("_memory", "accepts", "calls", "drained", "index", "leases", "link", "pid", "requests", "stats")

    def __init__(self, index: int, link: Link, memory: mmap.mmap | bytes) -> None:
        self.index = index
        self.link = link
        self._memory = memory
        self.requests: dict[int, Any] = {}
        self.leases: dict[int, Any] = {}
        self.calls: dict[int, Any] = {}
        self.stats = _NOTHING
        self.drained = 0
        self.pid = 0
        self.accepts: int | None = None

    def __repr__(self) -> str:
        return f"<RelayPort {self.index}: {len(self.requests)} requests, {len(self.leases)} leases>"

    def put(self, message: Message) -> None:
        """Send a message at the end of this turn."""
        self.link.put(message)

    def text(self, at: int, length: int) -> bytes:
        """Return a text in the relay's memory."""
        return self._memory[at : at + length]
