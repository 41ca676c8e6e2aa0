"""All sources together: they are started, kept running, and ended."""

from __future__ import annotations

import asyncio

import pytest

from discovery_scenes import scene
from sglang_router.discovery import discovery
from sglang_router.discovery.discovery import Discovery
from sglang_router.discovery.owner import WorkerOwner
from sglang_router.discovery.progress import LookProgress
from sglang_router.routing.source import Source


class Stubborn:
    """A source that fails once in the router, and takes one cancellation for something else."""

    looks_at = "nothing"

    def __init__(self, owner: WorkerOwner) -> None:
        self.owner = owner
        self.progress = LookProgress("Stubborn", lambda: 0.0)
        self.runs = 0
        self.cancelled = 0

    async def run(self) -> None:
        self.runs += 1
        if self.runs == 1:
            raise RuntimeError("a bug")
        await self.owner.follow({})
        self.progress.listed()
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled += 1
                if self.cancelled > 1:
                    raise


def test_a_fault_ends_no_source_and_an_end_is_an_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Python 3.12, `asyncio.wait_for` can swallow a cancellation: the router would never have ended."""
    monkeypatch.setattr(discovery, "_AGAIN_AFTER", 0.001)
    monkeypatch.setattr(discovery, "_CANCELLED_WITHIN", 0.01)
    with scene() as made:
        stubborn = Stubborn(made.owner(Source.DNS))
        made.begin(lambda: stubborn)
        assert not made.do(lambda: Discovery(made.router.loop, [Stubborn(made.owner(Source.DNS))]).looked)
        made.until(lambda: made.discovery.looked)
        assert stubborn.runs == 2
        assert "a fault in the router; looking again" in caplog.text
        made.end()
        assert stubborn.cancelled == 2
