"""One stream of a gateway, which is one HTTP request: what arrives on it, and what is answered in which order.

    arrives                     answered
    request_headers, _body ...  nothing, until the body is whole: the choice needs it
                                then the answer to the headers, with the choice, and the whole body in pieces; or the
                                whole answer to the client, an error of the router
    response_headers, _body ... each one at once, so that a stream of events flows

An answer that begins before the choice is another filter's, to a request that is over. It passes as it is. What comes
in another order, or cannot be decoded, breaks the stream off. A stream that is silent at its beginning, or after the
end of its answer, is closed in time.

The body is counted in the request-body budget of the router until it is given back: what finds no room is not read from
the gateway, which then reads no more from its client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sglang_router.errors import BadHTTP, HeadTooLarge, InternalError, PayloadTooLarge, RequestTimeout, RouterError
from sglang_router.picker import asked, changes, replies
from sglang_router.picker.ends import BY_DEADLINE, OK, OVER, TOO_LONG, TOO_MANY, BrokenOff, Ended, not_the_protocol
from sglang_router.picker.messages import FULL_DUPLEX, NONE
from sglang_router.picker.pick import ErrorAnswer, Pick
from sglang_router.picker.picking import Picking
from sglang_router.relay.budget import SMALL
from sglang_router.relay.deadlines import ERRORS, NEVER, Deadline, Due
from sglang_router.relay.states import ADMITTED, DONE, HELD, ROUTED
from sglang_router.routing.plan import PlannedLeg
from sglang_router.wire.gathering import Body, gather, whole
from sglang_router.wire.request import Request

log = logging.getLogger("sglang_router.picker")


class GatewayStream:
    """See the module. It is a connection to `relay.clients.Clients`, and a reader to `relay.budget.ByteBudget`.

    peer      address of the client
    among     names of the only workers that may get the request; None: any may
    deadline  of the body that is being read
    """

    def __init__(self, picking: Picking, context: Any) -> None:
        self.clients = picking.clients
        self.deadline: Deadline = NEVER
        self.among: frozenset[str] | None = None
        self.peer = ""
        self._picking = picking
        self._context = context
        self._task = asyncio.current_task()
        self._timeouts = picking.app.relay.timeouts
        self._hold = self.clients.budget.hold(self)
        self._modes = asked.Modes()
        self._pick: Pick | None = None
        self._request: Request | None = None
        self._reading: asyncio.Task[Any] | None = None
        self._early: Any = None  # the head of an answer that arrived before the request was decided
        self._waiting: asyncio.Future[None] | None = None  # for room in the budget
        self._fault: RouterError | None = None  # why the body is read no further
        self._has_body = self._trailers = False  # the request has
        self._writing = False
        self._broken: Ended | None = None  # how the router breaks the stream off

    def __repr__(self) -> str:
        return f"<GatewayStream {self.peer} {self._pick!r}>"

    # -- for Clients and ByteBudget ------------------------------------------------------------------------------------

    def overdue(self, now: float) -> None:
        """Refuse the request: its body comes too slowly, or found no room in time. Or end a stream that is silent, or
        that the gateway does not read."""
        due, self.deadline = self.deadline[0], NEVER
        if due in BY_DEADLINE:
            self._break_off(BY_DEADLINE[due])
        else:
            self._fault = ERRORS.get(due, RequestTimeout)()
            self.cut()

    def lateness(self, now: float) -> float:
        """Return by how many seconds the body is later than allowed while others wait."""
        return now - self._hold.due(0.0)

    def forgive(self, pause: float) -> None:
        """Give the gateway the time back in which the router did not read."""
        self._hold.since += pause
        if self.deadline is not NEVER:
            self.deadline = (self.deadline[0], self.deadline[1] + pause)

    def close_if_idle(self) -> None:
        """Close soon, unless a request is here: a stream that has just been opened may send it."""
        if self.deadline[0] in (Due.HEAD, Due.LINGER):  # it waits for no part of a request
            soon = max(self._timeouts.linger, self.clients.last_request_timeout)
            self.deadline = (self.deadline[0], self.clients.clock() + soon)

    def cut(self) -> None:
        """Close now."""
        if self._task is not None:
            self._task.cancel()

    def read_on(self) -> None:
        """Read the body on: there is room."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def overrun(self) -> None:
        """Break off: the answer has taken too long."""
        self._break_off(TOO_LONG)

    def _break_off(self, how: Ended) -> None:
        self._broken = how
        if self._writing:  # gRPC tells nothing more before the gateway has read that: hold nothing until then
            self._let_go()
            self._picking.unread.add(self)
        else:
            self.cut()

    # -- the request ---------------------------------------------------------------------------------------------------

    async def run(self) -> Ended:
        """Serve the stream; return how it ends."""
        try:
            if not self.clients.add(self):
                return TOO_MANY
            self.deadline = (Due.HEAD, self.clients.clock() + self._timeouts.head)
            first = await self._context.read()
            self.deadline = NEVER
            if first is grpc.aio.EOF:
                return OVER
            if first.WhichOneof("kind") != "request_headers":
                raise BrokenOff(not_the_protocol("a stream begins with request_headers"))
            verdict = await self._decided(first)
            del first  # it may be large, and what follows takes long
            if await self._send(verdict) or self._early is not None:
                await self._follow()
        except DecodeError:
            return not_the_protocol("this is no ProcessingRequest")
        except BrokenOff as error:
            return error.how
        except asyncio.CancelledError:
            if self._broken is None:
                raise
            return self._broken
        finally:
            self._close()
        return OVER

    async def _write(self, reply: Any) -> None:
        """Send a message; break off when the gateway does not read it in time."""
        self.deadline = (Due.SEND, self.clients.clock() + self._timeouts.send)
        self._writing = True
        await self._context.write(reply)
        self._writing = False
        self.deadline = NEVER
        if self._broken is not None:
            raise BrokenOff(self._broken)

    def _close(self) -> None:
        self._let_go()
        self._picking.unread.discard(self)
        if self._reading is not None:
            self._reading.cancel()
        # Leave no cycle: it would keep the call, and all of its memory, until the collector comes.
        self._task = self._pick = self._request = self._reading = None
        del self._hold, self._context

    def _let_go(self) -> None:
        """Give back all that the request holds. It may be called again."""
        if self._pick is not None:
            self._pick.gone()
        self._hold.release()
        if self._request is not None:
            self._picking.app.relay.batch.bulk.discard(self._request)
        self.clients.left(self)

    async def _decided(self, first: Any) -> PlannedLeg | ErrorAnswer | None:
        """Read the request; return where it goes, or why it goes nowhere. None: the gateway has closed the stream."""
        picking = self._picking
        request = self._request = asked.request_of(first.request_headers, picking.limits)
        self.peer = asked.peer_of(request, self._context.peer)
        self._modes = asked.modes_of(first)
        has_body = self._has_body = not first.request_headers.end_of_stream
        try:
            subset = asked.subset_of(first)
        except HeadTooLarge as error:
            subset, request.refusal = None, error.with_traceback(None)  # its frames refer to this stream
        most = picking.admit(request, has_body) if request.refusal is None else 0
        if has_body and request.refusal is None:
            if self._modes.request != FULL_DUPLEX:
                log.warning(asked.WRONG_MODE)
                request.refusal = InternalError(asked.WRONG_MODE)
            elif not await self._read_body(request, picking.limits.body_bytes if most is None else most):
                return None
            if request.refusal is not None:
                self._hold.release()
        if subset is not None:
            self.among = picking.destinations.workers_at(subset)
        pick = picking.routes.find(request.method, request.path)(self, request)
        assert isinstance(pick, Pick)
        self._pick = pick
        pick.start()
        return pick.verdict or await self._wait(pick)

    async def _read_body(self, request: Request, most: int) -> bool:
        """Read the body; return False when the request is over before. What is wrong with it is the refusal."""
        body: Body = b""
        pieces: list[bytes] = []
        length, received, end = asked.length_of(request), 0, False
        if length > most:
            request.refusal = PayloadTooLarge()
            return True
        while not end:
            now = self.clients.clock()
            self.deadline = (Due.BODY, min(now + self._timeouts.body, self._hold.due(self._timeouts.body)))
            message = await self._unless_late(self._context.read())
            if self._fault is not None:
                request.refusal = self._fault
                return True
            if self._is_over(message):
                return False
            piece, end = message.request_body.body, message.request_body.end_of_stream
            kind = message.WhichOneof("kind")
            if kind == "request_trailers":
                end = self._trailers = True
            elif kind != "request_body":
                raise BrokenOff(not_the_protocol(f"{kind} came inside the body of a request"))
            received += len(piece)
            if received > most:
                request.refusal = PayloadTooLarge()
                return True
            if 0 <= length < received or (end and received < length):
                request.refusal = BadHTTP("The body is not as long as Content-Length says.")
                return True
            body = gather(body, pieces, piece, length, end) if body else piece
            if self._hold.state < ADMITTED:
                self._hold.grow(len(piece))
            if not await self._room(length, received, end):
                request.refusal = self._fault
                return True
        request.body = whole(body, pieces)
        return True

    async def _room(self, length: int, received: int, end: bool) -> bool:
        """Wait until the request-body budget has room for the body; return False when there is none in time."""
        hold, clock = self._hold, self.clients.clock
        if end and received <= SMALL:
            hold.complete(received)
            return True
        while hold.state is not HELD and not hold.admits(length, received, clock()):
            self._waiting = asyncio.get_running_loop().create_future()
            self.deadline = (Due.BUDGET, clock() + self._timeouts.room)
            await self._unless_late(self._waiting)
            if self._fault is not None:
                return False
        if end:
            hold.complete(received)
        return True

    async def _unless_late(self, what: Awaitable[Any]) -> Any:
        """Wait for a message, or for room, no longer than the deadline; then `_fault` is set."""
        try:
            return await what
        except asyncio.CancelledError:
            if self._fault is None:
                raise
        finally:
            self.deadline = NEVER

    def _is_over(self, message: Any) -> bool:
        """Return whether the request is over before it was decided: its client left, or another filter answers it."""
        if message is not grpc.aio.EOF and message.WhichOneof("kind") == "response_headers":
            self._early = message
        return message is grpc.aio.EOF or self._early is not None

    async def _wait(self, pick: Pick) -> PlannedLeg | ErrorAnswer | None:
        """Wait for the decision; return None when the request is over before it."""
        deciding = asyncio.ensure_future(pick.decision())
        try:
            while pick.verdict is None:
                self._reading = self._reading or asyncio.ensure_future(self._context.read())
                await asyncio.wait((deciding, self._reading), return_when=asyncio.FIRST_COMPLETED)
                if self._reading.done() and pick.verdict is None:
                    message, self._reading = self._reading.result(), None
                    if self._is_over(message):
                        pick.gone()
                        return None
                    if message.WhichOneof("kind") != "request_trailers":
                        raise BrokenOff(not_the_protocol("a message came behind the end of a request"))
                    self._trailers = True
        finally:
            deciding.cancel()
        return pick.verdict

    # -- the decision --------------------------------------------------------------------------------------------------

    async def _send(self, verdict: PlannedLeg | ErrorAnswer | None) -> bool:
        """Tell the gateway where the request goes, and give the body back; return False when it goes nowhere."""
        pick, write = self._pick, self._write
        while pick is not None and verdict is not None:
            if isinstance(verdict, ErrorAnswer):
                await write(replies.refused(*verdict))
                return False
            try:
                endpoint = await self._picking.destinations.of(verdict.target)
            except OSError as error:
                pick.lost(str(error))
                verdict = pick.verdict
                continue
            await write(self._chosen(pick, verdict, endpoint))
            await self._give_back(pick, verdict)
            return True
        return False

    def _chosen(self, pick: Pick, leg: PlannedLeg, endpoint: str) -> Any:
        picking, relay = self._picking, self._picking.app.relay
        others = picking.destinations.after(leg.target, self.among, picking.fallbacks, self.clients.clock())
        prefix = picking.destinations.prefix(leg.target)
        sets = changes.added(pick.request, leg.target, pick.tag.raw_id, prefix, relay.forward)
        if relay.traces is not None:
            sets += replies.fields_of(relay.traces.fields(pick.tag, leg.lease, pick.request.headers))
        pick.told_of = (endpoint, *others)
        return replies.chosen(",".join(pick.told_of), sets, changes.removed(pick.request, relay.forward))

    async def _give_back(self, pick: Pick, leg: PlannedLeg) -> None:
        """Give the body back, with what the leg changes in it."""
        pick.begin(leg)
        left = bool(pick.request.body) or (self._has_body and not self._trailers)
        while left:
            data, left = pick.next()
            await self._write(replies.piece(replies.REQUEST_BODY, data, not (left or self._trailers)))
        if self._trailers:
            await self._write(replies.trailers(replies.REQUEST_TRAILERS))
        self._hold.release()

    # -- the answer ----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Pass the answer on, piece by piece, until the gateway closes the stream."""
        pick, write = self._pick, self._write
        while (message := await self._message()) is not grpc.aio.EOF:
            kind = message.WhichOneof("kind")
            if kind == "response_headers":
                if pick is not None:
                    self._head(pick, message)
                await write(replies.headers([] if pick is None else pick.told()))
                if pick is not None and message.response_headers.end_of_stream:
                    pick.data(b"", True)
            elif kind == "response_body":
                end = message.response_body.end_of_stream
                data = message.response_body.body
                if pick is not None:
                    data = pick.data(data, end)
                await write(replies.piece(replies.RESPONSE_BODY, data, end))
            elif kind == "response_trailers":
                rest = b"" if pick is None else pick.data(b"", True)
                if rest:  # of an event that did not end
                    await write(replies.piece(replies.RESPONSE_BODY, rest, False))
                await write(replies.trailers(replies.RESPONSE_TRAILERS))
            elif kind == "request_trailers":
                await write(replies.trailers(replies.REQUEST_TRAILERS))
            if pick is None or pick.state is DONE:
                linger = self._timeouts.linger if self.clients.draining else self._timeouts.idle
                self.deadline = (Due.LINGER, self.clients.clock() + linger)
        if pick is not None and self._modes.response == NONE:
            pick.data(b"", True)  # nobody tells how the answer ends

    async def _message(self) -> Any:
        if self._early is not None:
            early, self._early = self._early, None
            return early
        if self._reading is not None:
            reading, self._reading = self._reading, None
            return await reading
        return await self._context.read()

    def _head(self, pick: Pick, message: Any) -> None:
        """Tell the pick of the head of the answer."""
        if pick.state is not ROUTED:
            return
        status, fields = asked.answered_of(message.response_headers)
        served = asked.served_of(message)
        destinations = self._picking.destinations
        worker = destinations.worker_at(served) if served and served != pick.told_of[0] else None
        pick.answered(status, fields, worker, served in pick.told_of)


async def serve_stream(picking: Picking, context: Any) -> None:
    """Serve one stream of a gateway. A gateway that goes away ends it without a word."""
    with contextlib.suppress(grpc.aio.UsageError):
        code, why = await GatewayStream(picking, context).run()
        if code is not OK:  # nothing is held any more: behind what the gateway does not read, this may take long
            await context.abort(code, why)
