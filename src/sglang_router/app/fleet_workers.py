"""Workers that an operator adds or removes at one router, and by its word at all (--shared-state-workers).

    POST /add_worker, /workers  --> added(worker)    --+--> `routing.shared.workers` --> the other routers
    /remove_worker, DELETE      --> removed(workers) --'                                      |
    fleet <-- add, remove <-- what another router has told  <---------------------------------'

A description is the worker as a state file has it (`restart.saved_worker`): its URL, and what differs from the options.
It never holds a key: each router sends the worker the key of its own options. So a worker with a key of its own stays
at its router, and so do single ranks of an engine. Who can write such a description can make routers send their
requests and that key to any URL; so the option needs a file with the key of the fleet, which seals all messages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from sglang_router.errors import ConfigError
from sglang_router.restart import saved_worker
from sglang_router.restart.saved_worker import SavedWorker
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.shared.secret import is_local
from sglang_router.routing.shared.workers import LONGEST, SharedWorkers
from sglang_router.routing.source import Source
from sglang_router.routing.worker import Worker
from sglang_router.workers.sources import ConfiguredWorkers, WorkerDefaults

log = logging.getLogger("sglang_router.sharing")

_ADDED = "the other routers of the fleet add it too"
_REMOVED = "the other routers of the fleet remove it too"
_ADDED_HERE = "the other routers of this machine add it too: for others its address is their own"
_REMOVED_HERE = "the other routers of this machine remove it too"
_OWN_KEY = "only this router has it, because of its own API key"
_RANK = "only this router has this rank now"
_TOO_LONG = "only this router has it, because its description is too long"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SavedWorker).decode


class FleetWorkers:
    """See the module. It is the `WorkerHands` of what is heard.

    defaults  what the options say of each worker; which workers they name plays no part
    shared    what tells and hears of it
    """

    shared: SharedWorkers

    def __init__(self, fleet: Fleet, defaults: WorkerDefaults, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._configured = ConfiguredWorkers(defaults)
        self._clock = clock

    # -- what an operator does here ------------------------------------------------------------------------------------

    def added(self, worker: Worker) -> str:
        """Tell the other routers of a worker that an operator has added; return in words whether they add it."""
        if worker.dp_rank is not None:
            return _RANK
        if not self._is_shared(worker):
            return _OWN_KEY
        (saved,) = saved_worker.save([worker], self._configured)
        described = _encode(msgspec.structs.replace(saved, id="", slot=-1, draining=False, paused=[], weights=""))
        if len(described) > LONGEST:
            return _TOO_LONG
        self.shared.said(worker.spec.url, described)
        return _ADDED_HERE if is_local(worker.spec.url) else _ADDED

    def removed(self, workers: Sequence[Worker]) -> str:
        """Tell the other routers of workers of one engine that an operator has removed; return in words whether they
        remove it, "" for one that they were never told of."""
        worker = workers[0]
        if self._fleet.entries(worker.spec.url) or not self._is_shared(worker):
            return ""
        self.shared.said(worker.spec.url, None)
        return _REMOVED_HERE if is_local(worker.spec.url) else _REMOVED

    # -- what another router has told ----------------------------------------------------------------------------------

    def url(self, described: bytes) -> str:
        """Return the URL in a description. Raises: ValueError, for one that cannot be used."""
        return self._read(described).url

    def has(self, url: str) -> bool:
        """Return whether it is a worker here that an operator has added, at this router or another one."""
        return any(self._is_shared(worker) for worker in self._fleet.entries(url))

    def add(self, described: bytes) -> None:
        """Add a worker, unless its URL is known."""
        saved = self._read(described)
        spec = saved.spec_today(self._configured)
        if spec is not None and not self._fleet.entries(saved.url):
            self._fleet.add(spec, self._clock())
            log.info("added %s: an operator has added it at another router of the fleet", saved.url)

    def remove(self, url: str) -> None:
        """Remove a worker that an operator has added, if it is one."""
        there = [worker for worker in self._fleet.entries(url) if self._is_shared(worker)]
        for worker in there:
            self._fleet.remove(worker)
        if there:
            log.info("removed %s: an operator has removed it at another router of the fleet", url)

    def _read(self, described: bytes) -> SavedWorker:
        """Return what a description says. Raises: ValueError."""
        if len(described) > LONGEST:
            raise ValueError("a description is too long")
        try:
            saved = _decode(described)
            saved_worker.check([saved])
        except (msgspec.MsgspecError, ConfigError) as error:
            raise ValueError(str(error)) from None
        more = saved.changes.known().keys() & {"api_key", "origin", "instance"}
        if more or saved.source is not Source.API or saved.dp_rank is not None:
            raise ValueError("a description says more than an operator may")
        return saved

    def _is_shared(self, worker: Worker) -> bool:
        """Return whether all routers may have a worker by an operator's word at one of them."""
        spec = worker.spec
        return spec.source is Source.API and spec.api_key == self._configured.defaults.api_key
