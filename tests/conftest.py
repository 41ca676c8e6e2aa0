"""What all tests share: Hypothesis is the same on every machine, and so is what several processes make of the tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

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
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape half of a surrogate pair in what a test logged: reports travel between processes as UTF-8."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report
