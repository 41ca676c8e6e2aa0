"""Options of the reference router (0.3.2) whose features this router does not have.

They are declared so that using one gives a clear answer.

Using a `later` option is an error at the start. An `inert` option has no meaning for an HTTP router: using it gives a
warning. When a feature is built, its options move to `options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from sglang_router.config.option import option
from sglang_router.config.options import MODELS, HTTPOptions

NO_EFFECT = "Without effect"

T = TypeVar("T")


def _later(default: T, help: str, group: str, **more: Any) -> T:
    return option(default, help, group, status="later", **more)


def _inert(default: T, help: str, **more: Any) -> T:
    return option(default, help, NO_EFFECT, status="inert", **more)


@dataclass
class ReservedOptions(HTTPOptions):
    """The reference router's options that this router does not have yet, or has no use for."""

    # -- models
    backend: str = _later("sglang", "What kind the workers are.", MODELS, choices=("sglang", "openai"))

    # -- without effect
    mini_lb: bool = _inert(False, "Use the reference's minimal load balancer of pairs; this router is none.")
    control_plane_audit_enabled: bool = _inert(False, "Log changes of the control plane; they are always logged.")
    cb_window_duration_secs: float = _inert(
        120, "Window of failures; a circuit breaker counts failures in a row, as the reference's does.", unit="s"
    )
    bucket_adjust_interval_secs: float = _inert(5, "Interval of the policy `bucket`.", unit="s")
    model_path: str | None = _inert(None, "Model whose tokenizer to load; this router compares prompts as text.")
    tokenizer_path: str | None = _inert(None, "Tokenizer to load.")
    chat_template: str | None = _inert(None, "Chat template; the engine applies its own.")
    tokenizer_cache_enable_l0: bool = _inert(False, "Tokenizer cache for whole texts.")
    tokenizer_cache_l0_max_entries: int = _inert(10_000, "Size of the tokenizer cache for whole texts.")
    tokenizer_cache_enable_l1: bool = _inert(False, "Tokenizer cache for prefixes.")
    tokenizer_cache_l1_max_memory: int = _inert(52_428_800, "Size of the tokenizer cache for prefixes.", unit="bytes")
    reasoning_parser: str | None = _inert(
        None, "Parser of reasoning; this router passes the engine's answer unchanged."
    )
    tool_call_parser: str | None = _inert(
        None, "Parser of tool calls; this router passes the engine's answer unchanged."
    )
    mcp_config_path: str | None = _inert(None, "Tool servers (MCP).")
    history_backend: str = _inert(
        "memory",
        "Storage of conversations; this router leaves it to the engine.",
        choices=("memory", "none", "oracle", "postgres", "redis"),
    )
    oracle_wallet_path: str | None = _inert(None, "Oracle: wallet.")
    oracle_tns_alias: str | None = _inert(None, "Oracle: alias.")
    oracle_connect_descriptor: str | None = _inert(None, "Oracle: descriptor.", secret=True)
    oracle_username: str | None = _inert(None, "Oracle: user.")
    oracle_password: str | None = _inert(None, "Oracle: password.", secret=True)
    oracle_pool_min: int = _inert(1, "Oracle: fewest connections.")
    oracle_pool_max: int = _inert(16, "Oracle: most connections.")
    oracle_pool_timeout_secs: float = _inert(30, "Oracle: longest wait for a connection.", unit="s")
    postgres_db_url: str | None = _inert(None, "PostgreSQL: URL.", secret=True)
    postgres_pool_max: int = _inert(16, "PostgreSQL: most connections.")
    redis_url: str | None = _inert(None, "Redis: URL.", secret=True)
    redis_pool_max: int = _inert(16, "Redis: most connections.")
    redis_retention_days: int = _inert(30, "Redis: how long conversations are kept.", unit="days")
