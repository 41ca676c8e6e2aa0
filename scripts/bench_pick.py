"""The CPU of one request of a gateway without gRPC: what is left is the router's own code.

PYTHONPATH=tests python -m scripts.bench_pick

Here a gateway is a list of messages: a stream gets them at once, and what it answers is written and dropped. The rest
of what `scripts/test-epp` measures for a request is gRPC's.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from gateways import BODY, answer_head, request_head, scene
from sglang_router.picker.messages import ProcessingRequest
from sglang_router.picker.picking import Picking
from sglang_router.picker.streams import serve_stream

_PICKS = 2000
_ROUNDS = 7
_ANSWER = b'{"id":"1","usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'


class Messages:
    """One stream of a gateway, as gRPC shows it."""

    def __init__(self, messages: list[bytes]) -> None:
        self._left = iter(messages)

    async def read(self) -> Any:
        message = next(self._left, None)
        return grpc.aio.EOF if message is None else ProcessingRequest.FromString(message)

    async def write(self, reply: Any) -> None:
        reply.SerializeToString()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


def _messages() -> list[bytes]:
    fields: dict[str, Any] = {
        "content_type": "application/json",
        "accept": "*/*",
        "user_agent": "x",
        "x_request_id": "1",
    }
    head = request_head("/v1/completions", x_forwarded_proto="http", **fields)
    asked, body, end = ProcessingRequest(), ProcessingRequest(), ProcessingRequest()
    asked.request_body.body, asked.request_body.end_of_stream = BODY, True
    body.response_body.body = _ANSWER
    end.response_body.end_of_stream = True
    answered = answer_head(200, content_type="application/json", server="x", date="x")
    return [each.SerializeToString() for each in (head, asked, answered, body, end)]


def main() -> None:
    """Measure, and print the median and the least of all rounds."""
    messages = _messages()
    with scene(policy="cache_aware") as here:

        async def measured() -> float:
            clients = here.gateway.front.clients
            assert clients is not None
            picking = Picking(here.router.app, clients, set())
            began = time.thread_time()
            for _ in range(_PICKS):
                await asyncio.get_running_loop().create_task(serve_stream(picking, Messages(messages)))
            return (time.thread_time() - began) / _PICKS * 1e6

        found = sorted(here.router.run(measured()) for _ in range(_ROUNDS))
    print(f"a pick without gRPC: {found[_ROUNDS // 2]:.0f} µs of CPU in the median, {found[0]:.0f} at least")


if __name__ == "__main__":
    main()
