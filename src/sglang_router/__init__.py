"""A fast, cache-aware router for fleets of LLM engines. `docs/architecture.md` tells how it works."""

__version__ = "0.4.0"
