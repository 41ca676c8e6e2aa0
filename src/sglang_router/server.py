"""Assembly and life cycle: build everything once from the options, listen, serve, drain, stop.

    serve(args, crew)               the whole life of one router process, on a uvloop event loop
      Gateway.__init__              builds: fleet, policy, router, upstream, listeners, control plane, service
      Gateway.start                 listens; workers are registered at once and checked concurrently
      ... until SIGTERM or SIGINT
      Gateway.stop                  no new connections; running requests are finished within the grace period
      Gateway.close                 what is left is cut and told of; also after a start that failed

A `Crew` runs engines beside the router: it starts after the router listens and stops when the router has drained.

This is the only module that knows all the others. The cyclic garbage collector is taken out of the way here as well:
what exists after the start is frozen, young garbage is collected in small bites (`_COLLECT_EVERY`), and the prefix
tree is invisible to it by construction (see `core.tree`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import random
import resource
import signal
import time
import uuid
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import uvloop

from sglang_router import settings
from sglang_router.admin.app import ROUTES, Context, create_app, create_metrics_app
from sglang_router.core.events import Listener, Listeners, WorkerChanged
from sglang_router.core.fleet import Fleet
from sglang_router.core.outliers import Outliers
from sglang_router.core.policies import POLICIES
from sglang_router.core.policies.cache_aware import CacheAware
from sglang_router.core.request import ENDPOINTS
from sglang_router.core.retry_budget import RetryBudget, RetryBudgetRules
from sglang_router.core.router import PolicyListener, Router
from sglang_router.core.snapshot import Defaults
from sglang_router.core.worker import Health, WorkerSpec
from sglang_router.errors import ConfigError, ShuttingDown
from sglang_router.net.downstream import Downstream
from sglang_router.net.listen import Bequest, Legacy, take_over
from sglang_router.net.probe import Prober
from sglang_router.net.reports import Surveyor
from sglang_router.net.service import REQUEST_ID_HEADERS, Service
from sglang_router.net.tls import listening_context
from sglang_router.net.upstream import Upstream
from sglang_router.observe import logs
from sglang_router.observe.access import AccessLog, WorkerLog
from sglang_router.observe.deferred import Deferred
from sglang_router.observe.metrics import Metrics
from sglang_router.scaling.loop import autoscaler
from sglang_router.state import StateFile
from sglang_router.wire.cors import Cors
from sglang_router.wire.request import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang_router.config import RouterArgs
    from sglang_router.core.worker import Worker
    from sglang_router.net.tls import TLSFiles

log = logging.getLogger("sglang_router")

_CLOCK = time.monotonic
_CHECKED_EVERY = 0.01
_SWEEP_EVERY = 0.25
_COLLECT_EVERY = 1.0
_JUDGE_EVERY = 1.0
_LARGE_FLEET = 200
_RENEW_EVERY = 5.0
_TIDY_STEPS = 512
_TIDY_PAUSE = 0.01
_BACKLOG = 4096
_SHAKING = 1.0
"""Seconds for handshakes of TLS that are under way when another router takes over: such clients are not here yet."""
_LAST_REQUEST = 10.0
"""Seconds that a kept connection has for a last request when another router has taken over the port."""
_SCRAPE = 4096
"""Bytes of the body of a request for metrics, which has none."""
_HANDSHAKE = 10.0
_FAREWELL = 2.0
"""Seconds that a client has for the handshake of TLS, and for its end: one that is silent delays a shutdown so long."""


class Crew(Protocol):
    """Whoever runs engines for the router in the same process. `failed` is set when there is none left to run."""

    failed: asyncio.Event

    async def start(self) -> None:
        """Begins its work; returns at once, the engines come when they come."""

    async def stop(self, urgent: asyncio.Event) -> None:
        """Ends all engines, at once when `urgent` is set. Called exactly once, also when the start failed."""


class _Membership(Listener):
    """Hears of workers on behalf of the network: checks those that come, lets go of those that leave, wakes who
    waits."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def worker_changed(self, event: WorkerChanged) -> None:
        gateway = self._gateway
        if event.what == "added":
            gateway.prober.start(event.worker)
            gateway.surveyor.start(event.worker)
        elif event.what == "removed":
            gateway.prober.stop(event.worker)
            gateway.surveyor.stop(event.worker)
            gateway.upstream.forget(event.worker)
        if gateway.service.waiting:
            gateway.loop.call_soon(gateway.service.wake)


class Gateway:
    """One router: see the module."""

    def __init__(self, args: RouterArgs, loop: asyncio.AbstractEventLoop, writer: logs.LogWriter) -> None:
        self.args = args
        self.loop = loop
        rng = random.Random()
        self.policy = POLICIES[args.policy](settings.policy_settings(args), rng)
        self._servers: list[asyncio.Server] = []
        self._listening: dict[tuple[str, int], list[asyncio.Server]] = {}
        self._legacy: Legacy | None = None
        self._bequest: Bequest | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        listeners = Listeners()
        self.deferred = Deferred(loop.call_later)
        self.listeners = listeners
        self.fleet = Fleet(
            listeners,
            lambda: str(uuid.uuid4()),
            settings.breaker_rules(args),
            args.worker_startup_timeout_secs,
            args.slow_start_secs,
            args.max_running_per_worker,
            None if args.disable_outlier_ejection else Outliers(settings.outlier_rules(args)),
        )
        budget = RetryBudget(RetryBudgetRules(args.retry_budget_ratio, args.retry_budget_min_per_second))
        self.router = Router(self.fleet, self.policy, listeners, rng, settings.retry_rules(args), budget)
        access = settings.access_rules(args)
        self._tls = settings.server_tls(args)
        worker_tls = settings.worker_tls(args)
        self._certificates = [files for files in (self._tls, worker_tls) if files is not None]
        self.upstream = Upstream(
            loop,
            connect_timeout=args.connect_timeout_secs,
            idle_timeout=args.upstream_idle_timeout_secs,
            tls=worker_tls,
        )
        self.surveyor = Surveyor(loop, self.fleet, self.upstream, _CLOCK, args.engine_report_interval_secs)
        self.prober = Prober(
            loop,
            self.fleet,
            self.upstream,
            _CLOCK,
            unhealthy_interval=args.worker_startup_check_interval,
            meet=self.surveyor.meet,
        )
        self.scaler = scaler = autoscaler(args, loop, self.fleet, lambda: self.service.unanswered(), _CLOCK)
        self.fleet.elastic = args.scales_to_zero
        self.metrics = metrics = Metrics(
            self.fleet,
            self.policy,
            connections=lambda: len(self.service.connections),
            active=lambda: self.service.active,
            upstream_connections=lambda: self.upstream.open,
            lost_lines=lambda: writer.lost,
            waiting=lambda: self.service.queued,
            desired_workers=None if scaler is None else lambda: scaler.desired,
            duration_buckets=args.prometheus_duration_buckets,
            paths=[row.path for rows in ROUTES.values() for row in rows],
        )

        def render(accept: str) -> tuple[bytes, str]:
            self.deferred.flush()
            return metrics.render(accept)

        self.context = Context(
            fleet=self.fleet,
            router=self.router,
            upstream=self.upstream,
            prober=self.prober,
            clock=_CLOCK,
            startup_timeout=args.worker_startup_timeout_secs,
            health=settings.health_rules(args),
            worker_api_key=args.worker_api_key,
            dp_aware=args.dp_aware,
            metrics_render=render,
            access=access,
            scaling=self.scaler,
        )
        self.service = Service(
            loop,
            self.router,
            self.upstream,
            listeners,
            create_app(self.context),
            rng,
            endpoints=ENDPOINTS,
            prod=self.prober.prod,
            limits=settings.limits(args),
            timeouts=settings.timeouts(args),
            request_id_headers=tuple(args.request_id_headers or REQUEST_ID_HEADERS),
            forward_everything=args.forward_headers == "all",
            admission=settings.admission_rules(args),
            resuming=settings.resume_rules(args) if args.resume_streams else None,
            access=access,
            cors=Cors(args.cors_allowed_origins) if args.cors_allowed_origins else None,
            most_queued=args.queue_size,
            most_buffered=args.max_buffered_request_bytes,
            most_connections=settings.most_connections(),
        )
        self._metrics_service = Service(
            loop,
            self.router,
            self.upstream,
            Listeners(),
            create_metrics_app(render),
            rng,
            endpoints={},
            prod=self.prober.prod,
            limits=Limits(body_bytes=_SCRAPE),
            timeouts=settings.timeouts(args),
        )
        self._services = (self.service, self._metrics_service)
        listeners.add(PolicyListener(self.policy))
        listeners.add(_Membership(self))
        listeners.add(WorkerLog())
        listeners.add(self.deferred)
        self.deferred.add(metrics)
        if self.scaler is not None:
            self.deferred.add(self.scaler.observer)
        if args.access_log:
            self.deferred.add(AccessLog(writer))
        self.state = self._state_file(args.state_file) if args.state_file is not None else None

    async def start(self) -> None:
        """Listens and registers the workers given at start.

        The main port is had first, so that a second router of the same options complains of it, and opened last: a
        request before the workers are registered would be told that there are none. A router that takes over lets the
        one before it serve until the workers are checked.

        Raises: ConfigError when an address cannot be had.
        """
        args = self.args
        with _said_of(args.host, args.port, "--port"):
            if args.reuse_port:
                self._legacy = await take_over(self.loop, args.host, args.port)
            servers = await self._bind(self.service, args.host, args.port, self._tls)
        await self._listen_for_metrics()
        self._register()
        if self._legacy is not None:
            self._legacy.leave_rest()
            await self._checked()
        with _said_of(args.host, args.port, "--port"):
            await _open(servers)
        if args.reuse_port:
            self._offer()
        if self.state is not None:
            self.state.start(args.state_interval_secs)
        if self.scaler is not None:
            self.scaler.start()
        self._sweep()
        self._judge()
        self._renew()
        self._tidy()
        self._collect()
        gc.freeze()
        gc.disable()
        log.info("listening on %s, policy %s, %d workers", self.url, args.policy, len(self.fleet))

    @property
    def url(self) -> str:
        """Where clients reach the router."""
        host = f"[{self.args.host}]" if ":" in self.args.host else self.args.host
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{host}:{self._servers[0].sockets[0].getsockname()[1]}"

    def _register(self) -> None:
        """The workers of the last time, and those given now."""
        args = self.args
        if self.state is not None:
            self.state.load()
        for url in args.worker_urls:
            if not self.fleet.entries(url):
                key, rules = args.worker_api_key, settings.health_rules(args)
                self.fleet.add(WorkerSpec(url=url, api_key=key, dp_aware=args.dp_aware, health=rules), _CLOCK())

    async def _checked(self) -> None:
        """Waits until each worker was checked once, but no longer than a request would."""
        until = _CLOCK() + self.args.startup_wait_secs
        # No event tells of a first check that failed.
        while _CLOCK() < until and any(w.health is Health.STARTING and not w.last_error for w in self.fleet):  # noqa: ASYNC110
            await asyncio.sleep(_CHECKED_EVERY)

    async def _bind(self, service: Service, host: str, port: int, tls: TLSFiles | None = None) -> list[asyncio.Server]:
        """Servers that have the address, and are yet to be opened: one, or one for each socket that was taken over."""
        times: dict[str, Any] = {"ssl_handshake_timeout": _HANDSHAKE, "ssl_shutdown_timeout": _FAREWELL}
        taken = self._legacy.take(host, port) if self._legacy is not None else []
        places: list[dict[str, Any]] = [{"sock": sock} for sock in taken]
        servers: list[asyncio.Server] = [
            await self.loop.create_server(
                lambda: Downstream(service),
                backlog=_BACKLOG,
                start_serving=False,
                ssl=listening_context(tls) if tls is not None else None,
                **(times if tls is not None else {}),  # uvloop takes them on all versions of Python
                **place,
            )
            for place in places or [{"host": host.strip("[]"), "port": port, "reuse_address": True}]
        ]
        self._servers += servers
        self._listening[host, port] = servers
        return servers

    def _offer(self) -> None:
        """Lets the router that comes next have all addresses that stay the same."""
        fds = {
            place: [sock.fileno() for server in servers for sock in server.sockets]
            for place, servers in self._listening.items()
            if place[1]
        }
        self._bequest = Bequest(self.loop, fds, self._save)
        self._bequest.offer()

    async def _save(self) -> None:
        if self.state is not None:
            await self.state.save(hurry=True)

    def _state_file(self, path: str) -> StateFile:
        args = self.args

        def ours(worker: Worker) -> bool:
            replicas = self.context.replicas
            return replicas is None or replicas.describe(worker) is None

        return StateFile(
            path,
            self.fleet,
            self.policy.tree if isinstance(self.policy, CacheAware) else None,
            Defaults(tuple(args.worker_urls), args.worker_api_key, args.dp_aware, settings.health_rules(args)),
            ours=ours,
            rests=lambda: self._bequest is not None and self._bequest.succeeded,
        )

    async def _listen_for_metrics(self) -> None:
        """The second door to the metrics. Its default port is a convenience, so losing it is only worth a warning."""
        args = self.args
        try:
            with _said_of(args.prometheus_host, args.prometheus_port, "--prometheus-port"):
                await _open(await self._bind(self._metrics_service, args.prometheus_host, args.prometheus_port))
        except ConfigError as exc:
            if "prometheus_port" in args.given:
                raise
            log.warning("%s; metrics are served on %s/metrics only", exc, self.url)

    def _sweep(self) -> None:
        for service in self._services:
            service.sweep()
        self._timers["sweep"] = self.loop.call_later(_SWEEP_EVERY, self._sweep)

    def _judge(self) -> None:
        self.fleet.judge(_CLOCK())
        pause = _JUDGE_EVERY if len(self.fleet) < _LARGE_FLEET else 5 * _JUDGE_EVERY
        self._timers["judge"] = self.loop.call_later(pause, self._judge)

    def _renew(self) -> None:
        """Certificates that were renewed are used from now on."""
        for files in self._certificates:
            files.refresh()
        self._timers["renew"] = self.loop.call_later(_RENEW_EVERY, self._renew)

    def _collect(self) -> None:
        """Young garbage: what a second's requests left in cycles, which should be nothing."""
        gc.collect(0)
        self._timers["collect"] = self.loop.call_later(_COLLECT_EVERY, self._collect)

    def _tidy(self) -> None:
        """Upkeep of the policy's memory in small bites: what removed workers left, and what rested too long."""
        more = self.policy.tidy(_CLOCK(), _TIDY_STEPS)
        if not more:
            gc.collect()
        pause = _TIDY_PAUSE if more else self.args.eviction_interval_secs
        self._timers["tidy"] = self.loop.call_later(pause, self._tidy)

    async def stop(self, urgent: asyncio.Event) -> None:
        """Takes nothing new and finishes what is under way: within the grace period, and until `urgent` is set."""
        if self.scaler is not None:
            await self.scaler.close()  # the work that is drained away is no reason for fewer workers
        succeeded = self._bequest is not None and await self._bequest.settle()
        for server in self._servers:
            server.close()
        if succeeded and self._tls is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(urgent.wait(), _SHAKING)
        for service in self._services:
            service.drain(_LAST_REQUEST if succeeded else 0.0)
        if not self.fleet.able(_CLOCK()):  # else they wait for room, and get it
            for relay in list(self.service.waiting):
                relay.refuse(ShuttingDown())
        self.prober.release()
        if self.service.active:
            log.info("finishing %d running requests", self.service.active)
        waits = [self.loop.create_task(work) for work in (self._wind_up(succeeded), urgent.wait())]
        timeout = self.args.shutdown_grace_period_secs
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.service.active and not urgent.is_set():
            log.warning("the grace period is over: %d requests are cut", self.service.active)

    async def _wind_up(self, succeeded: bool) -> None:
        """Saves what is known, unless another router knows more by now, and waits for the last request."""
        if not succeeded:
            await self._save()
        await self._drained()

    async def _drained(self) -> None:
        for service in self._services:
            await service.drained.wait()

    async def close(self) -> None:
        """Closes everything; what is still under way is cut."""
        for server in self._servers:
            server.close()
        for service in self._services:
            service.drain()
            for connection in list(service.connections):
                connection.transport.abort()
        for timer in self._timers.values():
            timer.cancel()
        await self._drained()  # what was cut is told of as well
        if self.state is not None:
            await self.state.close()
        if self._bequest is not None:
            await self._bequest.close()
        if self._legacy is not None:
            self._legacy.close()
        if self.scaler is not None:
            await self.scaler.close()
        await self.prober.close()
        await self.surveyor.close()
        await self.upstream.close()
        self.deferred.flush()


def serve(args: RouterArgs, crew: Callable[[Gateway, logs.LogWriter], Crew] | None = None) -> int:
    """Runs a router until SIGTERM, SIGINT or SIGQUIT; returns the exit status. `crew` makes who works beside it."""
    writer = logs.configure(args.log_level, args.log_format, args.log_dir)
    _raise_fd_limit()
    try:
        with contextlib.closing(uvloop.new_event_loop()) as loop, _handshakes_cut_quietly(loop):
            asyncio.set_event_loop(loop)
            return int(loop.run_until_complete(_run(args, loop, writer, crew)))
    finally:
        asyncio.set_event_loop(None)
        writer.close()


@contextlib.contextmanager
def _handshakes_cut_quietly(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Closes the loop at the end. A client in the middle of a TLS handshake is known to uvloop alone, which closes its
    connection then, and warns; if warnings are errors, it does not even come to the closing."""
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            loop.close()


async def _open(servers: list[asyncio.Server]) -> None:
    """Takes connections from now on.

    Raises: OSError
    """
    for server in servers:
        await server.start_serving()
    # All that uvloop tells when somebody else listens there since it was bound.
    if not all(sock for server in servers for sock in server.sockets):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


@contextlib.contextmanager
def _said_of(host: str, port: int, option: str) -> Iterator[None]:
    """Makes a ConfigError of what the system says of an address."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(f"{host}:{port} is in use; choose another {option}") from None
        why = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; see --host and {option}") from None


class _Signals:
    """What signals ask for: to stop; asked again, to stop at once. `status` is that of the process."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stop = asyncio.Event()
        self.urgent = asyncio.Event()
        self.status = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, self._hear, number)

    def _hear(self, number: int) -> None:
        if self.stop.is_set():
            log.warning("second signal: leaving at once")
            self.status = 128 + number
            self.urgent.set()
        self.stop.set()


async def _run(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    writer: logs.LogWriter,
    crew_of: Callable[[Gateway, logs.LogWriter], Crew] | None,
) -> int:
    signals = _Signals(loop)
    gateway = Gateway(args, loop, writer)
    crew: Crew | None = None
    try:
        await gateway.start()
        if crew_of is not None:
            crew = crew_of(gateway, writer)
            await crew.start()
        await _first(loop, signals.stop, *([crew.failed] if crew is not None else ()))
        if not signals.stop.is_set():
            signals.status = 1
        await gateway.stop(signals.urgent)
    finally:
        if crew is not None:
            await crew.stop(signals.urgent)
        await gateway.close()
    log.info("stopped")
    return signals.status


async def _first(loop: asyncio.AbstractEventLoop, *events: asyncio.Event) -> None:
    """Waits until one of them is set."""
    waits = [loop.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _raise_fd_limit() -> None:
    """Each request may need two descriptors; the soft limit is often 1,024 though the hard one is far above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
