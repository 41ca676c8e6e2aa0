"""The router as `sglang_router.launch_router` starts it, with a socket for questions that no metric answers.

    python -m scripts.reliability.inspected SOCKET [options of the router]

It answers each line on the Unix socket with one line of JSON: the number of tasks of the event loop, by kind; the bytes
of text that the prefix tree reports, and the sum over its edges; the same for each worker. It runs as a `Crew` of the
server, so that the router is the same as in production.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

import msgspec

from sglang_router.app.lifecycle import Host
from sglang_router.config import parse
from sglang_router.launch_router import exit_status, launch_router
from sglang_router.processes.serve import serve
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.prefix_tree.tree import Tree


class Inspector:
    """See the module."""

    def __init__(self, host: Host, path: str) -> None:
        self.failed = asyncio.Event()
        self._host = host
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
        policy = next(iter(self._host.fleet.pools)).policy
        tree = tree_facts(policy.tree) if isinstance(policy, CacheAware) else {}
        return {"tasks": kinds.total(), "kinds": kinds, "unanswered": self._host.active()} | tree


def tree_facts(tree: Tree) -> dict[str, Any]:
    """Return what the tree reports (`held`, `sizes`), and what it really contains (`edges`, `owned`)."""
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

    def crew(host: Host) -> Inspector:
        return Inspector(host, path)

    return exit_status(lambda: launch_router(parse(words), serve=lambda args: serve(args, crew)))


if __name__ == "__main__":
    sys.exit(main())
