"""One request to one engine, for operators and trainers: any method, any path that is no generation.

    POST /engine/{id}/update_weights_from_disk        id: the worker's id, or its percent-encoded URL
    GET  /engine/http%3A%2F%2F10.0.0.1%3A8000/server_info

The answer is the engine's: status, type and body. Secrets in it are replaced, and what cannot be searched for them is
not passed on: JSON is gathered, up to 1 MiB. Other types pass as they come, however long they are: text line by line,
so that it can be searched, and the rest byte by byte. So a client may follow what an engine writes.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Collection
from typing import NoReturn
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang_router.access.redaction import MOST_BYTES, text_without_secrets
from sglang_router.admin.ask import Reply, passed_on
from sglang_router.admin.context import Context
from sglang_router.admin.orders import Order, engine_path, give, order_of
from sglang_router.errors import WorkerBroken, WorkerInvalid, WorkerNotFound, WorkerTimeout, WorkerUnreachable
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.worker import Worker
from sglang_router.workers.fetch import Fetched, FetchError
from sglang_router.workers.streamed import Streamed, open_answer

_LINES = (b"text/", b"application/x-ndjson", b"application/jsonl")
"""How the types of answers begin that are read line by line."""
_LONG = 1 << 15
"""Bytes of text that are searched at once."""


async def relay(context: Context, request: Request) -> Response:
    """Pass a request on to the engine of one worker: /engine/{id}/{path}."""
    return await _relay(context, request, before=2)


async def relay_rl(context: Context, request: Request) -> Response:
    """The same under the name that other routers use: /v1/rl/workers/{id}/engine/{path}."""
    return await _relay(context, request, before=5)


async def _relay(context: Context, request: Request, before: int) -> Response:
    """before: names in the path before that of the engine."""
    worker = _named(context, request, 1 if before == 2 else 3)
    order = await order_of(context, request, engine_path(request, before))
    asking = _Asking()
    given = await give(context, worker, order, asking)
    if isinstance(given.reply, FetchError):
        _fail(given.reply)
    if asking.answer is None:
        return await passed_on(context, given.reply)
    return PassedOn(asking.answer, context)


class _Asking:
    """Gives an order to an engine. answer: what is left to be passed on part by part; None: the reply is whole."""

    def __init__(self) -> None:
        self.answer: Streamed | None = None

    async def __call__(self, context: Context, worker: Worker, order: Order) -> Reply:
        """Return the engine's whole answer, or its head, where the body need not be read at once."""
        limit = context.timeouts.control
        try:
            answer = await open_answer(
                context.pool,
                worker.target,
                order.method,
                order.target,
                body=order.body,
                sent=order.sent,
                timeout=limit,
            )
            if not _is_json(answer):
                self.answer = answer
                return Fetched(answer.status, answer.headers, b"")
            return Fetched(answer.status, answer.headers, await _whole(answer, limit))
        except FetchError as failure:
            if not worker.removed:
                context.checks.check_now(worker)
            return failure


async def _whole(answer: Streamed, limit: float) -> bytes:
    """Return a body, as far as it can be searched: one that is longer is cut behind that."""
    parts, size = list[bytes](), 0
    try:
        async for part in answer.parts(limit):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                break
    finally:
        answer.close()
    return b"".join(parts)


def _field(answer: Streamed, name: bytes) -> bytes:
    return next((value for key, value in answer.headers if key == name), b"")


def _is_text(answer: Streamed) -> bool:
    return _field(answer, b"content-type").lower().startswith(_LINES)


def _is_json(answer: Streamed) -> bool:
    kind = _field(answer, b"content-type").lower()
    return not kind or (b"json" in kind and not _is_text(answer))


class PassedOn(Response):
    """An engine's answer that is no JSON, as it comes.

    Raises: WorkerInvalid, when it is a text that is compressed, so that it cannot be searched.
    """

    def __init__(self, answer: Streamed, context: Context) -> None:
        self._lines = _is_text(answer)
        if self._lines and _field(answer, b"content-encoding"):
            answer.close()
            raise WorkerInvalid("The worker's answer is a compressed text, so it is not passed on.")
        kept = (b"content-type",) if self._lines else (b"content-type", b"content-length", b"content-encoding")
        super().__init__(None, answer.status)
        self.raw_headers = [(name, value) for name, value in answer.headers if name in kept]
        self._answer = answer
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Raises: RouterError, when it breaks: the client's connection ends without a clean end."""
        parts = self._answer.parts(self._context.timeouts.control)
        if self._lines:
            parts = searched(parts, self._context.keys())
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                async for part in parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except FetchError as failure:
            _fail(failure)
        finally:
            self._answer.close()


async def searched(parts: AsyncIterator[bytes], keys: Collection[str]) -> AsyncIterator[bytes]:
    """Yield a text without secrets, whole lines at a time.

    Raises: WorkerInvalid, when a line is too long to be searched.
    """
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    async for part in parts:
        whole, end, rest = (rest + decoder.decode(part)).rpartition("\n")
        if len(rest) > MOST_BYTES:
            raise WorkerInvalid(f"The worker's answer has a line of more than {MOST_BYTES} bytes.")
        if end:
            yield await _without_secrets(whole + end, keys)
    if rest := rest + decoder.decode(b"", final=True):
        yield await _without_secrets(rest, keys)


async def _without_secrets(text: str, keys: Collection[str]) -> bytes:
    if len(text) > _LONG:
        text = await asyncio.to_thread(_searched, text, keys)
    else:
        text = _searched(text, keys)
    return text.encode("utf-8", "replace")


def _fail(failure: FetchError) -> NoReturn:
    """Raise the error that says why there is no answer."""
    if failure.outcome is Outcome.TIMEOUT:
        raise WorkerTimeout(str(failure))
    if failure.outcome is Outcome.INVALID:
        raise WorkerInvalid(str(failure))
    if failure.outcome in (Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED):
        raise WorkerUnreachable(str(failure))
    raise WorkerBroken(str(failure))


def _named(context: Context, request: Request, at: int) -> Worker:
    """Return the worker that a name in the path means. The path is read as it came: a URL has slashes, encoded."""
    raw: bytes = request.scope["raw_path"]
    name = unquote(raw.split(b"/")[at + 1].decode("latin-1")).rstrip("/")
    engines = context.fleet.entries(name)
    worker = context.fleet.by_id(name) or context.fleet.by_url(name) or (engines[0] if engines else None)
    if worker is None:
        raise WorkerNotFound(f"Worker {name[:256]} not found; a URL must be percent-encoded")
    return worker


def _searched(text: str, keys: Collection[str]) -> str:
    """Return a text without secrets; line by line, as a long one with a hint of a secret is replaced as a whole."""
    return "".join(text_without_secrets(line, keys) for line in text.splitlines(keepends=True))
