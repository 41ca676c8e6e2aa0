"""Defaults of other routers: `--compat 0.3.2` sets those of the Rust router of the same name, all at once.

A value that a flag, a variable or a file sets wins. `docs/migrating.md` holds the table below, and a test holds the two
equal:

    python -m sglang_router.config --migrating
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

VERSIONS = ("0.3.2",)

DEFAULTS_0_3_2: Mapping[str, Any] = MappingProxyType(
    {
        "host": "0.0.0.0",  # noqa: S104 - that is what it does
        "prometheus_host": "0.0.0.0",  # noqa: S104
        "control_plane_open": True,
        "cors_allowed_origins": ["*"],
        "cache_threshold": 0.3,
        "balance_abs_threshold": 64,
        "balance_rel_threshold": 1.5,
        "max_tree_size": 67_108_864,
        "max_worker_retries": 5,
        "max_total_retries": 4,
        "cb_failure_threshold": 10,
        "cb_success_threshold": 3,
        "cb_timeout_duration_secs": 60,
        "health_check_interval_secs": 60,
        "worker_startup_check_interval": 30,
    }
)
"""Options that 0.3.2 has too, or whose effect it always has, with its default where that differs from ours."""

_EXCLUDED_BY = {
    "control_plane_open": ("control_plane_api_keys", "control_plane_api_keys_file"),
    "max_total_retries": ("retry_max_retries", "disable_retries"),
    "max_worker_retries": ("disable_retries",),
}
"""Options that are left alone when one of these is set: the two would contradict each other."""


def defaults(given: frozenset[str]) -> dict[str, Any]:
    """Return what to set, when `given` are the names of the options that were set already."""
    return {
        name: value
        for name, value in DEFAULTS_0_3_2.items()
        if name not in given and given.isdisjoint(_EXCLUDED_BY.get(name, ()))
    }
