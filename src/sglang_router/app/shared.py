"""Make what shares this router's knowledge with others (--shared-state), which needs the package of the extra `shared`.

It is imported here, and only when the options ask for it: else nothing is imported, and nothing is done.
"""

from __future__ import annotations

import logging
import os
import platform
import random
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from sglang_router.access.tls import TLSFiles, worker_files
from sglang_router.access.watched import Renewed, WatchedFiles
from sglang_router.app import settings
from sglang_router.app.fleet_workers import FleetWorkers
from sglang_router.autoscale.autoscaler import Autoscaler
from sglang_router.config import RouterArgs, small_files
from sglang_router.config.store_urls import StoreURL, parse_store_url
from sglang_router.errors import ConfigError
from sglang_router.routing.events import Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.router import Router
from sglang_router.routing.shared.records import SharedRules
from sglang_router.routing.shared.sharing import SharedState
from sglang_router.sharing import fleet_key
from sglang_router.sharing.fleet_key import FleetKey
from sglang_router.sharing.link import StoreLink
from sglang_router.sharing.login import StoreLogin
from sglang_router.sharing.sharing import FleetSharing
from sglang_router.sharing.store import Store

log = logging.getLogger("sglang_router.sharing")

_INSTALL = "pip install 'sglang-router[shared]'"
_NAME_BYTES = 8
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_NETWORK: Final = "/proc/self/ns/net"


class StoreFiles(NamedTuple):
    """What the options name for a store.

    login     what new connections log in with
    password  the file that holds its password; None: there is no such file
    tls       None without TLS
    """

    url: StoreURL
    key: FleetKey
    login: StoreLogin
    password: WatchedFiles | None
    tls: TLSFiles | None

    @property
    def watched(self) -> list[Renewed]:
        """Those that are loaded again when they change."""
        return [each for each in (self.password, self.tls) if each is not None]


def state_of(args: RouterArgs, files: StoreFiles | None) -> SharedState | None:
    """Make what one router knows of the others, nothing yet; None when there are none."""
    if files is None:
        return None
    name = secrets.token_bytes(_NAME_BYTES)
    fleet = args.shared_state_prefix.encode()
    return SharedState(SharedRules(files.key.own, name, args.shared_state_blocks, place=_place(), fleet=fleet))


def _place() -> bytes:
    """Return what only processes with the same loopback addresses have: the same kernel and the same network."""
    try:
        return f"{_BOOT.read_text().strip()} {os.readlink(_NETWORK)}".encode()
    except OSError:
        return platform.node().encode()


def files_of(args: RouterArgs) -> StoreFiles | None:
    """Read the files that the options name; None when they ask for no store.

    Raises: ConfigError, when one cannot be used, or a package is missing.
    """
    if args.shared_state is None:
        return None
    try:
        import valkey  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--shared-state needs the package valkey ({error}): {_INSTALL}") from None
    url = parse_store_url(args.shared_state)
    login = StoreLogin(url.user, url.password)
    password = _password_file(args.shared_state_password_file, url, login)
    path = args.shared_state_key
    key = FleetKey(secrets.token_bytes(fleet_key.SIZE), fixed=False) if path is None else fleet_key.read(path)
    return StoreFiles(url, key, login, password, _tls(args, url))


def workers_of(args: RouterArgs, fleet: Fleet, clock: Callable[[], float]) -> FleetWorkers | None:
    """Make what adds and removes workers at all routers of the fleet; None where each has its own."""
    if args.shared_state is None or not args.shared_state_workers:
        return None
    return FleetWorkers(fleet, settings.worker_defaults(args), clock)


def sharing_of(
    args: RouterArgs,
    files: StoreFiles,
    state: SharedState,
    router: Router,
    listeners: Listeners,
    clock: Callable[[], float],
    rng: random.Random,
    workers: FleetWorkers | None = None,
) -> FleetSharing:
    """Make what shares the knowledge of a router, which has no workers yet.

    workers  adds and removes workers at all routers of the fleet; None: each has its own
    """
    state.attach(router, workers)
    if workers is not None and state.workers is not None:
        workers.shared = state.workers
    listeners.add(state)
    link = StoreLink(files.url.shown, clock, rng)
    return FleetSharing(state, _store(args, files), link, files.key, state.rules.router.hex(), args.shared_state_memory)


def scale_together(scaler: Autoscaler, state: SharedState, sharing: FleetSharing) -> None:
    """Let only one router of the fleet act, and let it know what the others hold: without a worker, nothing else says
    that one is wanted."""
    observer = scaler.observer
    scaler.leader = sharing.leader
    state.holds = lambda: observer.held
    observer.elsewhere = lambda: state.held_elsewhere


def _store(args: RouterArgs, files: StoreFiles) -> Store:
    from sglang_router.sharing.valkey_store import ValkeyStore

    tls = files.tls
    return ValkeyStore(files.url, files.login, args.shared_state_prefix, None if tls is None else lambda: tls.context)


def _password_file(path: str | None, url: StoreURL, login: StoreLogin) -> WatchedFiles | None:
    """Let a file say the password, now and when it changes; None without one. Raises: ConfigError."""
    if path is None:
        return None
    if url.password is not None:
        raise ConfigError("--shared-state holds a password, and --shared-state-password-file names one; give only one")
    return WatchedFiles([path], lambda: login.renew(_password(path)), "--shared-state", log, wall=time.time)


def _password(path: str) -> str:
    """Return the password in a file. Raises: ConfigError."""
    try:
        password = small_files.read(path, pipe=True).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        password = ""
    if not password:
        raise ConfigError(f"{path} holds no password")
    return password


def _tls(args: RouterArgs, url: StoreURL) -> TLSFiles | None:
    ca, cert, key = args.shared_state_ca_cert, args.shared_state_client_cert, args.shared_state_client_key
    if not url.tls:
        if ca or cert:
            raise ConfigError("certificates for --shared-state need TLS: begin its URL with rediss://")
        return None
    return worker_files([ca] if ca else [], cert, key)
