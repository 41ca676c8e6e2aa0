"""GET /engine_metrics: the metrics of all engines as one exposition, each sample labelled with its worker.

    from 10.0.0.1:8000                    merged
    # TYPE sglang:token_usage gauge       # TYPE sglang_token_usage gauge
    sglang:token_usage{model="m"} 0.3     sglang_token_usage{worker_addr="10.0.0.1:8000",model="m"} 0.3
    from 10.0.0.2:8000 ...                sglang_token_usage{worker_addr="10.0.0.2:8000",model="m"} 0.1

The samples of one metric must be adjacent, so lines are grouped by metric. Lines that Prometheus could not read are
dropped; nothing else is parsed. This runs on the event loop that also relays tokens and costs 1.4 us a line; the
parser of prometheus-client alone takes 16 us.
"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.ask import failure, get_from_all
from sglang_router.admin.context import Context
from sglang_router.errors import NoWorkers, WorkersStarting, WorkerUnreachable
from sglang_router.routing.states import Health
from sglang_router.workers.fetch import Fetched

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COMMENT = re.compile(r"#[ \t]+(HELP|TYPE)[ \t]+([a-zA-Z_:][a-zA-Z0-9_:]*)(.*)", re.DOTALL)
_SAMPLE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:[ \t]*\{(.*)\}[ \t]*|[ \t]+)"
    r"([-+]?(?:[0-9.][-+.0-9eE]*|inf|nan)(?:[ \t]+-?[0-9]+)?)[ \t\r]*",
    re.DOTALL | re.IGNORECASE,
)
"""Name, labels, value, perhaps a timestamp. Prometheus refuses a whole exposition for one line that it cannot read."""
_SUFFIXES = frozenset(("", "_bucket", "_sum", "_count", "_total", "_created"))
"""What the name of a sample may add to the name of its metric."""


class MergedMetrics:
    """The metrics added so far, by name, each with its comments and samples."""

    def __init__(self) -> None:
        self._comments: dict[str, dict[str, str]] = {}
        self._samples: dict[str, list[str]] = {}

    def add(self, exposition: str, address: str) -> None:
        """Add one worker's metrics; drop lines that are neither comments nor samples."""
        label = 'worker_addr="{}"'.format(address.replace("\\", r"\\").replace('"', r"\""))
        current = ""  # the metric that the last comment named
        for line in exposition.split("\n"):
            if line.startswith("#"):
                current = self._comment(line) or current
                continue
            sample = _SAMPLE.fullmatch(line)
            if sample is not None:
                name, labels, value = sample.groups()
                name = name.replace(":", "_")
                metric = current if name.startswith(current) and name[len(current) :] in _SUFFIXES else name
                more = f",{labels}" if labels else ""
                self._samples.setdefault(metric, []).append(f"{name}{{{label}{more}}} {value}\n")

    def _comment(self, line: str) -> str:
        """Keep the first HELP and TYPE of a metric; return its name, or "" for another comment."""
        comment = _COMMENT.fullmatch(line)
        if comment is None:
            return ""
        kind, name, rest = comment.groups()
        name = name.replace(":", "_")
        self._comments.setdefault(name, {}).setdefault(kind, f"# {kind} {name}{rest}\n")
        return name

    def exposition(self) -> str:
        """All metrics, one after the other."""
        parts: list[str] = []
        for metric, samples in self._samples.items():
            comments = self._comments.get(metric, {})
            parts += [comments[kind] for kind in ("HELP", "TYPE") if kind in comments]
            parts += samples
        return "".join(parts)


async def merged(context: Context, request: Request) -> Response:
    """Merge what the workers answer; it is an error only if none answers."""
    workers = [worker for worker in context.engines() if worker.health is not Health.STARTING]
    if not workers:
        raise WorkersStarting(retry_after=1.0) if len(context.fleet) else NoWorkers(retry_after=5.0)
    union = MergedMetrics()
    failures = []
    for worker, reply in await get_from_all(context, workers, b"/metrics"):
        if isinstance(reply, Fetched) and reply.ok:
            union.add(reply.body.decode("utf-8", "replace"), urlsplit(worker.spec.url).netloc)
            await asyncio.sleep(0)  # let streams continue between two workers' metrics
        else:
            failures.append(f"{worker.url}: {failure(reply)}")
    if len(failures) == len(workers):
        raise WorkerUnreachable(f"No worker gave its metrics. {'; '.join(failures)}")
    return Response(union.exposition(), headers={"content-type": CONTENT_TYPE})
