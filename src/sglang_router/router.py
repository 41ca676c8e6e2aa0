"""`Router` as programs written for the reference router use it.

    Router.from_args(RouterArgs(port=8000)).start()                               since 0.2
    Router(worker_urls=["http://a:8000"], policy=PolicyType.RoundRobin).start()   0.1

`start` serves until the router is stopped. It may run in a thread, which then lives as long as its process.
"""

from __future__ import annotations

from typing import Any

from sglang_router.launch_router import launch_router
from sglang_router.router_args import RouterArgs
from sglang_router.sglang_router_rs import PolicyType

__all__ = ["PolicyType", "Router", "RouterArgs", "policy_from_str"]


class ReferenceRouter:
    """One router; `args` are its options. The other way to make it: the options as keywords.

    Raises: ConfigError for options that cannot be used.
    """

    def __init__(self, worker_urls: list[str] | None = None, policy: PolicyType | str = "", **options: Any) -> None:
        found: dict[str, Any] = {"worker_urls": worker_urls or [], **options}
        if policy:
            found["policy"] = policy.value if isinstance(policy, PolicyType) else policy
        self.args = RouterArgs(**found).checked()

    @classmethod
    def from_args(cls, args: object) -> ReferenceRouter:
        """Make it from a RouterArgs, or from any object with such attributes. `args` is not changed."""
        router = cls.__new__(cls)
        router.args = (args if isinstance(args, RouterArgs) else RouterArgs.from_cli_args(args)).checked()
        return router

    def __repr__(self) -> str:
        return f"<Router on {self.args.host}:{self.args.port}, {self.args.policy}>"

    def start(self) -> None:
        """Serve until the router is stopped."""
        launch_router(self.args)


Router = ReferenceRouter
"""Its public name; inside this package a `Router` is the one that decides (`routing.router`)."""


def policy_from_str(name: str | None) -> PolicyType | None:
    """Return the member of PolicyType with this name; None for None. Raises: KeyError."""
    return None if name is None else {policy.value: policy for policy in PolicyType}[name]
