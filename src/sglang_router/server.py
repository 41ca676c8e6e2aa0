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
from typing import TYPE_CHECKING, Protocol

import uvloop

from sglang_router.admin.app import ROUTES, Context, create_app, create_metrics_app
from sglang_router.core.events import Listener, Listeners, WorkerChanged
from sglang_router.core.fleet import Fleet
from sglang_router.core.policies import POLICIES, PolicySettings
from sglang_router.core.request import ENDPOINTS
from sglang_router.core.router import PolicyListener, RetryRules, Router
from sglang_router.core.worker import BreakerRules, HealthRules, WorkerSpec
from sglang_router.errors import ConfigError, ShuttingDown
from sglang_router.net.downstream import Downstream
from sglang_router.net.probe import Prober
from sglang_router.net.reports import Surveyor
from sglang_router.net.service import REQUEST_ID_HEADERS, Service, Timeouts
from sglang_router.net.upstream import Upstream
from sglang_router.observe import logs
from sglang_router.observe.access import AccessLog, WorkerLog
from sglang_router.observe.deferred import Deferred
from sglang_router.observe.metrics import Metrics
from sglang_router.scaling.loop import autoscaler
from sglang_router.wire.request import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang_router.config import RouterArgs

log = logging.getLogger("sglang_router")

_CLOCK = time.monotonic
_SWEEP_EVERY = 0.25
_COLLECT_EVERY = 1.0
_TIDY_STEPS = 512
_TIDY_PAUSE = 0.01
_BACKLOG = 4096


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
        self.policy = POLICIES[args.policy](_policy_settings(args), rng)
        self._servers: list[asyncio.Server] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        listeners = Listeners()
        self.deferred = Deferred(loop.call_later)
        self.listeners = listeners
        self.fleet = Fleet(
            listeners,
            lambda: str(uuid.uuid4()),
            _breaker_rules(args),
            args.worker_startup_timeout_secs,
            args.slow_start_secs,
        )
        self.router = Router(self.fleet, self.policy, listeners, rng, _retry_rules(args))
        self.upstream = Upstream(
            loop, connect_timeout=args.connect_timeout_secs, idle_timeout=args.upstream_idle_timeout_secs
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
            waiting=lambda: len(self.service.waiting),
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
            health=health_rules(args),
            worker_api_key=args.worker_api_key,
            dp_aware=args.dp_aware,
            metrics_render=render,
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
            limits=_limits(args),
            timeouts=_timeouts(args),
            request_id_headers=tuple(args.request_id_headers or REQUEST_ID_HEADERS),
            forward_everything=args.forward_headers == "all",
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
            timeouts=_timeouts(args),
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

    async def start(self) -> None:
        """Listens and registers the workers given at start.

        The main port is had first, so that a second router of the same options complains of it, and opened last: a
        request before the workers are registered would be told that there are none.

        Raises: ConfigError when an address cannot be had.
        """
        args = self.args
        with _said_of(args.host, args.port, "--port"):
            server = await self._bind(self.service, args.host, args.port)
        await self._listen_for_metrics()
        with _said_of(args.host, args.port, "--port"):
            await _open(server)
        for url in args.worker_urls:
            key, rules = args.worker_api_key, health_rules(args)
            self.fleet.add(WorkerSpec(url=url, api_key=key, dp_aware=args.dp_aware, health=rules), _CLOCK())
        if self.scaler is not None:
            self.scaler.start()
        self._sweep()
        self._tidy()
        self._collect()
        gc.freeze()
        gc.disable()
        log.info("listening on %s, policy %s, %d workers", self.url, args.policy, len(self.fleet))

    @property
    def url(self) -> str:
        """Where clients reach the router."""
        host = f"[{self.args.host}]" if ":" in self.args.host else self.args.host
        return f"http://{host}:{self._servers[0].sockets[0].getsockname()[1]}"

    async def _bind(self, service: Service, host: str, port: int) -> asyncio.Server:
        """A server that has its address, and is yet to be opened."""
        server = await self.loop.create_server(
            lambda: Downstream(service),
            host.strip("[]"),
            port,
            backlog=_BACKLOG,
            reuse_address=True,
            start_serving=False,
        )
        self._servers.append(server)
        return server

    async def _listen_for_metrics(self) -> None:
        """The second door to the metrics. Its default port is a convenience, so losing it is only worth a warning."""
        args = self.args
        try:
            with _said_of(args.prometheus_host, args.prometheus_port, "--prometheus-port"):
                server = await self._bind(self._metrics_service, args.prometheus_host, args.prometheus_port)
                await _open(server)
        except ConfigError as exc:
            if "prometheus_port" in args.given:
                raise
            log.warning("%s; metrics are served on %s/metrics only", exc, self.url)

    def _sweep(self) -> None:
        for service in self._services:
            service.sweep()
        self._timers["sweep"] = self.loop.call_later(_SWEEP_EVERY, self._sweep)

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
        for server in self._servers:
            server.close()
        for service in self._services:
            service.drain()
        for relay in list(self.service.waiting):
            relay.refuse(ShuttingDown())
        self.prober.release()
        if self.service.active:
            log.info("finishing %d running requests", self.service.active)
        waits = [self.loop.create_task(work) for work in (self._drained(), urgent.wait())]
        timeout = self.args.shutdown_grace_period_secs
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.service.active and not urgent.is_set():
            log.warning("the grace period is over: %d requests are cut", self.service.active)

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
        with contextlib.closing(uvloop.new_event_loop()) as loop:
            asyncio.set_event_loop(loop)
            return int(loop.run_until_complete(_run(args, loop, writer, crew)))
    finally:
        asyncio.set_event_loop(None)
        writer.close()


async def _open(server: asyncio.Server) -> None:
    """Takes connections from now on.

    Raises: OSError
    """
    await server.start_serving()
    if not all(server.sockets):  # all that uvloop tells when somebody else listens there since it was bound
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


# -- what the options mean for each part -------------------------------------------------------------------------------


def _policy_settings(args: RouterArgs) -> PolicySettings:
    return PolicySettings(
        cache_threshold=args.cache_threshold,
        balance_abs_threshold=args.balance_abs_threshold,
        balance_rel_threshold=args.balance_rel_threshold,
        max_tree_size=args.max_tree_size,
        max_idle=args.max_idle_secs,
        assignment_mode=args.assignment_mode,
        prefix_hash_bytes=args.prefix_hash_bytes,
        hash_load_factor=args.hash_load_factor,
    )


def _breaker_rules(args: RouterArgs) -> BreakerRules:
    return BreakerRules(
        threshold=args.cb_failure_threshold or args.max_worker_retries + 1,
        successes=args.cb_success_threshold,
        timeout=args.cb_timeout_duration_secs,
        max_timeout=max(args.cb_timeout_duration_secs, args.cb_max_timeout_duration_secs),
        enabled=not args.disable_circuit_breaker,
    )


def _retry_rules(args: RouterArgs) -> RetryRules:
    return RetryRules(
        per_worker=args.max_worker_retries,
        total=args.max_total_retries,
        initial_backoff=args.retry_initial_backoff_ms / 1000,
        max_backoff=args.retry_max_backoff_ms / 1000,
        multiplier=args.retry_backoff_multiplier,
        jitter=args.retry_jitter_factor,
    )


def health_rules(args: RouterArgs) -> HealthRules:
    """The health checks of workers that name none of their own."""
    return HealthRules(
        failure_threshold=args.health_failure_threshold,
        success_threshold=args.health_success_threshold,
        interval=args.health_check_interval_secs,
        timeout=args.health_check_timeout_secs,
        endpoint=args.health_check_endpoint,
        enabled=not args.disable_health_check,
    )


def _limits(args: RouterArgs) -> Limits:
    return Limits(args.max_head_bytes, args.max_header_count, args.max_payload_size)


def _timeouts(args: RouterArgs) -> Timeouts:
    return Timeouts(
        head=args.head_timeout_secs,
        body=args.body_timeout_secs,
        idle=args.keepalive_timeout_secs,
        request=args.request_timeout_secs,
        starting=args.autoscale_wake_timeout_secs if args.scales_to_zero else args.startup_wait_secs,
    )
