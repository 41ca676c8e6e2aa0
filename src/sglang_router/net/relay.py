"""One inference request on its way: from the client's whole request to the last byte of its one answer.

    start -> route -> send -> begin -> data ... data(done) -> finished          the good way
       ^        ^        |
       |        |        '-- broken or refused answer before the first byte: retry, at once or after plan.delay
       |        '-- every worker is starting, or full: wait until one can take it or the time is up
       '-- no place is free (admission): wait for one

Whatever happens ends in `_end`, exactly once: the lease is closed, the client's connection goes on or closes, and one
`Finished` is emitted. After the head of an answer has gone to the client nothing is retried; if the worker breaks
then, the client gets an error event (when it reads a stream of events) and a connection that ends without a clean end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.events import Finished
from sglang_router.core.request import Endpoint, Facts, read, with_rank
from sglang_router.core.worker import Outcome, outcome_of_status
from sglang_router.errors import (
    BufferFull,
    ConnectTimeout,
    FirstByteTimeout,
    InternalError,
    Overdue,
    QueueFull,
    QueueTimeout,
    RouterError,
    StreamBroken,
    StreamSilent,
    TooManyConnections,
    TooManyWaiting,
    UnsupportedMediaType,
    WorkerBroken,
    WorkerInvalid,
    WorkersFull,
    WorkersStarting,
    WorkerTimeout,
    WorkerUnreachable,
)
from sglang_router.net.service import CONTENT_ENCODING, ROUTING_KEY
from sglang_router.wire.headers import error_answer, request_head, response_head
from sglang_router.wire.response import Framing, ResponseHead, Sized, UntilClose
from sglang_router.wire.sse import error_event, farewell

if TYPE_CHECKING:
    import asyncio

    from sglang_router.core.router import Plan
    from sglang_router.net.downstream import Downstream
    from sglang_router.net.service import Service
    from sglang_router.net.upstream import Connection, Opening
    from sglang_router.wire.request import Request

_ERRORS: dict[Outcome, type[RouterError]] = {
    Outcome.REFUSED: WorkerUnreachable,
    Outcome.UNREACHABLE: WorkerUnreachable,
    Outcome.UNCONNECTED: ConnectTimeout,
    Outcome.STARVED: TooManyConnections,
    Outcome.BROKEN: WorkerBroken,
    Outcome.INVALID: WorkerInvalid,
    Outcome.CUT: StreamBroken,
    Outcome.TIMEOUT: WorkerTimeout,
}


_LONGEST_LINE = 60.0
"""Seconds; the longest Retry-After told: nobody knows more of the future."""
_LOOKS = 4
"""Looks at a silent answer within the longest silence: it ends after one to one and a quarter of that time."""


class Relay:
    """See the module. It is the Exchange of its client connection and the Sink of its leg."""

    __slots__ = (
        "_chunked",
        "_client",
        "_ended",
        "_endpoint",
        "_facts",
        "_first_byte",
        "_framing",
        "_keep_alive",
        "_leg",
        "_outcome",
        "_paused",
        "_plan",
        "_quiet",
        "_request",
        "_request_id",
        "_seen",
        "_sent",
        "_service",
        "_sse",
        "_started_at",
        "_status",
        "_timer",
        "_transport",
        "_turn",
        "_waits_since",
        "_watched",
        "decoding",
    )
    resumed = 0
    unresumed = ""

    def __init__(self, service: Service, client: Downstream, request: Request, endpoint: Endpoint) -> None:
        # of the request
        self._service = service
        self._client = client
        self._turn = service.turn
        self._transport = client.transport
        self._request = request
        self._endpoint = endpoint
        self._started_at = service.clock()
        self._request_id = b""
        self._facts: Facts | None = None
        self._keep_alive = request.keep_alive
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._ended = False
        self._watched = False  # a stream: its first byte is waited for, and timed
        self._waits_since = 0.0
        self.decoding = request.http10
        # of the leg
        self._plan: Plan | None = None
        self._leg: Connection | Opening | None = None
        # of the answer
        self._outcome = Outcome.SERVED
        self._framing: Framing | None = None
        self._status = 0
        self._sent = 0
        self._first_byte = -1.0
        self._seen = 0  # of `_sent`, when it was last looked at
        self._quiet = 0  # looks in a row that saw nothing new
        self._sse = False
        self._chunked = False

    # -- the client's side (Exchange) ----------------------------------------------------------------------------------

    def start(self) -> None:
        request, service = self._request, self._service
        request_id = routing_key = b""
        best = len(service.watched)
        coded = False
        for name, value in request.headers:
            place = service.watched.get(name)
            if place is None:
                continue
            if place == ROUTING_KEY:
                routing_key = value
            elif place == CONTENT_ENCODING:
                coded = value.lower() != b"identity"
            elif place < best and service.usable_id(value):
                best, request_id = place, value
        self._request_id = request_id or service.request_id(self._endpoint.id)
        if request.refusal is not None:
            self.refuse(request.refusal)
            return
        try:
            if coded:
                raise UnsupportedMediaType
            if service.buffered > service.most_buffered:
                raise BufferFull(retry_after=1.0)
            self._facts = facts = read(self._endpoint, request.body, routing_key)
            self._watched = facts.streaming
            if service.admission is not None and not service.admission.enter(self, self._started_at):
                self._client.deadline = self._started_at + service.timeouts.queue
                return
        except RouterError as exc:
            self.refuse(exc)
            return
        self._admitted()

    def _admitted(self) -> None:
        """It has its place."""
        if self._ended:  # it left between two turns, and passed the place on
            return
        service = self._service
        self._client.deadline = self._started_at + service.timeouts.request
        if service.waiting and service.router.fleet.most_load:
            self._wait(WorkersFull(retry_after=1.0))  # behind those that came before
        else:
            self._route()

    def gone(self) -> None:
        self._give_up_leg()
        self._end(Outcome.GONE)

    def pause(self) -> None:
        self._paused = True
        if self._leg is not None:
            self._leg.pause()

    def resume(self) -> None:
        self._paused = False
        if self._leg is not None:
            self._leg.resume()

    def overdue(self, now: float) -> None:
        service = self._service
        if self._plan is None:
            self.refuse(self._why_still_here(now))
            return
        if now < self._started_at + service.timeouts.request and self._framing is not None and self._goes_on(now):
            return
        self._give_up_leg()
        if now >= self._started_at + service.timeouts.request:
            self._failed(Outcome.TIMEOUT, Overdue())
        elif self._framing is None:
            self._failed(Outcome.TIMEOUT, FirstByteTimeout())
        else:
            self._failed(Outcome.SILENT, StreamSilent())

    def _why_still_here(self, now: float) -> RouterError:
        """It has waited for too long."""
        service = self._service
        if self not in service.waiting:
            return QueueTimeout(retry_after=service.admission.wait(now) if service.admission is not None else 1.0)
        error = service.router.fleet.unavailable(now)
        return QueueTimeout(retry_after=self._line(now)) if isinstance(error, WorkersFull) else error

    def _line(self, now: float) -> float:
        """Seconds to come again in, when there was no room: as long as the first in the line has waited by now."""
        first = next(iter(self._service.waiting), self)
        return min(max(now - first._waits_since, 1.0), _LONGEST_LINE)

    def _goes_on(self, now: float) -> bool:
        """Whether the worker has said something of late. Looked at now and then: a stamp on each chunk would cost more
        than it tells. While the client does not read, the worker has leave to be silent."""
        if self._sent != self._seen or self._paused:
            self._seen, self._quiet = self._sent, 0
        else:
            self._quiet += 1
        self._watch(now)
        return self._quiet < _LOOKS

    def _watch(self, now: float) -> None:
        """Has the answer looked at again in a while."""
        timeouts = self._service.timeouts
        self._client.deadline = min(now + timeouts.chunk / _LOOKS, self._started_at + timeouts.request)

    def unanswered(self) -> tuple[float, int, bool] | None:
        """While it waits for its first token: when the request came, how many bytes of its routing text no worker is
        believed to hold, and whether it waits here for a worker."""
        facts, plan = self._facts, self._plan
        if self._first_byte >= 0.0 or facts is None:
            return None
        if plan is None:
            return self._started_at, len(facts.text), True
        if not facts.streaming:
            return None  # its first byte is its last: it may be computed already
        return self._started_at, plan.total - plan.matched, False

    # -- the decision --------------------------------------------------------------------------------------------------

    def _route(self) -> None:
        assert self._facts is not None
        service = self._service
        try:
            plan = service.router.route(self._facts, service.clock())
        except (WorkersStarting, WorkersFull) as exc:
            self._wait(exc)
            return
        except RouterError as exc:
            self.refuse(exc)
            return
        self._plan = plan
        self._turn.leg(self)

    def _wait(self, error: WorkersStarting | WorkersFull) -> None:
        """Waits for a worker; the time counts from the first time it has to."""
        service = self._service
        full = isinstance(error, WorkersFull)
        now = service.clock()
        if not self._waits_since:
            self._waits_since = now
        until = self._waits_since + (service.timeouts.queue if full else service.timeouts.starting)
        if now >= until:
            self.refuse(QueueTimeout(retry_after=self._line(now)) if full else error)
        elif len(service.waiting) >= (service.most_queued if full else service.most_waiting):
            self.refuse(QueueFull(retry_after=self._line(now)) if full else TooManyWaiting(retry_after=5.0))
        else:
            self._client.deadline = until
            service.waiting[self] = None

    def woken(self) -> None:
        """A worker changed while this request waited for one."""
        self._client.deadline = self._started_at + self._service.timeouts.request
        self._route()

    def send(self, fresh: bool = False) -> None:
        """Sends the leg of the present plan; `fresh`: on a new connection."""
        if self._ended:
            return
        plan, service, request = self._plan, self._service, self._request
        assert plan is not None
        self._timer = None
        worker = plan.worker
        if worker.dp_rank is not None and self._endpoint.json:
            request = msgspec.structs.replace(request, body=with_rank(request.body, worker.dp_rank))
        if self._watched and plan.lease.sent_at < 0.0:
            now = service.clock()
            plan.lease.streams(plan.total - plan.matched if plan.total else -1, now)
            self._client.deadline = min(now + service.timeouts.first_byte, self._client.deadline)
        head = request_head(
            request,
            service.upstream.origin(worker).start(b"POST", request.target),
            self._request_id,
            key=worker.key,
            everything=service.forward_everything,
            guarded=service.guarded,
        )
        self._leg = service.upstream.send(worker, self, head, request.body, fresh=fresh)

    def sent_on(self, connection: Connection) -> None:
        self._leg = connection

    def _retried(self, outcome: Outcome, continued: Facts | None = None) -> bool:
        """Asks for another leg, and sends it. False: what there is, is the answer. `continued`: see Router.retry."""
        service, plan = self._service, self._plan
        assert plan is not None
        now = service.clock()
        following = service.router.retry(plan, outcome, now, continued)
        if service.waiting:
            service.room()
        if following is None:
            return False
        self._client.deadline = self._started_at + service.timeouts.request
        self._plan = following
        self._outcome = Outcome.SERVED  # until the following leg says otherwise
        if following.delay:
            self._timer = service.loop.call_later(following.delay, self.send)
        else:
            self.send()
        return True

    # -- the worker's side (Sink) --------------------------------------------------------------------------------------

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        leg = self._leg
        if done:
            self._leg = None
        status = head.status
        if status >= 429:
            self._outcome = outcome_of_status(status, head.header(b"retry-after") is not None)
            if self._outcome is not Outcome.SERVED:
                self._leg = None
                if self._retried(self._outcome):
                    if not done and leg is not None:
                        leg.abort()
                    return
                self._leg = None if done else leg
        self._framing = framing
        self._status = status
        now = self._service.clock()
        self._first_byte = now - self._started_at
        if self._watched and self._plan is not None:
            self._plan.lease.began(now)
        if not done:
            self._watch(now)
        bytes_out = self._head(head, framing) + data
        self._sent = len(data)
        self._turn.write(self._transport, bytes_out)
        if done:
            self._finish()
        elif self._paused and leg is not None:
            leg.pause()

    def _head(self, head: ResponseHead, framing: Framing) -> bytes:
        """The client's head, and what it says of the framing; in HTTP/1.0 the closing ends what has no length."""
        http10 = self._request.http10
        field = b""
        if isinstance(framing, Sized):
            if not head.plain and head.status != 204:
                field = b"content-length: %d\r\n" % (head.content_length or 0)
        elif isinstance(framing, UntilClose) or http10:
            self._keep_alive = False
        else:
            self._chunked = True
            field = b"transfer-encoding: chunked\r\n"
        if self._service.draining:
            self._keep_alive = False
        connection = b""
        if not self._keep_alive:
            connection = b"connection: close\r\n"
        elif http10:
            connection = b"connection: keep-alive\r\n"
        if not isinstance(framing, Sized):
            content_type = head.header(b"content-type")
            self._sse = content_type is not None and content_type.startswith(b"text/event-stream")
        cors = self._service.cors
        if cors is not None:
            fields = cors.fields(self._request.headers)
            return response_head(head, self._request_id, framing=field, connection=connection, cors=fields)
        return response_head(head, self._request_id, framing=field, connection=connection)

    def data(self, data: bytes, done: bool) -> None:
        self._sent += len(data)
        if not done:
            self._turn.write(self._transport, data)
            return
        self._leg = None
        self._turn.write(self._transport, data)
        self._finish()

    def broken(self, outcome: Outcome, detail: str) -> None:
        self._leg = None
        if outcome is Outcome.STALE:
            self.send(fresh=True)
            return
        plan = self._plan
        assert plan is not None
        self._service.prod(plan.worker)
        if self._framing is None and self._retried(outcome):
            return
        self._failed(outcome, _ERRORS.get(outcome, InternalError)(detail))

    # -- the end -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        keep_alive = self._keep_alive
        self._end(self._outcome)
        self._client.done(keep_alive)

    def _failed(self, outcome: Outcome, error: RouterError) -> None:
        """No retry is left. Before the first byte the error is the answer; after it there can only be a broken end."""
        if self._framing is None:
            self.refuse(error, outcome)
            return
        if self._sse:
            last = farewell(error_event(self._request.path, error), self._framing, self._chunked)
            if last is not None:
                self._turn.write(self._transport, last)
        self._end(outcome, error.code)
        self._client.abort()

    def refuse(self, error: RouterError, outcome: Outcome | None = None) -> None:
        """Answers with an error of the router; nothing has been sent to the client yet."""
        self._service.waiting.pop(self, None)
        self._status = error.status
        keep_alive = self._keep_alive and not error.close and not self._service.draining
        connection = b"" if keep_alive else b"connection: close\r\n"
        if keep_alive and self._request.http10:
            connection = b"connection: keep-alive\r\n"
        if self._service.cors is not None:
            connection += self._service.cors.fields(self._request.headers)
        self._turn.write(self._transport, error_answer(error, self._request_id, connection))
        self._end(outcome, error.code)
        self._client.done(keep_alive)

    def _give_up_leg(self) -> None:
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._service.waiting.pop(self, None)

    def _end(self, outcome: Outcome | None, code: str = "") -> None:
        if self._ended:
            return
        self._ended = True
        self._client.deadline = math.inf
        service, plan, facts, request = self._service, self._plan, self._facts, self._request
        now = service.clock()
        if plan is not None:
            plan.lease.close(outcome or Outcome.ABANDONED, now)
            if service.waiting:
                service.room()
        if service.admission is not None and (following := service.admission.leave(self, now)) is not None:
            service.loop.call_soon(following._admitted)
        service.listener.finished(
            Finished(
                "POST",
                request.path.decode("latin-1"),
                self._endpoint.name,
                self._request_id.decode("latin-1"),
                self._client.peer,
                facts is not None and facts.streaming,
                facts.model.decode("utf-8", "replace") if facts is not None else "",
                plan.worker if plan is not None else None,
                plan.branch if plan is not None else "",
                plan.matched if plan is not None else 0,
                plan.total if plan is not None else 0,
                self._status,
                code,
                outcome,
                now - self._started_at,
                self._first_byte,
                len(request.body),
                self._sent,
                plan.retries if plan is not None else 0,
                request.client,
                self.resumed,
                self.unresumed,
            )
        )
