"""The access log's line in JSON: a record, apart from `observe.access`, which mypyc compiles."""

from __future__ import annotations

import msgspec


class AccessLine(msgspec.Struct, gc=False):
    """One request; `observe.access` fills it.

    matched        percent; null when the request has no routing text
    first_byte_ms  null when no byte was answered
    in, out        bytes of the bodies, with the chunked coding of a stream
    client         name of the client's key; only with access keys
    resumed        only when another worker continued the stream
    prefill        the worker that read the prompt; only of a pair, of which `worker` wrote the answer
    ..._tokens     only when the engine told them
    model          as the client names it; only when it does
    ttft_ms        only of streams: the same as first_byte_ms
    queue_ms       only when the request was queued
    trace_id       only when it is part of a trace
    served_model   only when it is not the one that the client named
    """

    time: str
    level: str
    logger: str
    message: str
    id: str
    peer: str
    method: str
    path: str
    status: int
    code: str
    outcome: str | None
    worker: str | None
    branch: str
    matched: int | None
    retries: int
    duration_ms: float
    first_byte_ms: float | None
    received: int = msgspec.field(name="in")
    sent: int = msgspec.field(name="out")
    stream: bool = False
    client: str | msgspec.UnsetType = msgspec.UNSET
    resumed: int | msgspec.UnsetType = msgspec.UNSET
    prompt_tokens: int | msgspec.UnsetType = msgspec.UNSET
    cached_tokens: int | msgspec.UnsetType = msgspec.UNSET
    completion_tokens: int | msgspec.UnsetType = msgspec.UNSET
    served_model: str | msgspec.UnsetType = msgspec.UNSET
    prefill: str | msgspec.UnsetType = msgspec.UNSET
    model: str | msgspec.UnsetType = msgspec.UNSET
    ttft_ms: float | msgspec.UnsetType = msgspec.UNSET
    queue_ms: float | msgspec.UnsetType = msgspec.UNSET
    trace_id: str | msgspec.UnsetType = msgspec.UNSET
