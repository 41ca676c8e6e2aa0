"""Requests that fail at every worker, end workers, or are refused by them: what the others notice, over loopback."""

from __future__ import annotations

import json
from typing import Any

import pytest

from played import Client, Leg, Play, Response, post, run
from sglang_router.relay.upstream import STALE_WITHIN
from sglang_router.routing.policies.cache_aware import CacheAware

PATHS = ["/generate", "/v1/chat/completions", "/v1/embeddings", "/v1/audio/transcriptions"]


def body(word: str, **fields: Any) -> bytes:
    return json.dumps({"text": word, "input": word, "messages": [{"role": "user", "content": word}], **fields}).encode()


async def ask(client: Client, path: str, word: str, **fields: Any) -> None:
    await client.send(post(path, body(word, **fields)))


async def serve(play: Play, client: Client) -> Leg:
    """Send a request and serve it; return the connection, which the router keeps."""
    await ask(client, "/generate", "hello")
    leg = await play.leg()
    await leg.answer(200)
    assert (await client.response()).status == 200
    return leg


def die(leg: Leg) -> None:
    leg.worker.refuse()
    leg.reset()


def code(response: Response) -> str:
    return str(json.loads(response.body)["error"]["code"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("status", [500, 502, 504])
def test_case_1_what_two_workers_fail_is_answered_and_takes_out_no_worker(path: str, status: int) -> None:
    """Two requests that no engine can answer opened every breaker, and everybody got 503."""

    async def play_it() -> None:
        async with Play(workers=3) as play:
            client = await play.client()
            for _ in range(5):
                await ask(client, path, "POISON")
                for _ in range(2):
                    await (await play.leg()).answer(status, b'{"error":"too long"}', "connection: close")
                response = await client.response()
                assert (response.status, response.body) == (status, b'{"error":"too long"}')
            assert [worker.circuit.failures for worker in play.workers] == [0, 0, 0]
            await serve(play, client)
            await play.at_rest()

    run(play_it())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_case_2_a_request_that_ends_workers_ends_two_and_is_refused_then(path: str, stream: bool) -> None:
    """One request ended every engine: on new connections, and on kept ones that look as if they had only been idle.

    The second worker gets it on a new connection.
    """

    async def play_it() -> None:
        async with Play(workers=4) as play:
            client = await play.client()
            kept = [await serve(play, client) for _ in range(4)]
            await ask(client, path, "DEATH", stream=stream)
            await kept[0].request()
            die(kept[0])
            die(await play.leg())
            assert code(await client.response()) == "worker_broken"
            for _ in range(2):
                await ask(client, path, "DEATH", stream=stream)
                response = await client.response()
                assert (response.status, code(response)) == (422, "request_breaks_workers")
                assert 0 < int(response.headers["retry-after"]) <= 300
            await ask(client, path, "ALIVE", stream=stream)
            await kept[2].request()
            await kept[2].answer(200)
            assert (await client.response()).status == 200
            await play.at_rest()

    run(play_it())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("says_408", [False, True])
def test_case_2_a_worker_that_computed_on_a_kept_connection_and_broke_off_is_not_asked_again(
    stream: bool, says_408: bool
) -> None:
    """What ends one process of a worker, whose others go on to listen, was taken for the end of an idle connection."""

    async def play_it() -> None:
        async with Play(workers=3) as play:
            client = await play.client()
            kept = [await serve(play, client) for _ in range(3)]
            await ask(client, "/generate", "DEATH", stream=stream)
            await kept[0].request()
            for connection in play.connections.at(play.workers[0].target).live:
                connection.sent_at -= STALE_WITHIN + 1.0  # it has been at work for a while
            if says_408:
                await kept[0].send(b"HTTP/1.1 408 Late\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                assert (await client.response()).status == 408
            else:
                kept[0].reset()
                second = await play.leg()
                assert second.worker is play.played[1]
                second.reset()
                assert code(await client.response()) == "worker_broken"
                await ask(client, "/generate", "DEATH", stream=stream)
                assert code(await client.response()) == "request_breaks_workers"
            assert play.played[0].connections == 1
            await play.at_rest()

    run(play_it())


def test_f3_an_idle_connection_that_was_closed_is_no_break() -> None:
    async def play_it() -> None:
        async with Play(workers=2) as play:
            client = await play.client()
            for _ in range(6):
                leg = await serve(play, client)
                leg.close()
            assert [worker.circuit.failures for worker in play.workers] == [0, 0]
            assert not play.router.quarantine.broken

    run(play_it())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429])
def test_f12_what_a_worker_answers_with_4xx_leaves_no_trace_in_the_tree(status: int, stream: bool) -> None:
    """A prompt that the engine had refused drove out those that it has."""

    async def play_it() -> None:
        async with Play(workers=1, policy="cache_aware") as play:
            client = await play.client()
            policy = play.router.fleet.pools.default.policy
            assert isinstance(policy, CacheAware)
            tree = policy.tree
            leg = await serve(play, client)
            before = tree.size(0), tree.nodes
            await ask(client, "/generate", "something else " * 100, stream=stream)
            await leg.request()
            assert tree.size(0) > before[0]
            await leg.answer(status)
            assert (await client.response()).status == status
            assert (tree.size(0), tree.nodes) == before
            assert play.workers[0].circuit.failures == 0
            await play.at_rest()

    run(play_it())


def test_f2_a_stream_that_is_rejected_is_no_first_byte_and_no_proof_against_the_first_worker() -> None:
    async def play_it() -> None:
        async with Play(workers=2) as play:
            client = await play.client()
            await ask(client, "/generate", "POISON", stream=True)
            await (await play.leg()).answer(500, b"{}", "connection: close")
            await (await play.leg()).answer(400, b"{}", "connection: close")
            assert (await client.response()).status == 400
            assert [worker.circuit.failures for worker in play.workers] == [0, 0]
            await play.at_rest()

    run(play_it())
