"""The periodic jobs of a router: one table, one timer for each job.

    job         every                                what
    sweep       0.25 s                               check deadlines and the queue
    trim        1 s                                  close old idle connections to workers
    lag         0.25 s                               measure by how much this timer is late
    keepalive   0.25 s                               fill the silence of streams, with --sse-keepalive-secs
    judge       1 s (5 s with 200 workers or more)   eject outliers, and let them return
    watchdog    a third of WatchdogSec=              tell systemd that the event loop turns
    peers       0.5 s                                forget routers of the fleet that are silent, with --shared-state
    points      10 s                                 keep a point of the page's curves
    renew       2 s                                  load certificates and keys that were renewed
    collect     1 s                                  collect the youngest generation of garbage
    tidy        --eviction-interval-secs             clean up the policies' memories in small steps

The cyclic garbage collector must not pause requests: what exists after the start is frozen, automatic collection is
off, and the prefix tree is invisible to the collector by construction (see `routing.prefix_tree.tree`). A router that
runs in a thread of another program leaves that program its collector.
"""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglang_router.access.watched import Renewed
from sglang_router.relay.clients import Clients
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.silences import KeepAlives
from sglang_router.restart.systemd import Notifier
from sglang_router.routing.router import Router
from sglang_router.sharing.sharing import FleetSharing

_SWEEP_EVERY = 0.25
_TRIM_EVERY = 1.0
_JUDGE_EVERY = 1.0
_LARGE_FLEET = 200
_PEERS_EVERY = 0.5
_RENEW_EVERY = 2.0
_COLLECT_EVERY = 1.0
_TIDY_STEPS = 512
_TIDY_PAUSE = 0.01


class Job(NamedTuple):
    """A periodic job. run: does it once, and returns the seconds until the next time."""

    name: str
    run: Callable[[], float]


def keepalive(keepalives: KeepAlives | None) -> tuple[Job, ...]:
    """Return the job that fills the silence of streams; none where no option asks for it."""
    if keepalives is None:
        return ()
    look = keepalives.look

    def run() -> float:
        look()
        return _SWEEP_EVERY

    return (Job("keepalive", run),)


def lag(clock: Callable[[], float], late: Callable[[float], None]) -> Job:
    """Return the job that measures by how many seconds timers of the event loop are late, and tells `late`."""
    due = math.inf

    def run() -> float:
        nonlocal due
        now = clock()
        if due < math.inf:
            late(max(now - due, 0.0))
        due = now + _SWEEP_EVERY
        return _SWEEP_EVERY

    return Job("lag", run)


def watchdog(notifier: Notifier) -> tuple[Job, ...]:
    """Return the job that tells systemd that the event loop turns; none where it does not ask."""
    if not notifier.watchdog:
        return ()

    def run() -> float:
        notifier.tell("WATCHDOG=1")
        return notifier.watchdog / 3

    return (Job("watchdog", run),)


def peers(sharing: FleetSharing | None) -> tuple[Job, ...]:
    """Return the job that forgets routers that are silent; none where no option asks for others."""
    if sharing is None:
        return ()
    look = sharing.look

    def run() -> float:
        look()
        return _PEERS_EVERY

    return (Job("peers", run),)


def points(sample: Callable[[], float]) -> Job:
    """Return the job that keeps the page's figures of the last half an hour."""
    return Job("points", sample)


class Jobs:
    """Runs jobs on an event loop from `start` until `close`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, jobs: Sequence[Job]) -> None:
        self._loop = loop
        self._jobs = jobs
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._paused_collector = False

    def __repr__(self) -> str:
        return f"<Jobs {', '.join(job.name for job in self._jobs)}>"

    def start(self) -> None:
        """Run each job now and periodically; turn off automatic garbage collection, which is a job too."""
        for job in self._jobs:
            self._run(job)
        if gc.isenabled() and threading.current_thread() is threading.main_thread():
            self._paused_collector = True
            gc.freeze()
            gc.disable()

    def _run(self, job: Job) -> None:
        self._timers[job.name] = self._loop.call_later(job.run(), self._run, job)

    def close(self) -> None:
        """Stop all jobs; give the collector back to a program that goes on without the router."""
        for timer in self._timers.values():
            timer.cancel()
        if self._paused_collector:
            gc.enable()
            gc.unfreeze()


def relaying(
    clock: Callable[[], float],
    clients: Sequence[Clients],
    connections: ConnectionPool,
    look: Callable[[float], None],
    watched: Sequence[Renewed],
) -> tuple[Job, ...]:
    """Return the jobs of all that serve clients.

    clients  the registries whose deadlines are checked
    look     called with the time at each sweep
    watched  files, and keys of an issuer, that are loaded again when they change
    """

    def sweep() -> float:
        for each in clients:
            each.sweep()
        look(clock())
        return _SWEEP_EVERY

    def trim() -> float:
        connections.trim()
        return _TRIM_EVERY

    def renew() -> float:
        for files in watched:
            files.refresh()
        return _RENEW_EVERY

    def collect() -> float:
        gc.collect(0)  # cycles left by the requests of the last second; there should be none
        return _COLLECT_EVERY

    return Job("sweep", sweep), Job("trim", trim), Job("renew", renew), Job("collect", collect)


def table(
    clock: Callable[[], float],
    clients: Sequence[Clients],
    connections: ConnectionPool,
    router: Router,
    watched: Sequence[Renewed],
    tidy_every: float,
) -> tuple[Job, ...]:
    """Return the jobs of a router: those of `relaying`, and of what decides.

    tidy_every  seconds between two clean-ups of the policies' memories
    """
    fleet = router.fleet

    def judge() -> float:
        fleet.judge(clock())
        return _JUDGE_EVERY if len(fleet) < _LARGE_FLEET else 5 * _JUDGE_EVERY

    def tidy() -> float:
        if fleet.pools.tidy(clock(), _TIDY_STEPS):
            return _TIDY_PAUSE
        gc.collect()
        return tidy_every

    common = relaying(clock, clients, connections, router.look, watched)
    return (*common, Job("judge", judge), Job("tidy", tidy))
