"""The policies. A new one is a file here, a line in POLICIES, and its name in POLICY_NAMES (`config.options`)."""

from __future__ import annotations

from typing import Final

from sglang_router.routing.policies.base import Policy
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.policies.cost import Cost
from sglang_router.routing.policies.hashing import ConsistentHashing, PrefixHash
from sglang_router.routing.policies.manual import Manual
from sglang_router.routing.policies.simple import LeastLoad, PowerOfTwo, Random, RoundRobin

POLICIES: Final[dict[str, type[Policy]]] = {
    policy.name: policy
    for policy in (CacheAware, Cost, RoundRobin, Random, PowerOfTwo, LeastLoad, ConsistentHashing, Manual, PrefixHash)
}
