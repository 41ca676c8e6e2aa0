"""The interface of the decider: the relay needs nothing else of it, and it may answer late.

`ThreadDecider` stands for another process: it runs in a thread of its own, gets its arguments through a queue, as plain
values, uses no worker, no fleet and no event loop, and its answers come back one iteration of the loop later at the
earliest.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Coroutine
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from played import Leg, Play, post, run
from sglang_router.errors import QueueTimeout, RouterError, Unavailable
from sglang_router.relay.deadlines import Due
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.moves import EXCHANGE_MOVES, IllegalMove
from sglang_router.relay.states import ExchangeState
from sglang_router.routing.decider import Deliver
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Route, Target, Wait
from sglang_router.routing.usage import Usage

CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}'


async def serve(leg: Leg, status: int = 200, body: bytes = b"{}") -> None:
    """Send an answer and close the connection, so that each following request opens a new one."""
    await leg.answer(status, body, "connection: close")
    leg.close()


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def wrapper(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return functools.wraps(test)(wrapper)


NONE_AT_ONCE = -1
"""A value of ThreadDecider.retries."""


def as_sent(value: Any) -> Any:
    """Return a copy with the same attributes, made of nothing but values that can be sent to another process.

    Raises: TypeError for anything else, such as a live worker or a bound method.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes, Enum)):
        return value
    if isinstance(value, Target):
        return Target(*map(as_sent, value))
    if type(value) is tuple:
        return tuple(map(as_sent, value))
    if isinstance(value, (RequestTag, Route, PlannedLeg)):
        named = {name: getattr(value, name) for name in dir(value) if not name.startswith("_")}
        return SimpleNamespace(**{name: as_sent(part) for name, part in named.items()})
    raise TypeError(f"{value!r} cannot be sent")


class ThreadDecider:
    """See the module. `legs`: number of legs of each plan; `patience`: seconds that a request waits for its answer."""

    deliver: Deliver

    def __init__(self, *, legs: int = 1, patience: float = 30.0) -> None:
        self.targets: list[Target] = []
        self.retries = 1
        self.open: set[int] = set()
        self.ends: list[Outcome] = []
        self.withdrawn: list[int] = []
        self._legs = legs
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._questions: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._leases = itertools.count(1)
        self._turn = itertools.count()
        self._attempts: dict[int, int] = {}
        self._planned: dict[int, Plan] = {}  # the last plan of each request
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._questions.put(None)
        self._thread.join(10.0)

    # -- in the event loop's thread ----------------------------------------------------------------------------------

    def _put(self, what: str, told: Any) -> None:
        self._questions.put((what, as_sent(told)))

    def ask(self, tag: RequestTag, facts: Facts, now: float) -> Wait:
        self._put("ask", tag)
        return Wait(now + self._patience, "decider")

    def retry(
        self,
        tag: RequestTag,
        leg: PlannedLeg,
        facts: Facts,
        outcome: Outcome,
        now: float,
        continued: bool = False,
        status: int = 0,
    ) -> Wait | None:
        if self.retries == NONE_AT_ONCE:
            return None
        self._put("retry", (tag, leg, outcome))
        return Wait(now + self._patience, "decider")

    def began(self, leg: PlannedLeg, now: float) -> None:
        self._put("began", leg)

    def ended(self, tag: RequestTag, leg: PlannedLeg, outcome: Outcome, now: float, usage: Usage | None = None) -> None:
        self._put("ended", (leg, outcome))

    def expired(self, tag: RequestTag, now: float) -> RouterError:
        self._put("withdraw", tag)
        return QueueTimeout(retry_after=1.0)

    def withdraw(self, tag: RequestTag) -> None:
        self._put("withdraw", tag)

    def suspect(self, leg: PlannedLeg) -> None:
        self._put("suspect", leg)

    def holds(self, leg: PlannedLeg, response: bytes) -> None:
        self._put("holds", (leg, response))

    # -- in its own ----------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        while (question := self._questions.get()) is not None:
            what, told = question
            getattr(self, f"_hear_{what}")(told)

    def _answer(self, number: int, answer: Plan | RouterError | None) -> None:
        self._loop.call_soon_threadsafe(lambda: self.deliver(number, answer))

    def _plan(self, tag: RequestTag, retries: int) -> Plan:
        legs = []
        for _ in range(self._legs):
            lease = next(self._leases)
            self.open.add(lease)
            legs.append(PlannedLeg(lease, self.targets[next(self._turn) % len(self.targets)], "thread"))
        self._planned[tag.number] = plan = Plan(tuple(legs), 0.0, retries)
        return plan

    def _hear_ask(self, tag: RequestTag) -> None:
        if self.targets:
            self._answer(tag.number, self._plan(tag, 0))
        else:
            self._answer(tag.number, Unavailable(retry_after=3.0))

    def _hear_retry(self, told: tuple[RequestTag, PlannedLeg, Outcome]) -> None:
        tag, leg, outcome = told
        attempts = self._attempts[tag.number] = self._attempts.get(tag.number, 0) + 1
        if attempts > self.retries:
            self._answer(tag.number, None)
        else:
            self.open.discard(leg.lease)
            self.ends.append(outcome)
            self._answer(tag.number, self._plan(tag, attempts))

    def _hear_began(self, leg: PlannedLeg) -> None: ...

    def _hear_suspect(self, leg: PlannedLeg) -> None: ...

    def _hear_holds(self, told: tuple[PlannedLeg, bytes]) -> None: ...

    def _hear_withdraw(self, tag: RequestTag) -> None:
        self.withdrawn.append(tag.number)
        if (crossed := self._planned.get(tag.number)) is not None:  # a plan that nobody waits for any more
            self.open.difference_update(leg.lease for leg in crossed.legs)

    def _hear_ended(self, told: tuple[PlannedLeg, Outcome]) -> None:
        leg, outcome = told
        if leg.lease in self.open:
            self.open.discard(leg.lease)
            self.ends.append(outcome)


class Far:
    """A play whose decisions are made in another thread."""

    def __init__(self, workers: int = 2, *, legs: int = 1, patience: float = 30.0, **options: Any) -> None:
        self.decider = ThreadDecider(legs=legs, patience=patience)
        self.play = Play(workers, decider=lambda _: self.decider, **options)

    async def __aenter__(self) -> tuple[Play, ThreadDecider]:
        await self.play.__aenter__()
        self.decider.targets = [worker.target for worker in self.play.workers]
        return self.play, self.decider

    async def __aexit__(self, *failure: Any) -> None:
        try:
            await self.play.__aexit__(*failure)
            if failure[0] is None:
                await self.play.until(lambda: not self.decider.open)
        finally:
            self.decider.close()


@on_loop
async def test_answers_from_another_thread_are_enough() -> None:
    async with Far(2) as (play, decider):
        clients = [await play.client() for _ in range(20)]
        for client in clients:
            await client.send(post(CHAT, BODY))
        for _ in clients:
            await serve(await play.leg())
        assert [(await client.response()).status for client in clients] == [200] * 20
        await play.until(lambda: not decider.open)
        assert decider.ends == [Outcome.SERVED] * 20
        assert not play.router.leases
        assert {end.leg.branch for end in play.events.ends if end.leg} == {"thread"}


@on_loop
async def test_a_stream_too() -> None:
    async with Far(1) as (play, _):
        client = await play.client()
        await client.send(post(CHAT, STREAM))
        leg = await play.leg()
        await leg.start_stream()
        for n in range(3):
            await leg.chunk(b"data: %d\n\n" % n)
            if not n:
                await client.head()
            assert await client.chunk() == b"data: %d\n\n" % n
        await leg.end_stream()
        assert await client.until(b"0\r\n\r\n")
        (end,) = await play.ended(1)
        assert end.answer.first_byte >= 0.0


@pytest.mark.parametrize("size", [2, 100_000])
@on_loop
async def test_a_failing_answer_is_held_until_the_decision_and_passed_on_when_nothing_follows(size: int) -> None:
    async with Far(2) as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        for _ in range(2):
            await serve(await play.leg(), 500, b"x" * size)
        response = await client.response()
        assert (response.status, response.body) == (500, b"x" * size)
        (end,) = await play.ended(1)
        assert (end.answer.retries, end.answer.outcome) == (1, Outcome.FAILED)
        await play.until(lambda: decider.ends == [Outcome.FAILED] * 2)


@on_loop
async def test_a_break_is_retried_and_is_502_when_nothing_follows() -> None:
    async with Far(2) as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        (await play.leg()).reset()
        await serve(await play.leg())
        assert (await client.response()).status == 200
        decider.retries = 0
        await client.send(post(CHAT, BODY))
        (await play.leg()).reset()
        assert (await client.response()).status == 502


@on_loop
async def test_a_final_error_is_the_answer() -> None:
    async with Far(1) as (play, decider):
        decider.targets.clear()
        client = await play.client()
        await client.send(post(CHAT, BODY))
        response = await client.response()
        assert (response.status, response.headers["retry-after"]) == (503, "3")
        await client.send(post(CHAT, BODY))
        assert (await client.response()).status == 503, "the connection goes on"


class SilentDecider(ThreadDecider):
    """Never answers."""

    def _hear_ask(self, tag: RequestTag) -> None: ...


@on_loop
async def test_no_answer_in_time_is_408_and_a_client_that_leaves_is_withdrawn() -> None:
    far = Far(1, patience=0.05)
    far.decider.close()
    far.decider = SilentDecider(patience=0.05)
    far.play = Play(1, decider=lambda _: far.decider)
    async with far as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        assert (await client.response()).status == 408
        decider._patience = 30.0
        other = await play.client()
        await other.send(post(CHAT, BODY))
        await play.until(lambda: bool(play.app.relay.queued))
        (waiting,) = play.clients.exchanges
        assert isinstance(waiting, Exchange)
        assert (waiting.state, waiting.deadline[0]) == (ExchangeState.QUEUED, Due.QUEUE)
        assert repr(waiting).startswith("<Exchange chat QUEUED, queue due at ")
        other.close()
        await play.until(lambda: len(decider.withdrawn) == 2)


class SlowDecider(ThreadDecider):
    """Answers once it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        super().__init__()

    def _hear_ask(self, tag: RequestTag) -> None:
        assert self.go.wait(30.0)
        super()._hear_ask(tag)


@on_loop
async def test_a_plan_that_crosses_the_withdrawal_reaches_nobody_and_holds_nothing() -> None:
    far = Far(1)
    far.decider.close()
    slow = far.decider = SlowDecider()
    far.play = Play(1, decider=lambda _: slow)
    async with far as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        await play.until(lambda: bool(play.app.relay.queued))
        client.close()
        await play.until(lambda: not play.app.relay.queued)
        slow.go.set()
        await play.until(lambda: bool(decider.withdrawn))
        assert not decider.open
        assert [end.leg for end in await play.ended(1)] == [None]


# -- two legs ----------------------------------------------------------------------------------------------------------


@on_loop
async def test_of_two_legs_the_last_ones_answer_is_the_clients() -> None:
    async with Far(2, legs=2) as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        legs = {leg.worker.url: leg for leg in (await play.leg(), await play.leg())}
        first, last = (legs[target.url] for target in decider.targets)
        assert first.body == last.body == BODY
        await first.answer(200, b'{"first":1}')
        await last.answer(201, b'{"last":1}')
        response = await client.response()
        assert (response.status, response.body) == (201, b'{"last":1}')
        await play.until(lambda: decider.ends == [Outcome.SERVED] * 2)


@on_loop
async def test_when_one_of_two_legs_breaks_both_are_given_up_and_tried_again() -> None:
    async with Far(2, legs=2) as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        legs = {leg.worker.url: leg for leg in (await play.leg(), await play.leg())}
        first, last = (legs[target.url] for target in decider.targets)
        first.reset()
        await last.closed()
        for _ in range(2):
            await serve(await play.leg())
        assert (await client.response()).status == 200
        await play.until(lambda: not decider.open)
        assert decider.ends == [Outcome.ABANDONED, Outcome.BROKEN, Outcome.SERVED, Outcome.SERVED]


@on_loop
async def test_while_a_retry_of_one_leg_is_decided_the_other_one_does_not_answer() -> None:
    async with Far(2, legs=2) as (play, decider):
        decider.retries = 0
        client = await play.client()
        await client.send(post(CHAT, BODY))
        legs = {leg.worker.url: leg for leg in (await play.leg(), await play.leg())}
        first, last = (legs[target.url] for target in decider.targets)
        await first.answer(500, b"x" * 100_000)
        await last.closed()
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (500, "prefill_internal_error")
        await play.until(lambda: sorted(end.label for end in decider.ends) == ["abandoned", "failed"])


@on_loop
async def test_a_first_leg_that_fails_for_good_is_the_answer_at_once_too() -> None:
    async with Far(2, legs=2) as (play, decider):
        decider.retries = NONE_AT_ONCE
        client = await play.client()
        await client.send(post(CHAT, BODY))
        legs = {leg.worker.url: leg for leg in (await play.leg(), await play.leg())}
        first, last = (legs[target.url] for target in decider.targets)
        await first.answer(503, b'{"first":1}')
        await last.closed()
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (503, "prefill_unavailable")
        planned = play.events.ends[-1].leg
        assert planned is not None
        assert planned.target == decider.targets[0]
        await play.until(lambda: not decider.open)
        assert sorted(end.label for end in decider.ends) == ["abandoned", "failed"]


@on_loop
async def test_a_first_leg_has_time_to_end_its_answer_when_the_last_ones_is_whole() -> None:
    async with Far(2, legs=2) as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        legs = {leg.worker.url: leg for leg in (await play.leg(), await play.leg())}
        first, last = (legs[target.url] for target in decider.targets)
        await last.answer(200, b"{}")
        assert (await client.response()).status == 200
        await play.until(lambda: decider.ends == [Outcome.SERVED] * 2)
        await first.answer(200)


@pytest.mark.parametrize("breaks", [False, True])
@on_loop
async def test_a_first_leg_that_fails_behind_the_head_does_not_end_the_answer(breaks: bool) -> None:
    async with Far(2, legs=2) as (play, decider):
        client = await play.client()
        await client.send(post(CHAT, STREAM))
        legs = {leg.worker.url: leg for leg in (await play.leg(), await play.leg())}
        first, last = (legs[target.url] for target in decider.targets)
        await last.start_stream()
        await last.chunk(b"data: 0\n\n")
        await client.head()
        assert await client.chunk() == b"data: 0\n\n"
        if breaks:
            first.reset()
        else:
            await first.answer(500, b"{}")
        await play.until(lambda: len(decider.ends) == 1)
        await last.chunk(b"data: 1\n\n")
        assert await client.chunk() == b"data: 1\n\n"
        await last.end_stream()
        assert await client.until(b"0\r\n\r\n")
        await play.until(lambda: not decider.open)
        assert decider.ends == [Outcome.BROKEN if breaks else Outcome.FAILED, Outcome.SERVED]


@on_loop
async def test_when_the_client_leaves_both_legs_are_given_up() -> None:
    async with Far(2, legs=2) as (play, _):
        client = await play.client()
        await client.send(post(CHAT, BODY))
        legs = await play.leg(), await play.leg()
        client.close()
        for leg in legs:
            await leg.closed()


# -- what is relayed is a table ----------------------------------------------------------------------------------------


@on_loop
async def test_other_methods_and_paths_with_parameters_are_relayed() -> None:
    rows = (
        Endpoint(b"/v1/responses/{id}", "response", json=False, methods=(b"GET", b"DELETE")),
        Endpoint(b"/v1/files", "files", json=False, methods=(b"GET",)),
    )
    async with Play(1, endpoints={row.path: row for row in rows}) as play:
        client = await play.client()
        for start in ("GET /v1/responses/r-1?x=1", "DELETE /v1/responses/r%2F2", "GET /v1/files"):
            await client.send(f"{start} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            leg = await play.leg()
            assert leg.start == f"{start} HTTP/1.1"
            await serve(leg)
            assert (await client.response()).status == 200
        ends = await play.ended(3)
        assert [(end.tag.route.method, end.tag.route.endpoint) for end in ends] == [
            ("GET", "response"),
            ("DELETE", "response"),
            ("GET", "files"),
        ]


# -- states ------------------------------------------------------------------------------------------------------------


@on_loop
async def test_the_state_of_an_exchange_can_be_printed_at_each_step() -> None:
    async with Play(1) as play:
        client = await play.client()
        await client.send(post(CHAT, STREAM))
        leg = await play.leg()
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)
        assert (exchange.state, exchange.deadline[0]) == (ExchangeState.ROUTED, Due.FIRST_BYTE)
        assert "chat ROUTED, first_byte due at" in repr(exchange)
        assert f"<Leg to {leg.worker.url}: UpstreamConnection, no answer yet, served>" in repr(exchange)
        await leg.start_stream()
        await leg.chunk(b"data: 1\n\n")
        await client.head()
        assert (exchange.state, exchange.deadline[0]) == (ExchangeState.ANSWERING, Due.PROGRESS)
        await client.chunk()
        assert "14 bytes sent" in repr(exchange)
        await leg.end_stream()
        await play.ended(1)
        assert (exchange.state, exchange.deadline[0]) == (ExchangeState.DONE, Due.NEVER)
        with pytest.raises(IllegalMove, match=r"ROUTED in <Exchange chat DONE"):
            exchange._move(ExchangeState.ROUTED)


def test_every_state_leads_to_done_and_done_nowhere() -> None:
    *rows, last = EXCHANGE_MOVES
    assert len(EXCHANGE_MOVES) == len(ExchangeState)
    assert last == 0
    assert all(row >> ExchangeState.DONE & 1 for row in rows)
