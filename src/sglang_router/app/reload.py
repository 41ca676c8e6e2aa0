"""What SIGHUP does: read again what can change while the router serves.

    certificates, keys of clients and operators     as every few seconds, but whether they changed or not
    log files                                       opened again (`observe.log_files` does it at the next line anyway)
    the --config file                               workers and what their models are called, log-level, models, aliases
                                                    and fallbacks take effect; other changes are one warning

A file that cannot be used is a warning, and everything stays as it was. Flags and variables override the file as they
did at the start.
"""

from __future__ import annotations

import logging
import time

import msgspec

from sglang_router.app import settings
from sglang_router.app.models import use_models
from sglang_router.app.parts import App
from sglang_router.config import OPTIONS, RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.observe.logs import LogWriter
from sglang_router.routing.source import Source
from sglang_router.words import counted

log = logging.getLogger("sglang_router")

_MODELS = ("models", "model_alias", "model_fallback")
_WORKERS = ("worker_urls", "prefill_urls", "decode_urls", "worker_model")
_LIVE = (*_WORKERS, "log_level", *_MODELS)
"""Options of the file that take effect at once."""


class Reload:
    """Reads everything again at each `run`. `args`: the options in effect."""

    def __init__(self, app: App, writer: LogWriter) -> None:
        self._app = app
        self._writer = writer
        self._args = app.args

    def run(self) -> None:
        """Read everything again."""
        log.info("SIGHUP: reading keys, certificates and files again")
        self._app.control.live.witness.note("reload", why="keys, certificates and files are read again (SIGHUP)")
        for files in self._app.watched:
            files.refresh(anyway=True)
        if self._args.config:
            self._read_config()
        self._app.elsewhere.reload()

    def _read_config(self) -> None:
        old = self._args
        try:
            new = old.reread()
        except ConfigError as error:
            log.warning("%s; the options stay as they are", error)
            self._app.control.live.witness.note("reload", new="refused", why=f"{error}; the options stay as they are")
            return
        self._app.metrics.sources.configured = time.time()
        changed = {name: None for name in OPTIONS if getattr(new, name) != getattr(old, name)}.keys()
        if "log_level" in changed:
            self._writer.set_level(new.log_level)
        if not changed.isdisjoint(_WORKERS):
            self._change_workers(old, new)
        if waiting := [OPTIONS[name].flag for name in changed if name not in _LIVE]:
            log.warning("%s: these changes need a restart: %s", old.config, ", ".join(waiting))
        for name in _LIVE:  # the others are named again at the next SIGHUP
            setattr(old, name, getattr(new, name))
        if any(name in changed for name in _MODELS):
            use_models(old, self._app.router, self._app.models)  # nothing else of the file takes effect with them
            log.info("%s: models, aliases and fallbacks are as the file says now", old.config)

    def _change_workers(self, old: RouterArgs, new: RouterArgs) -> None:
        """Add the workers that the file names now, remove those that only it named; call the others what it says."""
        fleet, now = self._app.fleet, self._app.clock()
        specs = {spec.url: spec for spec in settings.configured_workers(new).specs}
        before = {spec.url: spec for spec in settings.configured_workers(old).specs}
        added = [spec for url, spec in specs.items() if not fleet.entries(url)]
        gone = [
            worker
            for url in before
            if url not in specs
            for worker in fleet.entries(url)
            if worker.spec.source is Source.FILE
        ]
        for url, spec in specs.items():
            if url in before and spec.model_id != before[url].model_id:
                for worker in fleet.entries(url):
                    fleet.amend(worker, msgspec.structs.replace(worker.spec, model_id=spec.model_id))
        for spec in added:
            fleet.add(spec, now)
        for worker in gone:
            fleet.remove(worker)
        log.info("%s: %s added, %s removed", old.config, counted(len(added), "worker"), counted(len(gone), "worker"))
