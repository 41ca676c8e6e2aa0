"""A router whose workers come from a source under test: a real fleet, on the loop of `stack`.

with kube_scene() as scene:
    scene.api.create("p1", "127.0.0.21")        # on the loop: scene.do(lambda: ...)
    scene.until(lambda: scene.urls() == [...])
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fake_kube import FakeKube
from sglang_router.discovery.discovery import Discovery, Looking
from sglang_router.discovery.inference_pool import InferencePoolSource
from sglang_router.discovery.kube_config import KubeAccess, KubeFiles
from sglang_router.discovery.kube_rounds import KubeRhythm
from sglang_router.discovery.kubernetes import KubernetesSource
from sglang_router.discovery.owner import Hands, WorkerOwner
from sglang_router.discovery.pods import PodRules
from sglang_router.relay.addresses import Addresses
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source, SourceReport
from sglang_router.routing.worker import Worker
from sglang_router.workers.sources import WorkerDefaults
from stack import WITHIN, Stack, stack

QUICK = KubeRhythm(relist=3600.0, quiet=0.005, longest=0.05, first=0.005, most=0.02, refused=0.02)
"""No list but the first one and those after trouble; short pauses."""
ENGINES = PodRules(roles={"regular": {"app": "engine"}}, port=8000)
DEFAULTS = WorkerDefaults(None, False, HealthRules(enabled=False))
"""Workers are healthy at once."""


def url(number: int, port: int = 8000) -> str:
    return f"http://127.0.0.{number}:{port}"


class Scene:
    """See the module."""

    def __init__(self, router: Stack) -> None:
        self.router = router
        self.fleet = router.fleet
        self.discovery: Discovery

    def owner(self, source: Source, defaults: WorkerDefaults = DEFAULTS) -> WorkerOwner:
        router = self.router
        hands = Hands(router.fleet, router.app.membership, router.checks, router.loop.time)
        return WorkerOwner(source, hands, defaults)

    def begin(self, make: Callable[[], Looking]) -> None:
        """Start a source."""

        def start() -> None:
            self.discovery = Discovery(self.router.loop, [make()])
            self.router.context.discovery = self.discovery.reports
            self.discovery.start()

        self.router.call(start)

    def end(self) -> None:
        self.router.run(self.discovery.close())

    def do(self, *functions: Callable[[], Any]) -> Any:
        """Run functions on the loop, with nothing in between; return what the last one returned."""
        return self.router.call(lambda: [function() for function in functions][-1])

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds on the router's loop."""

        async def holds() -> None:
            while not condition():  # noqa: ASYNC110 - what a source knows is no event
                await asyncio.sleep(0.002)

        async def within() -> None:
            await asyncio.wait_for(holds(), WITHIN)

        try:
            asyncio.run_coroutine_threadsafe(within(), self.router.loop).result(WITHIN + 5)
        except (TimeoutError, asyncio.TimeoutError):
            raise AssertionError(f"it never came true; {list(self.fleet)!r} {self.discovery!r}") from None

    def urls(self) -> list[str]:
        """All workers, in order of their URLs."""
        return sorted(worker.url for worker in self.fleet)

    def until_urls(self, *expected: str) -> None:
        self.until(lambda: self.urls() == sorted(expected))

    def worker(self, name: str) -> Worker:
        return self.router.worker(name)

    @property
    def report(self) -> SourceReport:
        (report,) = self.do(self.discovery.reports)
        assert isinstance(report, SourceReport)
        return report

    def report_error(self) -> str:
        """Why the source does not know its workers; "": it does. To be called on the loop, as by `until`."""
        (report,) = self.discovery.reports()
        return report.error or ""


class KubeScene(Scene):
    """A router and an API server."""

    api: FakeKube


class Token:
    """A token that can be replaced, as a file of it would be."""

    def __init__(self, api: FakeKube, value: str = "t1") -> None:
        self.value = value
        self._api = api

    def access(self, used: set[str]) -> KubeAccess:
        return KubeAccess("127.0.0.1", self._api.port, "127.0.0.1", "", None, self.value, "the token file")


class FreshFiles(KubeFiles):
    """Files that are read again each time, with no file behind them."""

    def __init__(self, load: Callable[[set[str]], KubeAccess]) -> None:
        self._now = load

    def access(self) -> KubeAccess:
        return self._now(set())


@contextlib.contextmanager
def scene(**settings: Any) -> Iterator[Scene]:
    with stack(**settings) as router:
        made = Scene(router)
        try:
            yield made
        finally:
            made.end()


@contextlib.contextmanager
def kube_scene(
    prepare: Callable[[FakeKube], Any] = lambda api: None,
    rules: PodRules = ENGINES,
    rhythm: KubeRhythm = QUICK,
    namespace: str | None = "llm",
    files: Callable[[FakeKube], KubeFiles] | None = None,
    up: bool = True,
    defaults: WorkerDefaults = DEFAULTS,
    pool: str = "",
) -> Iterator[KubeScene]:
    """Yield a router that follows an API server.

    prepare  what is there before
    up       whether the server listens
    pool     the InferencePool whose pods it follows, in place of those that the rules select
    """
    with stack() as router:
        made = KubeScene(router)
        made.api = api = FakeKube()
        router.run(api.start())
        if not up:
            router.run(api.stop())
        router.call(lambda: prepare(api))
        where = files or (lambda api: FreshFiles(Token(api).access))

        def source() -> Looking:
            owner = made.owner(Source.KUBERNETES, defaults)
            others = (where(api), Addresses(router.loop), random.Random(1), router.loop.time, rhythm)
            if pool:
                return InferencePoolSource(owner, pool, rules, *others)
            return KubernetesSource(owner, rules, namespace, *others)

        made.begin(source)
        try:
            yield made
        finally:
            made.end()
            router.run(api.stop())


def write_anew(path: Path, text: str) -> None:
    """Replace a file at once."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def kubeconfig(path: Path, cluster: dict[str, Any], user: dict[str, Any] | None, namespace: str | None = None) -> str:
    """Write a kubeconfig with one context; JSON is YAML too."""
    context = {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})
    content: dict[str, Any] = {"apiVersion": "v1", "kind": "Config", "current-context": "x"}
    content["clusters"] = [{"name": "c", "cluster": cluster}]
    content["users"] = [{"name": "u", "user": user}]
    content["contexts"] = [{"name": "x", "context": context}]
    path.write_text(json.dumps(content))
    return str(path)
