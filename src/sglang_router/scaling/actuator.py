"""Whoever acts on a decision about the number of workers, and the words in which one is told.

    loop --scale(decision)--> Replicas    brings the number of replicas on this machine there   (launch_server)
                          --> Webhook     tells a URL
                          --> Command     runs a command

Each hears every decision, also those that change nothing; `decision.changed` is for those that only tell.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from sglang_router.core.scaling import Decision


class Actuator(Protocol):
    """Acts on decisions. Called on the event loop, so what takes time is done in a task of its own."""

    def scale(self, decision: Decision) -> None:
        """Hears a decision, every second. Returns at once and does not raise."""

    def explain(self) -> dict[str, Any]:
        """What it is about, for GET /scale; `kind` tells which one it is."""

    async def close(self) -> None:
        """Ends what it has under way, without waiting for others."""


def told(decision: Decision, at: float) -> dict[str, Any]:
    """A decision as GET /scale and the webhook tell it; `at` in seconds since 1970."""
    figures: dict[str, Any] = msgspec.to_builtins(decision.reading)
    figures = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    figures["wants"] = {want.measure: want.wants for want in decision.wants}
    return {
        "at": rfc3339(at),
        "desired": decision.desired,
        "current": decision.current,
        "reason": decision.reason,
        "figures": figures,
    }


def rfc3339(at: float) -> str:
    """A moment in UTC with milliseconds."""
    return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
