"""What acts on a scaling decision, and a decision as JSON.

    Autoscaler --scale(decision)--> ReplicaActuator  starts and stops replicas on this machine   (launch_server)
                                --> Webhook          posts the decision to a URL
                                --> ScaleCommand     runs a command

Each actuator hears every decision, also those that change nothing; Webhook and ScaleCommand act only on
`decision.changed`.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Protocol

import msgspec

from sglang_router.autoscale.scaler import Decision


class Actuator(Protocol):
    """Acts on decisions. It is called on the event loop, so whatever takes time runs in a task of its own."""

    def scale(self, decision: Decision) -> None:
        """Hear a decision, every second. Returns at once and does not raise."""

    def explain(self) -> dict[str, Any]:
        """Return its state, for GET /scale; `kind` says which actuator it is."""

    async def close(self) -> None:
        """End what is in flight, without waiting for others."""


def told(decision: Decision, at: float) -> dict[str, Any]:
    """Return a decision as GET /scale and the webhook tell it; `at` in seconds since 1970."""
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
    """Return a moment in UTC with milliseconds; `at` in seconds since 1970."""
    return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
