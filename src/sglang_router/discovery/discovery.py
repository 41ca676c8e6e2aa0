"""All sources that look for workers, each in a task of its own.

discovery = Discovery(loop, [KubernetesSource(...), FileSource(...), ...])
discovery.start()                     each source runs until `close`
discovery.looked                      each has known all of its workers once
discovery.reports()                   for GET /workers and the metrics
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Protocol

from sglang_router.discovery.owner import WorkerOwner
from sglang_router.discovery.progress import LookProgress
from sglang_router.routing.source import SourceReport

log = logging.getLogger("sglang_router.discovery")

_AGAIN_AFTER: Final = 5.0
"""Seconds after a fault of this program in a source, until it runs again."""
_CANCELLED_WITHIN: Final = 0.5
"""Seconds in which a task that was cancelled should have ended."""


class Looking(Protocol):
    """A source that looks for workers."""

    @property
    def owner(self) -> WorkerOwner:
        """What makes its workers those that it wants."""

    @property
    def progress(self) -> LookProgress:
        """How well it knows them."""

    @property
    def looks_at(self) -> str:
        """Where it looks, in words."""

    async def run(self) -> None:
        """Look until it is cancelled."""


class Discovery:
    """See the module."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sources: Sequence[Looking]) -> None:
        self._loop = loop
        self.sources = sources
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Discovery {', '.join(map(repr, self.sources))}>"

    def start(self) -> None:
        """Let each source look from now on."""
        for source in self.sources:
            log.info("%s: looking at %s", source.progress.topic, source.looks_at)
            self._tasks.append(self._loop.create_task(_keep(source)))

    @property
    def looked(self) -> bool:
        """Whether each source has known all of its workers once."""
        return all(source.owner.passes and source.progress.listed_at is not None for source in self.sources)

    def reports(self) -> list[SourceReport]:
        """Return what each source says of itself."""
        return [_report(source) for source in self.sources]

    async def close(self) -> None:
        """Look no more; workers stay."""
        running = set(self._tasks)
        while running:
            for task in running:
                task.cancel()
            # Again, because before Python 3.12 `asyncio.wait_for` can swallow a cancellation.
            _, running = await asyncio.wait(running, timeout=_CANCELLED_WITHIN)


async def _keep(source: Looking) -> None:
    while True:
        try:
            await source.run()
        except Exception:  # a fault here must not end discovery for good
            log.exception("%s: a fault in the router; looking again", source.progress.topic)
        await asyncio.sleep(_AGAIN_AFTER)


def _report(source: Looking) -> SourceReport:
    owner, progress = source.owner, source.progress
    age = progress.age
    return SourceReport(
        source=owner.source.value,
        looks_at=source.looks_at,
        workers=len(owner.present()),
        listed_secs=None if age is None else round(age, 3),
        error=progress.error or None,
        passes=owner.passes,
        added=owner.added,
        removed=dict(owner.removed),
        failures=dict(progress.failures),
    )
