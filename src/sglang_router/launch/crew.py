"""What works beside the router in `launch_server`: the supervisor with its engines, and the report of them.

Start(line, args, machine)      what is asked for, worked out and checked before anything runs
  |-- .command(rank)            how a replica is started
  '-- .crew(gateway, writer)    once the router listens  -->  Crew: start, failed, stop
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from sglang_router.core.worker import WorkerSpec
from sglang_router.launch.backends import BACKENDS, Setup
from sglang_router.launch.download import fetch_model
from sglang_router.launch.keeper import Timeouts
from sglang_router.launch.machine import Machine, Ports
from sglang_router.launch.report import Echo, Files, Report, by_hand
from sglang_router.launch.restarts import RestartRules
from sglang_router.launch.screen import Screen
from sglang_router.launch.supervisor import Supervisor
from sglang_router.scaling.replicas import Replicas
from sglang_router.server import Gateway
from sglang_router.settings import health_rules

if TYPE_CHECKING:
    import asyncio

    from sglang_router.config import RouterArgs
    from sglang_router.launch.options import CommandLine, LaunchOptions
    from sglang_router.launch.replica import Command
    from sglang_router.observe.logs import LogWriter

_STDERR = 2


class Start:
    """What is to be started. `args` are the router's options, checked.

    count    replicas that are started at once
    command  rank -> how that one is started

    Raises: ConfigError if it cannot be done as asked: no such engine, no model, no GPU, no folder for logs.
    """

    def __init__(self, line: CommandLine, args: RouterArgs, machine: Machine) -> None:
        options = line.options
        self._options = options
        self._args = args
        self._ranks = options.size if args.dp_aware else 0
        low, high = args.scale_range or (1, options.size)
        self.count = 1 if args.dp_aware else min(max(options.size, low), high)
        self._setup = Setup(
            model=options.model_path,
            engine=line.engine,
            size=1 if args.dp_aware else max(self.count, high),
            ranks=self._ranks,
            host=options.dp_worker_host,
            python=options.engine_python or sys.executable,
            machine=machine,
            fetch=lambda: fetch_model(sys.stderr),
        )
        self._backend = BACKENDS[options.backend](self._setup)
        self._backend.prepare()
        self._backend.command(self.count - 1, options.router_dp_worker_base_port)  # are there GPUs for all?
        self._ports = Ports(options.dp_worker_host, options.router_dp_worker_base_port, machine.port_is_free)
        self._files = Files(options.log_dir) if options.log_dir else None

    def command(self, rank: int) -> Command:
        """Raises: ConfigError, if there is no port or GPU for that rank."""
        return self._backend.command(rank, self._ports(rank))

    def crew(self, gateway: Gateway, writer: LogWriter) -> Crew:
        """The supervisor, joined to a router that listens."""
        options, args = self._options, self._args
        report = Report(
            later=gateway.loop.call_later,
            clock=time.monotonic,
            writer=writer,
            lines=self._files or Echo(writer),
            screen=Screen(_STDERR) if self._has_rows(writer) else None,
            size=self.count,
            url=gateway.url,
            by_hand=lambda rank: by_hand(self.command(rank)),
        )
        supervisor = Supervisor(
            gateway.loop,
            time.monotonic,
            gateway.fleet,
            gateway.prober,
            self.command,
            self._specs,
            report,
            _rules(options),
            _timeouts(options, args),
        )
        gateway.listeners.add(supervisor)
        gateway.context.replicas = supervisor
        gateway.metrics.live["replicas"] = supervisor.tell
        if gateway.scaler is not None:
            tree = getattr(gateway.policy, "tree", None)  # some policies remember prefixes
            rules = gateway.scaler.rules
            actuator = Replicas(gateway.loop, gateway.fleet, supervisor, tree, time.monotonic, rules)
            gateway.deferred.add(actuator)
            gateway.scaler.add(actuator)
        return Crew(supervisor, report, self.count)

    def _has_rows(self, writer: LogWriter) -> bool:
        terminal = self._setup.machine.environ.get("TERM", "dumb") != "dumb" and os.isatty(_STDERR)
        return terminal and self.count > 0 and not writer.json

    def _specs(self, command: Command) -> list[WorkerSpec]:
        """What a replica is to the router: a worker, or one for each rank inside it."""
        ranks: list[int | None] = [*range(self._ranks)] if self._ranks > 1 else [None]
        rules, key = health_rules(self._args), self._args.worker_api_key
        return [
            WorkerSpec(url=command.url, dp_rank=rank, api_key=key, runtime=command.runtime, health=rules)
            for rank in ranks
        ]


class Crew:
    """See `server.Crew`."""

    def __init__(self, supervisor: Supervisor, report: Report, count: int) -> None:
        self.supervisor = supervisor
        self.failed = supervisor.failed
        self._report = report
        self._count = count

    async def start(self) -> None:
        await self.supervisor.start(self._count)

    async def stop(self, urgent: asyncio.Event) -> None:
        try:
            await self.supervisor.stop(urgent)
        finally:
            self._report.close()


def _rules(options: LaunchOptions) -> RestartRules:
    return RestartRules(
        initial_backoff=options.router_restart_initial_backoff_secs,
        max_backoff=options.router_restart_max_backoff_secs,
        most=options.router_max_restarts,
        window=options.router_restart_window_secs,
    )


def _timeouts(options: LaunchOptions, args: RouterArgs) -> Timeouts:
    return Timeouts(
        startup=args.worker_startup_timeout_secs,
        hang=options.router_hang_timeout_secs,
        stop=options.router_stop_grace_secs,
        drain=options.router_drain_timeout_secs,
    )
