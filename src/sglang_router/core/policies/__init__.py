"""The policies. A new one is a file here and a line in POLICIES; `--policy` and the docs take their names from it."""

from __future__ import annotations

from sglang_router.core.policies.base import Choice, Policy, PolicySettings
from sglang_router.core.policies.cache_aware import CacheAware
from sglang_router.core.policies.hashing import ConsistentHashing, PrefixHash
from sglang_router.core.policies.manual import Manual
from sglang_router.core.policies.simple import LeastLoad, PowerOfTwo, Random, RoundRobin

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (CacheAware, RoundRobin, Random, PowerOfTwo, LeastLoad, ConsistentHashing, Manual, PrefixHash)
}

__all__ = ["POLICIES", "Choice", "Policy", "PolicySettings"]
