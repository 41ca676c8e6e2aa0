"""A whole router in the test's process: real sockets, real control plane, on an event loop in a thread of its own.

    with stack("http://127.0.0.1:8001", policy="round_robin") as router:
        router.get("/workers").json()                          # speaks HTTP to it
        router.until(lambda: router.worker(url).load == 0)     # waits for what its loop makes true
        router.call(lambda: router.fleet.set_draining(...))    # runs on its loop
        fake = router.fake({"GET /health": answer(503)})       # a FakeWorker on its loop

The assembly mirrors `sglang_router.server`, without options, logs and metrics, so that a test can reach every part.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import uvloop

from fake_worker import FakeWorker, Gate
from sglang_router.admin.app import Context, create_app
from sglang_router.core.events import Listener, Listeners, WorkerChanged
from sglang_router.core.fleet import Fleet
from sglang_router.core.policies import POLICIES, PolicySettings
from sglang_router.core.request import ENDPOINTS
from sglang_router.core.router import PolicyListener, Router
from sglang_router.core.worker import Health, HealthRules, Worker, WorkerSpec
from sglang_router.net.downstream import Downstream
from sglang_router.net.probe import Prober
from sglang_router.net.reports import Surveyor
from sglang_router.net.service import Service
from sglang_router.net.upstream import Upstream

T = TypeVar("T")

WITHIN = 20.0
"""Seconds after which a test that waits has failed; a busy machine is slow."""


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
    """Wakes whoever waits in `Stack.until`, and does what the server's own listener does for workers."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def worker_changed(self, event: WorkerChanged) -> None:
        stack = self._stack
        if event.what == "added":
            stack.prober.start(event.worker)
            stack.surveyor.start(event.worker)
        elif event.what == "removed":
            stack.prober.stop(event.worker)
            stack.surveyor.stop(event.worker)
            stack.upstream.forget(event.worker)
        stack.news.set()
        stack.loop.call_soon(stack.service.wake)

    def finished(self, event: object) -> None:
        self._stack.news.set()


class Stack:
    """One router. Made by `stack`; its parts may be touched through `call` only."""

    def __init__(self, policy: str, interval: float, settings: dict[str, Any]) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self.news = asyncio.Event()
        rng = random.Random(7)
        listeners = Listeners()
        chosen = POLICIES[policy](PolicySettings(), rng)
        self.fleet = Fleet(listeners, lambda: str(uuid.uuid4()))
        self.router = Router(self.fleet, chosen, listeners, rng)
        self.upstream = Upstream(self.loop)
        self.surveyor = Surveyor(self.loop, self.fleet, self.upstream, self.loop.time, interval)
        self.prober = Prober(
            self.loop,
            self.fleet,
            self.upstream,
            self.loop.time,
            unhealthy_interval=0.01,
            meet=self.surveyor.meet,
        )
        self.context = Context(
            fleet=self.fleet,
            router=self.router,
            upstream=self.upstream,
            prober=self.prober,
            clock=self.loop.time,
            **settings,
        )
        self.service = Service(
            self.loop,
            self.router,
            self.upstream,
            listeners,
            create_app(self.context),
            rng,
            endpoints=ENDPOINTS,
            prod=self.prober.prod,
        )
        listeners.add(PolicyListener(chosen))
        listeners.add(_News(self))
        self.port = 0
        self._fakes: list[FakeWorker] = []
        self._server: asyncio.Server | None = None
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
        self._server = server = await self.loop.create_server(lambda: Downstream(self.service), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

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
        for connection in list(self.service.connections):
            connection.transport.abort()
        await self.prober.close()
        await self.surveyor.close()
        await self.upstream.close()
        for fake in self._fakes:
            await fake.stop()
        await asyncio.sleep(0)

    # -- its loop ----------------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the router's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WITHIN)

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function on the router's loop."""

        async def on_loop() -> T:
            return function()

        return self.run(on_loop())

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until something is true; looked at after each change of a worker and each end of a request."""

        async def holds() -> None:
            while not condition():
                self.news.clear()
                await self.news.wait()

        self.run(holds())

    # -- its workers -------------------------------------------------------------------------------------

    def fake(self, script: Mapping[str, bytes | Gate] | None = None) -> FakeWorker:
        """A fake worker that listens; not registered."""
        fake = FakeWorker(script)
        self.run(fake.start())
        self._fakes.append(fake)
        return fake

    def add(self, url: str, **spec: Any) -> Worker:
        """Registers a worker, behind the control plane's back."""
        health = spec.pop("health", self.context.health)
        return self.call(lambda: self.fleet.add(WorkerSpec(url=url, health=health, **spec), self.loop.time()))

    def until_healthy(self, url: str) -> None:
        self.run(self.prober.healthy(self.worker(url), WITHIN))
        assert self.worker(url).health is Health.HEALTHY, self.worker(url).last_error

    def fakes(self, *scripts: Mapping[str, bytes | Gate]) -> list[FakeWorker]:
        """Fake workers, registered and healthy, in this order."""
        made = [self.fake(script) for script in scripts]
        for fake in made:
            self.add(fake.url)
        for fake in made:
            self.until_healthy(fake.url)
        return made

    def worker(self, url: str) -> Worker:
        worker = self.call(lambda: self.fleet.by_url(url))
        assert worker is not None, url
        return worker

    # -- its door ----------------------------------------------------------------------------------------

    def ask(self, method: str, target: str, body: bytes | None = None, **headers: str) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WITHIN)
        with contextlib.closing(connection):
            connection.request(method, target, body, {name.replace("_", "-"): v for name, v in headers.items()})
            got = connection.getresponse()
            fields = {name.lower(): value for name, value in got.getheaders()}
            return Reply(got.status, fields, got.read())

    def get(self, target: str, **headers: str) -> Reply:
        return self.ask("GET", target, None, **headers)

    def post(self, path: str, value: Any = None, **query: str) -> Reply:
        """POSTs a value as JSON (bytes as they are), with a query."""
        target = f"{path}?{urlencode(query)}" if query else path
        if value is None:
            return self.ask("POST", target, b"")
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.ask("POST", target, body, content_type="application/json")


@contextlib.contextmanager
def stack(*urls: str, policy: str = "cache_aware", interval: float = 0.0, **settings: Any) -> Iterator[Stack]:
    """A router in front of workers that are healthy when the block begins.

    `interval`: seconds between two reports of an engine, 0 for none. `settings` are those of Context.
    """
    settings.setdefault("health", HealthRules(interval=3600.0, failure_threshold=1, success_threshold=1))
    settings.setdefault("metrics_render", lambda accept: (f"for {accept}\n".encode(), "text/plain"))
    router = Stack(policy, interval, settings)
    try:
        router.start(urls)
        yield router
    finally:
        router.stop()
