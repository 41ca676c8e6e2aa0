"""The metrics of all engines as one exposition, each sample with a label that names its worker.

    from 10.0.0.1:8000                    merged
    # TYPE sglang:token_usage gauge       # TYPE sglang_token_usage gauge
    sglang:token_usage{model="m"} 0.3     sglang_token_usage{worker_addr="10.0.0.1:8000",model="m"} 0.3
    from 10.0.0.2:8000 ...                sglang_token_usage{worker_addr="10.0.0.2:8000",model="m"} 0.1

Line by line and not through a parser: the samples of a metric must stand together, so lines are grouped by
metric, and lines that Prometheus could not read are dropped, but nothing else in a line is looked at. It happens on
the event loop that also relays tokens: 1.4 us a line, where the parser of prometheus-client alone takes 16 us.
"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.context import Context, get_from_all, trouble
from sglang_router.core.worker import Health
from sglang_router.errors import NoWorkers, WorkersStarting, WorkerUnreachable
from sglang_router.net.fetch import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COMMENT = re.compile(r"#[ \t]+(HELP|TYPE)[ \t]+([a-zA-Z_:][a-zA-Z0-9_:]*)(.*)", re.DOTALL)
_SAMPLE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:[ \t]*\{(.*)\}[ \t]*|[ \t]+)"
    r"([-+]?(?:[0-9.][-+.0-9eE]*|inf|nan)(?:[ \t]+-?[0-9]+)?)[ \t\r]*",
    re.DOTALL | re.IGNORECASE,
)
"""Name, labels, value with or without time. One line that Prometheus cannot read would cost it all of them."""
_SUFFIXES = frozenset(("", "_bucket", "_sum", "_count", "_total", "_created"))
"""What a sample's name may add to the name of its metric."""


class Merged:
    """The metrics read so far, by name, each with its comments and its samples."""

    def __init__(self) -> None:
        self._comments: dict[str, dict[str, str]] = {}
        self._samples: dict[str, list[str]] = {}

    def add(self, exposition: str, address: str) -> None:
        """Takes one worker's metrics in; lines that are neither comments nor samples are left out."""
        label = 'worker_addr="{}"'.format(address.replace("\\", r"\\").replace('"', r"\""))
        current = ""
        for line in exposition.split("\n"):
            if line.startswith("#"):
                comment = _COMMENT.fullmatch(line)
                if comment is not None:
                    kind, name, rest = comment.groups()
                    current = name.replace(":", "_")
                    self._comments.setdefault(current, {}).setdefault(kind, f"# {kind} {current}{rest}\n")
                continue
            sample = _SAMPLE.fullmatch(line)
            if sample is None:
                continue
            name, labels, value = sample.groups()
            name = name.replace(":", "_")
            metric = current if name.startswith(current) and name[len(current) :] in _SUFFIXES else name
            more = f",{labels}" if labels else ""
            self._samples.setdefault(metric, []).append(f"{name}{{{label}{more}}} {value}\n")

    def exposition(self) -> str:
        """Everything, metric by metric."""
        parts: list[str] = []
        for metric, samples in self._samples.items():
            comments = self._comments.get(metric, {})
            parts += [comments[kind] for kind in ("HELP", "TYPE") if kind in comments]
            parts += samples
        return "".join(parts)


async def merged(context: Context, request: Request) -> Response:
    """Workers without metrics are left out; it is an error only when nobody has any."""
    workers = [worker for worker in context.engines() if worker.health is not Health.STARTING]
    if not workers:
        raise WorkersStarting(retry_after=1.0) if len(context.fleet) else NoWorkers(retry_after=5.0)
    union = Merged()
    failures = []
    for worker, reply in await get_from_all(context, workers, b"/metrics"):
        if isinstance(reply, Answer) and reply.ok:
            union.add(reply.body.decode("utf-8", "replace"), urlsplit(worker.spec.url).netloc)
            await asyncio.sleep(0)  # streams go on between two workers' metrics
        else:
            failures.append(f"{worker.url}: {trouble(reply)}")
    if len(failures) == len(workers):
        raise WorkerUnreachable(f"No worker gave its metrics. {'; '.join(failures)}")
    return Response(union.exposition(), headers={"content-type": CONTENT_TYPE})
