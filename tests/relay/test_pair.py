"""The two legs of a prefill/decode pair over real sockets, with workers that the test plays by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pair_deciders import BODY, CHAT, ERROR, OK, STREAM, PairDecider, Pairs, ask, both_kinds, finish, on_loop, streamed
from played import Client, Leg, Play, post
from sglang_router.errors import PrefillFailed
from sglang_router.relay.deadlines import Due
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.pair import LINGER
from sglang_router.relay.vanished import take_back
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.sse import payloads
from token_streams import Style, answer, seen
from token_streams import ask as ask_for

Doing = Callable[[Leg], Coroutine[Any, Any, None]]


async def served(client: Client, legs: list[Leg], body: bytes) -> None:
    """Let both legs serve, and see that the client has decode's answer."""
    prefill, decode = legs
    if body is STREAM:
        await streamed(prefill, b'{"n":0}')
        await streamed(decode, b'{"n":0}', b'{"n":1}', b"[DONE]")
        for leg in legs:
            await leg.end_stream()
        response = await client.response()
        assert response.body == b'data: {"n":0}\n\ndata: {"n":1}\n\ndata: [DONE]\n\n'
    else:
        await prefill.answer(200, b'{"prefill":1}')
        await decode.answer(200, OK)
        response = await client.response()
        assert response.body == OK
    assert (response.status, response.complete) == (200, True)


# -- the good way ------------------------------------------------------------------------------------------------------


@both_kinds
@on_loop
async def test_both_legs_are_sent_at_once_and_the_client_gets_decodes_answer(body: bytes) -> None:
    async with Pairs() as (play, decider):
        client = await ask(play, body, "X-Request-Id: mine")
        legs = await decider.legs(play)
        for leg, role in zip(legs, ("prefill", "decode"), strict=True):
            assert leg.body == body[:-1] + b',"bootstrap_room":0,"rid":"r0-%s"}' % role.encode()
            assert leg.headers["x-request-id"] == "mine"
        await served(client, legs, body)
        await play.until(lambda: len(decider.ends) == 2)
        assert sorted(decider.ends) == [("decode", Outcome.SERVED), ("prefill", Outcome.SERVED)]
        (end,) = await play.ended(1)
        assert end.leg is not None
        assert (end.leg.target, end.answer.status, end.answer.retries) == (decider.decodes[0], 200, 0)
        assert end.answer.first_byte > 0.0
        await decider.aborted(play)


@on_loop
async def test_decode_may_answer_first_and_its_status_and_fields_are_the_clients() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        await decode.answer(201, OK, "x-engine: decode")
        response = await client.response()
        assert (response.status, response.body, response.headers["x-engine"]) == (201, OK, "decode")
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]
        usage = decider.usages["decode"]
        assert usage is not None
        assert (usage.prompt, usage.cached, usage.completion) == (9, 4, 3)
        await prefill.answer(200)  # it has time to end its answer, and its connection is kept
        await client.send(post(CHAT, BODY))
        await prefill.request()
        await decode.request()
        await prefill.answer(200, OK)
        await play.until(lambda: len(decider.ends) == 3)
        told = decider.usages["prefill"]
        assert told is not None
        assert told.cached == 4
        await decode.answer(200)
        assert (await client.response()).status == 200
        assert [played.connections for played in play.played] == [1, 1]
        await decider.aborted(play)


@on_loop
async def test_a_prefill_answer_that_does_not_end_is_cut_off_after_a_while() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        delays: list[float] = []

        def soon(delay: float, call: Callable[[], None]) -> asyncio.TimerHandle:
            delays.append(delay)
            return play.loop.call_later(0.0, call)

        play.app.relay.call_later = soon  # type: ignore[assignment]
        await decode.answer(200)
        assert (await client.response()).status == 200
        assert delays == [LINGER]
        await prefill.closed()
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]
        await decider.aborted(play, "r0-prefill")


@pytest.mark.parametrize("how", ["reset", "status"])
@on_loop
async def test_a_prefill_that_fails_after_decode_has_ended_harms_nobody(how: str) -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        await decode.answer(200)
        assert (await client.response()).status == 200
        if how == "reset":
            prefill.reset()
            await decider.aborted(play, "r0-prefill")  # its engine may go on
        else:
            await finish(prefill, ERROR, 500)
            await play.until(lambda: play.connections.open <= 1)
            await decider.aborted(play)
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]


@on_loop
async def test_a_clients_own_name_and_room_are_overridden_by_those_behind_them() -> None:
    async with Pairs(trust_client_routing_fields=True) as (play, decider):
        client = await ask(play, b'{"messages":[],"rid":"mine","bootstrap_room":7}')
        legs = await decider.legs(play)
        assert [json.loads(leg.body)["rid"] for leg in legs] == ["r0-prefill", "r0-decode"]
        assert [json.loads(leg.body)["bootstrap_room"] for leg in legs] == [0, 0]
        await served(client, legs, BODY)


@on_loop
async def test_a_slow_client_pauses_decode_and_not_prefill() -> None:
    async with Pairs() as (play, decider):
        client = await play.client(limit=1 << 16)
        await client.send(post(CHAT, BODY))
        prefill, decode = await decider.legs(play)
        big = b"x" * (40 << 20)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(big)
        sending = asyncio.ensure_future(decode.send(head + big))
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)
        await play.until(lambda: exchange.stalled)
        assert not sending.done()
        await prefill.answer(200, big)  # is read to its end
        await play.until(lambda: decider.ends == [("prefill", Outcome.SERVED)])
        assert len((await client.response()).body) == len(big)
        await sending


@on_loop
async def test_a_large_body_reaches_both() -> None:
    async with Pairs() as (play, decider):
        body = b'{"prompt":"%b"}' % (b"word " * 1_000_000)
        client = await play.client()
        await client.send(post("/v1/completions", body))
        prefill, decode = await decider.legs(play)
        for leg, role in ((prefill, b"prefill"), (decode, b"decode")):
            assert leg.body == body[:-1] + b',"bootstrap_room":0,"rid":"r0-%b"}' % role
        await decode.answer(200)
        assert (await client.response()).status == 200
        await prefill.closed()
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]


@on_loop
async def test_a_pair_can_be_printed() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        legs = await decider.legs(play)
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)
        assert repr(exchange.pair).startswith("<Pair live: <Leg to http://127.0.0.1:")
        await legs[0].answer(200)
        await play.until(lambda: "prefill has ended" in repr(exchange.pair))
        await legs[1].answer(200)
        await client.response()


# -- prefill fails -----------------------------------------------------------------------------------------------------


@both_kinds
@on_loop
async def test_prefill_that_breaks_ends_the_pair_at_once_and_a_new_one_serves(body: bytes) -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play, body)
        prefill, decode = await decider.legs(play)
        prefill.reset()
        await decode.closed()
        legs = await decider.legs(play)
        assert b'"bootstrap_room":1' in legs[0].body
        await served(client, legs, body)
        assert decider.told[:2] == [("ended", "decode", Outcome.ABANDONED), ("retry", "prefill", Outcome.BROKEN)]
        (end,) = await play.ended(1)
        assert end.answer.retries == 1
        assert decider.suspects == [decider.prefills[0].name]
        await decider.aborted(play, "r0-prefill", "r0-decode")


@on_loop
async def test_prefill_that_refuses_connections_ends_the_pair_too() -> None:
    async with Pairs(2, script={"retries": 1}) as (play, decider):
        play.played[0].refuse()
        client = await ask(play)
        legs = await decider.legs(play, 1)  # the new pair's prefill, and both decode legs
        while not any(leg.worker is play.played[1] for leg in legs):
            legs += await decider.legs(play, 1)
        while sum(b'"bootstrap_room":1' in leg.body for leg in legs) < 2:
            legs += await decider.legs(play, 1)
        second = sorted(
            (leg for leg in legs if b'"bootstrap_room":1' in leg.body), key=lambda leg: b"decode" in leg.body
        )
        await served(client, second, BODY)
        assert decider.told[:2] == [("ended", "decode", Outcome.ABANDONED), ("retry", "prefill", Outcome.REFUSED)]


@both_kinds
@on_loop
async def test_prefill_that_breaks_without_a_retry_is_a_502(body: bytes) -> None:
    async with Pairs() as (play, decider):
        client = await ask(play, body)
        prefill, decode = await decider.legs(play)
        prefill.reset()
        await decode.closed()
        response = await client.response()
        assert (response.status, json.loads(response.body)["error"]["code"]) == (502, "worker_broken")
        assert sorted(decider.ends) == [("decode", Outcome.ABANDONED), ("prefill", Outcome.BROKEN)]
        (end,) = await play.ended(1)
        assert end.leg is not None
        assert end.leg.target == decider.prefills[0]
        await decider.aborted(play, "r0-prefill", "r0-decode")


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        (400, "prefill_bad_request", Outcome.REJECTED),
        (404, "prefill_not_found", Outcome.REJECTED),
        (422, "prefill_error", Outcome.REJECTED),
        (429, "prefill_error", Outcome.BUSY),
        (500, "prefill_internal_error", Outcome.FAILED),
        (502, "prefill_bad_gateway", Outcome.FAILED),
        (503, "prefill_unavailable", Outcome.FAILED),
        (504, "prefill_error", Outcome.FAILED),
    ],
)
@both_kinds
@on_loop
async def test_prefills_failing_status_is_told_by_its_code(
    body: bytes, status: int, code: str, outcome: Outcome
) -> None:
    async with Pairs() as (play, decider):
        client = await ask(play, body)
        prefill, decode = await decider.legs(play)
        await finish(prefill, ERROR, status)
        await decode.closed()
        response = await client.response()
        error = json.loads(response.body)["error"]
        assert (response.status, error["code"], response.headers["x-smg-error-code"]) == (status, code, code)
        assert error["message"] == f"The prefill worker answered with status {status}: no room for it."
        assert sorted(decider.ends) == [("decode", Outcome.ABANDONED), ("prefill", outcome)]
        assert [what for what, *_ in decider.told].count("retry") == (outcome is not Outcome.REJECTED)
        await decider.aborted(play, "r0-decode")


@on_loop
async def test_a_status_that_is_no_answer_is_a_502_and_retry_after_is_passed_on() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, _ = await decider.legs(play)
        await finish(prefill, b"", 307)
        assert (await client.response()).status == 502
        await client.send(post(CHAT, BODY))
        legs = await decider.legs(play)
        await legs[0].answer(503, b"busy", "retry-after: 7")
        response = await client.response()
        assert (response.status, response.headers["retry-after"]) == (503, "7")
        assert decider.ends[-1] == ("prefill", Outcome.BUSY)


@on_loop
async def test_an_error_event_of_prefill_counts_as_its_status() -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play, STREAM)
        prefill, decode = await decider.legs(play)
        await streamed(prefill, b'{"error":{"message":"x","code":503}}')
        await decode.closed()
        await served(client, await decider.legs(play), STREAM)
        assert decider.told[1] == ("retry", "prefill", Outcome.FAILED)
        assert decider.statuses == [503]


@on_loop
async def test_a_huge_error_of_prefill_is_not_read_to_its_end() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, _ = await decider.legs(play)
        await prefill.send(b"HTTP/1.1 500 No\r\ncontent-length: 99999999\r\n\r\n" + b"x" * 200_000)
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (500, "prefill_internal_error")
        await prefill.closed()


@pytest.mark.parametrize("breaks", [False, True])
@on_loop
async def test_prefill_that_fails_behind_decodes_first_event_does_not_end_the_answer(breaks: bool) -> None:
    async with Pairs() as (play, decider):
        client = await ask(play, STREAM)
        prefill, decode = await decider.legs(play)
        await streamed(decode, b"0")
        await client.head()
        assert await client.chunk() == b"data: 0\n\n"
        if breaks:
            prefill.reset()
        else:
            await prefill.answer(500, b"{}")
        await play.until(lambda: len(decider.ends) == 1)
        await decode.chunk(b"data: 1\n\n")
        assert await client.chunk() == b"data: 1\n\n"
        await decode.end_stream()
        assert await client.until(b"0\r\n\r\n")
        await play.ended(1)
        assert decider.ends == [
            ("prefill", Outcome.BROKEN if breaks else Outcome.FAILED),
            ("decode", Outcome.SERVED),
        ]
        await decider.aborted(play, *["r0-prefill"] * breaks)


@on_loop
async def test_while_a_retry_is_decided_decode_does_not_answer() -> None:
    async with Pairs(script={"late": True}) as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        await finish(prefill, ERROR, 500)
        await decode.closed()
        await play.until(lambda: bool(decider.waiting))
        ((number, plan),) = decider.waiting
        decider.deliver(number, plan)
        assert (await client.response()).status == 500
        assert decider.ends == [("decode", Outcome.ABANDONED), ("prefill", Outcome.FAILED)]


@on_loop
async def test_a_client_that_leaves_while_a_retry_is_decided() -> None:
    async with Pairs(script={"late": True}) as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        prefill.reset()
        await decode.closed()
        await play.until(lambda: bool(decider.waiting))
        client.close()
        await play.ended(1)
        assert decider.ends == [("decode", Outcome.ABANDONED), ("prefill", Outcome.GONE)]


# -- decode fails ------------------------------------------------------------------------------------------------------


@both_kinds
@on_loop
async def test_decode_that_breaks_gives_prefill_up_and_a_new_pair_serves(body: bytes) -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play, body)
        prefill, decode = await decider.legs(play)
        decode.reset()
        await prefill.closed()
        await served(client, await decider.legs(play), body)
        assert decider.told[:2] == [("ended", "prefill", Outcome.ABANDONED), ("retry", "decode", Outcome.BROKEN)]
        await decider.aborted(play, "r0-prefill", "r0-decode")


@on_loop
async def test_decode_that_breaks_when_prefill_is_done_leaves_prefill_in_peace() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        await prefill.answer(200)
        await play.until(lambda: len(decider.ends) == 1)
        decode.reset()
        assert (await client.response()).status == 502
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.BROKEN)]
        await decider.aborted(play, "r0-decode")


@on_loop
async def test_decode_that_refuses_connections() -> None:
    async with Pairs(script={"retries": 0}) as (play, decider):
        play.played[1].refuse()
        client = await ask(play)
        response = await client.response()
        assert (response.status, json.loads(response.body)["error"]["code"]) == (502, "worker_unreachable")
        assert sorted(decider.ends) == [("decode", Outcome.REFUSED), ("prefill", Outcome.ABANDONED)]


@pytest.mark.parametrize("status", [400, 404, 422])
@on_loop
async def test_what_decode_rejects_is_its_own_answer_and_no_retry(status: int) -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        await finish(decode, ERROR, status)
        response = await client.response()
        assert (response.status, response.body) == (status, ERROR)
        await prefill.closed()
        assert sorted(decider.ends) == [("decode", Outcome.REJECTED), ("prefill", Outcome.ABANDONED)]
        await decider.aborted(play, "r0-prefill")


@pytest.mark.parametrize("split", [False, True])
@on_loop
async def test_decodes_own_failure_is_its_own(split: bool) -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        head = b"HTTP/1.1 500 No\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ERROR)
        if split:
            await decode.send(head)
            await play.until(lambda: "Gathered" in repr(handled_of(play)))
            await decode.send(ERROR)
        else:
            await decode.send(head + ERROR)
        response = await client.response()
        assert (response.status, response.body) == (500, ERROR)
        await prefill.closed()
        assert decider.ends == [("prefill", Outcome.ABANDONED), ("decode", Outcome.FAILED)]
        assert decider.statuses == [500]
        await decider.aborted(play, "r0-prefill")


def handled_of(play: Play) -> object:
    """What takes the body of the only exchange's own leg."""
    (exchange,) = play.clients.exchanges
    assert isinstance(exchange, Exchange)
    return exchange.legs[-1].handled


BLAMES = [
    b"Decode handshake failed for request rank=0 decode_req.req.rid='r' decode_req.req.bootstrap_room=3",
    b"Decode transfer failed for request rank=0 with exception KVTransferError",
    b"Lost connection with prefill instance (bootstrap_addr: 127.0.0.1:8998)",
    b"Failed to get kvcache from prefill instance, it might be dead",
    b"Request r was Aborted by AbortReq.",
]


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("says", BLAMES)
@on_loop
async def test_decodes_failure_that_names_the_prefill_is_the_prefills(says: bytes, retries: int) -> None:
    async with Pairs(script={"retries": retries}) as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        error = b'{"error":{"message":"%s","code":500}}' % says
        await decode.send(b"HTTP/1.1 500 No\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(error))
        await play.until(lambda: "Gathered" in repr(handled_of(play)))
        await decode.send(error)
        await prefill.closed()
        assert decider.told[:2] == [("ended", "decode", Outcome.ABANDONED), ("retry", "prefill", Outcome.FAILED)]
        if retries:
            await served(client, await decider.legs(play), BODY)
        else:
            response = await client.response()
            assert (response.status, response.body) == (500, error)
            assert decider.ends[-1] == ("prefill", Outcome.FAILED)
        await decider.aborted(play, "r0-prefill")


@on_loop
async def test_the_same_as_the_first_event_of_a_stream() -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play, STREAM)
        _, decode = await decider.legs(play)
        await streamed(decode, b'{"error":{"message":"%b","code":500}}' % BLAMES[2])
        await served(client, await decider.legs(play), STREAM)
        assert decider.told[:2] == [("ended", "decode", Outcome.ABANDONED), ("retry", "prefill", Outcome.FAILED)]


@on_loop
async def test_a_prefill_that_has_served_is_not_to_blame_any_more() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        await prefill.answer(200)
        await play.until(lambda: len(decider.ends) == 1)
        await finish(decode, BLAMES[1], 500)
        assert (await client.response()).status == 500
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.FAILED)]


@on_loop
async def test_a_huge_failure_of_decode_is_passed_on_unread() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        _, decode = await decider.legs(play)
        body = b"Decode transfer failed" + b"x" * 300_000
        await decode.answer(500, body)
        response = await client.response()
        assert (response.status, response.body) == (500, body)
        assert decider.ends[-1] == ("decode", Outcome.FAILED)


@on_loop
async def test_decode_that_breaks_off_inside_its_failure_is_a_break() -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play)
        _, decode = await decider.legs(play)
        await decode.send(b"HTTP/1.1 500 No\r\ncontent-length: 100\r\n\r\nDecode")
        await play.until(lambda: "Gathered" in repr(handled_of(play)))
        decode.reset()
        await served(client, await decider.legs(play), BODY)
        assert decider.told[1] == ("retry", "decode", Outcome.BROKEN)


@on_loop
async def test_decode_that_breaks_in_the_stream_ends_it_with_an_error_event() -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play, STREAM)
        prefill, decode = await decider.legs(play)
        await streamed(decode, b'{"n":0}')
        await client.head()
        assert await client.chunk() == b'data: {"n":0}\n\n'
        decode.reset()
        assert b'"code":"stream_broken"' in await client.rest()
        await prefill.closed()
        assert sorted(decider.ends) == [("decode", Outcome.CUT), ("prefill", Outcome.ABANDONED)]
        await decider.aborted(play, "r0-prefill", "r0-decode")


# -- deadlines, and clients that leave ---------------------------------------------------------------------------------


@both_kinds
@on_loop
async def test_a_client_that_leaves_ends_both_legs(body: bytes) -> None:
    async with Pairs() as (play, decider):
        client = await ask(play, body)
        legs = await decider.legs(play)
        client.close()
        for leg in legs:
            await leg.closed()
        await play.ended(1)
        assert sorted(decider.ends) == [("decode", Outcome.GONE), ("prefill", Outcome.GONE)]
        await decider.aborted(play, "r0-prefill", "r0-decode")


@on_loop
async def test_a_client_that_leaves_in_mid_stream_ends_decode_alone() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play, STREAM)
        prefill, decode = await decider.legs(play)
        await streamed(prefill, b"0")
        await prefill.end_stream()
        await streamed(decode, b"0")
        await client.head()
        await play.until(lambda: ("prefill", Outcome.SERVED) in decider.ends)
        client.close()
        await decode.closed()
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.GONE)]
        await decider.aborted(play, "r0-decode")


@both_kinds
@on_loop
async def test_a_prefill_that_hangs_holds_the_client_until_the_first_byte_is_due(body: bytes) -> None:
    async with Pairs(first_byte_timeout_secs=0.1) as (play, decider):
        client = await ask(play, body)
        legs = await decider.legs(play)
        response = await client.response()
        assert (response.status, json.loads(response.body)["error"]["code"]) == (504, "first_byte_timeout")
        for leg in legs:
            await leg.closed()
        assert sorted(decider.ends) == [("decode", Outcome.TIMEOUT), ("prefill", Outcome.TIMEOUT)]
        await decider.aborted(play, "r0-prefill", "r0-decode")


@on_loop
async def test_what_decode_sends_gives_prefill_no_more_time() -> None:
    async with Pairs(first_byte_timeout_secs=0.3) as (play, decider):
        client = await ask(play)
        _, decode = await decider.legs(play)
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)
        await decode.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n")
        await play.until(lambda: exchange.legs != () and exchange.legs[0].framing is not None)
        assert exchange.deadline[0] is Due.FIRST_BYTE
        response = await client.response()
        assert (response.status, json.loads(response.body)["error"]["code"]) == (504, "first_byte_timeout")
        assert ("prefill", Outcome.TIMEOUT) in decider.ends


@on_loop
async def test_once_prefill_has_answered_decode_has_the_requests_own_time() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)
        assert exchange.deadline[0] is Due.FIRST_BYTE
        await prefill.answer(200)
        await play.until(lambda: exchange.deadline[0] is Due.REQUEST)
        await decode.answer(200)
        await client.response()


@on_loop
async def test_a_decode_that_hangs_is_alone_to_blame_when_prefill_has_served() -> None:
    async with Pairs(first_byte_timeout_secs=0.3) as (play, decider):
        client = await ask(play, STREAM)
        prefill, _ = await decider.legs(play)
        await streamed(prefill, b"0")
        await prefill.end_stream()
        assert (await client.response()).status == 504
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.TIMEOUT)]
        await decider.aborted(play, "r0-decode")


@on_loop
async def test_when_the_router_cuts_its_clients_both_legs_are_aborted() -> None:
    async with Pairs() as (play, decider):
        await ask(play)
        legs = await decider.legs(play)
        play.clients.cut()
        settling = asyncio.ensure_future(play.app.relay.aborts.settle())
        for leg in legs:
            await leg.closed()
        await decider.aborted(play, "r0-prefill", "r0-decode")
        await settling


@on_loop
async def test_a_prefill_whose_host_is_gone_is_taken_back_from() -> None:
    async with Pairs(2, script={"retries": 1}) as (play, decider):
        client = await ask(play)
        await decider.legs(play)
        take_back(play.clients.exchanges, decider.prefills[0].name)
        await served(client, await decider.legs(play), BODY)
        assert decider.told[:2] == [("ended", "decode", Outcome.ABANDONED), ("retry", "prefill", Outcome.VANISHED)]


@on_loop
async def test_legs_that_were_not_sent_yet_are_not_aborted() -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        decider.delay = 60.0
        client = await ask(play)
        prefill, decode = await decider.legs(play)
        prefill.reset()
        await decode.closed()
        await decider.aborted(play, "r0-prefill", "r0-decode")
        client.close()
        await play.ended(1)
        assert sorted(decider.ends[-2:]) == [("decode", Outcome.GONE), ("prefill", Outcome.GONE)]
        await decider.aborted(play, "r0-prefill", "r0-decode")


# -- the whole of a kept connection ------------------------------------------------------------------------------------


async def served_and_asked_again(client: Client, legs: list[Leg], play: Play, decider: PairDecider) -> None:
    """Let both legs serve, and send another request, which comes on the connections that they keep."""
    await served(client, legs, BODY)
    await play.until(lambda: len(decider.ends) == 2)
    await client.send(post(CHAT, BODY))
    for leg in legs:
        await leg.request()


@pytest.mark.parametrize("role", [0, 1])
@on_loop
async def test_when_a_kept_connection_had_closed_the_pair_is_planned_anew(role: int) -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await ask(play)
        first = await decider.legs(play)
        await served_and_asked_again(client, first, play, decider)
        first[role].close()  # it may have been read: nothing is sent to a second engine under the same name
        await first[1 - role].closed()
        legs = await decider.legs(play)
        assert [b'"bootstrap_room":2' in leg.body for leg in legs] == [True, True]
        await served(client, legs, BODY)
        assert ("retry", ("prefill", "decode")[role], Outcome.STALE) in decider.told
        await decider.aborted(play, "r1-prefill", "r1-decode")


@on_loop
async def test_without_a_retry_a_kept_connection_that_had_closed_is_a_502() -> None:
    async with Pairs() as (play, decider):
        client = await ask(play)
        legs = await decider.legs(play)
        await served_and_asked_again(client, legs, play, decider)
        legs[0].close()
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (502, "worker_broken")
        await decider.aborted(play, "r1-prefill", "r1-decode")


@pytest.mark.parametrize("role", [0, 1])
@on_loop
async def test_a_leg_without_a_name_is_sent_again_where_a_kept_connection_had_closed(role: int) -> None:
    async with Pairs() as (play, decider):
        decider.named = False
        client = await ask(play)
        legs = await decider.legs(play)
        await served_and_asked_again(client, legs, play, decider)
        legs[role].close()
        legs[role] = (await decider.legs(play, 1))[0]
        await served(client, legs, BODY)
        assert not decider.suspects
        await decider.aborted(play)


# -- everything against everything -------------------------------------------------------------------------------------


async def cut(leg: Leg) -> None:
    await leg.send(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{")
    leg.reset()


async def cut_stream(leg: Leg) -> None:
    await streamed(leg, b'{"n":0}')
    leg.reset()


async def serve(leg: Leg) -> None:
    await finish(leg, OK)


async def serve_stream(leg: Leg) -> None:
    await streamed(leg, b'{"n":0}', b"[DONE]")
    await leg.end_stream()
    leg.close()


async def fail(leg: Leg) -> None:
    await finish(leg, ERROR, 500)


async def close(leg: Leg) -> None:
    leg.close()


async def reset(leg: Leg) -> None:
    leg.reset()


async def no_http(leg: Leg) -> None:
    await leg.send(b"SMTP ready\r\n\r\n")


async def hang(leg: Leg) -> None:
    """Do nothing."""


DOINGS = [serve, serve_stream, fail, close, reset, no_http, cut, cut_stream, hang]


@pytest.mark.parametrize("decodes", DOINGS)
@pytest.mark.parametrize("prefills", DOINGS)
@both_kinds
@on_loop
async def test_whatever_both_do_there_is_one_answer_and_nothing_stays(
    body: bytes, prefills: Doing, decodes: Doing
) -> None:
    """`Pairs` sees that each leg ends exactly once, and that no load, no connection and no abort is left."""
    async with Pairs(script={"retries": 1}, request_timeout_secs=0.5) as (play, decider):
        client = await ask(play, body)
        answering = asyncio.ensure_future(client.response())
        while not answering.done():
            await play.until(lambda: answering.done() or not play.legs.empty())
            if not play.legs.empty():
                leg = await play.leg()
                if not await decider.abort(leg):
                    with contextlib.suppress(ConnectionError):  # the router may have given it up by now
                        await (prefills if leg.worker is play.played[0] else decodes)(leg)
        response = await answering
        (end,) = await play.ended(1)
        assert end.answer.status == response.status
        if prefills in (serve, serve_stream) and decodes in (serve, serve_stream):
            assert (response.status, response.complete) == (200, True)
        elif decodes in (serve, serve_stream):
            assert response.complete
        elif decodes not in (cut, cut_stream):
            assert response.status in (500, 502, 504)


# -- streams that go on ------------------------------------------------------------------------------------------------


async def broken_stream(play: Play, decider: PairDecider, style: Style, asked: bytes) -> tuple[Client, list[bytes]]:
    """Ask for a stream that breaks after some events; return the client and what it got."""
    client = await ask(play, asked)
    prefill, decode = await decider.legs(play)
    await finish(prefill, b"{}")
    await play.until(lambda: bool(decider.ends))
    events = answer(style, asked, 0)[:4]
    await streamed(decode, *events)
    await client.head()
    got = [(await client.chunk()).removeprefix(b"data: ").strip() for _ in events]
    decode.reset()
    return client, got


@on_loop
async def test_a_stream_whose_decode_breaks_goes_on_in_a_new_pair() -> None:
    style, asked = Style("chat"), ask_for(Style("chat"), 8)
    async with Pairs(script={"retries": 1}, resume_streams=True) as (play, decider):
        client, got = await broken_stream(play, decider, style, asked)
        prefill, decode = await decider.legs(play)
        assert [json.loads(leg.body)["bootstrap_room"] for leg in (prefill, decode)] == [1, 1]
        assert (
            json.loads(prefill.body)["messages"] == json.loads(decode.body)["messages"] != json.loads(asked)["messages"]
        )
        await finish(prefill, b"{}")
        await streamed(decode, *answer(style, decode.body, 1))
        await decode.end_stream()
        rest = b""
        while (size := int(await client.until(b"\r\n"), 16)) > 0:
            rest += await client.exactly(size)
            await client.exactly(2)
        got += [data for _, data in payloads(rest)]
        assert seen(style, got) == seen(style, answer(style, asked, 0))
        (end,) = await play.ended(1)
        assert (end.answer.resumed, end.answer.outcome) == (1, Outcome.SERVED)
        assert decider.ends[-2:] == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]


@on_loop
async def test_a_new_pair_for_a_broken_stream_whose_prefill_fails_ends_at_once() -> None:
    style, asked = Style("chat"), ask_for(Style("chat"), 8)
    async with Pairs(script={"retries": 1}, resume_streams=True) as (play, decider):
        client, _ = await broken_stream(play, decider, style, asked)
        prefill, decode = await decider.legs(play)
        await finish(prefill, ERROR, 500)
        await decode.closed()
        assert b'"code":"stream_broken"' in await client.rest()
        assert decider.told[-3:] == [
            ("ended", "decode", Outcome.ABANDONED),
            ("retry", "prefill", Outcome.FAILED),
            ("ended", "prefill", Outcome.FAILED),
        ]


def test_an_error_of_prefill_that_is_no_json_is_told_without_its_text() -> None:
    for body in (b"", b"<html>", b"[1]", b'{"error":"text"}', b'{"error":{"message":7}}', b"\xff"):
        assert str(PrefillFailed(500, body)) == "The prefill worker answered with status 500."
    assert str(PrefillFailed(400, b'{"message":"why"}')).endswith("400: why.")
