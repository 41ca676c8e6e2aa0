"""Measure the decision by itself, without sockets: `sh scripts/bench --decision [--markdown]`.

    body --> facts.read --> Router.ask (pool, candidates, policy, lease) --> ... --> Router.ended --> its record
             '--------------------------------------- timed --------------------------------------------'

The parts are made from the product's default options. Every body is new (4 kB). Of the same traffic, only the number of
workers differs: `FLYING` requests are in flight, of which the oldest ends when the next is planned, and each worker has
some more, up to `MOST_LOAD`, that never end. A row is one kind of traffic, a column one size of the fleet: microseconds
of CPU for one decision, in the fastest repeat, and in brackets the median of all repeats. `x` compares the last size
with the first. Rows with changes do, before each decision, what makes the candidates change.

All sizes of a row are measured in turn, repeat by repeat, so that a disturbance of the machine affects all of them. To
compare with another revision of the package, name its `src` by PYTHONPATH.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sglang_router.app import settings
from sglang_router.app.deciding import in_shadow, recorder_of, shadows_of
from sglang_router.config import RouterArgs
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.events import Answered, Finished, Listener
from sglang_router.routing.facts import read
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.lease import Lease
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, RequestTag
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.queue import Queue
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.router import Router
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

SIZE = 4000  # bytes of a prompt
SHARED = SIZE * 3 // 4
FLYING = 64
MOST_LOAD = 8
GROUPS = 64  # of prompts that share three quarters; as many routing keys
ENDPOINT = ENDPOINTS[b"/v1/chat/completions"]
ROUTE = ENDPOINT.route_of(b"POST", ENDPOINT.path)
BATCH = 32  # ends of requests that are told together, as in `observe.deferred`
TICK = 1e-4  # seconds of the router's clock between two requests

Change = Callable[["Rig", Worker], None]


@dataclass(frozen=True)
class Row:
    """One kind of traffic.

    groups     of prompts that share three quarters; 0: nothing is shared
    models     names that the workers announce, each the same number of workers
    change     what happens to some worker before each decision
    most_load  --max-running-per-worker
    tree_size  --max-tree-size
    records    --decision-records; tables: --decision-table-every; shadow: --shadow-policy
    """

    label: str
    policy: str = "cache_aware"
    groups: int = GROUPS
    models: int = 1
    change: Change | None = None
    most_load: int = 0
    tree_size: int = 1 << 24
    slow_start: float = 0.0
    records: int = 2048
    tables: int = 64
    shadow: str | None = None


class Rig:
    """A router and its workers, without sockets."""

    def __init__(self, row: Row, workers: int) -> None:
        args = RouterArgs(
            policy=row.policy,
            max_running_per_worker=row.most_load,
            max_tree_size=row.tree_size,
            slow_start_secs=row.slow_start,
            decision_records=row.records,
            decision_table_every=row.tables,
            shadow_policy=row.shadow,
        ).checked()
        self.row = row
        self.now = 1000.0
        self.rng = random.Random(7)
        number = itertools.count()
        shadows = shadows_of(args)

        def policy() -> Policy:
            made = POLICIES[row.policy](settings.policy_settings(args), self.rng)
            return made if shadows is None else in_shadow(made, shadows)

        self.fleet = Fleet(Listener(), lambda: f"id-{next(number)}", policy, settings.fleet_rules(args))
        self.router = Router(
            self.fleet,
            Queue(settings.queue_rules(args)),
            Listener(),
            settings.retry_rules(args),
            RetryBudget(settings.retry_budget_rules(args)),
            self.rng,
            lambda work: None,
            lambda worker: None,
        )
        self.router.recorder = recorder_of(args, lambda: self.now)
        self.workers = [self._worker(index) for index in range(workers)]
        self._turn = itertools.cycle(self.workers)
        for worker in self.workers:
            for _ in range(self.rng.randrange(MOST_LOAD)):
                self.fleet.lease(worker)
        self._shared = [self._text(SHARED) for _ in range(row.groups)]
        self._keys = [b"key-%d" % index for index in range(GROUPS)]
        self._open: deque[tuple[RequestTag, Plan]] = deque()
        self._number = itertools.count(1)
        self.last: Lease | None = None  # for `flips_room`

    def _worker(self, index: int) -> Worker:
        spec = WorkerSpec(
            url=f"http://10.0.{index >> 8}.{index & 255}:8000", model_id=f"model-{index % self.row.models}"
        )
        worker = self.fleet.add(spec, self.now)
        self.fleet.probed(worker, None, self.now)
        return worker

    def _text(self, size: int) -> str:
        return self.rng.randbytes(size // 2).hex()

    def requests(self, count: int) -> Iterator[tuple[RequestTag, bytes, bytes]]:
        """Make requests: tag, body and routing key."""
        for _ in range(count):
            text = self.rng.choice(self._shared) if self._shared else self._text(SHARED)
            model = self.rng.randrange(self.row.models)
            text += self._text(SIZE - SHARED)
            message = f'{{"role":"user","content":"{text}"}}'
            body = f'{{"model":"model-{model}","messages":[{message}],"max_tokens":16}}'
            number = next(self._number)
            tag = RequestTag(number, b"chatcmpl-%d" % number, self.now, ROUTE, "", "", len(body))
            yield tag, body.encode(), self.rng.choice(self._keys)

    def run(self, count: int) -> float:
        """Decide about some requests; return the microseconds of one."""
        open_, router, served, change = self._open, self.router, Outcome.SERVED, self.row.change
        now, recorder = self.now, self.router.recorder
        requests = list(self.requests(count))
        ends = [Finished(tag, None, Answered(200, "", served, 0.5, 0.1, SIZE)) for tag, _, _ in requests]
        told: list[Finished] = []
        begin = time.thread_time()
        for tag, body, key in requests:
            now += TICK
            if change is not None:
                self.now = now
                change(self, next(self._turn))
            plan = router.ask(tag, read(ENDPOINT, body, key), now)
            assert isinstance(plan, Plan)
            open_.append((tag, plan))
            if len(open_) > FLYING:
                tag, plan = open_.popleft()
                router.ended(tag, plan.legs[0], served, now)
                if recorder is not None:
                    end = ends.pop()
                    end.tag, end.leg = tag, plan.legs[0]
                    told.append(end)
                    if len(told) == BATCH:
                        recorder.finished_all(told)
                        told = []
        took = time.thread_time() - begin
        self.now = now
        return took / count * 1e6


# -- changes of the candidates -----------------------------------------------------------------------------------------


def flips_health(rig: Rig, worker: Worker) -> None:
    """Make a worker unhealthy by failed checks, and the one before it healthy."""
    for _ in range(worker.spec.health.failure_threshold):
        rig.fleet.probed(worker, "GET /health answered 500", rig.now)
    before = rig.workers[worker.order - 2]
    for _ in range(before.spec.health.success_threshold):
        rig.fleet.probed(before, None, rig.now)


def flips_room(rig: Rig, worker: Worker) -> None:
    """Make the first worker full, or free it again."""
    first = rig.workers[0]
    if rig.last is not None:
        rig.last.close(Outcome.SERVED, rig.now)
        rig.last = None
        return
    while first.load < rig.fleet.rules.most_load:
        rig.last = rig.fleet.lease(first)


def flips_breaker(rig: Rig, worker: Worker) -> None:
    """Open the breaker of a worker by refused connections, and close that of the one before it by a passed check."""
    for _ in range(rig.fleet.rules.breaker.threshold):
        rig.fleet.lease(worker).close(Outcome.UNREACHABLE, rig.now)
    rig.fleet.probed(rig.workers[worker.order - 2], None, rig.now)


ROWS = (
    Row("cache_aware, three quarters shared"),
    Row("cache_aware, nothing shared", groups=0),
    Row("cache_aware, one prompt for all", groups=1),
    Row("cache_aware, three quarters shared, trees full", tree_size=1 << 16),
    Row("cache_aware, 10 models", models=10),
    Row("cache_aware, 100 models", models=100),
    *(Row(name, name) for name in POLICIES if name != "cache_aware"),
    Row("least_load, 10 models", "least_load", models=10),
    Row("cache_aware, no records", records=0),
    Row("cache_aware, a table for each", tables=1),
    Row("least_load, no records", "least_load", records=0),
    Row("least_load, a table for each", "least_load", tables=1),
    Row("cache_aware, least_load in its shadow", shadow="least_load"),
    Row("least_load, cache_aware in its shadow", "least_load", shadow="cache_aware"),
    Row("a limit for each worker, reached by none", most_load=10 * MOST_LOAD),
    Row("a worker is full, and free again", "least_load", most_load=10 * MOST_LOAD, change=flips_room),
    Row("slow start of all workers", slow_start=3600.0),
    Row("a worker becomes unhealthy, one healthy", change=flips_health),
    Row("a breaker opens, one closes", change=flips_breaker),
)


def measure(row: Row, sizes: list[int], repeats: int, count: int) -> list[list[float]]:
    """Return the microseconds of a decision: for each size, in each repeat."""
    rigs = [Rig(row, size) if size >= row.models else None for size in sizes]
    for rig in rigs:
        if rig is not None:
            rig.run(max(count, 4 * GROUPS))
    gc.collect()
    found: list[list[float]] = [[] for _ in sizes]
    for _ in range(repeats):
        for rig, times in zip(rigs, found, strict=True):
            if rig is not None:
                times.append(rig.run(count))
    return found


def cells(times: list[list[float]]) -> list[str]:
    shown = [f"{min(each):.1f} ({statistics.median(each):.1f})" if each else "-" for each in times]
    ratio = f"{min(times[-1]) / min(times[0]):.2f}" if times[0] and times[-1] else "-"
    return [*shown, ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 100, 1000], help="workers (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="of each size (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1000, help="decisions in a repeat (default: %(default)s)")
    parser.add_argument("--only", default="", help="rows whose label contains this")
    parser.add_argument("--markdown", action="store_true", help="a table for docs/performance.md")
    options = parser.parse_args()
    gc.disable()  # as in the router, which has its own schedule of collections
    head = ["us for a decision: least (median)", *(f"{size:,} workers" for size in options.sizes), "x"]
    widths = [max(len(head[0]), *(len(row.label) for row in ROWS)), *(16 for _ in options.sizes), 6]
    mark = "| " if options.markdown else ""

    def show(line: list[str]) -> None:
        _, *rest = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text = (" | " if options.markdown else "  ").join([line[0].ljust(widths[0]), *rest])
        print(f"{mark}{text}{' |' if mark else ''}", flush=True)

    show(head)
    if options.markdown:
        show(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for row in ROWS:
        if options.only in row.label:
            show([row.label, *cells(measure(row, options.sizes, options.repeats, options.count))])


if __name__ == "__main__":
    main()
