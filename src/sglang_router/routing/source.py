"""What made a worker known, and so owns it.

    source     named by                                    at the next start
    FLAGS      --worker-urls, or its variable              named again, if the option still says so
    FILE       `worker_urls` in a --config file            named again, if the file still says so
    API        POST /workers, POST /add_worker             not named again: the state file keeps all of it
    REPLICAS   launch_server, which runs the engine        other processes: nothing of it is kept

The ranks of an engine have the source of their engine.
"""

from __future__ import annotations

import enum


class Source(enum.Enum):
    """What made a worker known; see the module."""

    FLAGS = "flags"
    FILE = "file"
    API = "api"
    REPLICAS = "replicas"

    @property
    def told_again(self) -> bool:
        """Whether this source names its workers itself at the next start."""
        return self is not Source.API
