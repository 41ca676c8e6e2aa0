"""Events for tests; fields that are not given are those of a served chat request.

finished(leg(worker), status=503, code="no_workers")      fields of RequestTag and Answered, by their names
routed(leg(worker, "hit", 870, 1000))
"""

from __future__ import annotations

from typing import Any

from sglang_router.routing.events import Answered, Finished, Routed
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag, Route, Target
from sglang_router.routing.worker import Worker

_TAG: dict[str, Any] = {
    "number": 1,
    "id": "chatcmpl-1",
    "start": 0.0,
    "method": "POST",
    "path": "/v1/chat/completions",
    "endpoint": "chat",
    "peer": "10.0.0.9",
    "received": 100,
    "model": '"m"',
}
_ANSWER: dict[str, Any] = {
    "status": 200,
    "outcome": Outcome.SERVED,
    "duration": 0.3,
    "first_byte": 0.05,
    "sent": 1000,
}


def target(worker: Worker) -> Target:
    spec = worker.spec
    return Target(spec.url, worker.dp_rank, worker.key, worker.url, worker.id, spec.worker_type)


def leg(worker: Worker, branch: str = "", matched: int = 0, total: int = 0) -> PlannedLeg:
    return PlannedLeg(1, target(worker), branch, matched, total)


def tag(**fields: Any) -> RequestTag:
    told = {**_TAG, **fields}
    route = Route(told["method"], told["path"], told["endpoint"])
    made = RequestTag(told["number"], told["id"].encode(), told["start"], route, told["peer"])
    made.id, made.received, made.model = told["id"], told["received"], told["model"]
    made.client, made.streaming = told.get("client", ""), told.get("streaming", False)
    return made


def routed(planned: PlannedLeg, policy: str = "cache_aware") -> Routed:
    return Routed(tag(), planned, policy, 0)


def finished(planned: PlannedLeg | None = None, **fields: Any) -> Finished:
    """Make a Finished event. The fields are those of the tag, and of the answer."""
    of_answer = {name: fields.pop(name) for name in list(fields) if hasattr(Answered, name)}
    return Finished(tag(**fields), planned, Answered(**{**_ANSWER, **of_answer}))
