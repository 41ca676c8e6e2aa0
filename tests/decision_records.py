"""A decision record for tests, of which any field can be another one."""

from __future__ import annotations

from typing import Any

from sglang_router.routing.decision_record import DecisionRecord

A = "http://10.0.0.7:30000"


def record(**changes: object) -> DecisionRecord:
    fields: dict[str, Any] = {
        "id": "r-1",
        "at": 1764279852.25,
        "endpoint": "chat",
        "model": "tiny",
        "session": "s-1",
        "stream": True,
        "body_bytes": 5120,
        "policy": "cache_aware",
        "worker": A,
        "branch": "hit",
        "matched": 3000,
        "total": 4000,
        "retries": 0,
        "outcome": "served",
        "status": 200,
        "code": "",
        "first_byte": 0.095,
        "duration": 1.5,
    }
    return DecisionRecord(**(fields | changes))
