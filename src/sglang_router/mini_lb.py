"""`MiniLoadBalancer`, the reference's small balancer for pairs of prefill and decode engines, under its name there.

Here it is the router itself: what its options ask for must be a feature of the router.
"""

from __future__ import annotations

from sglang_router.router import Router
from sglang_router.router_args import RouterArgs

__all__ = ["MiniLoadBalancer"]


class MiniLoadBalancer:
    """A router with these options. Raises: ConfigError for options that cannot be used."""

    def __init__(self, router_args: RouterArgs) -> None:
        self._router = Router.from_args(router_args)

    def start(self) -> None:
        """Serve until it is stopped."""
        self._router.start()
