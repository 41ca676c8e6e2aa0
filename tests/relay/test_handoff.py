"""What a prefill worker hands over: taken as it came, given to one decode worker, while it may be used."""

from __future__ import annotations

from typing import Any

import pytest

from pair_deciders import BODY, ERROR, NIXL, OK, STREAM, Pairs, ask, both_kinds, finish, on_loop, streamed
from played import Leg, Play
from sglang_router.relay import handoff, silences
from sglang_router.relay.deadlines import Due
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.handoff import RESULTS, Handed, is_pushed, params_of
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, Target
from sglang_router.routing.transfer import LEASE
from sglang_router.routing.usage import Usage

PARAMS = b'{"do_remote_prefill":true, "remote_block_ids":[[1,2]],"remote_host":"h\\u00e9", "x":1.50,"tp_size":1}'
USAGE = b'"usage":{"prompt_tokens":586,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":576}}'
HANDS = b'{"id":"c","kv_transfer_params":%b,%b,"choices":[{"text":"a \\"kv_transfer_params\\":{}"}]}' % (PARAMS, USAGE)
GIVEN = b',"kv_transfer_params":' + PARAMS + b"}"
NAMELESS = b'{"id":"c"}'


async def prefilled(play: Play, decider: Any, answer: bytes = HANDS) -> Leg:
    """Let the prefill worker answer; return the decode leg."""
    (prefill,) = await decider.legs(play, 1)
    await finish(prefill, answer)
    (decode,) = await decider.legs(play, 1)
    assert isinstance(decode, Leg)
    return decode


# -- without sockets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "params"),
    [
        (HANDS, PARAMS),
        (b'{"kv_transfer_params":{}}', b"{}"),
        (b'{"kv_transfer_params":null}', b""),
        (b'{"choices":[{"kv_transfer_params":{"a":1}}]}', b""),
        (b'{"kv_transfer_params":"text"}', b""),
        (b'{"kv_transfer_params":[1]}', b""),
        (b'{"kv_transfer_params":{"a":}', b""),
        (b"[" * 100_000, b""),
        (b"[]", b""),
        (b"\xff", b""),
        (b"", b""),
    ],
)
def test_only_an_object_at_the_top_is_handed_over(body: bytes, params: bytes) -> None:
    assert params_of(body) == params


def leg(lease: int, splice: bytes = b"") -> PlannedLeg:
    return PlannedLeg(lease, Target("http://d"), "pair", splice=splice)


def given(handed: Handed, sent: float, lease: int, splice: bytes = b"") -> bytes:
    """Return the splice of a leg that is given what was handed over."""
    decode = leg(lease, splice)
    handed.give(decode, sent)
    return decode.splice


def test_it_is_given_once_while_it_is_fresh() -> None:
    handed = Handed(b"{}", 10.0, None)
    assert repr(handed) == "<Handed to give>"
    assert given(handed, 10.0 + LEASE + 0.1, 1) == b""
    assert handed.result == "expired"
    assert given(handed, 10.0 + LEASE, 2, b'"a":1') == b'"a":1,"kv_transfer_params":{}'
    assert repr(handed) == "<Handed given>"
    assert given(handed, 11.0, 3) == b""
    assert handed.result == "used"
    nothing = Handed(b"", 10.0, None)
    assert given(nothing, 10.0, 1) == b""
    assert {"given", handed.result, nothing.result, "expired"} == set(RESULTS)


@pytest.mark.parametrize("outcome", Outcome)
def test_only_a_worker_that_was_not_reached_leaves_it_to_the_next(outcome: Outcome) -> None:
    handed = Handed(b"{}", 10.0, None)
    assert given(handed, 11.0, 2)
    handed.take_back(leg(1), outcome)
    assert not given(handed, 11.0, 3), "another leg failed"
    handed.take_back(leg(2), outcome)
    unreached = {Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED, Outcome.STARVED}
    assert bool(given(handed, 11.0, 4)) == (outcome in unreached)


def test_cached_tokens_are_those_that_prefill_found() -> None:
    usage = Usage(586, 0, 9)
    Handed(b"{}", 0.0, None).correct(usage)
    assert usage.cached == 0
    Handed(b"{}", 0.0, Usage(586, 576, 1)).correct(usage)
    assert (usage.prompt, usage.cached, usage.completion) == (586, 576, 9)


# -- with sockets ------------------------------------------------------------------------------------------------------


@both_kinds
@on_loop
async def test_prefill_first_then_decode_with_what_it_handed_over(body: bytes) -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        client = await ask(play, body, "X-Request-Id: mine")
        (prefill,) = await decider.legs(play, 1)
        assert prefill.body == body[:-1] + b"," + NIXL + b"}"
        assert play.legs.empty(), "decode is not asked yet"
        await finish(prefill, HANDS)
        (decode,) = await decider.legs(play, 1)
        assert decode.body == body[:-1] + GIVEN
        assert decode.headers["x-request-id"] == prefill.headers["x-request-id"] == "mine"
        told = decider.usages["prefill"]
        assert told is not None
        assert (told.prompt, told.cached) == (586, 576)
        answer = OK.replace(b'"prompt_tokens":9', b'"prompt_tokens":586').replace(
            b'cached_tokens":4', b'cached_tokens":0'
        )
        if body is STREAM:
            await streamed(decode, b'{"n":0}', answer, b"[DONE]")
            await decode.end_stream()
            assert (await client.response()).complete
        else:
            await decode.answer(200, answer)
            assert (await client.response()).body == answer
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]
        (end,) = await play.ended(1)
        assert end.answer.usage is not None
        assert end.answer.usage is decider.usages["decode"]
        assert (end.answer.usage.prompt, end.answer.usage.cached, end.answer.usage.completion) == (586, 576, 3)
        assert end.answer.handoff == "given"
        assert end.leg is not None
        assert end.leg.target == decider.decodes[0]


PUSHED = b'{"do_remote_prefill": true, "transfer_mode": "push"}'


@pytest.mark.parametrize(
    ("params", "pushed"),
    [(PUSHED, True), (b'{"transfer_mode":"pull"}', False), (b"{}", False), (b'{"transfer_mode":1}', False)],
)
def test_who_pushes_says_so(params: bytes, pushed: bool) -> None:
    assert is_pushed(params) == pushed


@on_loop
async def test_both_engines_know_a_marked_attempt_by_the_same_id_and_the_client_by_its_own() -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        decider.marked = True
        client = await ask(play, BODY, "X-Request-Id: mine")
        (prefill,) = await decider.legs(play, 1)
        await finish(prefill, b'{"kv_transfer_params":%b}' % PUSHED)
        (decode,) = await decider.legs(play, 1)
        assert decode.body == BODY[:-1] + b',"kv_transfer_params":' + PUSHED + b"}"
        assert prefill.headers["x-request-id"] == decode.headers["x-request-id"]
        assert prefill.headers["x-request-id"].startswith("mine-mark")
        await decode.answer(200, OK)
        assert (await client.response()).headers["x-request-id"] == "mine"


@on_loop
async def test_what_is_pushed_to_an_id_that_others_may_have_is_not_handed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        caplog.set_level("INFO", "sglang_router.relay")
        client = await ask(play)
        (prefill,) = await decider.legs(play, 1)
        await finish(prefill, b'{"kv_transfer_params":%b}' % PUSHED)
        (decode,) = await decider.legs(play, 1)
        assert decode.body == BODY
        await decode.answer(200, OK)
        assert (await client.response()).status == 200
        (end,) = await play.ended(1)
        assert end.answer.handoff == "absent"
        assert "would push (--pd-kv-connector nixl_push)" in caplog.text


@on_loop
async def test_a_stream_is_asked_for_its_usage_at_decode_only() -> None:
    async with Pairs(script={"handoff": True}, inject_usage=True) as (play, decider):
        client = await ask(play, STREAM)
        (prefill,) = await decider.legs(play, 1)
        assert b"stream_options" not in prefill.body
        await finish(prefill, HANDS)
        (decode,) = await decider.legs(play, 1)
        assert b'"stream_options":{"include_usage":true}' in decode.body
        await streamed(decode, b'{"n":0}')
        await decode.end_stream()
        assert (await client.response()).complete


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("hands", [NAMELESS, b'{"kv_transfer_params":null}', b"no json", b"[" * 50_000, b""])
@on_loop
async def test_decode_goes_alone_when_nothing_was_handed_over(
    hands: bytes, chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        caplog.set_level("INFO", "sglang_router.relay")
        client = await ask(play)
        (prefill,) = await decider.legs(play, 1)
        if chunked:
            await prefill.start_stream("application/json")
            if hands:
                await prefill.chunk(hands)
            await prefill.end_stream()
        else:
            await finish(prefill, hands)
        (decode,) = await decider.legs(play, 1)
        assert decode.body == BODY
        await decode.answer(200, OK)
        assert (await client.response()).status == 200
        assert "handed nothing over" in caplog.text
        assert [end.answer.handoff for end in await play.ended(1)] == ["absent"]
        play.app.deferred.flush()
        assert play.app.metrics.counts.handoffs == {"absent": 1}


@on_loop
async def test_an_answer_that_is_too_large_hands_nothing_over() -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        client = await ask(play)
        (prefill,) = await decider.legs(play, 1)
        await prefill.send(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n" + b" " * (handoff.MOST + 1))
        (decode,) = await decider.legs(play, 1)
        assert decode.body == BODY
        await prefill.closed()
        await decode.answer(200, OK)
        assert (await client.response()).status == 200
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]


@on_loop
async def test_a_large_answer_within_the_limit_is_read() -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        client = await ask(play)
        decode = await prefilled(play, decider, HANDS[:-1] + b',"x":"%b"}' % (b"x" * 900_000))
        assert decode.body.endswith(GIVEN)
        await decode.answer(200, OK)
        assert (await client.response()).status == 200


# -- prefill fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("how", ["reset", "status", "cut"])
@on_loop
async def test_prefill_fails_before_decode_is_sent(how: str, retries: int) -> None:
    async with Pairs(script={"handoff": True, "retries": retries}) as (play, decider):
        client = await ask(play)
        (prefill,) = await decider.legs(play, 1)
        if how == "reset":
            prefill.reset()
        elif how == "status":
            await finish(prefill, ERROR, 500)
        else:
            await prefill.send(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n" + HANDS[:50])
            prefill.close()
        if retries:
            decode = await prefilled(play, decider)
            assert decode.body.endswith(GIVEN)
            await decode.answer(200, OK)
            assert (await client.response()).status == 200
        else:
            assert (await client.response()).status == (500 if how == "status" else 502)
        outcome = Outcome.FAILED if how == "status" else Outcome.BROKEN
        assert decider.told[:2] == [("ended", "decode", Outcome.ABANDONED), ("retry", "prefill", outcome)]
        (end,) = await play.ended(1)
        assert end.leg is not None


@both_kinds
@on_loop
async def test_prefill_hangs(body: bytes) -> None:
    async with Pairs(script={"handoff": True}, first_byte_timeout_secs=0.1) as (play, decider):
        client = await ask(play, body)
        (prefill,) = await decider.legs(play, 1)
        assert (await client.response()).status == 504
        await prefill.closed()
        assert sorted(decider.ends) == [("decode", Outcome.ABANDONED), ("prefill", Outcome.TIMEOUT)]
        (end,) = await play.ended(1)
        assert end.leg is not None
        assert end.leg.target == decider.prefills[0]


@on_loop
async def test_the_client_leaves_while_prefill_computes() -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        client = await ask(play)
        (prefill,) = await decider.legs(play, 1)
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)
        assert not exchange.legs
        assert exchange.unanswered() is None
        client.close()
        await prefill.closed()
        await play.ended(1)
        assert sorted(decider.ends) == [("decode", Outcome.GONE), ("prefill", Outcome.GONE)]


@on_loop
async def test_a_stream_whose_prefill_computes_is_no_queued_one_and_is_kept_alive() -> None:
    async with Pairs(script={"handoff": True}) as (play, decider):
        client = await ask(play, STREAM)
        (prefill,) = await decider.legs(play, 1)
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)
        waits = exchange.unanswered()
        assert waits is not None
        assert not waits[2], "a worker has it"
        assert silences.silence(exchange) == 0
        assert exchange.deadline[0] is Due.FIRST_BYTE
        before = exchange.deadline[1]
        await finish(prefill, HANDS)
        (decode,) = await decider.legs(play, 1)
        assert exchange.deadline[0] is Due.FIRST_BYTE
        assert exchange.deadline[1] > before, "decode has its own time"
        await streamed(decode, b'{"n":0}')
        await decode.end_stream()
        assert (await client.response()).complete


# -- decode fails ------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_decode_that_cannot_be_reached_leaves_it_to_the_next_without_a_second_prefill() -> None:
    async with Pairs(1, 2, script={"handoff": True, "retries": 1}) as (play, decider):
        play.played[1].refuse()
        client = await ask(play)
        decode = await prefilled(play, decider)
        assert decode.worker is play.played[2]
        assert decode.body == BODY[:-1] + GIVEN
        await decode.answer(200, OK)
        assert (await client.response()).status == 200
        (end,) = await play.ended(1)
        assert end.answer.usage is not None
        assert end.answer.retries == 1
        assert decider.told[1] == ("retry", "decode", Outcome.REFUSED)
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.SERVED)]


@pytest.mark.parametrize("how", ["reset", "status"])
@on_loop
async def test_a_decode_that_was_reached_may_have_used_it_up(how: str) -> None:
    async with Pairs(1, 2, script={"handoff": True, "retries": 1}) as (play, decider):
        client = await ask(play)
        decode = await prefilled(play, decider)
        assert decode.body.endswith(GIVEN)
        if how == "reset":
            decode.reset()
        else:
            await finish(decode, b'{"error":{"message":"Internal server error"}}', 500)
        (again,) = await decider.legs(play, 1)
        assert again.body == BODY
        await again.answer(200, OK)
        assert (await client.response()).status == 200


@on_loop
async def test_what_will_be_too_old_when_decode_is_sent_is_not_used() -> None:
    async with Pairs(1, 2, script={"handoff": True, "retries": 1}) as (play, decider):
        play.played[1].refuse()
        decider.delay = LEASE + 1.0
        client = await ask(play)
        (prefill,) = await decider.legs(play, 1)
        await finish(prefill, HANDS)
        await play.until(lambda: ("retry", "decode", Outcome.REFUSED) in decider.told)
        client.close()
        (end,) = await play.ended(1)
        assert end.answer.handoff == "expired"
        assert decider.ends == [("prefill", Outcome.SERVED), ("decode", Outcome.GONE)]


@on_loop
async def test_a_new_pair_has_what_its_own_prefill_hands_over() -> None:
    async with Pairs(script={"handoff": True, "retries": 1, "alone": False}) as (play, decider):
        client = await ask(play)
        decode = await prefilled(play, decider)
        decode.reset()
        other = HANDS.replace(b"remote_host", b"remote_place")
        again = await prefilled(play, decider, other)
        assert b"remote_place" in again.body
        await again.answer(200, OK)
        assert (await client.response()).status == 200
