"""What made a worker known, and so owns it.

    source          named by                                    at the next start
    FLAGS           --worker-urls, or its variable              named again, if the option still says so
    FILE            `worker_urls` in a --config file            named again, if the file still says so
    API             POST /workers, POST /add_worker             not named again: the state file keeps all of it
    REPLICAS        launch_server, which runs the engine        other processes: nothing of it is kept
    KUBERNETES      --service-discovery, --inference-pool: pods restored if the option is still there, until the source
    DISCOVERY_FILE  --discovery-file                              has named its workers: then those that it does not
    DNS             --discovery-dns                               name are removed

The last three are those that look for workers by themselves (`discovery`). The ranks of an engine have the source of
their engine.
"""

from __future__ import annotations

import enum

import msgspec


class Source(enum.Enum):
    """What made a worker known; see the module."""

    FLAGS = "flags"
    FILE = "file"
    API = "api"
    REPLICAS = "replicas"
    KUBERNETES = "kubernetes"
    DISCOVERY_FILE = "discovery-file"
    DNS = "dns"

    @property
    def told_again(self) -> bool:
        """Whether this source names its workers itself at the next start."""
        return self is not Source.API

    @property
    def looks(self) -> bool:
        """Whether this source looks for workers all the time, so that those of an earlier start may serve until it has
        looked once."""
        return self in (Source.KUBERNETES, Source.DISCOVERY_FILE, Source.DNS)


class SourceReport(msgspec.Struct, kw_only=True):
    """What a source that looks for workers says of itself, for GET /workers and the metrics.

    source       its name
    looks_at     where it looks, in words
    workers      how many of the router's workers are its own
    listed_secs  seconds since it knew all of its workers last; None: it never did
    error        why it does not know them now; None: it does
    passes       how often workers were compared with what it names
    added        workers added since the start
    removed      workers removed since the start, by reason
    failures     failed looks since the start, by reason
    """

    source: str
    looks_at: str
    workers: int
    listed_secs: float | None
    error: str | None
    passes: int
    added: int
    removed: dict[str, int]
    failures: dict[str, int]
