"""A fast, cache-aware router for fleets of LLM engines. `docs/architecture.md` tells how it works.

Programs may import `RouterArgs`, `Router` and `PolicyType` from here; they are loaded when they are first used.
"""

from __future__ import annotations

import importlib

from sglang_router.version import __version__

__all__ = ["PolicyType", "Router", "RouterArgs", "__version__"]

_HOMES = {"RouterArgs": "router_args", "Router": "router", "PolicyType": "sglang_router_rs"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
