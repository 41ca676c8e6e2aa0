"""The WebSockets that are open or being opened: how many there may be, and how long each may last."""

from __future__ import annotations

from typing import Protocol

from sglang_router.errors import TooManyTunnels
from sglang_router.relay.rules import TunnelRules


class Tunnel(Protocol):
    """A request for a WebSocket, from its beginning to its end."""

    @property
    def open(self) -> bool:
        """Whether the client has the worker's 101, and the end has not come."""


class Tunnels:
    """See the module."""

    __slots__ = ("_all", "rules")

    def __init__(self, rules: TunnelRules) -> None:
        self.rules = rules
        self._all: set[Tunnel] = set()

    def __repr__(self) -> str:
        return f"<Tunnels {len(self._all)} of {self.rules.most}>"

    @property
    def open(self) -> int:
        """Number of open ones."""
        return sum(tunnel.open for tunnel in self._all)

    def enter(self, tunnel: Tunnel) -> None:
        """Count a tunnel from now on. Raises: TooManyTunnels, when there are as many as there may be."""
        if len(self._all) >= self.rules.most:
            raise TooManyTunnels(retry_after=5.0)
        self._all.add(tunnel)

    def leave(self, tunnel: Tunnel) -> None:
        """Count it no more; do nothing when it is not counted."""
        self._all.discard(tunnel)
