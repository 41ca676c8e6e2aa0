"""What the supervisor gives to the processes that it starts: they share it, because they are forked."""

from __future__ import annotations

import mmap
import os
import signal
import socket
from collections.abc import Sequence

import msgspec

from sglang_router.processes import sockets
from sglang_router.processes.kept_options import KeptOptions
from sglang_router.restart.handover import InheritedSockets


class Given(msgspec.Struct, frozen=True):
    """The same for all processes of one router.

    folder     private; has the Unix socket of the decider, and its state file
    sockets    of the main port, bound: for each relay those that it serves
    inherited  what another router has handed over; None: nothing
    memories   for long texts, one for each relay
    key        of the fingerprints of requests
    mark       what this router writes into Via
    tells      by which the decider tells the supervisor how it is
    options    those that the last reload has left
    """

    folder: str
    sockets: list[list[socket.socket]]
    inherited: InheritedSockets | None
    memories: Sequence[mmap.mmap]
    key: bytes
    mark: bytes
    tells: socket.socket
    options: KeptOptions

    @property
    def address(self) -> str:
        """The Unix socket of the decider."""
        return os.path.join(self.folder, "decider")

    @property
    def state_file(self) -> str:
        """Where the decider keeps its state, when no option says so."""
        return os.path.join(self.folder, "state")

    def close_ports(self) -> None:
        """Close the main port, and what else was handed over."""
        for share in self.sockets:
            sockets.close(share)
        if self.inherited is not None:
            self.inherited.close_rest()

    def close(self) -> None:
        """Close everything in this process."""
        self.close_ports()
        self.tells.close()
        self.options.close()
        if self.inherited is not None:
            self.inherited.close()


class Launch(msgspec.Struct, frozen=True):
    """One start of one process.

    count  how many processes have been started before; it makes numbers unique
    cause  how the one before it ended; "": this is the first
    """

    count: int
    cause: str


LEADING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that the supervisor passes on to the decider."""
PASSED = {number: signal.SIGRTMIN + place for place, number in enumerate(LEADING)}
"""By which signal each of them reaches the decider. It ignores LEADING: whoever sends SIGTERM to all processes of a
group, as systemd does, would end it twice, and the second one means at once."""
BUILT, READY, ENDING, REFUSED = b"built", b"ready", b"ending", b"refused "
"""What the decider tells: the options can be used; clients are served; it ends, and is not to be restarted; it cannot
start, and why."""
