"""GET /engine_metrics: the metrics of all engines as one exposition, each sample labelled with its worker.

    from http://10.0.0.1:8000             merged
    # TYPE sglang:token_usage gauge       # TYPE sglang_token_usage gauge
    sglang:token_usage{model="m"} 0.3     sglang_token_usage{worker_addr="http://10.0.0.1:8000",model="m"} 0.3
    from http://10.0.0.2:8000 ...         sglang_token_usage{worker_addr="http://10.0.0.2:8000",model="m"} 0.1

The samples of one metric must be adjacent, so lines are grouped by metric. Lines that Prometheus could not read are
dropped. An engine's own label `worker_addr` becomes `exported_worker_addr`: that is what Prometheus does. Labels and
comments are searched for secrets, as other things are that engines say of themselves.

This runs on the event loop that also relays tokens, so it is done in slices, and once for all who ask at the same time
(`admin.shared`). It costs 4 us a line; the parser of prometheus-client alone takes 16 us.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.redaction import label_without_secrets, may_hold_secrets, text_without_secrets
from sglang_router.admin.ask import failure, get_from_all
from sglang_router.admin.context import Context
from sglang_router.admin.shared import in_slices, joined
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
_PAIR = r'[ \t]*"?({0}[a-zA-Z_][a-zA-Z0-9_]*)"?[ \t]*=[ \t]*"({0}(?:[^"\\]|\\.)*)"[ \t]*(?:,|\Z)'
_LABEL = re.compile(_PAIR.format(""), re.DOTALL)
_LABELS = re.compile(f"(?:{_PAIR.format('?:')})*[ \t]*", re.DOTALL)
_LONGEST_LINE = 1 << 16
_TYPES = frozenset(("counter", "gauge", "histogram", "summary", "untyped"))
_OURS = "worker_addr"
_SUFFIXES = frozenset(("", "_bucket", "_sum", "_count", "_total", "_created"))
"""What the name of a sample may add to the name of its metric."""


class MergedMetrics:
    """The metrics added so far, by name, each with its comments and samples. keys: what must not be in any of them."""

    def __init__(self, keys: Collection[str] = ()) -> None:
        self._keys = keys
        self._comments: dict[str, dict[str, str]] = {}
        self._samples: dict[str, list[str]] = {}

    def add(self, exposition: str, worker: str) -> None:
        """Add one worker's metrics; drop lines that are neither comments nor samples. worker: its URL."""
        for _ in self.adding(exposition, worker):
            pass

    def adding(self, exposition: str, worker: str) -> Iterator[None]:
        """Do the same line by line."""
        label = '{}="{}"'.format(_OURS, worker.replace("\\", r"\\").replace('"', r"\""))
        current = ""  # the metric that the last comment named
        for line in _lines(exposition):
            yield
            if line.startswith("#"):
                current = self._comment(line) or current
                continue
            sample = _SAMPLE.fullmatch(line) if len(line) <= _LONGEST_LINE else None
            if sample is not None:
                name, labels, value = sample.groups()
                more = self._relabelled(labels) if labels else ""
                if more is None:
                    continue
                name = name.replace(":", "_")
                metric = current if name.startswith(current) and name[len(current) :] in _SUFFIXES else name
                self._samples.setdefault(metric, []).append(f"{name}{{{label}{more}}} {value}\n")

    def _comment(self, line: str) -> str:
        """Keep the first HELP and TYPE of a metric; return its name, or "" for another comment."""
        comment = _COMMENT.fullmatch(line)
        if comment is None:
            return ""
        kind, name, rest = comment.groups()
        if kind == "TYPE" and rest.strip() not in _TYPES:
            return ""
        name = name.replace(":", "_")
        rest = text_without_secrets(rest, self._keys)
        self._comments.setdefault(name, {}).setdefault(kind, f"# {kind} {name}{rest}\n")
        return name

    def _relabelled(self, labels: str) -> str | None:
        """Return a comma and the labels without secrets, ours renamed where the engine has it too; None for what
        Prometheus cannot read."""
        if _LABELS.fullmatch(labels) is None:
            return None
        pairs = _LABEL.findall(labels)
        names = {name for name, _ in pairs}
        if len(names) < len(pairs):  # one comes twice
            return None
        if may_hold_secrets(labels, self._keys):
            pairs = [(name, label_without_secrets(name, value, self._keys)) for name, value in pairs]
        new = _OURS
        while new in names:
            new = f"exported_{new}"
        return "".join([f',{new if name == _OURS else name}="{value}"' for name, value in pairs])

    def exposition(self) -> str:
        """All metrics, one after the other."""
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        """Yield the same metric by metric."""
        for metric, samples in self._samples.items():
            comments = self._comments.get(metric, {})
            yield "".join([comments[kind] for kind in ("HELP", "TYPE") if kind in comments] + samples)


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text: splitting 8 MB at once would take milliseconds."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


async def merged(context: Context, request: Request) -> Response:
    """Merge what the workers answer; it is an error only if none answers."""
    body = await context.engine_metrics.get("", lambda: _merged(context))
    return Response(body, headers={"content-type": CONTENT_TYPE})


async def _merged(context: Context) -> bytes:
    workers = [worker for worker in context.engines() if worker.health is not Health.STARTING]
    if not workers:
        raise WorkersStarting(retry_after=1.0) if len(context.fleet) else NoWorkers(retry_after=5.0)
    union = MergedMetrics(context.keys())
    failures = []
    for worker, reply in await get_from_all(context, workers, b"/metrics"):
        if isinstance(reply, Fetched) and reply.ok:
            await in_slices(union.adding(reply.body.decode("utf-8", "replace"), worker.spec.url))
        else:
            failures.append(f"{worker.url}: {failure(reply)}")
    if len(failures) == len(workers):
        raise WorkerUnreachable(f"No worker gave its metrics. {'; '.join(failures)}")
    return await joined(union.pieces())
