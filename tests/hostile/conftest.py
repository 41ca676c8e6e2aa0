"""One router for all tests here that can share it: starting it takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostile.arena import Arena, arena


@pytest.fixture(scope="session")
def field() -> Iterator[Arena]:
    """Short timeouts for clients, and bodies of 1 MB at most."""
    with arena("--head-timeout-secs", "1", "--body-timeout-secs", "1", "--max-payload-size", "1000000") as field:
        yield field


@pytest.fixture(scope="session")
def brief() -> Iterator[Arena]:
    """Short timeouts for workers, and for idle clients."""
    with arena("--request-timeout-secs", "1", "--keepalive-timeout-secs", "1") as field:
        yield field
