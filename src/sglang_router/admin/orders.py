"""Requests of the control plane that engines carry out: to one engine, or to several at the same time.

    order = order_of(context, request, b"POST", b"/update_weights_from_disk", body)
    await give(context, worker, order)              one engine
    await give_all(context, workers, order)         several: `OrderResult` for each, in their order

    admin.broadcast        POST /update_weights_from_disk?selector=...      the results of all
    admin.engine_relay     POST /engine/{id}/update_weights_from_disk       the answer of one

What an order does to its engine is followed (`admin.effects`): a worker that is to be paused gets no new requests from
before its engine is asked, and gets them again if the engine did not do it. When nobody knows whether it did, because
no answer came or the client left, what is safe is believed: it is paused, and has forgotten what it had cached.

An order is sent once, on a connection of its own: engines must not load weights or join a group twice.

The engine gets the method, the path, the query without selectors, the body as it came and its type; no other field of
the client's head, but Authorization where inference would pass it on, to a worker without a key of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes

import msgspec
from starlette.requests import Request

from sglang_router.access.redaction import text_without_secrets
from sglang_router.admin.ask import Reply, ask, failure
from sglang_router.admin.context import Context
from sglang_router.admin.effects import Effect, effect_of, fields_of, learn
from sglang_router.admin.rows import generates
from sglang_router.admin.selection import without_selectors
from sglang_router.errors import InvalidRequest
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.worker import Worker
from sglang_router.wire.gathering import Body
from sglang_router.words import counted
from sglang_router.workers.fetch import Fetched, FetchError, Sent

log = logging.getLogger("sglang_router.control")

MOST_TOLD = 1 << 20
"""Bytes of an answer of one of several engines; a longer one counts as a failure."""
_MOST_SHOWN = 1 << 16
"""Bytes of an answer up to which it is decoded to see whether the engine reports a failure in it."""
_LOGGED_EVERY = 10.0
"""Seconds between two lines of progress."""
_BEGUN_AT_ONCE = 16
"""Engines that are asked in one turn of the event loop."""
_TOGETHER = frozenset(
    (
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/update_weights_from_distributed",
        "/init_weight_transfer_engine",
        "/update_weights",
        "/collective_rpc",
    )
)
"""What engines do together, each waiting for the others: all must be asked at once, whatever --rl-fanout-concurrency
says."""
_NOT_ASKED = frozenset((Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED, Outcome.STARVED))
"""After these an engine has not heard of the order."""
_OF_GATEWAYS = frozenset((502, 504))
"""Statuses that only a proxy in front of an engine gives: nobody knows what the engine did."""


class Order(NamedTuple):
    """What an engine is asked to do.

    path   as it is sent; name: as the engine understands it
    query  as it is sent
    """

    method: bytes
    path: bytes
    name: str
    query: bytes
    body: Body
    sent: Sent
    effect: Effect

    @property
    def target(self) -> bytes:
        """Path and query."""
        return self.path + b"?" + self.query if self.query else self.path


Asked = Callable[[Context, Worker, Order], Awaitable[Reply]]


class OrderResult(NamedTuple):
    """What came of an order. error: why it failed, None if it did not; seconds: how long it took."""

    worker: Worker
    reply: Reply
    error: str | None
    seconds: float


async def order_of(context: Context, request: Request, path: bytes) -> Order:
    """Return the order that a request makes, to this path of an engine."""
    body = await request.body()
    query = without_selectors(request.scope["query_string"])
    method = b"GET" if request.method == "HEAD" else request.method.encode()
    content_type = request.headers.get("content-type", "application/json").encode("latin-1")
    name = unquote(path.decode("latin-1"))
    effect = effect_of(name, query, await fields_of(body))
    sent = msgspec.structs.replace(context.sent(request, content_type), once=method != b"GET")
    return Order(method, path, name, query, body, sent, effect)


def engine_path(request: Request, segments: int) -> bytes:
    """Return the path of an engine in the path of a request, as it came. segments: those before it.

    Raises: InvalidRequest, when it could mean another path than it says, or is one that the router relays itself.
    """
    raw: bytes = request.scope["raw_path"].partition(b"?")[0]
    parts = raw.split(b"/")[segments + 1 :]
    plain = [unquote_to_bytes(part) for part in parts]
    if not all(plain) or any(part in (b".", b"..") or b"/" in part or b"\\" in part for part in plain):
        raise InvalidRequest("The path of an engine has no empty name, no `.`, `..`, encoded slash or backslash")
    if generates(request.method, "/" + b"/".join(plain).decode("latin-1")):
        path = "/" + b"/".join(parts).decode("latin-1")
        raise InvalidRequest(f"Generation does not go this way: send it to {path[:64]} of the router")
    return b"/" + b"/".join(parts)


async def asked_whole(context: Context, worker: Worker, order: Order) -> Reply:
    """Give an order to an engine, and return its whole answer."""
    return await ask(
        context,
        worker,
        order.method,
        order.target,
        body=order.body,
        sent=order.sent,
        timeout=context.timeouts.control,
        max_bytes=MOST_TOLD,
    )


async def give(context: Context, worker: Worker, order: Order, asked: Asked = asked_whole) -> OrderResult:
    """Let one engine carry out an order. asked: gives it to the engine."""
    begun, effect, done = context.clock(), order.effect, None  # what is done is unknown if the client leaves
    claim = context.pausing.begin(worker.spec.url, effect.pauses, effect.continues)
    try:
        reply = await asked(context, worker, order)
        error = failure(reply) or _said_failure(reply, context)
        done = _is_done(reply, error)
    finally:
        context.pausing.end(claim, done, effect.passes)
        if done is not False:
            learn(context, worker, effect, done is True)
    if done is None and effect.pauses and not effect.passes:
        error = f"{error} It may have done it all the same, so it gets no new requests until it is told to continue."
    return OrderResult(worker, reply, error, round(context.clock() - begun, 3))


def _is_done(reply: Reply, error: str | None) -> bool | None:
    """Return whether an engine did what it was asked to do; None if nobody knows. An answer of its own is believed."""
    if error is None:
        return True
    if isinstance(reply, FetchError):
        return False if reply.outcome in _NOT_ASKED else None
    return None if reply.status in _OF_GATEWAYS else False


def _said_failure(reply: Reply, context: Context) -> str | None:
    """Return why an engine did not do it, if it says so in an answer with a good status."""
    if not isinstance(reply, Fetched) or len(reply.body) > _MOST_SHOWN or b'"success"' not in reply.body:
        return None
    try:
        said = json.loads(reply.body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or said.get("success") is not False:
        return None
    message = text_without_secrets(str(said.get("message", ""))[:1024], context.keys())
    return f"The engine answered success: false. {message}".rstrip()


async def give_all(context: Context, workers: list[Worker], order: Order) -> list[OrderResult]:
    """Let several engines carry out an order, at the same time or as many at once as an option says."""
    name, total, begun = order.path.decode("latin-1")[:64], len(workers), context.clock()
    limit = 0 if order.name in _TOGETHER else context.fan_out
    gate = asyncio.Semaphore(limit or max(total, 1))

    async def one(worker: Worker) -> OrderResult:
        async with gate:
            return await give(context, worker, order)

    tasks: list[asyncio.Task[OrderResult]] = []
    try:
        for worker in workers:
            tasks.append(asyncio.ensure_future(one(worker)))
            if not len(tasks) % _BEGUN_AT_ONCE:
                await asyncio.sleep(0)
        waiting = {*tasks}
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=_LOGGED_EVERY)
            if waiting:
                log.info("%s: %d of %s answered so far", name, total - len(waiting), counted(total, "engine"))
    finally:
        for task in tasks:  # if the client has left
            task.cancel()
    given = [task.result() for task in tasks]
    failed = sum(each.error is not None for each in given)
    level = logging.WARNING if failed else logging.INFO
    seconds = context.clock() - begun
    log.log(level, "%s: done by %d of %s in %.1f s", name, total - failed, counted(total, "engine"), seconds)
    return given
