"""A complete router in the test's process: real sockets, real control plane, on an event loop in a thread of its own.

    with stack("http://127.0.0.1:8001", policy="round_robin") as router:
        router.get("/workers").json()                          # sends it a request
        router.until(lambda: router.worker(url).load == 0)     # waits for a state of its loop
        router.call(lambda: router.fleet.set_draining(...))    # runs on its loop
        fake = router.fake({"GET /health": answer(503)})       # a FakeWorker on its loop

`sglang_router.app.build` makes it, so a test can reach every part; logs, jobs and the metrics port are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlencode

import uvloop

from fake_worker import FakeWorker, Gate
from sglang_router.admin.context import AddRules, AskTimeouts
from sglang_router.app.build import Seams, build
from sglang_router.config import RouterArgs
from sglang_router.relay.addresses import system_look_up
from sglang_router.relay.client import ClientConnection
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker

T = TypeVar("T")

WITHIN = 20.0
"""Seconds after which a test that waits fails; a busy machine is slow."""


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class _News(Listener):
    """Wakes `Stack.until`."""

    def __init__(self, news: asyncio.Event) -> None:
        self._news = news

    def worker_changed(self, event: WorkerChanged) -> None:
        self._news.set()

    def finished(self, event: object) -> None:
        self._news.set()


async def named_metrics(accept: str) -> tuple[bytes, str]:
    """Stand for the metrics."""
    return f"for {accept}\n".encode(), "text/plain"


class Stack:
    """One router. `stack` makes it; tests access its parts only through `call`."""

    def __init__(self, policy: str, interval: float, settings: dict[str, Any]) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self.news = asyncio.Event()
        options = {
            "policy": policy,
            "engine_report_interval_secs": interval,
            "worker_startup_check_interval": 0.01,
            "slow_start_secs": 0.0,
            "disable_outlier_ejection": True,
            "max_concurrent_requests": -1,
            "metrics_interval_secs": 0.0,
        }
        args = RouterArgs(**options | settings.pop("options", {})).checked()
        look_up = settings.pop("look_up", system_look_up)
        self.app = app = build(
            args, self.loop, seams=Seams(rng=random.Random(7), clock=self.loop.time, look_up=look_up)
        )
        self.fleet = app.fleet
        self.router = app.router
        self.connections = app.connections
        self.survey = app.survey
        self.checks = app.checks
        self.context = app.control
        self.plane = app.plane
        self.clients = app.clients
        self.context.add_rules = AddRules(
            startup_timeout=settings.pop("startup_timeout", WITHIN),
            health=settings.pop("health"),
            api_key=None,
            dp_aware=settings.pop("dp_aware", False),
        )
        self.context.timeouts = AskTimeouts(generate=settings.pop("generate_timeout", WITHIN))
        for name, value in settings.items():
            assert hasattr(self.context, name)
            setattr(self.context, name, value)
        app.listeners.add(_News(self.news))
        self.port = 0
        self._fakes: list[FakeWorker] = []
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)

    # -- its life ----------------------------------------------------------------------------------------

    def _live(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def start(self, urls: tuple[str, ...]) -> None:
        self._thread.start()
        self.run(self._listen())
        for url in urls:
            self.add(url)
        for url in urls:
            self.until_healthy(url)

    async def _listen(self) -> None:
        self._server = server = await self.loop.create_server(
            lambda: cast("asyncio.Protocol", ClientConnection(self.app.frontend)), "127.0.0.1", 0
        )
        self.port = server.sockets[0].getsockname()[1]
        self._sweep()

    def _sweep(self) -> None:
        self.clients.sweep()
        self._sweeper = self.loop.call_later(0.05, self._sweep)

    def stop(self) -> None:
        try:
            self.run(self._close())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(WITHIN)
            self.loop.close()

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.clients.cut()
        await self.checks.close()
        await self.survey.close()
        await self.connections.close()
        for fake in self._fakes:
            await fake.stop()
        await asyncio.sleep(0)

    # -- its loop ----------------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the router's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WITHIN)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the router's loop."""

        async def on_loop() -> T:
            return function()

        return self.run(on_loop())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds; it is checked after each change of a worker and each end of a request."""

        async def holds() -> None:
            while not condition():
                self.news.clear()
                await self.news.wait()

        self.run(holds())

    # -- its workers -------------------------------------------------------------------------------------

    def fake(self, script: Mapping[str, bytes | Gate] | None = None) -> FakeWorker:
        """Start a fake worker; it is not registered."""
        fake = FakeWorker(script)
        self.run(fake.start())
        self._fakes.append(fake)
        return fake

    def add(self, url: str, **spec: Any) -> Worker:
        """Register a worker in the fleet directly, not through the control plane."""
        health = spec.pop("health", self.context.add_rules.health)
        return self.call(lambda: self.fleet.add(WorkerSpec(url=url, health=health, **spec), self.loop.time()))

    def until_healthy(self, url: str) -> None:
        self.run(self.checks.until_healthy(self.worker(url), WITHIN))
        assert self.worker(url).health is Health.HEALTHY, self.worker(url).last_error

    def fakes(self, *scripts: Mapping[str, bytes | Gate]) -> list[FakeWorker]:
        """Start fake workers, registered and healthy, in this order."""
        made = [self.fake(script) for script in scripts]
        for fake in made:
            self.add(fake.url)
        for fake in made:
            self.until_healthy(fake.url)
        return made

    def join(self, fake: FakeWorker) -> None:
        """Register a fake worker that was started elsewhere, and wait until it is healthy."""
        self._fakes.append(fake)
        self.add(fake.url)
        self.until_healthy(fake.url)

    def worker(self, url: str) -> Worker:
        worker = self.call(lambda: self.fleet.by_url(url))
        assert worker is not None, url
        return worker

    # -- its door ----------------------------------------------------------------------------------------

    def ask(self, method: str, target: str, body: bytes | None = None, **headers: str) -> Reply:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WITHIN)
        with contextlib.closing(connection):
            connection.request(method, target, body, {name.replace("_", "-"): v for name, v in headers.items()})
            got = connection.getresponse()
            fields = {name.lower(): value for name, value in got.getheaders()}
            return Reply(got.status, fields, got.read())

    def get(self, target: str, **headers: str) -> Reply:
        return self.ask("GET", target, None, **headers)

    def post(self, path: str, value: Any = None, **query: str) -> Reply:
        """POST a value as JSON (bytes as they are), with a query."""
        target = f"{path}?{urlencode(query)}" if query else path
        if value is None:
            return self.ask("POST", target, b"")
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.ask("POST", target, body, content_type="application/json")


@contextlib.contextmanager
def stack(*urls: str, policy: str = "cache_aware", interval: float = 0.0, **settings: Any) -> Iterator[Stack]:
    """Yield a router in front of workers that are healthy when the block begins.

    interval  seconds between two reports of an engine; 0 for none
    settings  startup_timeout, health, dp_aware (of workers that are added), generate_timeout, metrics_render, access;
              options: a mapping of further options of the router; look_up: finds the addresses of workers' names
    """
    settings.setdefault("health", HealthRules(interval=3600.0, failure_threshold=1, success_threshold=1))
    settings.setdefault("metrics_render", named_metrics)
    router = Stack(policy, interval, settings)
    try:
        router.start(urls)
        yield router
    finally:
        router.stop()
