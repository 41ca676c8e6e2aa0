"""Rounds of a list and a watch at a Kubernetes API server, for ever: what any source does that follows objects there.

    KubeRounds._look_on    a connection --> _list --> _watch_on --> another connection, and so on
                                '- KubeError --> _failed, a pause (`pause_after`), another connection

Each round has a connection of its own: a new one finds out what an old one cannot say. After the first trouble in a row
the next list follows at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, NamedTuple

from sglang_router.discovery.kube_api import KubeError, KubeLink
from sglang_router.discovery.kube_config import KubeAccess, KubeFiles
from sglang_router.relay.addresses import Addresses

REFUSED: Final = (401, 403)
_WELL: Final = 5.0
"""Seconds after which a round that ends in trouble was well before."""
_LONGEST_WISH: Final = 60.0
"""Seconds that the API server may ask for (Retry-After)."""


class KubeRhythm(NamedTuple):
    """Times in seconds.

    relist          age of a list after which the next one begins
    slack           how much longer than it was told to a watch may last before it is given up
    quiet, longest  a pass begins when no event came for so long, or so long after the first one
    first, most     the pause after the second failure in a row, doubled each time, and the longest
    refused         the pause after 401 and 403
    """

    relist: float = 60.0
    slack: float = 1.0
    quiet: float = 0.1
    longest: float = 1.0
    first: float = 0.1
    most: float = 1.0
    refused: float = 2.0


def pause_after(error: KubeError, failures: int, rhythm: KubeRhythm) -> float:
    """Return the longest pause before the next list, in seconds; 0.0: it comes at once.

    failures  rounds in a row that ended in trouble; this one is the last of them
    """
    if error.status in REFUSED:
        return rhythm.refused
    if error.pause:
        return min(error.pause, _LONGEST_WISH)
    return min(rhythm.first * 2.0 ** min(failures - 2, 16), rhythm.most) if failures > 1 else 0.0


class WatchEnded(KubeError):
    """A watch did not end as it was told to."""

    def __init__(self, cause: KubeError) -> None:
        super().__init__(f"watch_{cause.kind}", str(cause), cause.status, cause.pause)


class KubeRounds:
    """See the module. files: how to reach the API server; clock: gives seconds."""

    def __init__(
        self,
        files: KubeFiles,
        addresses: Addresses,
        rng: random.Random,
        clock: Callable[[], float],
        rhythm: KubeRhythm | None,
    ) -> None:
        self.rhythm = rhythm or KubeRhythm()
        self._files = files
        self._addresses = addresses
        self._rng = rng
        self._clock = clock

    async def _look_on(self) -> None:
        """List and watch until it is cancelled."""
        failures = 0
        while True:
            began = self._clock()
            access = self._files.access()
            try:
                async with KubeLink(access, self._addresses) as link:
                    await self._list(link)
                    await self._watch_on(link)
                failures = 0
            except KubeError as error:
                failures = 1 if self._clock() - began > _WELL else failures + 1
                self._failed(error, access)
                await asyncio.sleep(pause_after(error, failures, self.rhythm) * self._rng.uniform(0.5, 1.0))

    async def _list(self, link: KubeLink) -> None:
        """Read all objects. Raises: KubeError."""
        raise NotImplementedError

    async def _watch_on(self, link: KubeLink) -> None:
        """Follow their changes, until it is time for another list. Raises: KubeError."""
        raise NotImplementedError

    def _failed(self, error: KubeError, access: KubeAccess) -> None:
        """Note what ended a list or a watch."""
        raise NotImplementedError
