"""For tests of those who act on decisions about the number of workers: the decisions, and waiting for what follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sglang_router.autoscale.scaler import Decision, Reading, ScalingRules, wants_of

WITHIN = 20.0
RULES = ScalingRules(fewest=1, most=4)


def decision(desired: int, current: int = 1, *, changed: bool = True, reason: str = "", at: float = 0.0) -> Decision:
    reading = Reading(ready=current, load=40)
    said = reason or f"load: wants {desired}"
    return Decision(desired, current, said, changed, wants_of(reading, RULES), reading, at)


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what only asking can tell."""

    async def looking() -> None:
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    await asyncio.wait_for(looking(), WITHIN)
