"""The options that a reload changes while the router runs; `app.reload` says how. Of all others, a change needs a
restart.

Keys change live as long as there are keys before and after: whether requests need a key at all is decided at the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

URLS: Final = ("worker_urls", "prefill_urls", "decode_urls")
WORKERS: Final = (*URLS, "worker_model")
MODELS: Final = ("models", "model_alias", "model_fallback")
POLICIES: Final = ("policy", "prefill_policy", "decode_policy")
THRESHOLDS: Final = (
    "cache_threshold",
    "balance_abs_threshold",
    "balance_rel_threshold",
    "max_idle_secs",
    "hash_load_factor",
    "cost_load_cap",
)
"""Those of the policies. Sizes are not among them: memories are made for a size."""
QUEUE: Final = ("max_concurrent_requests", "queue_size", "rate_limit_tokens_per_second", "session_wait_secs")
ROOM: Final = ("max_running_per_worker",)
RETRIES: Final = ("retry_budget_ratio", "retry_budget_min_per_second")
KEYS: Final = ("api_key", "control_plane_api_keys")
LOGGING: Final = ("log_level",)

LIVE: Final = frozenset((*WORKERS, *MODELS, *POLICIES, *THRESHOLDS, *QUEUE, *ROOM, *RETRIES, *KEYS, *LOGGING))

TOGETHER: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "pd_disaggregation": WORKERS,
        "api_key_file": ("api_key",),
        "control_plane_api_keys_file": ("control_plane_api_keys",),
    }
)
"""Live options that wait for a restart when this one changes, because half of such a change is none that anybody wants:
keys that move from the options into a file would leave the router without any, and workers of the other kind could not
be asked."""


def taken_over(changed: Collection[str]) -> list[str]:
    """Return which of these changed options a reload changes while the router runs."""
    waiting = {name for first, others in TOGETHER.items() if first in changed for name in others}
    return [name for name in changed if name in LIVE and name not in waiting]
