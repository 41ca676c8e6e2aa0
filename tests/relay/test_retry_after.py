"""Retry-After for a client that finds the queue full: the time that the queue takes at the present pace."""

from __future__ import annotations

from played import Client, Play, post, run

BODY = b'{"model": "m", "messages": []}'


async def ask(play: Play) -> Client:
    client = await play.client()
    await client.send(post("/v1/chat/completions", BODY))
    return client


async def told_after(play: Play, waited: float) -> str:
    """Return Retry-After for a new request when one is queued and no request has ended for so many seconds."""
    now = play.clock
    relay = play.app.relay
    relay.clock = lambda: now() + waited
    response = await (await ask(play)).response()
    relay.clock = now
    assert response.status == 429
    return response.headers["retry-after"]


def test_as_long_as_the_queue_takes_a_minute_at_most() -> None:
    """One is queued, the new request would be the second; no request has ended for 0, 3.4, 1000 seconds."""

    async def play_it() -> None:
        async with Play(queue_timeout_secs=3600.0, max_running_per_worker=1, queue_size=1) as play:
            await ask(play)
            leg = await play.leg()
            await ask(play)
            await play.until(lambda: len(play.router.queue) == 1)
            assert [await told_after(play, waited) for waited in (0.0, 3.4, 1000.0)] == ["1", "7", "60"]
            await leg.answer(200, b"{}", "connection: close")
            leg.close()
            await (await play.leg()).answer(200, b"{}")
            await play.at_rest()

    run(play_it())
