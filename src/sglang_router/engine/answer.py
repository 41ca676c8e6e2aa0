"""Sends one answer: whole when it is complete, or streamed as passes end. A client that leaves aborts its
request.

The head of a stream is sent with the first token, not before: until then an error can still have a status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang_router.engine.dialects import Dialect, encode
from sglang_router.engine.runner import Engine, EngineError, Generation, Job

_STREAM_HEAD = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def json_response(value: object, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(encode(value), status, media_type="application/json")


async def compute(engine: Engine, jobs: Sequence[Job], receive: Receive) -> list[Generation]:
    """Run `jobs` to their end; abort them if the client leaves meanwhile, or if this is cancelled."""
    generations = engine.start(jobs)
    watch = asyncio.create_task(_drop_when_gone(engine, generations, receive))
    try:
        await engine.complete(generations)
    finally:
        watch.cancel()
        engine.drop(generations)
    return generations


async def _drop_when_gone(engine: Engine, generations: Sequence[Generation], receive: Receive) -> None:
    # The body has been read: the next message can only say that the client is gone.
    while (await receive())["type"] != "http.disconnect":
        pass
    engine.drop(generations)


async def answer_whole(engine: Engine, jobs: Sequence[Job], dialect: Dialect, request: Request) -> Response:
    """The complete answer, as JSON."""
    return json_response(dialect.whole(await compute(engine, jobs, request.receive)))


class StreamedAnswer(Response):
    """An answer as server-sent events. Making it raises `EngineError` if the engine refuses the jobs."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], dialect: Dialect) -> None:
        super().__init__()
        self._engine = engine
        self._dialect = dialect
        self._generations = engine.start(jobs, streamed=True)
        self._sent = [0] * len(jobs)
        self._running = set(range(len(jobs)))
        self._opened = self._head_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_drop_when_gone(self._engine, self._generations, receive))
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
            news = self._news()
            if not news:
                continue
            if not self._head_sent:
                self._head_sent = True
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEAD})
            await send({"type": "http.response.body", "body": news, "more_body": bool(self._running)})

    def _news(self) -> bytes:
        """The events for all that was settled since the last time."""
        news = b"" if self._opened else self._dialect.opening(self._generations)
        self._opened = True
        for index in sorted(self._running):
            generation = self._generations[index]
            text = generation.writer.text[self._sent[index] : generation.settled]
            if text:
                self._sent[index] += len(text)
                news += self._dialect.delta(generation, text)
            if generation.finish is not None:
                self._running.discard(index)
                news += self._dialect.ending(generation)
        return news if self._running else news + self._dialect.closing(self._generations)


def error_response(request: Request, error: Exception) -> Response:
    """`EngineError` in OpenAI's shape."""
    assert isinstance(error, EngineError)
    body = {"message": str(error), "type": error.kind, "param": None, "code": error.status}
    return json_response({"object": "error", **body, "error": body}, error.status)
