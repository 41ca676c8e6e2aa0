"""The relays of this router, in the process that decides: their links, and all that goes to every relay.

    Hello       --> the relay has a port: its requests are adopted, it gets Welcome
    a frame     --> the desk, the control plane, numbers, log lines; then the answers in one frame
    link lost   --> the relay is gone: the desk ends its requests

It is `app.parts.Elsewhere` for `--relay-processes`: the life cycle drains and closes the relays' clients as its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from sglang_router.app.parts import App, Elsewhere, GivenPort
from sglang_router.observe.logs import LEVELS
from sglang_router.processes import message, messages
from sglang_router.processes.control import ControlDesk
from sglang_router.processes.desk import Desk
from sglang_router.processes.facing import known_of
from sglang_router.processes.given import BUILT, ENDING, LEADING, PASSED, READY, Given, Launch
from sglang_router.processes.link import Link, decode_from_relay
from sglang_router.processes.message import Message, ReadAgain
from sglang_router.processes.ports import RelayPort
from sglang_router.relay.clients import Unanswered
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.plan import Target
from sglang_router.words import counted

log = logging.getLogger("sglang_router.processes")

_ACCEPT_WITHIN = 10.0
"""Seconds that relays have to accept clients; the router goes on with those that do."""
_CUT_WITHIN = 5.0
"""Seconds that relays have to report that all connections are closed."""
_KEPT = ("added", "removed", "draining", "withheld", "paused")
"""Changes of workers after which the state is written soon."""
_SAVED_AFTER = 0.5
"""Seconds; changes that come together are one write."""
_NUMBERS = 40
"""Bits of the leases' numbers of one decider."""

Hear = Callable[[RelayPort, Any], None]


class Relays(Elsewhere, Listener):
    """See the module."""

    _app: App
    _desk: Desk
    _control: ControlDesk

    def __init__(self, loop: asyncio.AbstractEventLoop, given: Given, start: Launch) -> None:
        super().__init__()
        self._loop = loop
        self._given = given
        self._start = start
        self.mark = given.mark
        self.state_file = given.state_file
        self.restarted = bool(start.cause)
        self.passed = PASSED
        self._all_accept = asyncio.Event()
        self.given = GivenPort([sock for sockets in given.sockets for sock in sockets], given.inherited)
        self._ports: dict[int, RelayPort] = {}  # by index
        self._port_of: dict[Link, RelayPort] = {}
        self._places: dict[str, tuple[int, Target]] = {}  # by worker id: its number, and what relays know of it
        self._placed = 0
        self._hear: dict[type, Hear] = {}
        self._server: asyncio.Server | None = None
        self._accepting = False
        self._opened = False  # the router has started
        self._round = 0  # drains so far
        self._drain: messages.Drain | None = None  # the last one
        self._again: ReadAgain | None = None  # what the last reload told
        self._wanted = False
        self._save: Callable[[], Awaitable[object]] | None = None
        self._saving = False  # a write of the state is due
        self._task: asyncio.Future[object] | None = None

    def __repr__(self) -> str:
        return f"<Relays {[*self._ports.values()]!r}>"

    def attach(self, app: App) -> None:
        """Take the parts of the router: relays ask this one."""
        self._given.tells.send(BUILT)
        self._app = app
        app.fleet.number_leases(self._start.count << _NUMBERS)
        app.router.quarantine.use(self._given.key)
        desk = self._desk = Desk(app.router, app.listeners, self._place)
        control = self._control = ControlDesk(app.plane.app, self._loop)
        app.listeners.add(self)
        self._hear = {
            messages.Ask: desk.ask,
            messages.Retry: desk.retry,
            messages.Began: desk.began,
            messages.Ended: desk.ended,
            messages.Done: desk.done,
            messages.Unasked: desk.told,
            messages.Withdraw: desk.withdraw,
            messages.Suspect: desk.suspect,
            messages.Holds: desk.holds,
            messages.Shown: desk.shown,
            messages.Stats: self._hear_stats,
            messages.Accepts: self._hear_accepts,
            messages.Said: self._hear_said,
            messages.Drained: self._hear_drained,
            message.AppAsk: control.ask,
            message.AppBody: control.body,
            message.AppTaken: control.taken,
            message.AppGone: control.gone,
        }

    # -- numbers -------------------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """Open client connections of all relays."""
        return sum(port.stats.connections for port in self._ports.values())

    @property
    def active(self) -> int:
        """Requests in flight: those that were asked for, and calls of the control plane."""
        return self._desk.requests + sum(len(port.calls) for port in self._ports.values())

    @property
    def upstream(self) -> int:
        """Open connections of all relays to workers."""
        return sum(port.stats.upstream for port in self._ports.values())

    @property
    def tunnels(self) -> int:
        """Open WebSockets of all relays."""
        return sum(port.stats.tunnels for port in self._ports.values())

    def unanswered(self) -> Unanswered:
        """Sum up the requests without a first byte."""
        total = Unanswered(0, 0, 0, 0.0)
        for port in self._ports.values():
            stats = port.stats
            total = total.with_others(Unanswered(stats.requests, stats.held, stats.size, stats.oldest))
        return total

    # -- workers -------------------------------------------------------------------------------------------------------

    def _place(self, target: Target) -> int:
        """Return the number by which relays know a target; tell them if it is new, or has changed."""
        known = self._places.get(target.worker_id)
        if known is not None and known[1] is target:
            return known[0]
        if known is None:
            self._placed = place = self._placed + 1
        else:
            place = known[0]
        self._places[target.worker_id] = (place, target)
        self._tell(known_of(place, target))
        return place

    def keep(self, save: Callable[[], Awaitable[object]]) -> None:
        """Write the state soon, and soon after workers come, go or drain, beside the usual intervals."""
        self._save = save
        self._save_soon()  # of the workers that are here already

    def _save_soon(self) -> None:
        if self._save is not None and not self._saving:
            self._saving = True
            self._loop.call_later(_SAVED_AFTER, self._save_now)

    def _save_now(self) -> None:
        self._saving = False
        if self._save is not None and self._accepting:
            self._task = asyncio.ensure_future(self._save())

    def worker_changed(self, event: WorkerChanged) -> None:
        """Tell relays of workers that come and go."""
        worker = event.worker
        if event.what in _KEPT:
            self._save_soon()
        if event.what in ("added", "role"):
            self._place(worker.target)
        elif event.what == "removed":
            known = self._places.pop(worker.id, None)
            if known is not None:
                self._tell(messages.Forgotten(known[0]))

    # -- relays --------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Listen for relays, and let them accept clients."""
        self._accepting = True
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._given.address)  # left by a decider that was killed
        self._server = await self._loop.create_unix_server(self._link, self._given.address)
        await self._accepted()
        self._given.tells.send(READY)
        self._loop.call_soon(self._control.open)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*LEADING, *PASSED.values()))
        if self._start.cause:
            log.warning("the process that decides is started again: the one before %s", self._start.cause)
        log.info("process %d decides for %s", os.getpid(), counted(len(self._given.memories), "relay"))
        self._opened = True
        for port in self._ports.values():
            self._log_relay(port)
        self._loop.call_later(0.25, self._look)

    async def _accepted(self) -> None:
        """Wait until all relays accept clients. Raises: OSError, when one cannot."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_accept.wait(), _ACCEPT_WITHIN)
        failed = next((port.accepts for port in self._ports.values() if port.accepts), 0)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def _link(self) -> Any:
        return Link(self, decode_from_relay, self._send_soon)

    def _send_soon(self, link: Link) -> None:
        self._loop.call_soon(link.send)

    def heard(self, link: Link, heard: list[Any]) -> None:
        """Take the messages of one frame; answer in one. A fault at one of them is logged; the others are heard."""
        port = self._port_of.get(link)
        if port is None:
            port = self._welcome(link, heard.pop(0))
        hear = self._hear
        for each in heard:
            try:
                hear[type(each)](port, each)
            except Exception:
                log.exception("%r failed at a %s", self, type(each).__name__)
        link.send()
        if bool(self._app.router.quarantine.broken) is not self._wanted:
            self._want()

    def _want(self) -> None:
        self._wanted = bool(self._app.router.quarantine.broken)
        self._tell(messages.Wanted(self._wanted))

    def _welcome(self, link: Link, hello: messages.Hello) -> RelayPort:
        """Give a relay its port. One that is there under the same index is gone."""
        before = self._ports.get(hello.index)
        if before is not None:
            before.link.transport.abort()
            self._leave(before)
        port = RelayPort(hello.index, link, self._given.memories[hello.index])
        self._ports[hello.index] = self._port_of[link] = port
        link.put(
            messages.Welcome(
                [known_of(place, target) for place, target in self._places.values()],
                self._wanted,
                self._app.listeners.hears_first_byte,
                self._accepting,
                LEVELS[self._app.args.log_level],
            )
        )
        if self._again is not None:  # it was started with the keys of the start
            link.put(self._again)
        if self._drain is not None:
            link.put(self._drain)
        port.pid = hello.pid
        if self._opened:
            self._log_relay(port)
        now = self._app.clock()
        for request in hello.requests:
            self._desk.adopt(port, request, now)
        return port

    def link_lost(self, link: Link) -> None:
        """End the requests of a relay that is gone."""
        port = self._port_of.get(link)
        if port is not None:
            self._leave(port)

    def _leave(self, port: RelayPort) -> None:
        del self._port_of[port.link]
        if self._ports.get(port.index) is port:
            del self._ports[port.index]
        if port.requests:
            log.warning("relay %d is gone, and with it %s", port.index + 1, counted(len(port.requests), "request"))
        self._desk.leave(port, self._app.clock())
        self._control.leave(port)
        self._look_drained()

    def _log_relay(self, port: RelayPort) -> None:
        log.info("relay %d is process %d", port.index + 1, port.pid)

    def _tell(self, each: Message) -> None:
        """Send a message to all relays."""
        for port in self._ports.values():
            port.put(each)

    def _look(self) -> None:
        """Refuse what was queued for too long."""
        self._desk.look(self._app.clock())
        if bool(self._app.router.quarantine.broken) is not self._wanted:
            self._want()
        self._loop.call_later(0.25, self._look)

    # -- what relays tell ----------------------------------------------------------------------------------------------

    def _hear_stats(self, port: RelayPort, stats: messages.Stats) -> None:
        port.stats = stats

    def _hear_accepts(self, port: RelayPort, accepts: messages.Accepts) -> None:
        port.accepts = accepts.error
        ports = self._ports.values()
        if accepts.error or (len(ports) == len(self._given.memories) and all(each.accepts == 0 for each in ports)):
            self._all_accept.set()

    def _hear_said(self, port: RelayPort, said: messages.Said) -> None:
        fields = said.fields | ({"trace": said.trace} if said.trace else {})
        logger = logging.getLogger(said.logger)
        if logger.isEnabledFor(said.level):
            logger.log(said.level, "relay %d: %s", port.index + 1, said.message, extra={"fields": fields})

    def _hear_drained(self, port: RelayPort, drained: messages.Drained) -> None:
        port.drained = max(port.drained, drained.round)
        self._look_drained()

    # -- app.parts.Elsewhere -------------------------------------------------------------------------------------------

    def take_back(self, name: str) -> None:
        """Let relays retry the requests at a worker, whose host does not answer."""
        self._tell(messages.TakeBack(name))

    def reload(self) -> None:
        """Let relays read keys and certificates again; processes that are started later begin with these options."""
        args = self._app.args
        self._given.options.keep(args)
        self._again = ReadAgain(
            LEVELS[args.log_level],
            [(*each,) for each in args.api_key],
            [(*each,) for each in args.control_plane_api_keys],
        )
        self._tell(self._again)

    def stop_accepting(self) -> None:
        """Let relays accept no further clients, and the supervisor start no process again."""
        self._accepting = False
        self._tell(messages.StopAccepting())
        self._given.tells.send(ENDING)

    def drain(self, last_request_timeout: float = 0.0) -> None:
        """Let relays close each connection after the answer in flight."""
        self._round += 1
        self.drained.clear()
        self._drain = messages.Drain(self._round, last_request_timeout)
        self._tell(self._drain)
        self._look_drained()

    def cut(self) -> None:
        """Let relays close all connections now."""
        if not self.drained.is_set():
            self._round += 1
            self._tell(messages.Cut(self._round))
            self._loop.call_later(_CUT_WITHIN, self.drained.set)
        self._look_drained()

    def _look_drained(self) -> None:
        if self._round and all(port.drained == self._round for port in self._ports.values()):
            self.drained.set()

    async def close(self) -> None:
        """End all relays: they leave when their link is closed."""
        if self._server is not None:
            self._server.close()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        for port in list(self._ports.values()):
            port.link.send()
            port.link.transport.close()
