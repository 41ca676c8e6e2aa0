"""A relay process: clients and connections to workers, and no state of routing.

    run      make the parts; connect to the decider; serve until the decider says that the router ends
    a frame of the decider --> answers to questions, workers, orders of the life cycle
    link lost --> connect again; what clients have goes on meanwhile

Signals that are meant for the router reach the supervisor. What relays log goes to the decider, so that logs are
written in one place; while that is away, to standard error.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import logging
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from sglang_router.admin.exchange import ControlPlane
from sglang_router.app import front, settings
from sglang_router.app.admission import admission
from sglang_router.app.issuer import tokens_of
from sglang_router.app.jobs import Jobs, keepalive, relaying
from sglang_router.app.listening import open_all, servers_on
from sglang_router.app.looping import on_loop
from sglang_router.app.traces import ids_of
from sglang_router.config import RouterArgs
from sglang_router.config.keys import ClientKey, ControlKey
from sglang_router.processes import message, messages, sockets
from sglang_router.processes.control import ControlProxy
from sglang_router.processes.facing import target_of
from sglang_router.processes.given import LEADING, PASSED, Given, Launch
from sglang_router.processes.link import Link, decode_from_decider
from sglang_router.processes.logs import RelayLog
from sglang_router.processes.remote import GRACE, RemoteDecider, Reporter
from sglang_router.processes.texts import TextRing
from sglang_router.relay.addresses import system_look_up
from sglang_router.relay.frontend import Frontend
from sglang_router.relay.relay import Relay
from sglang_router.relay.vanished import take_back
from sglang_router.routing.roles import REGULAR

log = logging.getLogger("sglang_router.processes")

_AGAIN = 0.05
"""Seconds between two tries to connect to the decider."""


def relay_for(args: RouterArgs, given: Given, index: int, start: Launch) -> int:
    """Run one relay process until the router ends; return its exit status. index: which one it is, from 0."""
    for share in given.sockets:  # a copy here would keep a socket open after its own relay has closed it
        sockets.close([sock for sock in share if sock not in given.sockets[index]])
    if given.inherited is not None:
        given.inherited.close()
    for number in LEADING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*LEADING, *PASSED.values()))
    mine = copy.copy(args)
    mine.max_buffered_request_bytes = max(args.max_buffered_request_bytes // args.relay_processes, 65536)
    return on_loop(lambda loop: RelayProcess(mine, loop, given, index, start).run())


class RelayProcess:
    """See the module."""

    def __init__(
        self, args: RouterArgs, loop: asyncio.AbstractEventLoop, given: Given, index: int, start: Launch
    ) -> None:
        self._args = args
        self._loop = loop
        self._given = given
        self._index = index
        self._start = start
        self._clock = clock = time.monotonic
        self._log = RelayLog(args.log_level, args.log_format, index)
        self._log.attach()
        rng = random.Random()
        self._tls, worker_tls = settings.server_tls(args), settings.worker_tls(args)
        tokens, self._issuer = tokens_of(args, loop, clock)
        access, key_files = settings.access_rules(args, tokens=tokens, wall=time.time)
        answers = front.answers_of(args, rng, given.mark)
        forward = settings.forward_rules(args, access, given.mark)
        self._connections = connections = front.connections_of(args, loop, system_look_up, rng, worker_tls)
        connections.mark = given.mark
        patience = args.queue_timeout_secs + GRACE
        self._remote = remote = RemoteDecider(index, TextRing(given.memories[index]), patience, clock, given.key)
        self._reporter = reporter = Reporter(remote)
        self._clients, _ = front.clients_of(args, clock, connections)
        rules = front.relay_rules(args, forward, ids_of(args, given.mark))
        self._relay = relay = Relay(loop, clock, remote, connections, answers, reporter, rules)
        self._aborts = relay.aborts
        self._control = ControlProxy()
        timeout = settings.control_timeout(args)
        plane = ControlPlane(self._control, loop, clock, answers, listener=reporter, timeout=timeout)
        routes = front.routes_of(args, plane, relay)
        self._frontend = Frontend(
            routes,
            self._clients,
            connections.batch,
            reporter,
            answers,
            settings.limits(args),
            settings.timeouts(args),
            admission(access, routes),
            front.upgrades_of(),
        )
        self._watched = [each for each in (self._tls, worker_tls, key_files, self._issuer) if each is not None]
        jobs = relaying(clock, (self._clients,), connections, self._look, self._watched)
        jobs += keepalive(front.keepalives_of(args, self._clients))
        self._jobs = Jobs(loop, jobs)
        self._servers: list[asyncio.Server] = []
        self._accepts = False  # whether the sockets are open
        self._ending = False
        self._lost = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hear = self._table()

    def _table(self) -> dict[type, Callable[[Any], None]]:
        """Return what each message of the decider does."""
        remote, control = self._remote, self._control
        return {
            messages.Planned: remote.planned,
            messages.Waits: remote.waits,
            messages.Refused: remote.refused,
            messages.NoRetry: remote.no_retry,
            messages.Known: self._know,
            messages.Forgotten: self._forget,
            messages.Welcome: self._welcome,
            messages.TakeBack: lambda back: take_back(self._clients.exchanges, back.name),
            messages.Wanted: self._want,
            messages.Accept: lambda _: self._accept(),
            messages.Drain: self._drain,
            messages.StopAccepting: lambda _: self._stop_accepting(),
            messages.Cut: self._cut,
            message.ReadAgain: self._reload,
            message.AppWants: control.heard,
            message.AppHead: control.heard,
            message.AppData: control.heard,
            message.AppFailed: control.heard,
            message.AppDone: control.heard,
        }

    async def run(self) -> int:
        """Serve until the router ends."""
        if self._start.cause:
            log.warning("started again: the one before %s", self._start.cause)
        self._jobs.start()
        while not self._ending:
            self._lost.clear()
            await self._connect()
            await self._lost.wait()
        self._jobs.close()
        self._clients.cut()
        await self._aborts.settle()
        if self._issuer is not None:
            await self._issuer.close()
        await self._connections.close()
        return 0

    async def _connect(self) -> None:
        """Connect to the decider; try until it is there."""
        batch = self._connections.batch
        while True:
            try:
                _, link = await self._loop.create_unix_connection(
                    lambda: cast("asyncio.Protocol", RelayLink(self, decode_from_decider, batch.leg)),
                    self._given.address,
                )
            except OSError:
                await asyncio.sleep(_AGAIN)
                continue
            self._linked(cast("Link", link))
            return

    # -- the link (LinkOwner) ------------------------------------------------------------------------------------------

    def _linked(self, link: Link) -> None:
        self._log.link = link
        self._remote.connected(link)
        self._control.connected(link)

    def heard(self, link: Link, heard: list[Any]) -> None:
        """Take the messages of one frame."""
        hear = self._hear
        for each in heard:
            hear[type(each)](each)

    def reads_again(self) -> None:
        """Tell and ask what was kept while the decider did not read."""
        self._remote.read_again()
        self._control.reads_again()

    def link_lost(self, link: Link) -> None:
        """Go on without a decider until there is one again."""
        self._log.link = None
        self._remote.lost()
        self._control.lost()
        self._lost.set()

    # -- workers -------------------------------------------------------------------------------------------------------

    def _know(self, known: messages.Known) -> None:
        target, before = target_of(known), self._remote.targets.get(known.worker)
        self._remote.targets[known.worker] = target
        if target.role != REGULAR:
            self._remote.paired = True
        if before is None:
            self._connections.know(target)
        elif before != target:
            self._connections.move(before, target)

    def _forget(self, gone: messages.Forgotten) -> None:
        target = self._remote.targets.pop(gone.worker, None)
        if target is not None:
            self._connections.forget(target)

    def _welcome(self, welcome: messages.Welcome) -> None:
        """Begin with a decider: its workers are the only ones."""
        for known in welcome.workers:
            self._know(known)
        present = set(self._remote.targets.values())
        for target in [target for target in self._connections.known if target not in present]:
            self._connections.forget(target)
        self._remote.wanted = welcome.wanted
        self._reporter.hears_first_byte = welcome.first_bytes
        self._log.set_level(welcome.level)
        if welcome.accepting:
            self._accept()

    # -- orders --------------------------------------------------------------------------------------------------------

    def _want(self, wanted: messages.Wanted) -> None:
        self._remote.wanted = wanted.wanted

    def _accept(self) -> None:
        """Accept clients."""
        if not self._accepts:
            self._accepts = True
            self._run(self._open(self._given.sockets[self._index]))
        else:
            self._report_accepts(0)

    async def _open(self, sockets: Sequence[socket.socket]) -> None:
        try:
            places = [{"sock": sock} for sock in sockets]
            self._servers = await servers_on(self._loop, self._frontend, self._tls, places)
            await open_all(self._servers)
        except OSError as error:
            self._report_accepts(error.errno or errno.EADDRINUSE)
        else:
            self._report_accepts(0)

    def _report_accepts(self, error: int) -> None:
        if self._remote.link is not None:
            self._remote.link.put(messages.Accepts(error))

    def _stop_accepting(self) -> None:
        self._ending = True
        for server in self._servers:
            server.close()

    def _drain(self, drain: messages.Drain) -> None:
        self._clients.drain(drain.last_request_timeout)
        self._run(self._drained(drain.round))

    def _cut(self, cut: messages.Cut) -> None:
        self._clients.cut()
        self._run(self._drained(cut.round))

    async def _drained(self, number: int) -> None:
        """Report that the last client connection is closed."""
        await self._clients.drained.wait()
        if self._remote.link is not None:
            self._remote.link.put(messages.Drained(number))

    def _reload(self, reload: message.ReadAgain) -> None:
        self._log.set_level(reload.level)
        self._args.api_key = [ClientKey(*each) for each in reload.client_keys]
        self._args.control_plane_api_keys = [ControlKey(*each) for each in reload.control_keys]
        for files in self._watched:
            files.refresh(anyway=True)

    def _run(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- periodically --------------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """Report what is open."""
        self._remote.look(now)
        link, clients = self._remote.link, self._clients
        if link is not None and not link.stuck:
            unanswered = clients.unanswered()
            link.put(
                messages.Stats(
                    len(clients.connections),
                    clients.active,
                    self._connections.open,
                    *unanswered,
                    self._relay.tunnels.open,
                )
            )


class RelayLink(Link):
    """The link of a relay, which asks again when the decider reads again."""

    __slots__ = ("_process",)

    def __init__(
        self, process: RelayProcess, decode: Callable[[memoryview], list[Any]], later: Callable[[Link], None]
    ) -> None:
        super().__init__(process, decode, later)
        self._process = process

    def resume_writing(self) -> None:
        """Take note, and ask what was kept."""
        super().resume_writing()
        self._process.reads_again()
