"""Limits on places, queues, rates, bytes and times, with clients and workers that the test plays by hand."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from played import Client, Leg, Play, post, run
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.deadlines import Due
from sglang_router.relay.states import CLOSING
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec

CHAT = "/v1/chat/completions"


def body(text: str = "hi", **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more}).encode()


STREAM = body(stream=True)


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def wrapper(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return functools.wraps(test)(wrapper)


def code(answer: bytes) -> str:
    found: str = json.loads(answer)["error"]["code"]
    return found


async def ask(play: Play, content: bytes | None = None) -> Client:
    client = await play.client()
    await client.send(post(CHAT, content or body()))
    return client


def queued(play: Play, count: int) -> bool:
    return len(play.router.queue) == count


def parked(play: Play) -> list[ClientConnection]:
    """Return the connections that do not read because the request-body budget is exhausted."""
    return [each for each in connections(play) if each.deadline[0] is Due.BUDGET]


def connections(play: Play) -> list[ClientConnection]:
    return [each for each in play.clients.connections if isinstance(each, ClientConnection)]


async def serve(leg: Leg, status: int = 200) -> None:
    """Send an answer and close the connection, so that each following request opens a new one."""
    await leg.answer(status, b"{}", "connection: close")
    leg.close()


# -- places ------------------------------------------------------------------------------------------------------------


@on_loop
async def test_places_are_exact_and_are_given_in_order() -> None:
    async with Play(workers=2, max_concurrent_requests=2, queue_size=10) as play:
        clients = []
        for n in range(6):
            clients.append(await ask(play, body("x" * n)))
            await play.until(functools.partial(queued, play, max(0, n - 1)))
        legs = [await play.leg() for _ in range(2)]
        assert play.legs.empty()
        sizes = [len(leg.body) for leg in legs]
        for _ in range(4):
            assert sum(worker.load for worker in play.workers) == 2
            await serve(legs.pop(0))
            legs.append(await play.leg())
            sizes.append(len(legs[-1].body))
        for leg in legs:
            await serve(leg)
        assert [size - sizes[0] for size in sizes] == [0, 1, 2, 3, 4, 5]
        assert [(await client.response()).status for client in clients] == [200] * 6
        await play.at_rest()
        assert play.router.queue.running == 0


@on_loop
async def test_a_full_queue_is_429_at_once_and_says_when_to_come_again() -> None:
    async with Play(max_concurrent_requests=1, queue_size=1) as play:
        await ask(play)
        await ask(play)
        await play.until(functools.partial(queued, play, 1))
        response = await (await ask(play)).response()
        assert (response.status, code(response.body)) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        first = await play.leg()
        await serve(first)
        await serve(await play.leg())
        await play.at_rest()


@on_loop
async def test_who_waits_too_long_is_408() -> None:
    async with Play(queue_timeout_secs=0.05, max_concurrent_requests=1, queue_size=1) as play:
        await ask(play)
        leg = await play.leg()
        response = await (await ask(play)).response()
        assert (response.status, code(response.body)) == (408, "queue_timeout")
        assert int(response.headers["retry-after"]) >= 1
        await serve(leg)
        await play.at_rest()
        assert play.legs.empty(), "it reached a worker"


@on_loop
async def test_who_leaves_frees_the_place_in_the_queue_at_once() -> None:
    async with Play(max_concurrent_requests=1, queue_size=1) as play:
        await ask(play)
        leg = await play.leg()
        impatient = await ask(play)
        await play.until(functools.partial(queued, play, 1))
        impatient.close()
        await play.until(functools.partial(queued, play, 0))
        patient = await ask(play)
        await play.until(functools.partial(queued, play, 1))
        await serve(leg)
        await serve(await play.leg())
        assert (await patient.response()).status == 200
        await play.at_rest()


@on_loop
async def test_who_leaves_just_when_it_is_let_in_passes_the_place_on() -> None:
    async with Play(max_concurrent_requests=1, queue_size=2) as play:
        await ask(play)
        leg = await play.leg()
        waiters = []
        for n in (1, 2):
            waiters.append(await ask(play))
            await play.until(functools.partial(queued, play, n))
        first = next(iter(play.router.queue)).number
        waits = play.app.relay.queued[first]
        (connection,) = [each for each in connections(play) if id(each.exchange) == id(waits)]
        await serve(leg)
        await play.until(functools.partial(queued, play, 1))
        connection.cut()  # it has begun, and its leg is about to be sent
        while (following := await play.leg()).writer.transport.is_closing():
            pass
        await serve(following)
        await play.until(lambda: play.router.queue.running == 0)


@on_loop
async def test_a_rate_is_kept() -> None:
    async with Play(rate_limit_tokens_per_second=2) as play:
        for _ in range(2):
            await ask(play)
            await serve(await play.leg())
        response = await (await ask(play)).response()
        assert (response.status, code(response.body)) == (429, "rate_limited")
        assert response.headers["retry-after"] == "1"
        await play.at_rest()


# -- room at the workers -----------------------------------------------------------------------------------------------


@on_loop
async def test_workers_get_no_more_than_they_may_have_and_the_rest_waits_in_order() -> None:
    async with Play(workers=2, policy="least_load", max_running_per_worker=1) as play:
        clients = []
        for n in range(5):
            clients.append(await ask(play, body("x" * n)))
            await play.until(functools.partial(queued, play, max(0, n - 1)))
        legs = [await play.leg() for _ in range(2)]
        assert play.legs.empty()
        order = [len(leg.body) for leg in legs]
        while legs:
            await serve(legs.pop(0))
            if len(order) < 5:
                legs.append(await play.leg())
                order.append(len(legs[-1].body))
                assert max(worker.load for worker in play.workers) == 1
        assert order == sorted(order)
        assert [(await client.response()).status for client in clients] == [200] * 5
        await play.at_rest()


@pytest.mark.parametrize(("size", "expected"), [(0, (429, "queue_full")), (5, (408, "queue_timeout"))])
@on_loop
async def test_no_room_in_time(size: int, expected: tuple[int, str]) -> None:
    async with Play(queue_timeout_secs=0.05, max_running_per_worker=1, queue_size=size) as play:
        await ask(play)
        leg = await play.leg()
        response = await (await ask(play)).response()
        assert (response.status, code(response.body)) == expected
        assert "retry-after" in response.headers
        await serve(leg)
        await play.at_rest()


@on_loop
async def test_a_retry_does_not_wait_for_room() -> None:
    async with Play(workers=2, policy="least_load", max_running_per_worker=1) as play:
        clients = [await ask(play), await ask(play)]
        one, other = await play.leg(), await play.leg()
        one.reset()
        again = await play.leg()
        assert again.worker is other.worker
        for leg in (again, other):
            await serve(leg)
        assert [(await client.response()).status for client in clients] == [200, 200]
        await play.at_rest()


# -- bytes -------------------------------------------------------------------------------------------------------------


@on_loop
async def test_bodies_that_do_not_fit_wait_and_go_on_when_there_is_room() -> None:
    async with Play(max_buffered_request_bytes=300_000) as play:
        large = body("x" * 200_000)
        first = await play.client()
        await first.send(post(CHAT, large))
        leg = await play.leg()
        second = await play.client()
        request = post(CHAT, large)
        await second.send(request[:150_000])
        await play.until(lambda: bool(parked(play)))
        assert play.clients.budget.held < 500_000
        assert "READING, budget due at" in repr(parked(play)[0])
        assert "<Hold IN_LINE " in repr(parked(play)[0])
        await serve(leg)
        await first.response()
        await second.send(request[150_000:])
        await serve(await play.leg())
        assert (await second.response()).status == 200
        await play.at_rest()
        assert play.clients.budget.held == 0


@on_loop
async def test_bodies_that_never_fit_are_413() -> None:
    async with Play(max_buffered_request_bytes=100_000) as play:
        in_a_chunk = "Transfer-Encoding: chunked\r\n\r\n249f0\r\n" + "x" * 150_000
        for framing in ("Content-Length: 150000\r\n\r\n", in_a_chunk):
            held = await play.client()
            await held.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{framing}".encode())
            response = await held.response()
            assert (response.status, code(response.body)) == (413, "payload_too_large")
        small = await ask(play)
        await serve(await play.leg())
        assert (await small.response()).status == 200
        await play.at_rest()
        assert play.clients.budget.held == 0


@on_loop
async def test_a_body_held_up_for_long_is_429() -> None:
    async with Play(max_buffered_request_bytes=400_000) as play:
        request = post(CHAT, body("x" * 300_000))
        first, client = await play.client(), await play.client()
        await first.send(request)
        leg = await play.leg()
        await client.send(request[:150_000])
        await play.until(lambda: bool(parked(play)))
        (connection,) = parked(play)
        connection.overdue(play.clock())
        response = await client.response()
        assert (response.status, code(response.body)) == (429, "buffer_full")
        assert "retry-after" in response.headers
        await serve(leg)
        await first.response()
        first.close()
        assert not parked(play)
        client.close()
        await play.until(lambda: not play.clients.connections)
        assert play.clients.budget.held == 0


@on_loop
async def test_a_body_held_up_of_a_client_that_reads_nothing_is_forgotten() -> None:
    async with Play(max_buffered_request_bytes=400_000) as play:
        request = post(CHAT, body("x" * 300_000))
        first, client = await play.client(), await play.client()
        await first.send(request)
        leg = await play.leg()
        await client.send(request[:150_000])
        await play.until(lambda: bool(parked(play)))
        (connection,) = parked(play)
        connection.pause_writing()
        connection.overdue(play.clock())
        assert connection.state is CLOSING
        await serve(leg)
        await first.response()
        first.close()
        assert connection.state is CLOSING
        await play.until(lambda: not play.clients.connections)
        assert play.clients.budget.held == 0


@on_loop
async def test_bytes_that_come_while_the_last_answer_is_flushed_are_discarded() -> None:
    async with Play() as play:
        await play.client()
        await play.until(lambda: bool(connections(play)))
        (connection,) = connections(play)
        connection.overdue(play.clock())
        assert connection.state is CLOSING
        connection.data_received(post(CHAT, body())[:50])  # TLS delivers until the close is complete
        assert connection.state is CLOSING
        assert play.clients.budget.held == 0


@on_loop
async def test_a_request_that_a_shutdown_cuts_off_is_not_refused_later() -> None:
    async with Play() as play:
        client = await play.client()
        await client.send(post(CHAT, body())[:50])
        await play.until(lambda: any(each.deadline[0] is Due.HEAD and each.state for each in connections(play)))
        (connection,) = connections(play)
        play.clients.drain()  # the transport may stay open for long: until an earlier answer is read
        assert connection.state is CLOSING
        connection.overdue(play.clock())
        assert connection.state is CLOSING


@on_loop
async def test_every_byte_is_given_back_whatever_becomes_of_the_client() -> None:
    async with Play() as play:
        request = post(CHAT, body("x" * 100_000))
        leaves_early, resets, pipelines = [await play.client() for _ in range(3)]
        await leaves_early.send(request[:60_000])
        await resets.send(request)
        await play.leg()
        await pipelines.send(post(CHAT, body()) * 3)
        for _ in range(3):
            await serve(await play.leg())
        await play.until(lambda: play.clients.budget.held > 150_000)
        leaves_early.close()
        resets.reset()
        pipelines.close()
        await play.until(lambda: not play.clients.connections)
        assert play.clients.budget.held == 0


# -- times -------------------------------------------------------------------------------------------------------------


@on_loop
async def test_no_first_byte_of_a_stream_in_time() -> None:
    async with Play(workers=2, first_byte_timeout_secs=0.05) as play:
        client = await ask(play, STREAM)
        leg = await play.leg()
        response = await client.response()
        assert (response.status, code(response.body)) == (504, "first_byte_timeout")
        await leg.closed()
        assert play.legs.empty(), "it may be at work: not again elsewhere"
        assert play.workers[0].waiting == 0


@on_loop
async def test_an_answer_that_is_no_stream_may_take_its_time() -> None:
    async with Play(first_byte_timeout_secs=0.01) as play:
        client = await ask(play)
        leg = await play.leg()
        later = await ask(play, STREAM)
        stream = await play.leg()
        assert code((await later.response()).body) == "first_byte_timeout"
        await stream.closed()
        await serve(leg)
        assert (await client.response()).status == 200


@on_loop
async def test_a_worker_that_falls_silent_inside_a_stream() -> None:
    async with Play(chunk_timeout_secs=0.1) as play:
        client = await ask(play, STREAM)
        leg = await play.leg()
        await leg.start_stream()
        for _ in range(3):
            await leg.chunk(b"data: {}\n\n")
        response = await client.response()
        assert not response.complete
        assert response.body.startswith(b"data: {}\n\n" * 3)
        assert b"chunk_timeout" in response.body
        await leg.closed()
        (end,) = await play.ended(1)
        assert (end.answer.outcome, end.answer.code) == (Outcome.SILENT, "chunk_timeout")


@on_loop
async def test_a_worker_that_goes_on_is_not_silent() -> None:
    async with Play(chunk_timeout_secs=0.2) as play:
        client = await ask(play, STREAM)
        leg = await play.leg()
        await leg.start_stream()
        began = play.clock()
        count = 0
        while play.clock() < began + 0.5:
            await leg.chunk(b"data: {}\n\n")
            count += 1
            await client.chunk() if count > 1 else await client.head()
        await leg.end_stream()


@on_loop
async def test_while_the_client_does_not_read_the_worker_may_be_silent() -> None:
    async with Play(chunk_timeout_secs=0.05) as play:
        await ask(play, STREAM)
        leg = await play.leg()
        await leg.start_stream()
        await leg.chunk(b"data: {}\n\n")
        (connection,) = connections(play)
        await play.until(lambda: next(iter(play.clients.exchanges)).deadline[0] is Due.PROGRESS)
        connection.pause_writing()
        looks = []
        (watched,) = play.clients.exchanges
        watch = watched.overdue
        for n in range(20):  # five times the longest silence
            watch(play.clock())
            looks.append(n)
        assert not play.events.ends
        connection.resume_writing()
        (end,) = await play.ended(1)
        assert end.answer.code == "chunk_timeout"


@on_loop
async def test_no_connection_in_time_is_tried_elsewhere_and_is_504_in_the_end() -> None:
    """A listener whose queue is full, so that the kernel answers nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        async with Play(workers=0, max_worker_retries=1, connect_timeout_secs=0.2) as play:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            play.fleet.add(WorkerSpec(url=url, health=HealthRules(enabled=False)), 0.0)
            response = await (await ask(play)).response()
            assert (response.status, code(response.body)) == (504, "connect_timeout")
            await play.add_worker()
            clients = [await ask(play) for _ in range(2)]  # in turn: one of them goes to the full listener first
            for _ in clients:
                await serve(await play.leg())
            assert [(await client.response()).status for client in clients] == [200, 200]
        for filler in fillers:
            filler.close()


@on_loop
async def test_a_name_that_nobody_knows_is_no_fault_of_the_router_however_late_that_is_told() -> None:
    """A look-up continues after its timeout; its late failure must not cause a warning (warnings are errors here)."""
    async with Play(workers=0, max_worker_retries=1, connect_timeout_secs=0.0005) as play:
        url = "http://no-such-host.invalid:80"
        play.fleet.add(WorkerSpec(url=url, health=HealthRules(enabled=False)), 0.0)
        response = await (await ask(play)).response()
        assert code(response.body) in ("connect_timeout", "worker_unreachable")
        with pytest.raises(OSError, match=r"not known|Name|failure"):
            await asyncio.get_running_loop().getaddrinfo("no-such-host.invalid", 80)
        gc.collect()


@on_loop
async def test_all_addresses_of_a_name_are_tried() -> None:
    async with Play(workers=1) as play:
        play.fleet.remove(play.workers[0])
        port = play.played[0].port
        play.fleet.add(WorkerSpec(url=f"http://localhost:{port}", health=HealthRules(enabled=False)), 0.0)
        client = await ask(play)
        await serve(await play.leg())
        assert (await client.response()).status == 200


# -- retries -----------------------------------------------------------------------------------------------------------


@on_loop
async def test_retries_stay_within_their_budget() -> None:
    """Every leg fails: the workers see hardly more than the clients sent, and the free retries."""
    async with Play(
        workers=3, retry_initial_backoff_ms=1, retry_max_backoff_ms=1, disable_circuit_breaker=True
    ) as play:
        legs = 0

        async def fail() -> None:
            nonlocal legs
            while True:
                leg: Leg = await play.legs.get()
                legs += 1
                await serve(leg, 500)

        failing = asyncio.ensure_future(fail())
        client = await play.client()
        for _ in range(300):
            await client.send(post(CHAT, body()))
            assert (await client.response()).status == 500
        failing.cancel()
        assert 300 < legs <= 300 * 1.2 + 3 * 10 + 1


# -- connections -------------------------------------------------------------------------------------------------------


@on_loop
async def test_there_are_no_more_connections_than_descriptors() -> None:
    async with Play() as play:
        play.clients.limit = 2
        first, second = await play.client(), await play.client()
        await play.until(lambda: len(play.clients.connections) == 2)
        third = await play.client()
        response = await third.response()
        assert (response.status, code(response.body)) == (503, "too_many_connections")
        assert response.headers["connection"] == "close"
        third.close()
        first.close()
        await play.until(lambda: len(play.clients.connections) == 1)
        await second.send(post(CHAT, body()))
        await serve(await play.leg())
        assert (await second.response()).status == 200
