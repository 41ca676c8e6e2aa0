"""What a client that finds no room is told about when to come again: as long as the line takes by now."""

from __future__ import annotations

import pytest

from played import Client, Play, post, run
from sglang_router.net.service import Timeouts

BODY = b'{"model": "m", "messages": []}'


async def ask(play: Play) -> Client:
    client = await play.client()
    await client.send(post("/v1/chat/completions", BODY))
    return client


@pytest.mark.parametrize(("waited", "told"), [(0.0, "1"), (7.0, "8"), (1000.0, "60")])
def test_as_long_as_the_first_in_the_line_has_waited(waited: float, told: str) -> None:
    """Whole seconds, rounded up, a minute at most."""

    async def play_it() -> None:
        async with Play(timeouts=Timeouts(queue=3600.0)) as play:
            play.fleet.most_load = play.service.most_queued = 1
            now = play.service.clock
            await ask(play)
            leg = await play.leg()
            await ask(play)
            await play.until(lambda: len(play.service.waiting) == 1)
            play.service.clock = lambda: now() + waited
            response = await (await ask(play)).response()
            assert response.status == 429
            await leg.answer(200, b"{}", "connection: close")
            leg.close()
            await (await play.leg()).answer(200, b"{}")
            await play.at_rest()
            assert response.headers["retry-after"] == told

    run(play_it())
