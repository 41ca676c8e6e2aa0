"""Run the event loop of a router's process: uvloop, with all descriptors and the memory that a router needs."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvloop

from sglang_router.relay.memory import keep_apart


def on_loop(main: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, int]]) -> int:
    """Run a coroutine on a new event loop; return its result."""
    _raise_descriptor_limit()
    keep_apart()
    try:
        with contextlib.closing(uvloop.new_event_loop()) as loop, _handshakes_cut_quietly(loop):
            asyncio.set_event_loop(loop)
            try:
                return int(loop.run_until_complete(main(loop)))
            finally:
                loop.run_until_complete(_end_tasks())
    finally:
        asyncio.set_event_loop(None)


async def _end_tasks() -> None:
    """End what is left of the tasks: one that is cancelled twice leaves the task behind for which it waits."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


@contextlib.contextmanager
def _handshakes_cut_quietly(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Close the loop at the end, without warnings about TLS handshakes in progress.

    Only uvloop knows a client in the middle of a handshake. It closes the connection here, and warns; where warnings
    are errors, it would not close it.
    """
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            loop.close()


def _raise_descriptor_limit() -> None:
    """Raise the soft limit on file descriptors to the hard one.

    A request may need two descriptors, and the soft limit is often 1,024 while the hard one is far higher.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
