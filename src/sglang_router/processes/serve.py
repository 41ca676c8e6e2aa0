"""Serve: in this process, or with --relay-processes in several.

serve(args, crew)    app.lifecycle.serve; or the supervisor, whose decider runs app.lifecycle.serve
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_router.app import lifecycle
from sglang_router.app.lifecycle import Crew, Host
from sglang_router.config import RouterArgs


def serve(args: RouterArgs, crew: Callable[[Host], Crew] | None = None) -> int:
    """Run a router until a signal tells it to stop; return the exit status. See `app.lifecycle.serve`.

    Raises: ConfigError, when the router cannot start with these options.
    """
    if not args.relay_processes:
        return lifecycle.serve(args, crew)
    from sglang_router.processes.assembly import serve_together  # imported here: one process does not need it

    return serve_together(args, crew)
