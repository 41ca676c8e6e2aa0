"""Names that programs import from the reference router's native module."""

from __future__ import annotations

from enum import Enum

__all__ = ["PolicyType"]


class PolicyType(Enum):
    """The policies; the value is the name that --policy takes."""

    Random = "random"
    RoundRobin = "round_robin"
    CacheAware = "cache_aware"
    PowerOfTwo = "power_of_two"
    Bucket = "bucket"
    Manual = "manual"
    ConsistentHashing = "consistent_hashing"
    PrefixHash = "prefix_hash"
    LeastLoad = "least_load"
