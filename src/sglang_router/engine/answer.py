"""Send one answer: as a whole when it is complete, or as a stream after each pass.

When a client disconnects, its request is aborted. The head of a stream is sent with the first token, so that an error
before it can still have a status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang_router.engine.dialects import AnswerDialect, encode
from sglang_router.engine.runner import Engine, EngineError, EngineGeneration, EngineJob

_STREAM_HEAD = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def json_response(value: object, status: int = 200) -> Response:
    """Return `value` as a JSON response."""
    return Response(encode(value), status, media_type="application/json")


async def compute(engine: Engine, jobs: Sequence[EngineJob], receive: Receive) -> list[EngineGeneration]:
    """Run `jobs` until they end. Abort them if the client disconnects or the call is cancelled."""
    generations = engine.start(jobs)
    watch = asyncio.create_task(_drop_on_disconnect(engine, generations, receive))
    try:
        await engine.complete(generations)
    finally:
        watch.cancel()
        engine.drop(generations)
    return generations


async def _drop_on_disconnect(engine: Engine, generations: Sequence[EngineGeneration], receive: Receive) -> None:
    # The body has been read already, so the next message is the disconnect.
    while (await receive())["type"] != "http.disconnect":
        pass
    engine.drop(generations)


async def answer_whole(engine: Engine, jobs: Sequence[EngineJob], dialect: AnswerDialect, request: Request) -> Response:
    """Return the complete answer as JSON."""
    return json_response(dialect.whole(await compute(engine, jobs, request.receive)))


class StreamedAnswer(Response):
    """An answer as server-sent events. The constructor raises `EngineError` if the engine refuses the jobs."""

    def __init__(self, engine: Engine, jobs: Sequence[EngineJob], dialect: AnswerDialect) -> None:
        super().__init__()
        self._engine = engine
        self._dialect = dialect
        self._generations = engine.start(jobs, streamed=True)
        self._sent = [0] * len(jobs)
        self._running = set(range(len(jobs)))
        self._opened = self._head_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_drop_on_disconnect(self._engine, self._generations, receive))
        try:
            await self._stream(send)
        finally:
            watch.cancel()
            self._engine.drop(self._generations)

    async def _stream(self, send: Send) -> None:
        wake = self._generations[0].wake
        while self._running:
            await wake.wait()
            wake.clear()
            events = self._new_events()
            if not events:
                continue
            if not self._head_sent:
                self._head_sent = True
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEAD})
            await send({"type": "http.response.body", "body": events, "more_body": bool(self._running)})

    def _new_events(self) -> bytes:
        """Return the events for all text that was settled since the last call."""
        events = b"" if self._opened else self._dialect.opening(self._generations)
        self._opened = True
        for index in sorted(self._running):
            generation = self._generations[index]
            text = generation.writer.text[self._sent[index] : generation.settled]
            if text:
                self._sent[index] += len(text)
                events += self._dialect.delta(generation, text)
            if generation.finish is not None:
                self._running.discard(index)
                events += self._dialect.ending(generation)
        return events if self._running else events + self._dialect.closing(self._generations)


def error_response(request: Request, error: Exception) -> Response:
    """Return an `EngineError` as a response in OpenAI's shape."""
    assert isinstance(error, EngineError)
    body = {"message": str(error), "type": error.kind, "param": None, "code": error.status}
    return json_response({"object": "error", **body, "error": body}, error.status)
