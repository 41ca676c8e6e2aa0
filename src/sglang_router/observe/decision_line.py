"""The lines of the log of decisions: records, apart from `observe.decision_log`, which says what the fields mean."""

from __future__ import annotations

import msgspec

FORMAT = "sglang-router-decisions"
VERSION = 1
BLOCK = 256
"""Bytes of routing text that one hash of a chain stands for."""


class DecisionLogHead(msgspec.Struct, gc=False):
    """The first line of a file. key: tells the keys of hashes apart, and nothing else of them."""

    key: str
    format: str = FORMAT
    version: int = VERSION
    block: int = BLOCK


class DecisionLine(msgspec.Struct, gc=False):
    """A request."""

    t: float
    id: str
    model: str
    session: str
    endpoint: str
    bytes: int
    chain: list[str]
    stream: bool
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    worker: str | None
    policy: str
    branch: str
    matched: int
    attempts: int
    outcome: str
    status: int
    ttft: float | None
    duration: float
