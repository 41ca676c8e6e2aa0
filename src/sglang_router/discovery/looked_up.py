"""What a look-up of a DNS name returns or raises."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from sglang_router.config.dns_names import DNSName


class LookedUp(NamedTuple):
    """What a look-up found. ttl: seconds for which it is valid; None: unknown."""

    urls: tuple[str, ...]
    ttl: float | None = None


class LookUpFailed(Exception):
    """A name could not be looked up. kind: a word for metrics."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


Resolve = Callable[[DNSName], Awaitable[LookedUp]]
"""Looks a name up. Raises: LookUpFailed."""
