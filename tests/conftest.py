"""What all tests share: Hypothesis is the same on every machine, and so is what several processes make of the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Machines that run tests are shared and slow at times: a deadline would make failures of their load, not of the code.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

LONG = (
    "tests/chaos/test_chaos.py",
    "tests/launch/test_real_engines.py",
    "tests/blackbox/",
    "tests/hostile/",
    "tests/launch/",
)
"""Files that take longest, by the beginning of their path; the longest one first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes take file after file (pytest-xdist), none must begin a long one when the rest is done."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((n for n, path in enumerate(LONG) if item.nodeid.startswith(path)), len(LONG)))


def pytest_collection_finish() -> None:
    """Keep thousands of tests and their modules out of every garbage collection from here on."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escape half of a surrogate pair in a report: reports travel between processes as UTF-8.

    One that cannot travel ends the whole run, and nobody learns which test failed.
    """
    return _utf8((yield))


def _utf8(data: Any) -> Any:
    """Return what a report consists of, with all text fit for UTF-8."""
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode()
    if isinstance(data, dict):
        return {_utf8(key): _utf8(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(map(_utf8, data))
    return data
