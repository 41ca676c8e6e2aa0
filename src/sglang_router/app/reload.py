"""Read the configuration again while the router runs: SIGHUP, `POST /reload`, `systemctl reload`.

    1. read      the --config file, all files of keys and certificates
    2. check     as at a start; anything wrong: refused whole, with the reasons, and nothing has changed
    3. compare   options that are in `config.live` take effect; the others are told: they need a restart
    4. use       log level, workers, models, policies and their thresholds, limits, keys, certificates

Flags and variables override the file as they did at the start, so only what the file sets can change.

A policy that only gets other thresholds remembers what it has learned; another policy begins without a memory. Requests
in flight and queued ones stay; new limits count from the next decision on.

`App.args` says what is in effect: a value that needs a restart is not taken over, and is told again at each reload.
"""

from __future__ import annotations

import copy
import logging
import time

import msgspec

from sglang_router.admin.context import ReloadReport
from sglang_router.app import settings
from sglang_router.app.checking import problems
from sglang_router.app.models import use_models
from sglang_router.app.parts import App
from sglang_router.app.routers import usual_policies
from sglang_router.config import OPTIONS, RouterArgs
from sglang_router.config.live import (
    KEYS,
    LOGGING,
    MODELS,
    POLICIES,
    QUEUE,
    RETRIES,
    ROOM,
    THRESHOLDS,
    WORKERS,
    taken_over,
)
from sglang_router.errors import ConfigError, ConfigRefused
from sglang_router.observe.logs import LogWriter
from sglang_router.routing.roles import ROLES
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.words import counted

log = logging.getLogger("sglang_router")


class Reload:
    """Reads everything again at each `run`. `App.args`: the options in effect, which it owns from then on."""

    def __init__(self, app: App, writer: LogWriter) -> None:
        self._app = app
        self._writer = writer
        self._args = app.args
        app.control.reload = self.run

    def started(self) -> None:
        """Read everything again, if this is not the first process that decides: it has the options of the start."""
        if self._app.elsewhere.restarted:
            self.hang_up("start again")

    def hang_up(self, why: str = "SIGHUP") -> None:
        """Read everything again; a configuration that is refused is a warning. why: see `run`."""
        try:
            self.run(why)
        except ConfigRefused as error:
            log.warning("%s", error)

    def run(self, why: str) -> ReloadReport:
        """Read everything again; return what changed. why: who asks, for the log.

        Raises: ConfigRefused, when anything cannot be used; nothing has changed then.
        """
        log.info("%s: reading keys, certificates and files again", why)
        self._note(why=f"keys, certificates and files are read again ({why})")
        new = self._read()
        self._app.deferred.flush()  # what has ended is told with the names of before
        old = copy.copy(self._args)
        changed = [name for name in OPTIONS if getattr(new, name) != getattr(old, name)]
        live = [name for name in taken_over(changed) if not _opens_or_closes(name, old, new)]
        waiting = [OPTIONS[name].flag for name in changed if name not in live]
        self._check_without(waiting, live, new)
        self._take_over(live, new)
        added, removed = self._use(old, set(live))
        self._app.metrics.sources.configured = time.time()
        for files in self._app.watched:
            files.refresh(anyway=True)
        self._app.elsewhere.reload()
        report = ReloadReport([OPTIONS[name].flag for name in live], waiting, added, removed, old.config)
        _tell(report)
        return report

    def _read(self) -> RouterArgs:
        """Return the options as the file says them now, checked with all that they name. Raises: ConfigRefused."""
        try:
            new = self._args.reread() if self._args.config else self._args
        except ConfigError as error:
            found = [str(error)]
        else:
            found = problems(new, again=True)
        if found:
            raise self._refused(found)
        return new

    def _check_without(self, waiting: list[str], live: list[str], new: RouterArgs) -> None:
        """Check the options as they would be in effect: a part of a change may be none that a router can start with.

        Raises: ConfigRefused.
        """
        mixed = copy.copy(self._args)
        for name in live:
            setattr(mixed, name, getattr(new, name))
        try:
            mixed.checked()
        except ConfigError as error:
            raise self._refused([f"{error} (as long as {', '.join(waiting)} waits for a restart)"]) from None

    def _refused(self, reasons: list[str]) -> ConfigRefused:
        """Return the error of a configuration that cannot be used, and show it on the page."""
        refused = f"{'; '.join(reasons)}; everything stays as it was"
        self._note(new="refused", why=refused)
        return ConfigRefused(refused)

    def _note(self, **what: str) -> None:
        """Show on the page what happens."""
        self._app.control.live.witness.note("reload", **what)

    def _take_over(self, live: list[str], new: RouterArgs) -> None:
        """Let these options have their new values, and say that they come from where they come from now."""
        args = self._args
        for name in live:
            setattr(args, name, getattr(new, name))
        for origin in ("given", "from_file"):
            setattr(args, origin, getattr(args, origin) - frozenset(live) | getattr(new, origin) & frozenset(live))

    def _use(self, old: RouterArgs, live: set[str]) -> tuple[list[str], list[str]]:
        """Let the parts follow the options; return the URLs of workers that were added and removed."""
        app, args = self._app, self._args
        if live.intersection(LOGGING):
            self._writer.set_level(args.log_level)
        moved = self._change_workers(old) if live.intersection(WORKERS) else ([], [])
        if live.intersection((*POLICIES, *THRESHOLDS)):
            self._change_policies(old)
        if live.intersection((*MODELS, *POLICIES, *THRESHOLDS)):
            use_models(args, app.router, app.models)
        if live.intersection(ROOM):
            app.fleet.pools.limit(args.max_running_per_worker)
            if app.router.recorder is not None:
                app.router.recorder.most_load = args.max_running_per_worker
        if live.intersection(QUEUE):
            running = {lease.tag.number for lease in app.router.open_leases()}
            app.router.queue.use(settings.queue_rules(args), running)
        if live.intersection(RETRIES):
            app.router.budget.use(settings.retry_budget_rules(args))
        app.router.look(app.clock())  # queued requests may begin now
        return moved

    def _change_policies(self, old: RouterArgs) -> None:
        """Let pools have the policies that the options name now, with their thresholds."""
        app, args = self._app, self._args
        make, roles = usual_policies(args, app.policies)
        pools = app.fleet.pools
        pools.use(make, roles, {role for role in ROLES if _policy(old, role) != _policy(args, role)})
        pools.adjust(settings.policy_settings(args, app.policies.caches))
        app.router.pairs.rules = settings.pair_rules(args)
        app.metrics.counts.policy = app.control.live.policy = args.policy
        if app.router.recorder is not None:
            app.router.recorder.policy = args.policy

    def _change_workers(self, old: RouterArgs) -> tuple[list[str], list[str]]:
        """Add the workers that the file names now, remove those that only it named; call the others what it says.

        A worker that the file gives another role or bootstrap port begins anew: it is removed, and added.
        """
        fleet, now = self._app.fleet, self._app.clock()
        specs = {spec.url: spec for spec in settings.configured_workers(self._args).specs}
        before = {spec.url: spec for spec in settings.configured_workers(old).specs}
        of_file = [worker for url in before for worker in fleet.entries(url) if worker.spec.source is Source.FILE]
        gone = [worker for worker in of_file if worker.spec.url not in specs]
        moved = [
            worker
            for worker in of_file
            if worker not in gone and _part(specs[worker.spec.url]) != _part(before[worker.spec.url])
        ]
        for worker in moved:
            fleet.remove(worker)
        added = [spec for url, spec in specs.items() if not fleet.entries(url)]
        for url, spec in specs.items():
            if url in before and spec.model_id != before[url].model_id:
                for worker in fleet.entries(url):
                    fleet.amend(worker, msgspec.structs.replace(worker.spec, model_id=spec.model_id))
        for spec in added:
            fleet.add(spec, now)
        for worker in gone:
            fleet.remove(worker)
        return [spec.url for spec in added], [worker.url for worker in (*gone, *moved)]


def _part(spec: WorkerSpec) -> tuple[str, int | None]:
    """Return what a worker does, and where it is asked for the cache of a prompt."""
    return spec.worker_type, spec.bootstrap_port


def _opens_or_closes(name: str, old: RouterArgs, new: RouterArgs) -> bool:
    """Return whether a change of keys decides whether any key is needed at all: that is decided at the start."""
    if name not in KEYS:
        return False
    file = f"{name}_file"
    return bool(getattr(old, name) or getattr(old, file)) != bool(getattr(new, name) or getattr(new, file))


def _policy(args: RouterArgs, role: str) -> str:
    """Return the name of a role's policy."""
    own: str | None = getattr(args, f"{role}_policy", None)
    return own or args.policy


def _tell(report: ReloadReport) -> None:
    """Log what a reload did."""
    if report.changed:
        workers = f"{counted(len(report.added), 'worker')} added, {counted(len(report.removed), 'worker')} removed"
        about = f"; {workers}" if report.added or report.removed else ""
        log.info("%s: in effect now: %s%s", report.file, ", ".join(report.changed), about)
    if report.needs_restart:
        log.warning("%s: these changes need a restart: %s", report.file, ", ".join(report.needs_restart))
