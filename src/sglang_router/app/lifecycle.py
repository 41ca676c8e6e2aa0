"""The life cycle of one router process: listen, serve, drain, stop.

    serve(args, crew)            everything, on a uvloop event loop
      app.build                  make all parts
      Life.start                 listen; register workers at once and check them concurrently
      ... until a signal to stop (`app.signals`)
      Life.leave                 SIGTERM: not ready any more, but serve on until load balancers have noticed
      Life.stop                  accept no connections; finish requests in flight within the grace period
      Life.close                 abort and log what is left; also after a start that failed

A `Crew` runs engines for the router: it starts after the router listens and stops when the router has drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from sglang_router import process
from sglang_router.app import settings
from sglang_router.app.advice import remark
from sglang_router.app.build import build
from sglang_router.app.deciding import open_log
from sglang_router.app.jobs import Jobs, keepalive, lag, peers, points, table, watchdog
from sglang_router.app.listening import Listening, address_errors, open_all, port_of
from sglang_router.app.looping import on_loop
from sglang_router.app.parts import App, Attachment, Elsewhere
from sglang_router.app.reload import Reload
from sglang_router.app.signals import Signals, first_of
from sglang_router.autoscale.scaler import ScalingRules
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError, ShuttingDown
from sglang_router.observe import logs
from sglang_router.observe.log_files import KeepRules
from sglang_router.relay.clients import Clients
from sglang_router.restart import systemd
from sglang_router.restart.state_file import StateFile
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.states import Health
from sglang_router.words import counted
from sglang_router.workers.health_checks import HealthChecks

log = logging.getLogger("sglang_router")

_CHECKED_EVERY = 0.01
"""Seconds between two looks at the first health checks."""
_HANDSHAKES = 1.0
"""Seconds for TLS handshakes in progress when another router takes over: such connections are not registered yet."""
_LAST_REQUEST = 10.0
"""Seconds that an idle connection has for a last request when another router has taken over the port."""


class Host(NamedTuple):
    """A router that listens, as a crew sees it.

    clock    returns seconds of the router's clock
    writer   writes log lines
    url      where clients reach the router
    fleet    all workers
    checks   the health checks
    scaling  the rules of autoscaling; None: the number of workers is fixed
    active   returns the number of exchanges in flight
    attach   adds listeners, actuators, and what the control plane and the metrics ask
    """

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    writer: logs.LogWriter
    url: str
    fleet: Fleet
    checks: HealthChecks
    scaling: ScalingRules | None
    active: Callable[[], int]
    attach: Callable[[Attachment], None]


class Crew(Protocol):
    """Runs engines for the router in the same process. failed: set when no engine is left to run."""

    failed: asyncio.Event

    async def start(self) -> None:
        """Start the engines; return at once, before they are ready."""

    async def stop(self, urgent: asyncio.Event) -> None:
        """Stop all engines, at once when `urgent` is set. Called exactly once, also when the start failed."""


class Life:
    """One router from its start to its end. See the module."""

    def __init__(self, app: App, writer: logs.LogWriter) -> None:
        self.app = app
        self._writer = writer
        args = app.args
        self._configured = settings.configured_workers(args)
        self._listening = Listening(app.loop)
        ports = (app.clients, app.scrapers)
        self._clients: tuple[Clients | Elsewhere, ...] = (*ports, app.elsewhere)
        self._metrics_url = ""  # of the metrics port, if there is one
        jobs = table(app.clock, ports, app.connections, app.router, app.watched, args.eviction_interval_secs)
        more = (lag(app.clock, app.metrics.late), points(app.control.live.sample), *keepalive(app.keepalives))
        self._notifier = systemd.Notifier()
        self._jobs = Jobs(app.loop, jobs + more + watchdog(self._notifier) + peers(app.sharing))
        self._decisions = open_log(args, app.router.recorder, app.loop.call_later)
        if (decisions := self._decisions) is not None:
            app.metrics.sources.unlogged_decisions = lambda: decisions.lost
        path = args.state_file or app.elsewhere.state_file
        self._state = None if path is None else self._state_file(path)

    def _state_file(self, path: str) -> StateFile:
        app = self.app
        pool = app.fleet.pools.default
        return StateFile(
            path,
            app.fleet,
            lambda: pool.policy.memory,
            self._configured,
            suspended=lambda: self._listening.succeeded,
        )

    @property
    def url(self) -> str:
        """Where clients reach the router."""
        return _url("http" if self.app.tls is None else "https", self.app.args.host, self._listening.port)

    @property
    def host(self) -> Host:
        """What a crew gets of the router."""
        app = self.app
        return Host(
            app.loop,
            app.clock,
            self._writer,
            self.url,
            app.fleet,
            app.checks,
            None if app.scaler is None else app.scaler.rules,
            self._active,
            app.attach,
        )

    def _active(self) -> int:
        """Return the number of exchanges in flight on the main port."""
        return self.app.clients.active + self.app.elsewhere.active

    # -- start ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and register the workers given at start.

        The main port is bound first, so that a second router with the same options fails at once. It is opened last: a
        request before the workers are registered would be refused for want of workers. A router that takes over lets
        the previous one serve until the workers are checked.

        Raises: ConfigError, when an address cannot be bound.
        """
        app, args, listening = self.app, self.app.args, self._listening
        with address_errors(args.host, args.port, "--port"):
            follows, servers = await self._bind()
        await self._listen_for_metrics()
        self._register()
        app.discovery.start()
        if app.sharing is not None:
            app.sharing.start(lead=app.scaler is not None)
        if follows:
            listening.leave_rest()
        if follows and not app.elsewhere.restarted:  # else nobody serves meanwhile
            await self._checked()
        with address_errors(args.host, args.port, "--port"):
            await open_all(servers)
            await app.elsewhere.open()
        if args.reuse_port:
            listening.offer(self._save)
        if self._state is not None:
            self._state.start(args.state_interval_secs)
            app.elsewhere.keep(self._state.save)
        if app.scaler is not None:
            app.scaler.start()
        self._jobs.start()
        for warning in app.control.access.warnings(args.host):
            log.warning(warning)
        log.info("listening on %s, policy %s, %s", self.url, args.policy, counted(len(app.fleet), "worker"))
        if self._metrics_url:
            log.info("metrics are served on %s", self._metrics_url)
        self._notifier.tell("READY=1")

    async def _bind(self) -> tuple[bool, list[asyncio.Server]]:
        """Bind the main port, or take it over; return whether another router has handed it over, and what this process
        serves of it."""
        args, listening, given = self.app.args, self._listening, self.app.elsewhere.given
        if given is not None:
            return listening.adopt(args.host, args.port, given), []
        follows = args.reuse_port and await listening.take_over(args.host, args.port)
        passed = systemd.take_sockets(args.host, args.port)
        return follows, await listening.bind(self.app.frontend, args.host, args.port, self.app.tls, passed)

    def say_how_to_add_workers(self) -> None:
        """Warn when there is no worker, and nothing that will start one."""
        args = self.app.args
        if not len(self.app.fleet) and not args.scales_to_zero and not self.app.discovery.sources:
            keys = (args.api_key, args.api_key_file, args.control_plane_api_keys, args.control_plane_api_keys_file)
            log.warning(
                "no workers yet: start with --worker-urls http://HOST:PORT, or add one now: "
                "curl -X POST %s'%s/add_worker?url=http://HOST:PORT'",
                "-H 'Authorization: Bearer KEY' " if any(keys) or args.jwt_issuer else "",
                self.url,
            )

    async def _listen_for_metrics(self) -> None:
        """Open the metrics port. If the default port is taken, only warn: the main port serves metrics too.

        Raises: ConfigError, when --prometheus-port was given and cannot be bound.
        """
        args = self.app.args
        try:
            with address_errors(args.prometheus_host, args.prometheus_port, "--prometheus-port"):
                servers = await self._listening.bind(
                    self.app.metrics_frontend, args.prometheus_host, args.prometheus_port
                )
                await open_all(servers)
            self._metrics_url = _url("http", args.prometheus_host, port_of(servers)) + "/metrics"
        except ConfigError as exc:
            if "prometheus_port" in args.given:
                raise
            log.warning("%s; metrics are served on %s/metrics only", exc, self.url)

    def _register(self) -> None:
        """Register the workers of the state file, and those of the options; the latter may have been removed since, if
        the router has only been restarted in part."""
        loaded = 0 if self._state is None else self._state.load()
        if loaded and self.app.elsewhere.restarted:
            return
        fleet = self.app.fleet
        for spec in self._configured.specs:
            if not fleet.entries(spec.url):
                fleet.add(spec, self.app.clock())

    async def _checked(self) -> None:
        """Wait until workers are known and checked, and what other routers know; no longer than --startup-wait-secs."""
        app = self.app
        until = app.clock() + app.args.startup_wait_secs
        while app.clock() < until and not (app.discovery.looked and app.learned):  # noqa: ASYNC110
            await asyncio.sleep(_CHECKED_EVERY)
        # Poll, because no event reports a first check that failed.
        while app.clock() < until and any(w.health is Health.STARTING and not w.last_error for w in app.fleet):  # noqa: ASYNC110
            await asyncio.sleep(_CHECKED_EVERY)

    async def _save(self) -> None:
        """Write the state file, if there is one."""
        if self._state is not None:
            await self._state.save(hurry=True)

    # -- stop ----------------------------------------------------------------------------------------------------------

    async def leave(self, urgent: asyncio.Event) -> None:
        """Serve on for --shutdown-drain-secs, or until `urgent` is set, while /readiness says that the router ends.

        A load balancer, or kube-proxy on each node, sends new connections until it has heard of the end. Answers say
        `Connection: close`, so that clients with kept connections go elsewhere by themselves. A router whose port
        another one has taken over need not wait: new connections reach that one.
        """
        app, seconds = self.app, self.app.args.shutdown_drain_secs
        self._notifier.tell("STOPPING=1")
        app.control.ending = True
        if seconds and not self._listening.succeeded:
            log.info("ending: /readiness fails; requests are served for another %g s", seconds)
            app.clients.drain(seconds)
            app.elsewhere.drain(seconds)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(urgent.wait(), seconds)

    async def stop(self, urgent: asyncio.Event) -> None:
        """Accept nothing new, and finish what is in flight within the grace period, or until `urgent` is set."""
        app = self.app
        self._notifier.tell("STOPPING=1")
        app.control.ending = True
        if app.scaler is not None:
            await app.scaler.close()  # it must not scale down because the load drains
        succeeded = await self._listening.stop()
        app.elsewhere.stop_accepting()
        if succeeded and app.tls is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(urgent.wait(), _HANDSHAKES)
        for clients in self._clients:
            clients.drain(_LAST_REQUEST if succeeded else 0.0)
        app.router.refuse_stranded(ShuttingDown(), app.clock())
        app.checks.release()
        if self._active():
            log.info("finishing %s", counted(self._active(), "running request"))
        waits = [app.loop.create_task(work) for work in (self._wind_up(succeeded), urgent.wait())]
        await asyncio.wait(waits, timeout=app.args.shutdown_grace_period_secs, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._active() and not urgent.is_set():
            log.warning("the grace period is over: cutting %s", counted(self._active(), "request"))

    async def _wind_up(self, succeeded: bool) -> None:
        """Write the state file, unless another router has taken over, and wait for the last request."""
        if not succeeded:
            await self._save()
        await self._drained()

    async def _drained(self) -> None:
        """Wait until the last client connection is closed."""
        for clients in self._clients:
            await clients.drained.wait()

    async def close(self) -> None:
        """Close everything; abort what is still in flight."""
        app = self.app
        self._listening.stop_accepting()
        for clients in self._clients:
            clients.cut()
        self._jobs.close()
        await self._drained()  # the aborted requests are logged and counted too
        await app.discovery.close()
        await app.elsewhere.close()
        if self._state is not None:
            await self._state.close()
        await self._listening.close()
        if app.scaler is not None:
            await app.scaler.close()
        await app.checks.close()
        await app.survey.close()
        for each in (app.sharing, app.issuer, app.kv_events, app.spans):
            if each is not None:
                await each.close()
        await app.relay.aborts.settle()
        await app.connections.close()
        app.deferred.flush()
        if self._decisions is not None:
            self._decisions.close()


def serve(
    args: RouterArgs,
    crew: Callable[[Host], Crew] | None = None,
    elsewhere: Callable[[asyncio.AbstractEventLoop], Elsewhere] | None = None,
) -> int:
    """Run a router until a signal tells it to stop; return the exit status. In a thread of another program it runs
    until that program ends.

    crew       makes what runs engines for the router; None: the router has no engines of its own
    elsewhere  makes the clients that other processes serve; None: there are none

    Raises: ConfigError, when the router cannot start with these options.
    """
    process.open_standard_descriptors()
    keep = KeepRules(args.log_keep_files, args.log_keep_days, args.log_max_bytes)
    writer = logs.configure(args.log_level, args.log_format, args.log_dir, keep=keep)
    try:
        return on_loop(lambda loop: _run(args, loop, writer, crew, elsewhere(loop) if elsewhere else None))
    finally:
        writer.close()


async def _run(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    writer: logs.LogWriter,
    crew_of: Callable[[Host], Crew] | None,
    elsewhere: Elsewhere | None,
) -> int:
    signals = Signals(loop, {} if elsewhere is None else elsewhere.passed)
    app = build(args, loop, writer, elsewhere=elsewhere)
    life = Life(app, writer)
    reload = Reload(app, writer)
    signals.reload = reload.hang_up
    # Each write finds by itself that its file was moved away; this line makes the new one.
    signals.reopen = lambda: writer.tell("log files are opened again")
    crew: Crew | None = None
    try:
        await life.start()
        reload.started()
        remark(args)
        if crew_of is None:
            life.say_how_to_add_workers()
        else:
            crew = crew_of(life.host)
            await crew.start()
        await first_of(loop, signals.stop, *([crew.failed] if crew is not None else ()))
        if not signals.stop.is_set():
            signals.status = 1
        if signals.patient:
            await life.leave(signals.urgent)
        await life.stop(signals.urgent)
    finally:
        if crew is not None:
            await crew.stop(signals.urgent)
        await life.close()
    log.info("stopped")
    return signals.status


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
