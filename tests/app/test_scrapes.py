"""Scrapes: what they cost the relaying loop, and what the metrics port may take from the main port."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from event_makers import finished, leg
from fleets import any_policy
from sglang_router.app import settings
from sglang_router.app.scrapes import Scrapes
from sglang_router.observe.deferred import Deferred
from sglang_router.observe.metrics import Metrics
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.rules import Timeouts
from sglang_router.routing.events import Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec
from stack import WITHIN, stack

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/generate": "generate", "/v1/messages": "m"}


def large_metrics(workers: int, models: int) -> Metrics:
    """Return the metrics of a large fleet that served each model on four paths."""
    listeners = Listeners()
    ids = iter(range(workers))
    fleet = Fleet(listeners, lambda: str(next(ids)), any_policy)
    names = {f'"model-{n}"': f"model-{n}" for n in range(models)}
    metrics = Metrics(fleet, "cache_aware", models=names)
    listeners.add(metrics)
    for number in range(workers):
        fleet.add(WorkerSpec(url=f"http://w{number}:1", health=HealthRules(enabled=False)), 0.0)
    for worker in fleet:
        worker.decisions.count("cache_aware", "hit", 10, 20)
        metrics.finished(finished(leg(worker), model=""))
    for name in names:
        for path, endpoint in PATHS.items():
            metrics.finished(finished(model=name, path=path, endpoint=endpoint))
    return metrics


@pytest.mark.parametrize("openmetrics", [False, True])
def test_f13_the_exposition_of_a_large_fleet_comes_in_small_pieces(openmetrics: bool) -> None:
    """With 800 workers a scrape held the relaying loop for 195 ms, after 100 invented names for 116 ms."""
    pieces = list(large_metrics(800, 100).pieces(openmetrics))
    assert sum(map(len, pieces)) > 1_000_000
    assert len(pieces) > 10_000
    assert max(map(len, pieces[1:])) < 8192, "a histogram is the longest"


def test_f13_requests_are_counted_between_two_pieces_of_an_exposition() -> None:
    metrics = large_metrics(20, 3)
    for number, _ in enumerate(metrics.pieces(openmetrics=False)):
        metrics.finished(finished(status=100 + number % 50))
        metrics.counts.tallies.pop(str(number % 20), None)


def test_f13_all_scrapes_of_a_second_get_the_same_bytes() -> None:
    async def scene() -> None:
        now = 0.0
        metrics = large_metrics(2, 1)
        deferred = Deferred(asyncio.get_running_loop().call_later)
        deferred.add(metrics)
        scrape = Scrapes(metrics, deferred, lambda: now, 1.0)
        (first, kind), (other, _) = await asyncio.gather(scrape(""), scrape("text/html, */*;q=0.1"))
        assert first is other
        deferred.finished(finished())
        assert (await scrape("text/plain;version=1.0.0"))[0] is first
        assert kind == "text/plain; version=0.0.4; charset=utf-8"
        for version in ("1.0.0", "1.0.1"):  # what a client writes there makes no format of its own
            body, kind = await scrape(f"application/openmetrics-text;version={version};escaping=x{version}")
            assert body is (await scrape(OPENMETRICS))[0]
            assert body.endswith(b"# EOF\n")
        assert (await scrape("application/openmetrics-text; version=0.0.1"))[0] is first
        now = 1.0
        later, _ = await scrape("")
        assert later != first

    asyncio.run(scene())


# -- the metrics port --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descriptors", [20, 128, 1000, 65536])
def test_f15_all_ports_share_one_bound_of_connections(monkeypatch: pytest.MonkeyPatch, descriptors: int) -> None:
    """Idle connections to the metrics port took 996 of 1,000 descriptors, and clients on the main port got 503."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (descriptors, descriptors))
    most, scrapers = settings.most_connections()
    assert 1 <= scrapers <= 32
    assert most + scrapers == max(16, descriptors - 64)
    assert most >= 3 * scrapers


def test_f15_the_metrics_port_lets_nobody_stay_silent() -> None:
    short = settings.short(Timeouts())
    assert (short.head, short.body, short.idle) == (10.0, 10.0, 10.0)
    assert settings.short(Timeouts(idle=2.0)).idle == 2.0


def test_f15_a_flood_of_the_metrics_port_is_refused_there_and_takes_nothing_from_clients() -> None:
    with stack() as router, contextlib.ExitStack() as flood:
        scrapers = router.app.scrapers
        assert scrapers.limit == 32
        loop = router.loop

        async def listen() -> asyncio.Server:
            return await loop.create_server(
                lambda: cast("asyncio.Protocol", ClientConnection(router.app.metrics_frontend)), "127.0.0.1", 0
            )

        server = router.run(listen())
        address = server.sockets[0].getsockname()
        held = [flood.enter_context(socket.create_connection(address, WITHIN)) for _ in range(100)]
        answers = [_read(client) for client in held[32:]]
        assert {answer[:12] for answer in answers if answer} == {b"HTTP/1.1 503"}
        assert answers.count(b"") >= 100 - 32 - 16, "those over the bound are not even told"
        assert router.call(lambda: len(scrapers.connections)) <= 32 + 16
        assert router.call(lambda: (len(router.clients.connections), router.clients.crowded)) == (0, False)
        held[0].sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        assert held[0].recv(12) == b"HTTP/1.1 200", "who was there is served"
        assert router.get("/health").status == 200
        router.call(server.close)
        router.call(scrapers.cut)


def _read(client: socket.socket) -> bytes:
    """Return what a connection gets before it is closed."""
    with contextlib.suppress(ConnectionError):
        return b"".join(_parts(client))
    return b""


def _parts(client: socket.socket) -> Iterator[bytes]:
    while part := client.recv(4096):
        yield part
