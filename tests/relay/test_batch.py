"""A batch does its stages in order; a fault in one piece of work keeps nobody else's from being done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from sglang_router.relay.batch import Batch


class Turns:
    """The event loop: what is called soon waits here."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], Any]] = []

    def call_soon(self, call: Callable[[], Any]) -> None:
        self.soon.append(call)

    def run(self) -> int:
        """Run all; return how many calls failed."""
        failed = 0
        while self.soon:
            try:
                self.soon.pop(0)()
            except RuntimeError:
                failed += 1
        return failed


class Work:
    """A request, a leg, and where it writes."""

    def __init__(self, name: str, done: list[str], batch: Batch) -> None:
        self.name = name
        self.done = done
        self.batch = batch

    def proceed(self) -> None:
        self._do("proceeds")
        self.batch.leg(self)

    def send(self) -> None:
        self._do("is sent")
        self.batch.write(cast("asyncio.Transport", self), self.name.encode())

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self._do("is written")

    def _do(self, what: str) -> None:
        if self.name == f"fails when it {what}":
            raise RuntimeError(self.name)
        self.done.append(f"{self.name} {what}")


@pytest.mark.parametrize("fault", ["proceeds", "is sent"])
def test_what_fails_keeps_nobody_else_from_being_done(fault: str) -> None:
    turns, done = Turns(), list[str]()
    batch = Batch(cast("asyncio.AbstractEventLoop", turns))
    for name in ("first", f"fails when it {fault}", "last"):
        batch.request(Work(name, done, batch))
    assert turns.run() == 1
    others = [each for each in done if not each.startswith("fails")]
    assert others == [f"{name} {what}" for what in ("proceeds", "is sent", "is written") for name in ("first", "last")]
    assert repr(batch) == "<Batch 0 requests, 0 legs, 0 writes>"
