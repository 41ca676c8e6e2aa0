"""How a family of metrics is read: functions from `Metrics` to samples, made from small parts.

A sample is a tuple of label values, and a number or a histogram. Readers are made by:

    requests(key, value, where)   sums over series, grouped by key; `times` does it for histograms
    per_worker(value)             one sample for each worker there is
    per_tally(value)              the same, of what was counted for it; `per_tally_items` when it is several
    per_tree_slot(value)          the same, of what the prefix tree holds for it
    totals(items)                 sums over all workers there are and were
    per_report(value)             what each worker's engine says of itself, where it does
    per_replica(value)            the same of the replicas that the router runs itself
    live(name)                    a number that somebody else knows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sglang_router.core.worker import Breaker, Health, Hears, Outcome, Worker

if TYPE_CHECKING:
    from sglang_router.core.report import EngineReport
    from sglang_router.core.tree import Tree
    from sglang_router.observe.metrics import Metrics
    from sglang_router.observe.tallies import Histogram, Series, Tally

Values = tuple[str, ...]
Sample = tuple[Values, Any]  # the labels' values; an int, a float or a Histogram
Reader = Callable[["Metrics"], Iterable[Sample]]

ROUTER = ("http",)
"""router_type: requests are relayed as HTTP."""
BACKEND = ("regular", "http")
"""backend_type or worker_type, and connection_mode: workers for both prefill and decode, by HTTP."""


# -- readers ---------------------------------------------------------------------------------------------


def requests(
    key: Callable[[Series], Values], value: Callable[[Series], int], where: Callable[[Series], object]
) -> Reader:
    """Sums over the series that `where` takes."""

    def read(metrics: Metrics) -> Iterable[Sample]:
        sums: dict[Values, int] = {}
        for series in metrics.series.values():
            if where(series):
                values = key(series)
                sums[values] = sums.get(values, 0) + value(series)
        return sums.items()

    return read


def times(
    key: Callable[[Series], Values], value: Callable[[Series], Histogram], where: Callable[[Series], object]
) -> Reader:
    """The same for histograms."""

    def read(metrics: Metrics) -> Iterable[Sample]:
        sums: dict[Values, Histogram] = {}
        for series in metrics.series.values():
            if where(series):
                values = key(series)
                if values not in sums:
                    sums[values] = metrics.histogram()
                sums[values].add(value(series))
        return sums.items()

    return read


def per_worker(value: Callable[[Worker], float]) -> Reader:
    return lambda metrics: [((worker.url,), value(worker)) for worker in metrics.fleet]


def per_report(value: Callable[[EngineReport], int | None]) -> Reader:
    def read(metrics: Metrics) -> Iterator[Sample]:
        for worker in metrics.fleet:
            number = value(worker.report)
            if number is not None:
                yield (worker.url,), number

    return read


def per_replica(value: Callable[[int, bool], int]) -> Reader:
    """`value` takes how often it was restarted, and whether it is up; nothing while no replicas are run."""

    def read(metrics: Metrics) -> Iterable[Sample]:
        source = metrics.live["replicas"]
        return [] if source is None else [((url,), value(restarts, up)) for url, restarts, up in source()]

    return read


def per_tally(value: Callable[[Tally], float]) -> Reader:
    return lambda metrics: [((worker.url,), value(tally)) for worker, tally in metrics.tallies.items()]


def per_tally_items(items: Callable[[Tally], Iterable[Sample]]) -> Reader:
    """Several samples of each worker; what `items` gives stands behind the worker's URL."""
    return lambda metrics: [
        ((worker.url, *values), number) for worker, tally in metrics.tallies.items() for values, number in items(tally)
    ]


def per_tree_slot(value: Callable[[Tree, int], int]) -> Reader:
    """What the prefix tree keeps for each worker; nothing for policies without one."""

    def read(metrics: Metrics) -> Iterator[Sample]:
        tree = metrics.tree
        if tree is not None:
            for worker in metrics.fleet:
                yield (worker.url,), value(tree, worker.slot)

    return read


def of_tree(value: Callable[[Tree], int]) -> Reader:
    return lambda metrics: [] if metrics.tree is None else [((), value(metrics.tree))]


def totals(items: Callable[[str, Tally], Iterable[Sample]]) -> Reader:
    """Sums over the workers there are and were; `items` takes the worker's type."""

    def read(metrics: Metrics) -> Iterable[Sample]:
        sums: dict[Values, int] = {}
        for worker_type, tally in metrics.totals():
            for values, count in items(worker_type, tally):
                sums[values] = sums.get(values, 0) + count
        return sums.items()

    return read


def branches_of(policy: str) -> Reader:
    """Decisions of one policy by branch; nothing while another is in use."""
    return totals(lambda _, tally: [((branch,), n) for (name, branch), n in tally.decisions.items() if name == policy])


def cache_branch(wanted: str) -> Reader:
    """Decisions of one branch, of whatever policy; 0 from the start on."""

    def read(metrics: Metrics) -> Iterable[Sample]:
        tallies = [tally for _, tally in metrics.totals()]
        return [((), sum(n for t in tallies for (_, branch), n in t.decisions.items() if branch == wanted))]

    return read


def live(name: str, values: Values = ()) -> Reader:
    def read(metrics: Metrics) -> Iterable[Sample]:
        source = metrics.live[name]
        return [] if source is None else [(values, source())]

    return read


def load_of_all(pick: Callable[[list[int]], int]) -> Reader:
    """Over the workers in rotation."""

    def read(metrics: Metrics) -> Iterable[Sample]:
        loads = [worker.load for worker in metrics.fleet if worker.in_rotation]
        return [((), pick(loads) if loads else 0)]

    return read


def pool(metrics: Metrics) -> Iterable[Sample]:
    sizes: dict[Values, int] = {}
    for worker in metrics.fleet:
        values = (worker.spec.worker_type, "http", worker.spec.model_id or "unknown")
        sizes[values] = sizes.get(values, 0) + 1
    return sizes.items()


def selections(metrics: Metrics) -> Iterable[Sample]:
    """Counted when the request ends, because there its model is known in bounded form."""
    legs = requests(lambda s: (*BACKEND, s.model, metrics.policy), lambda s: s.legs, lambda s: s.legs)
    return legs(metrics)


# -- what the readers read -------------------------------------------------------------------------------

_ERROR_TYPES = {
    "no_workers": "no_workers",
    "no_available_workers": "no_workers",
    "workers_starting": "no_workers",
    "shutting_down": "no_workers",
    "worker_timeout": "timeout",
    "internal_error": "internal_error",
}
_BREAKER_STATES = {Breaker.CLOSED: 0, Breaker.OPEN: 1, Breaker.HALF_OPEN: 2}
_OUTCOMES = {outcome.label: outcome for outcome in Outcome}
_FAULTS = (Hears.ANSWER_FAILURE, Hears.CONTACT_FAILURE)
_ERRORS = frozenset(outcome.label for outcome in Outcome if outcome.retryable or outcome.hears in _FAULTS)


def everything(series: Series) -> bool:
    return True


def relayed(series: Series) -> bool:
    return bool(series.endpoint)


def failed(series: Series) -> bool:
    """An error answer, or an answer that broke off; a client that leaves is no error."""
    return bool(series.endpoint) and (series.code != "" or series.status >= 400)


def answered(series: Series) -> bool:
    """By a worker, and not with an error."""
    return bool(series.endpoint) and not series.code and 0 < series.status < 400


def from_worker(series: Series) -> bool:
    return bool(series.endpoint) and not series.code and series.status > 0


def count(series: Series) -> int:
    return sum(series.duration.counts)


def duration(series: Series) -> Histogram:
    return series.duration


def route(series: Series) -> Values:
    return (series.path,)


def method_path(series: Series) -> Values:
    return (series.method, series.path)


def worker_endpoint(series: Series) -> Values:
    return (BACKEND[0], series.endpoint)


def router_labels(series: Series) -> Values:
    return (*ROUTER, *BACKEND, series.model, series.endpoint)


def status_code(series: Series) -> Values:
    return (str(series.status or 499), series.code)


def upstream_status(series: Series) -> Values:
    return (*ROUTER, str(series.status), series.code)


def error_code(series: Series) -> str:
    return series.code or f"http_{series.status}"


def error_type(series: Series) -> str:
    """The reference's five kinds of errors."""
    kind = _ERROR_TYPES.get(series.code)
    if kind is None:
        kind = "validation_error" if 400 <= series.status < 500 else "backend_error"
        kind = "timeout" if series.status == 504 else kind
    return kind


def decisions(tally: Tally) -> Iterable[Sample]:
    return tally.decisions.items()


def transitions(tally: Tally) -> Iterable[Sample]:
    return tally.transitions.items()


def outcomes(tally: Tally) -> Iterable[Sample]:
    return [((label,), n) for label, n in tally.outcomes.items()]


def heard(tally: Tally) -> Iterable[Sample]:
    """What the breaker heard, both from the start on."""
    served = failures = 0
    for label, n in tally.outcomes.items():
        hears = _OUTCOMES[label].hears
        served += n if hears is Hears.SUCCESS else 0
        failures += n if hears in _FAULTS else 0
    return [(("success",), served), (("failure",), failures)]


def worker_errors(worker_type: str, tally: Tally) -> Iterable[Sample]:
    return [((worker_type, "http", label), n) for label, n in tally.outcomes.items() if label in _ERRORS]


def load(worker: Worker) -> int:
    return worker.load


def healthy(worker: Worker) -> int:
    return int(worker.health is Health.HEALTHY)


def down(worker: Worker) -> int:
    return int(worker.health is Health.DOWN)


def breaker(worker: Worker) -> int:
    return _BREAKER_STATES[worker.breaker]
