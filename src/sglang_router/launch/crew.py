"""What `launch_server` runs beside the router: the supervisor with its engines, and the report about them.

Start(line, args, machine)      what to start, computed and checked before anything runs
  |-- .command(rank)            how to start one replica
  '-- .crew(host)               once the router listens  -->  EngineCrew: start, failed, stop
"""

from __future__ import annotations

import asyncio
import os
import sys

from sglang_router.app.lifecycle import Host
from sglang_router.app.parts import Attachment
from sglang_router.app.settings import worker_defaults
from sglang_router.autoscale.replicas import ReplicaActuator
from sglang_router.config import RouterArgs
from sglang_router.launch.backends import BACKENDS, EngineSetup
from sglang_router.launch.download import fetch_model
from sglang_router.launch.keeper import ReplicaTimeouts, SupervisedRouter, SupervisionRules
from sglang_router.launch.machine import LocalMachine, PortAllocator
from sglang_router.launch.options import CommandLine, LaunchOptions
from sglang_router.launch.replica import EngineCommand
from sglang_router.launch.report import LogEcho, LogFiles, ReplicaReport, ReportOutputs, manual_command
from sglang_router.launch.restarts import RestartRules
from sglang_router.launch.screen import Screen
from sglang_router.launch.supervisor import Supervisor
from sglang_router.observe.logs import LogWriter
from sglang_router.routing.spec import WorkerSpec
from sglang_router.workers.sources import replica_specs

_STDERR = 2


class Start:
    """What to start. `args` are the router's checked options.

    count    replicas to start at once
    command  rank -> how to start that replica

    Raises: ConfigError if it cannot be started: no such engine, no model, no GPU, no folder for logs.
    """

    def __init__(self, line: CommandLine, args: RouterArgs, machine: LocalMachine) -> None:
        options = line.options
        self._options = options
        self._args = args
        self._ranks = options.size if args.dp_aware else 0
        low, high = args.scale_range or (1, options.size)
        self.count = 1 if args.dp_aware else min(max(options.size, low), high)
        self._setup = EngineSetup(
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
        # Raises an error now if there are not enough GPUs for all replicas.
        self._backend.command(self.count - 1, options.router_dp_worker_base_port)
        self._ports = PortAllocator(options.dp_worker_host, options.router_dp_worker_base_port, machine.take_port)
        self._files = LogFiles(options.log_dir) if options.log_dir else None

    def command(self, rank: int) -> EngineCommand:
        """Return how to start a replica. Raises: ConfigError if there is no port or GPU for that rank."""
        return self._backend.command(rank, self._ports(rank))

    def crew(self, host: Host) -> EngineCrew:
        """Return the supervisor, attached to a router that listens."""
        report = self._report(host)
        router = SupervisedRouter(loop=host.loop, clock=host.clock, fleet=host.fleet, checks=host.checks)
        rules = supervision_rules(self._options, self._args)
        supervisor = Supervisor(router, self.command, self._specs, report, rules)
        actuators: list[ReplicaActuator] = []
        if host.scaling is not None:
            actuators.append(ReplicaActuator(host.loop, host.fleet, supervisor, host.clock, host.scaling))
        host.attach(
            Attachment(
                listeners=[supervisor],
                deferred=actuators,
                replicas=supervisor,
                replica_metrics=supervisor.replica_metrics,
                actuators=actuators,
            )
        )
        return EngineCrew(supervisor, report, self.count)

    def _report(self, host: Host) -> ReplicaReport:
        writer = host.writer
        return ReplicaReport(
            later=host.loop.call_later,
            clock=host.clock,
            outputs=ReportOutputs(
                writer=writer,
                lines=self._files or LogEcho(writer),
                screen=Screen(_STDERR) if self._has_rows(writer) else None,
            ),
            size=self.count,
            url=host.url,
            manual_command=lambda rank: manual_command(self.command(rank)),
        )

    def _has_rows(self, writer: LogWriter) -> bool:
        terminal = self._setup.machine.environ.get("TERM", "dumb") != "dumb" and os.isatty(_STDERR)
        return terminal and self.count > 0 and not writer.json

    def _specs(self, command: EngineCommand) -> list[WorkerSpec]:
        """Return the workers that a replica is for the router: one, or one for each of its data-parallel ranks."""
        return replica_specs(command.url, command.runtime, self._ranks, worker_defaults(self._args))


class EngineCrew:
    """The engines of one router process; implements `app.lifecycle.Crew`."""

    def __init__(self, supervisor: Supervisor, report: ReplicaReport, count: int) -> None:
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


def supervision_rules(options: LaunchOptions, args: RouterArgs) -> SupervisionRules:
    """Return when to restart and when to give up, as the options of the launcher and of the router say."""
    return SupervisionRules(
        restarts=RestartRules(
            initial_backoff=options.router_restart_initial_backoff_secs,
            max_backoff=options.router_restart_max_backoff_secs,
            most=options.router_max_restarts,
            window=options.router_restart_window_secs,
        ),
        timeouts=ReplicaTimeouts(
            startup=args.worker_startup_timeout_secs,
            hang=options.router_hang_timeout_secs,
            stop=options.router_stop_grace_secs,
            drain=options.router_drain_timeout_secs,
        ),
    )
