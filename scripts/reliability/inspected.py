"""The router as `sglang_router.launch_router` starts it, and a door for questions no metric answers.

    python -m scripts.reliability.inspected SOCKET [options of the router]

A line sent to the Unix socket is answered with one of JSON: how many tasks the event loop has, and of what kind; the
bytes of text the prefix tree says it holds, and what the sum over its edges is; the same for each worker.
It is a `Crew` of the server, so nothing of the router is another than in production.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

import msgspec

from sglang_router.config import parse
from sglang_router.core.policies.cache_aware import CacheAware
from sglang_router.core.tree import Tree
from sglang_router.launch_router import exit_status, launch_router
from sglang_router.observe.logs import LogWriter
from sglang_router.server import Gateway, serve


class Inspector:
    """See the module."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self.failed = asyncio.Event()
        self._gateway = gateway
        self._path = path
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._tell, self._path)

    async def stop(self, urgent: asyncio.Event) -> None:
        if self._server is not None:
            self._server.close()

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(msgspec.json.encode(self._facts()) + b"\n")
        await writer.drain()
        writer.close()

    def _facts(self) -> dict[str, Any]:
        own = asyncio.current_task()
        kinds = Counter(
            getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks() if task is not own
        )
        policy = self._gateway.policy
        tree = tree_facts(policy.tree) if isinstance(policy, CacheAware) else {}
        return {"tasks": kinds.total(), "kinds": kinds, "unanswered": self._gateway.service.active} | tree


def tree_facts(tree: Tree) -> dict[str, Any]:
    """What the tree says of itself, `held` and `sizes`, and what is there, `edges` and `owned`."""
    edges, owned = 0, dict.fromkeys(tree.sizes, 0)
    left = list(tree._roots.values())
    while left:
        node = left.pop()
        for child in (node.children or {}).values():
            edges += len(child.edge)
            for slot in owned:
                if child.owners >> slot & 1:
                    owned[slot] += len(child.edge)
            left.append(child)
    return {
        "held": tree.held,
        "edges": edges,
        "sizes": list(tree.sizes.values()),
        "owned": list(owned.values()),
        "retired": tree.retired_size,
        "bound": tree.max_size,
    }


def main() -> int:
    path, *words = sys.argv[1:]

    def crew(gateway: Gateway, writer: LogWriter) -> Inspector:
        return Inspector(gateway, path)

    return exit_status(lambda: launch_router(parse(words), serve=lambda args: serve(args, crew)))


if __name__ == "__main__":
    sys.exit(main())
