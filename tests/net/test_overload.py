"""More than there is room for: places, queues, rates, bytes and times, with clients and workers played by hand."""

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
from sglang_router.core.admission import Admission, AdmissionRules
from sglang_router.core.router import RetryRules
from sglang_router.core.worker import HealthRules, Outcome, WorkerSpec
from sglang_router.net.service import Timeouts

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


def limited(play: Play, places: int | None = None, **rules: Any) -> Admission[Any]:
    admission: Admission[Any] = Admission(AdmissionRules(max_concurrent=places, **rules))
    play.service.admission = admission
    return admission


def waiting(admission: Admission[Any], count: int) -> bool:
    return len(admission.waiting) == count


async def serve(leg: Leg, status: int = 200) -> None:
    """An answer, and the end of the connection: each following request is a leg of its own then."""
    await leg.answer(status, b"{}", "connection: close")
    leg.close()


# -- places ------------------------------------------------------------------------------------------------------------


@on_loop
async def test_places_are_exact_and_are_given_in_order() -> None:
    async with Play(workers=2) as play:
        admission = limited(play, 2, queue_size=10)
        clients = []
        for n in range(6):
            clients.append(await ask(play, body("x" * n)))
            await play.until(functools.partial(waiting, admission, max(0, n - 1)))
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
        assert admission.running == 0


@on_loop
async def test_a_full_queue_is_429_at_once_and_says_when_to_come_again() -> None:
    async with Play() as play:
        admission = limited(play, 1, queue_size=1)
        await ask(play)
        await ask(play)
        await play.until(functools.partial(waiting, admission, 1))
        response = await (await ask(play)).response()
        assert (response.status, code(response.body)) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        first = await play.leg()
        await serve(first)
        await serve(await play.leg())
        await play.at_rest()


@on_loop
async def test_who_waits_too_long_is_408() -> None:
    async with Play(timeouts=Timeouts(queue=0.05)) as play:
        limited(play, 1, queue_size=1)
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
    async with Play() as play:
        admission = limited(play, 1, queue_size=1)
        await ask(play)
        leg = await play.leg()
        impatient = await ask(play)
        await play.until(functools.partial(waiting, admission, 1))
        impatient.close()
        await play.until(functools.partial(waiting, admission, 0))
        patient = await ask(play)
        await play.until(functools.partial(waiting, admission, 1))
        await serve(leg)
        await serve(await play.leg())
        assert (await patient.response()).status == 200
        await play.at_rest()


@on_loop
async def test_who_leaves_just_when_it_is_let_in_passes_the_place_on() -> None:
    async with Play() as play:
        admission = limited(play, 1, queue_size=2)
        await ask(play)
        leg = await play.leg()
        waiters = []
        for n in (1, 2):
            waiters.append(await ask(play))
            await play.until(functools.partial(waiting, admission, n))
        first = next(iter(admission.waiting))
        await serve(leg)
        await play.until(functools.partial(waiting, admission, 1))
        first.gone()  # let in, and not routed yet or just so
        second = await play.leg()
        await serve(second)
        await play.until(lambda: admission.running == 0)


@on_loop
async def test_a_rate_is_kept() -> None:
    async with Play() as play:
        limited(play, rate=1.0, burst=2.0)
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
    async with Play(workers=2, policy="least_load") as play:
        play.fleet.most_load = 1
        clients = []
        for n in range(5):
            clients.append(await ask(play, body("x" * n)))
            await play.until(lambda n=n: len(play.service.waiting) == max(0, n - 1))  # type: ignore[misc]
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


@on_loop
async def test_a_newcomer_queues_behind_those_that_wait() -> None:
    async with Play() as play:
        play.fleet.most_load = 1
        await ask(play, body("a"))
        leg = await play.leg()
        await ask(play, body("bb"))
        await play.until(lambda: len(play.service.waiting) == 1)
        play.fleet.most_load = 2  # as if there were room, and nobody had told those that wait
        await ask(play, body("ccc"))
        await play.until(lambda: len(play.service.waiting) == 2)
        await serve(leg)
        sizes = []
        for _ in range(2):
            following = await play.leg()
            sizes.append(len(following.body))
            await serve(following)
        assert sizes == sorted(sizes)
        await play.at_rest()


@pytest.mark.parametrize(("queued", "expected"), [(0, (429, "queue_full")), (5, (408, "queue_timeout"))])
@on_loop
async def test_no_room_in_time(queued: int, expected: tuple[int, str]) -> None:
    async with Play(timeouts=Timeouts(queue=0.05)) as play:
        play.fleet.most_load = 1
        play.service.most_queued = queued
        await ask(play)
        leg = await play.leg()
        response = await (await ask(play)).response()
        assert (response.status, code(response.body)) == expected
        assert "retry-after" in response.headers
        await serve(leg)
        await play.at_rest()


@on_loop
async def test_a_retry_does_not_wait_for_room() -> None:
    async with Play(workers=2, policy="least_load") as play:
        play.fleet.most_load = 1
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
    async with Play() as play:
        play.service.most_buffered = 300_000
        large = body("x" * 200_000)
        first = await play.client()
        await first.send(post(CHAT, large))
        leg = await play.leg()
        second = await play.client()
        request = post(CHAT, large)
        await second.send(request[:150_000])
        await play.until(lambda: len(play.service.held_up) == 1)
        assert play.service.buffered < 500_000
        await serve(leg)
        await first.response()
        await second.send(request[150_000:])
        await serve(await play.leg())
        assert (await second.response()).status == 200
        await play.at_rest()
        assert play.service.buffered == 0


@on_loop
async def test_bodies_that_never_fit_are_429() -> None:
    async with Play() as play:
        play.service.most_buffered = 100_000
        held = await ask(play, body("x" * 150_000))
        assert code((await held.response()).body) == "buffer_full"
        small = await ask(play)
        await serve(await play.leg())
        assert (await small.response()).status == 200
        await play.at_rest()
        assert play.service.buffered == 0


@on_loop
async def test_a_body_held_up_for_long_is_429() -> None:
    async with Play() as play:
        play.service.most_buffered = 100_000
        request = post(CHAT, body("x" * 300_000))
        client = await play.client()
        await client.send(request[:150_000])
        await play.until(lambda: len(play.service.held_up) == 1)
        (connection,) = play.service.held_up
        connection.overdue(play.service.clock())
        response = await client.response()
        assert (response.status, code(response.body)) == (429, "buffer_full")
        assert not play.service.held_up
        client.close()
        await play.until(lambda: not play.service.connections)
        assert play.service.buffered == 0


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
        await play.until(lambda: play.service.buffered > 150_000)
        leaves_early.close()
        resets.reset()
        pipelines.close()
        await play.until(lambda: not play.service.connections)
        assert play.service.buffered == 0


# -- times -------------------------------------------------------------------------------------------------------------


@on_loop
async def test_no_first_byte_of_a_stream_in_time() -> None:
    async with Play(workers=2, timeouts=Timeouts(first_byte=0.05)) as play:
        client = await ask(play, STREAM)
        leg = await play.leg()
        response = await client.response()
        assert (response.status, code(response.body)) == (504, "first_byte_timeout")
        await leg.closed()
        assert play.legs.empty(), "it may be at work: not again elsewhere"
        assert play.workers[0].waiting == 0


@on_loop
async def test_an_answer_that_is_no_stream_may_take_its_time() -> None:
    async with Play(timeouts=Timeouts(first_byte=0.01)) as play:
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
    async with Play(timeouts=Timeouts(chunk=0.1)) as play:
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
        assert (end.outcome, end.code) == (Outcome.SILENT, "chunk_timeout")


@on_loop
async def test_a_worker_that_goes_on_is_not_silent() -> None:
    async with Play(timeouts=Timeouts(chunk=0.2)) as play:
        client = await ask(play, STREAM)
        leg = await play.leg()
        await leg.start_stream()
        began = play.service.clock()
        count = 0
        while play.service.clock() < began + 0.5:
            await leg.chunk(b"data: {}\n\n")
            count += 1
            await client.chunk() if count > 1 else await client.head()
        await leg.end_stream()


@on_loop
async def test_while_the_client_does_not_read_the_worker_may_be_silent() -> None:
    async with Play(timeouts=Timeouts(chunk=0.05)) as play:
        await ask(play, STREAM)
        leg = await play.leg()
        await leg.start_stream()
        await leg.chunk(b"data: {}\n\n")
        (connection,) = play.service.connections
        connection.pause_writing()
        looks = []
        watch = connection.overdue
        for n in range(20):  # five times the longest silence
            watch(play.service.clock())
            looks.append(n)
        assert not play.events.ends
        connection.resume_writing()
        (end,) = await play.ended(1)
        assert end.code == "chunk_timeout"


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
        async with Play(workers=0, retries=RetryRules(per_worker=1), connect_timeout=0.2) as play:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            play.fleet.add(WorkerSpec(url=url, health=HealthRules(enabled=False)), 0.0)
            response = await (await ask(play)).response()
            assert (response.status, code(response.body)) == (504, "connect_timeout")
            await play.add_worker()
            clients = [await ask(play) for _ in range(2)]  # in turn: one of them comes to the full one first
            for _ in clients:
                await serve(await play.leg())
            assert [(await client.response()).status for client in clients] == [200, 200]
        for filler in fillers:
            filler.close()


@on_loop
async def test_a_name_that_nobody_knows_is_no_fault_of_the_router_however_late_that_is_told() -> None:
    """A look-up goes on when its time is over; nobody may complain of its failure then (warnings are errors here)."""
    async with Play(workers=0, retries=RetryRules(per_worker=1), connect_timeout=0.0005) as play:
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
    async with Play(workers=3, retries=RetryRules(initial_backoff=0.001, max_backoff=0.001)) as play:
        legs = 0

        async def fail() -> None:
            nonlocal legs
            while True:
                leg: Leg = await play.legs.get()
                legs += 1
                await serve(leg, 500)

        failing = asyncio.ensure_future(fail())
        play.fleet.breaker_rules = type(play.fleet.breaker_rules)(enabled=False)
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
        play.service.most_connections = 2
        first, second = await play.client(), await play.client()
        await play.until(lambda: len(play.service.connections) == 2)
        third = await play.client()
        response = await third.response()
        assert (response.status, code(response.body)) == (503, "too_many_connections")
        assert response.headers["connection"] == "close"
        third.close()
        first.close()
        await play.until(lambda: len(play.service.connections) == 1)
        await second.send(post(CHAT, body()))
        await serve(await play.leg())
        assert (await second.response()).status == 200
