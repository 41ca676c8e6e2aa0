"""Workers from an InferencePool of the Gateway API Inference Extension: the pods that it selects, at its target ports.

    LIST and WATCH of the one pool    --> selector and target ports
      |  they changed                     a new KubernetesSource follows the pods of the new selector
      |  the pool was deleted             its workers are removed
      '- it is not there, or trouble      workers that are known stay, and the reason is told

    apiVersion: inference.networking.k8s.io/v1
    kind: InferencePool
    spec: {selector: {matchLabels: {app: llama}}, targetPorts: [{number: 8000}]}

A pod is a worker at each of the target ports. How pods become workers, and what is done about broken links, is said in
`discovery.kubernetes`; permissions to get, list and watch are needed for pods and for inferencepools.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from typing import Final, NamedTuple
from urllib.parse import quote, urlencode

import msgspec

from sglang_router.discovery.kube_api import KubeError, KubeLink
from sglang_router.discovery.kube_config import KubeAccess, KubeFiles
from sglang_router.discovery.kube_rounds import KubeRhythm, KubeRounds, WatchEnded
from sglang_router.discovery.kubernetes import KubernetesSource
from sglang_router.discovery.owner import WorkerOwner
from sglang_router.discovery.pods import PodMetadata, PodRules
from sglang_router.discovery.progress import LookProgress
from sglang_router.relay.addresses import Addresses
from sglang_router.routing.roles import REGULAR

log = logging.getLogger("sglang_router.discovery")

_API: Final = "/apis/inference.networking.k8s.io/v1"
_HELP: Final = "see docs/endpoint-picker.md"
_MOST_PORTS: Final = 8
"""Target ports that the API allows: each of them is a worker on each pod."""
_CANCELLED_WITHIN: Final = 1.0
"""Seconds after which a task that is to end is told so again."""


class MatchLabels(msgspec.Struct, kw_only=True):
    """`spec.selector`."""

    labels: dict[str, str] | None = msgspec.field(name="matchLabels", default=None)
    expressions: list[msgspec.Raw] | None = msgspec.field(name="matchExpressions", default=None)


class TargetPort(msgspec.Struct, kw_only=True):
    """One of `spec.targetPorts`."""

    number: int = 0


class InferencePoolSpec(msgspec.Struct, kw_only=True):
    """`spec`, as far as it says who the workers are."""

    selector: MatchLabels | None = None
    ports: list[TargetPort] | None = msgspec.field(name="targetPorts", default=None)


class InferencePoolItem(msgspec.Struct, kw_only=True):
    """An InferencePool, or the Status of a watch that fails."""

    metadata: PodMetadata = msgspec.field(default_factory=PodMetadata)
    spec: InferencePoolSpec | None = None
    code: int | None = None
    message: str | None = None


class InferencePoolList(msgspec.Struct, kw_only=True):
    """The list with the pool, or without it."""

    metadata: PodMetadata
    items: list[InferencePoolItem] | None = None


class InferencePoolEvent(msgspec.Struct, kw_only=True):
    """One line of a watch."""

    type: str
    object: InferencePoolItem


class Selected(NamedTuple):
    """Which pods a pool selects, and at which ports they serve."""

    labels: tuple[tuple[str, str], ...]
    ports: tuple[int, ...]


def selected(item: InferencePoolItem) -> Selected:
    """Return what a pool selects. Raises: ValueError, when that cannot be."""
    spec = item.spec or InferencePoolSpec()
    selector = spec.selector or MatchLabels()
    labels = selector.labels or {}
    ports = tuple(dict.fromkeys(port.number for port in spec.ports or ()))
    if selector.expressions:  # without them it would be other pods
        raise ValueError("spec.selector.matchExpressions is not supported: say it with matchLabels")
    if not labels:
        raise ValueError("it selects no pods: spec.selector.matchLabels is empty")
    if not ports or not all(1 <= port <= 65535 for port in ports):
        raise ValueError("spec.targetPorts has no valid port number")
    if len(ports) > _MOST_PORTS:
        raise ValueError(f"spec.targetPorts has {len(ports)} ports, and {_MOST_PORTS} are allowed")
    return Selected(tuple(sorted(labels.items())), ports)


class InferencePoolSource(KubeRounds):
    """See the module.

    name   NAMESPACE/NAME of the pool
    rules  how its pods become workers, but for what the pool says itself
    files  how to reach the API server
    clock  gives seconds
    """

    def __init__(
        self,
        owner: WorkerOwner,
        name: str,
        rules: PodRules,
        files: KubeFiles,
        addresses: Addresses,
        rng: random.Random,
        clock: Callable[[], float],
        rhythm: KubeRhythm | None = None,
    ) -> None:
        super().__init__(files, addresses, rng, clock, rhythm)
        self.owner = owner
        self._namespace, _, self._name = name.partition("/")
        self._rules = rules
        self._own = LookProgress(f"InferencePool {name}", clock)
        self._version = ""
        self._selected: Selected | None = None
        self._pods: KubernetesSource | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<InferencePoolSource {self.looks_at}: {self._selected}>"

    @property
    def looks_at(self) -> str:
        """Which pods, in words."""
        return f"the pods of InferencePool {self._namespace}/{self._name}"

    @property
    def progress(self) -> LookProgress:
        """How well it knows the pods; while it does not know the pool, how well it knows that."""
        return self._own if self._pods is None or self._own.error else self._pods.progress

    async def run(self) -> None:
        """Follow the pool and its pods until it is cancelled."""
        try:
            await self._look_on()
        finally:
            await self._end_pods()

    def _failed(self, error: KubeError, access: KubeAccess) -> None:
        """Note what ended a list or a watch."""
        text = str(error)
        if isinstance(error, WatchEnded) and not error.status:  # a list follows at once
            self._own.failures[error.kind] += 1
            log.debug("%s: %s; listing again", self._own.topic, error)
            return
        if error.status == 404:
            text = f"the API server knows no InferencePool of inference.networking.k8s.io/v1; {_HELP}"
        elif error.status == 403:
            text = f"{error}. The router needs a Role to get, list and watch inferencepools and pods; {_HELP}"
        self._own.failed(error.kind, text)

    def _path(self, **query: str) -> str:
        one = {"fieldSelector": f"metadata.name={self._name}"}
        return f"{_API}/namespaces/{quote(self._namespace, safe='')}/inferencepools?{urlencode(one | query)}"

    async def _list(self, link: KubeLink) -> None:
        """Read the pool. Raises: KubeError."""
        try:
            page = msgspec.json.decode(await link.get(self._path()), type=InferencePoolList)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise KubeError("invalid", f"the API server's list cannot be read: {error}") from None
        self._version = page.metadata.version or ""
        self._own.listed()
        await self._take(next((item for item in page.items or () if item.metadata.name == self._name), None))

    async def _watch_on(self, link: KubeLink) -> None:
        """Watch until the list is old. Raises: WatchEnded."""
        rhythm, until = self.rhythm, self._clock() + self.rhythm.relist * self._rng.uniform(0.8, 1.0)
        while (left := until - self._clock()) > 0.0:
            began, seconds = self._clock(), max(1, math.floor(left))
            query = {"watch": "1", "resourceVersion": self._version, "timeoutSeconds": str(seconds)}
            try:
                lines = await link.stream(self._path(**query, allowWatchBookmarks="true"), left + rhythm.slack)
                async for line in lines:
                    await self._heard(line)
            except KubeError as error:
                raise WatchEnded(error) from None
            await asyncio.sleep(max(0.0, began + rhythm.most - self._clock()))

    async def _heard(self, line: bytes) -> None:
        """Take an event. Raises: KubeError."""
        try:
            event = msgspec.json.decode(line, type=InferencePoolEvent)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise KubeError("invalid", f"the API server's watch cannot be read: {error}") from None
        item = event.object
        if event.type == "ERROR":
            kind = "expired" if item.code == 410 else str(item.code or "error")
            raise KubeError(kind, f"the watch ended: {item.message or 'it does not say why'}")
        self._version = item.metadata.version or self._version
        if event.type in ("ADDED", "MODIFIED", "DELETED") and item.metadata.name == self._name:
            await self._take(None if event.type == "DELETED" else item)

    async def _take(self, item: InferencePoolItem | None) -> None:
        """Follow what the pool selects now. item: None: it is not there."""
        if self._task is not None and self._task.done():  # a fault in the router
            self._task.result()
        if item is None:
            known, self._selected = self._selected, None
            await self._end_pods()
            if known is not None:
                await self.owner.follow({})
            self._own.failed("absent", f"there is no InferencePool {self._namespace}/{self._name}")
            return
        try:
            found = selected(item)
        except ValueError as error:
            self._own.failed("invalid", str(error))
            return
        self._own.succeeded()
        if found != self._selected:
            self._selected = found
            await self._begin_pods(found)

    async def _begin_pods(self, found: Selected) -> None:
        """Follow the pods of a selector from now on."""
        await self._end_pods()
        rules = msgspec.structs.replace(self._rules, roles={REGULAR: dict(found.labels)}, target_ports=found.ports)
        self._pods = KubernetesSource(
            self.owner,
            rules,
            self._namespace,
            self._files,
            self._addresses,
            self._rng,
            self._clock,
            self.rhythm,
        )
        log.info("%s: following %s, ports %s", self._own.topic, self._pods.looks_at, ",".join(map(str, found.ports)))
        self._task = asyncio.get_running_loop().create_task(self._pods.run())

    async def _end_pods(self) -> None:
        """Follow no pods any more; workers stay."""
        task, self._task, self._pods = self._task, None, None
        while task is not None and not task.done():
            task.cancel()
            # Again, because before Python 3.12 `asyncio.wait_for` can swallow a cancellation.
            await asyncio.wait((task,), timeout=_CANCELLED_WITHIN)
