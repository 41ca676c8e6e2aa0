"""Workers from Kubernetes: the pods that the API server lists, kept up to date by a watch.

    LIST, page by page      --> all pods: known, complete       --> a pass
      |
    WATCH from there on     --> events, each on a known pod     --> a pass, once they pause
      |  ends as told       --> WATCH again from the last version, until the list is a minute old; then LIST
      '- ends otherwise     --> LIST at once, then with growing pauses of at most a second or two
         (410, reset, silence)

The last complete list with the events since then is all that is known, and each pass compares the whole of it with the
workers (`discovery.reconcile`). So an event that was lost, with a connection that was cut or stayed silent, is made
good by the next list, which begins at once after any trouble and once a minute without. While the API server is away,
or refuses, nothing is known to be gone, and all workers stay.

Each round has a connection of its own: a new one finds out what an old one cannot say.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from typing import Final

import msgspec

from sglang_router.discovery.kube_api import KubeError, KubeLink, shown
from sglang_router.discovery.kube_config import KubeAccess, KubeFiles
from sglang_router.discovery.kube_rounds import REFUSED, KubeRhythm, KubeRounds, WatchEnded
from sglang_router.discovery.owner import WorkerOwner
from sglang_router.discovery.pod_answers import list_query, pods_path, read_event, read_page, watch_query
from sglang_router.discovery.pods import Pod, PodItem, PodRules, workers
from sglang_router.discovery.progress import LookProgress
from sglang_router.relay.addresses import Addresses

log = logging.getLogger("sglang_router.discovery")

_MOST_PODS: Final = 20_000
"""Pods that are kept; a selector that fits more is a mistake."""
_MOST_PAGES: Final = 2_000
"""Pages of a list; a page may be empty, but a list without end is none."""
_GONE: Final = 410
_ERRORS: Final = range(400, 600)
"""What the code of an ERROR may be: each is a label of a metric."""
_HELP: Final = "see docs/kubernetes.md"


class KubernetesSource(KubeRounds):
    """See the module.

    rules      how pods become workers
    namespace  whose pods; None: of all namespaces
    files      how to reach the API server
    clock      gives seconds; that of `progress`
    """

    def __init__(
        self,
        owner: WorkerOwner,
        rules: PodRules,
        namespace: str | None,
        files: KubeFiles,
        addresses: Addresses,
        rng: random.Random,
        clock: Callable[[], float],
        rhythm: KubeRhythm | None = None,
    ) -> None:
        super().__init__(files, addresses, rng, clock, rhythm)
        self.owner = owner
        self.progress = LookProgress("Kubernetes", clock)
        self._rules = rules
        self._namespace = namespace
        self._pods: dict[str, Pod] = {}  # by namespace and name; the last complete list, and the events since
        self._version = ""  # of `_pods`
        self._changed = asyncio.Event()  # an event since the last pass
        self._passing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<KubernetesSource {self.looks_at}: {len(self._pods)} pods, {self.progress!r}>"

    @property
    def looks_at(self) -> str:
        """Which pods, in words."""
        labels = ",".join(f"{key}={value}" for key, value in sorted(self._rules.common.items())) or "any labels"
        space = "all namespaces" if self._namespace is None else f"namespace {self._namespace}"
        return f"pods with {labels} in {space}"

    async def run(self) -> None:
        """Follow the pods until it is cancelled."""
        passes = asyncio.get_running_loop().create_task(self._gather_changes())
        try:
            await self._look_on()
        finally:
            passes.cancel()

    def _failed(self, error: KubeError, access: KubeAccess) -> None:
        """Note what ended a list or a watch. A watch that breaks is no trouble yet: a list follows at once."""
        if isinstance(error, WatchEnded) and error.status not in REFUSED:
            self.progress.failures[error.kind] += 1
            log.debug("Kubernetes: %s; listing again", error)
        else:
            self.progress.failed(error.kind, self._explained(error, access))

    async def _gather_changes(self) -> None:
        """Make a pass when events pause, or when the first of them is old enough."""
        rhythm = self.rhythm
        while True:
            await self._changed.wait()
            until = self._clock() + rhythm.longest
            while self._changed.is_set() and (left := until - self._clock()) > 0.0:
                self._changed.clear()
                await asyncio.sleep(min(rhythm.quiet, left))
            self._changed.clear()
            try:
                await self._pass()
            except Exception:  # a fault here must not end the passes
                log.exception("Kubernetes: a pass failed in the router")

    # -- list ----------------------------------------------------------------------------------------------------------

    async def _list(self, link: KubeLink) -> None:
        """Read all pods, and make a pass. Raises: KubeError."""
        path, following = pods_path(self._namespace), None
        found: dict[str, Pod] = {}
        for _ in range(_MOST_PAGES):
            try:
                page = read_page(await link.get(f"{path}?{list_query(self._rules, following)}"))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise KubeError("invalid", f"the API server's list cannot be read: {error}") from None
            for item in page.items or ():
                pod = self._read(item)
                found[pod.name] = pod
            if len(found) > _MOST_PODS:
                raise KubeError("invalid", f"more than {_MOST_PODS} pods fit the selector")
            following = page.metadata.following
            if not following:
                break
        else:
            raise KubeError("invalid", f"the API server's list has more than {_MOST_PAGES} pages")
        self._pods, self._version = found, page.metadata.version or ""
        self.progress.listed()
        await self._pass()

    def _read(self, item: PodItem) -> Pod:
        pod = Pod.read(item, self._rules)
        return pod.after(self._pods.get(pod.name))

    async def _pass(self) -> None:
        """Compare all pods with the workers."""
        async with self._passing:
            wanted, complaints = workers(self._pods.values())
            self.progress.complaints(complaints)
            await self.owner.follow(wanted)

    # -- watch ---------------------------------------------------------------------------------------------------------

    async def _watch_on(self, link: KubeLink) -> None:
        """Watch until the list is old. Raises: WatchEnded."""
        rhythm, until = self.rhythm, self._clock() + self.rhythm.relist * self._rng.uniform(0.8, 1.0)
        while (left := until - self._clock()) > 0.0:
            began = self._clock()
            try:
                await self._watch(link, max(1, math.floor(left)), left + rhythm.slack)
            except KubeError as error:
                raise WatchEnded(error) from None
            # A server, or a proxy in front of it, that ends each watch at once is not asked in a tight loop.
            await asyncio.sleep(max(0.0, began + rhythm.most - self._clock()))

    async def _watch(self, link: KubeLink, seconds: int, within: float) -> None:
        """Follow the events of one watch to its end. Raises: KubeError."""
        query = watch_query(self._rules, self._version, seconds)
        lines = await link.stream(f"{pods_path(self._namespace)}?{query}", within)
        self.progress.succeeded()
        async for line in lines:
            if self._heard(line):
                self._changed.set()

    def _heard(self, line: bytes) -> bool:
        """Take an event; return whether it concerns a pod. Raises: KubeError."""
        try:
            event = read_event(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise KubeError("invalid", f"the API server's watch cannot be read: {error}") from None
        item = event.object
        if event.type == "ERROR":
            code = item.code if item.code in _ERRORS else None
            kind = "expired" if code == _GONE else str(code or "error")
            raise KubeError(kind, f"the watch ended: {shown(item.message or '') or 'it does not say why'}")
        self._version = item.metadata.version or self._version
        if event.type not in ("ADDED", "MODIFIED", "DELETED"):
            return False
        pod = self._read(item)
        if event.type != "DELETED":
            if len(self._pods) >= _MOST_PODS and pod.name not in self._pods:
                raise KubeError("invalid", f"more than {_MOST_PODS} pods fit the selector")
            self._pods[pod.name] = pod
        elif (known := self._pods.get(pod.name)) is not None and known.uid == pod.uid:
            del self._pods[pod.name]
        return True

    def _explained(self, error: KubeError, access: KubeAccess) -> str:
        """Return what went wrong, and what to do about it."""
        if error.status == 403:
            kind, where = ("Role", f"in namespace {self._namespace}")
            if self._namespace is None:
                kind, where = "ClusterRole", "for all namespaces, or name one with --service-discovery-namespace"
            return f"{error}. The router needs a {kind} to get, list and watch pods {where}; {_HELP}"
        if error.status == 401:
            return f"{error}. It is read again before each list; {_HELP}"
        return str(error)
