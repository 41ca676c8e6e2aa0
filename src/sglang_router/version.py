"""The version of this package, and how it runs: compiled or interpreted."""

from __future__ import annotations

from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec

__version__ = "0.4.0"

_COMPILED = "compiled by mypyc"
_INTERPRETED = "interpreted"


def build() -> str:
    """Return how the hot path runs in this process: "compiled by mypyc" or "interpreted".

    This asks the module itself; if it is not loaded yet, it asks Python what would be loaded.
    """
    spec = find_spec("sglang_router.relay.exchange")
    return _COMPILED if spec is not None and isinstance(spec.loader, ExtensionFileLoader) else _INTERPRETED


def version_line() -> str:
    """Return what `--version` prints."""
    return f"sglang-router {__version__} ({build()})"
