"""Makes the workers of one source what it wants: applies the steps of `discovery.reconcile` to the fleet.

    owner = WorkerOwner(Source.KUBERNETES, hands, defaults)
    await owner.follow({url: WantedWorker(...), ...})         one pass, with everything that the source names now

The fleet is the only memory of who owns which worker: `WorkerSpec.source`, `origin` and `instance`. So a pass after a
restart takes over what the state file restored. Long passes let the event loop do other work in between; passes of one
owner do not overlap, because its source waits for each.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from sglang_router.discovery import reconcile
from sglang_router.discovery.reconcile import Present, Step, WantedWorker
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.workers.health_checks import HealthChecks
from sglang_router.workers.membership import Membership
from sglang_router.workers.sources import WorkerDefaults

log = logging.getLogger("sglang_router.discovery")

_SLICE: Final = 16
"""Steps of a pass between which nothing else runs."""
GONE: Final = "gone"
"""Why a worker was removed: its source does not name it any more."""
REPLACED: Final = "replaced"
"""Why a worker was removed: another instance has its URL."""


class Hands(NamedTuple):
    """What an owner acts through. clock: gives the fleet's time."""

    fleet: Fleet
    membership: Membership
    checks: HealthChecks
    clock: Callable[[], float]


class WorkerOwner:
    """See the module.

    source    whose workers these are
    defaults  what the options say of workers of which the source says nothing
    passes    how often `follow` was called; added, removed: workers, the latter by reason
    """

    def __init__(self, source: Source, hands: Hands, defaults: WorkerDefaults) -> None:
        self.source = source
        self.defaults = defaults
        self.passes = 0
        self.added = 0
        self.removed: Counter[str] = Counter()
        self._fleet, self._membership, self._checks, self._clock = hands
        self._told: dict[str, WantedWorker] = {}
        self._mentioned: set[tuple[str, str, str]] = set()  # what was said once: act, URL, instance
        self._acts: Mapping[str, Callable[[str, WantedWorker | None], None]] = {
            reconcile.ADD: self._add,
            reconcile.REPLACE: self._replace,
            reconcile.AMEND: self._amend,
            reconcile.WITHHOLD: self._withhold,
            reconcile.REMOVE: self._remove,
            reconcile.FOREIGN: self._foreign,
            reconcile.DISMISSED: self._dismissed,
        }

    def __repr__(self) -> str:
        return f"<WorkerOwner of {len(self.present())} workers from {self.source.value}>"

    def present(self) -> dict[str, Present]:
        """Return the workers of this source, by URL; ranks of one engine are one."""
        return {spec.url: there for spec, there in self._everybody() if spec.source is self.source}

    def urls_of(self, origin: str) -> list[str]:
        """Return the URLs of the workers that came from there."""
        mine = [worker.spec for worker in self._fleet if worker.spec.source is self.source]
        return list(dict.fromkeys(spec.url for spec in mine if spec.origin == origin))

    def untouched(self) -> Iterator[WantedWorker]:
        """Return its workers as what to want in order to change nothing of them."""
        for worker in self._fleet:
            spec = worker.spec
            if spec.source is self.source:
                before = self._told.get(spec.url)
                yield WantedWorker(
                    url=spec.url,
                    said={} if before is None else before.said,
                    origin=spec.origin,
                    instance=spec.instance,
                    addable=False,
                    withheld=worker.withheld,
                )

    async def follow(self, wanted: Mapping[str, WantedWorker]) -> None:
        """Make the workers of this source those."""
        self.passes += 1
        present = {spec.url: there for spec, there in self._everybody() if self._concerns(spec, wanted)}
        steps = reconcile.difference(self.source, wanted, present, self._told)
        idle = {(step.act, step.url) for step in steps if step.act in (reconcile.FOREIGN, reconcile.DISMISSED)}
        self._mentioned = {each for each in self._mentioned if each[:2] in idle}
        for number, step in enumerate(steps, 1):
            self._acts[step.act](step.url, step.wanted)
            if not number % _SLICE:
                await asyncio.sleep(0)
        self._told = {url: each for url, each in self._told.items() if url in wanted}
        self._tell(wanted, steps)

    def _everybody(self) -> list[tuple[WorkerSpec, Present]]:
        found = []
        for worker in self._fleet:
            spec = worker.spec
            found.append((spec, Present(spec.source, spec.instance, worker.withheld)))
        return found

    def _concerns(self, spec: WorkerSpec, wanted: Mapping[str, WantedWorker]) -> bool:
        return spec.source is self.source or spec.url in wanted

    def _tell(self, wanted: Mapping[str, WantedWorker], steps: list[Step]) -> None:
        """Keep what the source said of the workers that are its own now."""
        others = {step.url for step in steps if step.act in (reconcile.FOREIGN, reconcile.DISMISSED)}
        for url, each in wanted.items():
            entries = self._fleet.entries(url)
            if url not in others and entries and entries[0].spec.source is self.source:
                self._told[url] = each

    # -- the steps -----------------------------------------------------------------------------------------------------

    def _add(self, url: str, wanted: WantedWorker | None) -> None:
        assert wanted is not None
        if self._fleet.entries(url):  # an operator was faster
            return
        spec = self.defaults.spec(url, self.source)
        worker = self._fleet.add(_described(spec, wanted), self._clock())
        self._fleet.withhold(worker, wanted.withheld)
        self.added += 1

    def _replace(self, url: str, wanted: WantedWorker | None) -> None:
        self._end(url, REPLACED)
        self._add(url, wanted)

    def _remove(self, url: str, wanted: WantedWorker | None) -> None:
        self._end(url, GONE)

    def _end(self, url: str, why: str) -> None:
        for worker in self._fleet.entries(url):
            if worker.spec.source is self.source:
                self._fleet.remove(worker)
                self.removed[why] += 1

    def _amend(self, url: str, wanted: WantedWorker | None) -> None:
        """Give a worker what its source says of it now; the rest of what an operator said stays."""
        assert wanted is not None
        before = self._told.get(url)
        unsaid = {} if before is None else {name: _default(self.defaults, name) for name in before.said}
        for worker in self._fleet.entries(url):
            spec = _described(msgspec.structs.replace(worker.spec, **unsaid), wanted)
            if spec != worker.spec:
                self._membership.amend(worker, spec)

    def _withhold(self, url: str, wanted: WantedWorker | None) -> None:
        assert wanted is not None
        for worker in self._fleet.entries(url):
            self._fleet.withhold(worker, wanted.withheld)
            self._checks.check_now(worker)  # its engine may be restarting: that is noticed by a check that fails

    def _foreign(self, url: str, wanted: WantedWorker | None) -> None:
        owner = next((worker.spec.source.value for worker in self._fleet.entries(url)), "nobody")
        self._mention(
            reconcile.FOREIGN, url, wanted, "%s is known from %s already, and stays as it is there", url, owner
        )

    def _dismissed(self, url: str, wanted: WantedWorker | None) -> None:
        text = "%s was removed by an operator, and stays out until there is another instance of it"
        self._mention(reconcile.DISMISSED, url, wanted, text, url)

    def _mention(self, act: str, url: str, wanted: WantedWorker | None, text: str, *words: object) -> None:
        """Log something once for each instance."""
        assert wanted is not None
        about = (act, url, wanted.instance)
        if about not in self._mentioned:
            self._mentioned.add(about)
            named = f" ({wanted.origin})" if wanted.origin else ""
            log.info(f"{self.source.value}: {text}%s", *words, named)


def _described(spec: WorkerSpec, wanted: WantedWorker) -> WorkerSpec:
    described: WorkerSpec = msgspec.structs.replace(spec, **wanted.said, origin=wanted.origin, instance=wanted.instance)
    return described


def _default(defaults: WorkerDefaults, name: str) -> Any:
    return getattr(defaults.spec("", Source.API), name)
