"""Make one router of several processes: bind the port, make what they share, and let the supervisor start them."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable

from sglang_router import process
from sglang_router.app import lifecycle
from sglang_router.app.build import new_mark
from sglang_router.app.lifecycle import Crew, Host
from sglang_router.app.listening import address_errors
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.processes import sockets
from sglang_router.processes.given import Given, Launch
from sglang_router.processes.kept_options import KeptOptions
from sglang_router.processes.relaying import relay_for
from sglang_router.processes.relays import Relays
from sglang_router.processes.supervisor import ProcessSupervisor
from sglang_router.processes.texts import shared_memory
from sglang_router.restart import systemd
from sglang_router.restart.handover import InheritedSockets, take_over

_LONGEST_FOLDER = 90
"""Bytes: the address of a Unix socket has 107 at most."""


def serve_together(args: RouterArgs, crew: Callable[[Host], Crew] | None) -> int:
    """Run a router in several processes; return its exit status. See `app.lifecycle.serve`.

    Raises: ConfigError, when the router cannot start with these options.
    """
    _check()
    process.open_standard_descriptors()
    with address_errors(args.host, args.port, "--port"):
        inherited, bound = _listen(args)
    folder = _folder()
    hears, tells = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    hears.setblocking(False)
    given = Given(
        folder=folder,
        sockets=sockets.divide(bound, args.relay_processes),
        inherited=inherited,
        memories=[shared_memory() for _ in range(args.relay_processes)],
        key=secrets.token_bytes(32),
        mark=new_mark(),
        tells=tells,
        options=KeptOptions(),
    )

    def run(place: int, start: Launch) -> int:
        now = given.options.last(args)
        if place >= 0:
            return relay_for(now, given, place, start)
        return lifecycle.serve(now, crew, lambda loop: Relays(loop, given, start))

    return ProcessSupervisor(args.relay_processes, given, hears, run).supervise()


def _folder() -> str:
    """Make a private folder for the decider's socket and its state. Raises: ConfigError."""
    try:
        folder = tempfile.mkdtemp(prefix="sglang-router-")
    except OSError as error:
        raise ConfigError(f"--relay-processes needs a folder for its socket, see TMPDIR: {error}") from None
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        os.rmdir(folder)
        raise ConfigError(
            f"--relay-processes needs a folder with a shorter name for its socket than {folder}: set TMPDIR"
        )
    return folder


def _check() -> None:
    """Refuse where no process can be forked. Raises: ConfigError."""
    missing = not hasattr(os, "fork") or not hasattr(socket, "SO_REUSEPORT")
    if missing or threading.current_thread() is not threading.main_thread() or threading.active_count() > 1:
        raise ConfigError(
            "--relay-processes needs a process of its own, on Linux, and no other thread in it: start the router as a"
            " command, or leave this option out"
        )


def _listen(args: RouterArgs) -> tuple[InheritedSockets | None, list[socket.socket]]:
    """Take the main port over from another router or from systemd, or bind it. Raises: OSError, ConfigError."""
    if args.reuse_port:
        loop = asyncio.new_event_loop()
        try:
            inherited = loop.run_until_complete(take_over(loop, args.host, args.port))
        finally:
            loop.close()
        if inherited is not None and (taken := inherited.take(args.host, args.port)):
            return inherited, taken
    if passed := systemd.take_sockets(args.host, args.port):
        return None, passed
    return None, sockets.bind(args.host, args.port, args.relay_processes)
