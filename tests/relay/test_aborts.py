"""Engines are asked to end what was given up: with the key of the leg, bounded in number and time, and nobody waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from pair_deciders import BODY, CHAT, Pairs, on_loop
from played import Client, Leg, Play, post
from sglang_router.config.keys import ClientKey
from sglang_router.relay.aborts import AGAIN, SECONDS, Aborts
from sglang_router.routing.plan import PlannedLeg, Target
from sglang_router.wire.headers import ForwardRules


def leg_to(play: Play, rid: bytes = b"r1", key: bytes | None = None) -> PlannedLeg:
    return PlannedLeg(1, Target(play.played[0].url, key=key, name="w"), "pair", rid=rid)


def shown(aborts: Aborts) -> tuple[int, int, int, int]:
    return aborts.in_flight, aborts.told, aborts.failed, aborts.dropped


async def over(play: Play) -> Aborts:
    await play.until(lambda: not play.app.relay.aborts.in_flight)
    return play.app.relay.aborts


async def answered(leg: Leg, status: int = 200) -> None:
    await leg.answer(status, b"", "connection: close")
    leg.close()


@on_loop
async def test_the_name_is_sent_and_any_status_will_do() -> None:
    async with Play(1) as play:
        for status in (200, 404, 500):
            play.app.relay.aborts.abort(leg_to(play, b'a"b'), [])
            leg = await play.leg()
            assert leg.start == "POST /abort_request HTTP/1.1"
            assert json.loads(leg.body) == {"rid": 'a"b'}
            assert leg.headers["content-type"] == "application/json"
            assert "authorization" not in leg.headers
            await answered(leg, status)
            await over(play)
        assert shown(play.app.relay.aborts) == (0, 3, 0, 0)
        assert repr(play.app.relay.aborts) == "<Aborts 0 in flight, 3 told, 0 failed, 0 dropped>"


@on_loop
async def test_an_answer_in_pieces_is_dropped() -> None:
    async with Play(1) as play:
        play.app.relay.aborts.abort(leg_to(play), [])
        leg = await play.leg()
        await leg.start_stream("text/plain")
        await leg.chunk(b"one")
        assert play.app.relay.aborts.in_flight == 1
        await leg.end_stream()
        assert shown(await over(play)) == (0, 1, 0, 0)


@on_loop
async def test_each_request_of_a_batch_is_ended() -> None:
    async with Play(1) as play:
        play.app.relay.aborts.abort(leg_to(play, b"r_0 r_1"), [])
        legs = await play.leg(), await play.leg()
        assert sorted(json.loads(leg.body)["rid"] for leg in legs) == ["r_0", "r_1"]
        for leg in legs:
            await answered(leg)
        await over(play)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("key", [None, b"workers"])
@on_loop
async def test_the_key_is_that_of_the_leg(key: bytes | None, guarded: bool) -> None:
    async with Play(1, api_key=[ClientKey("one", "clients")] if guarded else []) as play:
        play.app.relay.aborts.abort(leg_to(play, key=key), [(b"authorization", b"Bearer clients")])
        leg = await play.leg()
        expected = "Bearer clients" if not guarded else None if key is None else "Bearer workers"
        assert leg.headers.get("authorization") == expected
        await answered(leg)
        await over(play)


@on_loop
async def test_a_worker_that_is_gone_costs_nothing_but_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async with Play(1) as play:
        caplog.set_level("DEBUG", "sglang_router.relay")
        play.played[0].refuse()
        play.app.relay.aborts.abort(leg_to(play), [])
        assert shown(await over(play)) == (0, 0, 1, 0)
        assert "w could not be asked to end a request: The worker refuses connections." in caplog.text


@on_loop
async def test_one_that_is_not_answered_is_given_up() -> None:
    async with Play(1) as play:
        late: list[Callable[[], None]] = []

        def call_later(seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
            assert seconds == SECONDS
            late.append(call)
            return play.loop.call_later(seconds, call)

        aborts = Aborts(play.connections, call_later, ForwardRules())
        aborts.again = ()
        aborts.abort(leg_to(play), [])
        leg = await play.leg()
        late[0]()
        await leg.closed()
        assert shown(aborts) == (0, 0, 1, 0)


@on_loop
async def test_an_engine_is_asked_again_for_it_may_not_have_read_the_request() -> None:
    async with Play(1) as play:
        delays: list[float] = []

        def call_later(seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
            delays.append(seconds)
            return play.loop.call_later(seconds if seconds == SECONDS else 0.0, call)

        aborts = Aborts(play.connections, call_later, ForwardRules())
        aborts.abort(leg_to(play), [])
        for _ in range(1 + len(AGAIN)):
            leg = await play.leg()
            assert json.loads(leg.body) == {"rid": "r1"}
            await answered(leg)
        await play.until(lambda: not aborts.in_flight)
        assert shown(aborts) == (0, 1, 0, 0), "it is counted once"
        assert delays == [SECONDS, AGAIN[0], SECONDS, AGAIN[1], SECONDS]


@on_loop
async def test_nothing_is_asked_again_when_the_router_ends() -> None:
    async with Play(1) as play:
        repeats: list[Callable[[], None]] = []

        def call_later(seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
            if seconds != SECONDS:
                repeats.append(call)
            return play.loop.call_later(60.0, call)

        aborts = Aborts(play.connections, call_later, ForwardRules())
        aborts.abort(leg_to(play), [])
        await answered(await play.leg())
        await play.until(lambda: not aborts.in_flight)
        await aborts.settle()
        for repeat in repeats:
            repeat()
        assert (len(repeats), aborts.in_flight) == (1, 0)


@on_loop
async def test_no_more_than_so_many_are_open() -> None:
    async with Play(1) as play:
        aborts = Aborts(play.connections, play.loop.call_later, ForwardRules(), 2, 0)
        aborts.again = ()
        for _ in range(5):
            aborts.abort(leg_to(play), [])
        assert shown(aborts) == (2, 0, 0, 3)
        for _ in range(2):
            await answered(await play.leg())
        await play.until(lambda: not aborts.in_flight)
        assert shown(aborts) == (0, 2, 0, 3)


@on_loop
async def test_a_long_list_that_is_given_up_leaves_nobody_behind() -> None:
    """Each prompt must be asked for by its name, and other clients' requests are given up meanwhile."""
    async with Play(1) as play:
        aborts = Aborts(play.connections, play.loop.call_later, ForwardRules(), 2, 3)
        aborts.again = ()
        aborts.abort(leg_to(play, b"r_0 r_1 r_2 r_3"), [])
        aborts.abort(leg_to(play, b"other"), [])
        aborts.abort(leg_to(play, b"too-many"), [])
        assert shown(aborts) == (2, 0, 0, 1)
        rids = set()
        for _ in range(5):
            leg = await play.leg()
            rids.add(json.loads(leg.body)["rid"])
            await answered(leg)
        await play.until(lambda: not aborts.in_flight)
        assert rids == {"r_0", "r_1", "r_2", "r_3", "other"}
        assert shown(aborts) == (0, 5, 0, 1)


@on_loop
async def test_a_kept_connection_that_had_closed_is_replaced() -> None:
    async with Play(1) as play:
        aborts = play.app.relay.aborts
        leg = PlannedLeg(1, play.workers[0].target, "pair", rid=b"r")
        aborts.abort(leg, [])
        first = await play.leg()
        await first.answer(200, b"")
        await over(play)
        aborts.abort(leg, [])
        await first.request()
        first.close()
        await answered(await play.leg())
        assert shown(await over(play)) == (0, 2, 0, 0)


@on_loop
async def test_the_end_of_the_router_waits_for_them_but_not_long() -> None:
    async with Play(1) as play:
        aborts = play.app.relay.aborts
        await aborts.settle()
        aborts.abort(leg_to(play), [])
        leg = await play.leg()
        await aborts.settle(0.05)
        assert aborts.in_flight == 1
        settling = asyncio.ensure_future(aborts.settle(60.0))
        await answered(leg)
        await settling
        assert not aborts.in_flight


async def asked(play: Play, *headers: str) -> Client:
    client = await play.client()
    await client.send(post(CHAT, BODY, *headers))
    return client


@on_loop
async def test_a_leg_alone_is_aborted_by_its_name_too() -> None:
    async with Pairs() as (play, decider):
        decider.alone_only = True
        client = await asked(play, "Authorization: Bearer mine")
        (leg,) = await decider.legs(play, 1)
        client.close()
        await leg.closed()
        abort = await play.leg()
        assert abort.headers["authorization"] == "Bearer mine"
        assert await decider.abort(abort)
        await decider.aborted(play, "r0-decode")


@on_loop
async def test_a_leg_without_a_name_is_closed_and_nothing_else() -> None:
    async with Pairs() as (play, decider):
        decider.named = False
        client = await asked(play)
        legs = await decider.legs(play)
        client.close()
        for leg in legs:
            await leg.closed()
        await play.ended(1)
        await decider.aborted(play)
