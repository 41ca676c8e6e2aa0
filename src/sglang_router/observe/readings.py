"""How a metric family is read: functions from `MetricCounts` to samples, made from small parts.

A sample is a tuple of label values, and a number or a histogram. A reader may be left in the middle and continued later
(see `observe.exposition`), so it works on copies of what changes; None is no sample, but a place to pause. Readers are
made by:

    requests(key, value, where)   sums over series, grouped by key; `times` does the same for histograms
    per_worker(value)             one sample for each present worker
    per_tally(value)              the same, of what was counted for the worker; `per_tally_items`: several samples
    per_memory(value)             the same, of the prefixes remembered for the worker
    totals(items)                 sums over all present and removed workers
    per_report(value)             what each worker's engine reports, where it reports it
    per_replica(value)            the same, of the replicas that the router runs itself
    live(source)                  a number that another part of the router owns
    shadow(items)                 what the shadow policies would have done
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sglang_router.observe.counts import MetricCounts, RememberedPrefixes
from sglang_router.observe.live_sources import LiveSources, Number
from sglang_router.observe.tallies import Histogram, Series, Tally, TokenCounts
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.outcome import Hears, Outcome
from sglang_router.routing.policies.shadowed import ShadowTally
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker

Values = tuple[str, ...]
Sample = tuple[Values, Any]  # the labels' values; an int, a float or a Histogram
Reader = Callable[[MetricCounts], Iterable[Sample | None]]

_STEP = 100
"""Series, or tallies, that are summed up between two places to pause."""
ROUTER = ("http",)
"""router_type: requests are relayed as HTTP."""
BACKEND = ("regular", "http")
"""backend_type or worker_type, and connection_mode: workers that do both prefill and decode, over HTTP."""


# -- readers ---------------------------------------------------------------------------------------------


def requests(
    key: Callable[[Series], Values], value: Callable[[Series], int], where: Callable[[Series], object]
) -> Reader:
    """Sum over the series for which `where` holds."""

    def read(counts: MetricCounts) -> Iterator[Sample | None]:
        sums: dict[Values, int] = {}
        for number, series in enumerate(list(counts.series.values())):
            if not number % _STEP:
                yield None
            if where(series):
                values = key(series)
                sums[values] = sums.get(values, 0) + value(series)
        yield from sums.items()

    return read


def times(
    key: Callable[[Series], Values], value: Callable[[Series], Histogram], where: Callable[[Series], object]
) -> Reader:
    """The same for histograms."""

    def read(counts: MetricCounts) -> Iterator[Sample | None]:
        sums: dict[Values, Histogram] = {}
        for number, series in enumerate(list(counts.series.values())):
            if not number % _STEP:
                yield None
            if where(series):
                values = key(series)
                if values not in sums:
                    sums[values] = counts.histogram()
                sums[values].add(value(series))
        yield from sums.items()

    return read


def per_worker(value: Callable[[Worker], float]) -> Reader:
    """Read a value of each worker."""
    return lambda counts: (((worker.url,), value(worker)) for worker in list(counts.fleet))


def learned_capacity(counts: MetricCounts) -> Iterator[Sample]:
    """Read what was learnt of the workers' caches; skip workers of which nothing was."""
    for worker in list(counts.fleet):
        if worker.belief.capacity:
            yield (worker.url,), worker.belief.capacity


def per_report(value: Callable[[EngineReport], int | None]) -> Reader:
    """Read a value of each engine's report; skip engines that do not report it."""

    def read(counts: MetricCounts) -> Iterator[Sample]:
        for worker in list(counts.fleet):
            number = value(worker.report)
            if number is not None:
                yield (worker.url,), number

    return read


def per_replica(value: Callable[[int, bool], int]) -> Reader:
    """`value` takes the number of restarts, and whether the replica is up. No samples without a source."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        source = counts.sources.replicas
        return [] if source is None else [((url,), value(restarts, up)) for url, restarts, up in source()]

    return read


def per_tally(value: Callable[[Tally], float]) -> Reader:
    """Read a value of each worker's counts."""
    return lambda counts: (((tally.name,), value(tally)) for tally in list(counts.tallies.values()))


def per_tally_items(items: Callable[[Tally], Iterable[Sample]]) -> Reader:
    """Several samples per worker; the label values of `items` follow the worker's name."""

    def read(counts: MetricCounts) -> Iterator[Sample]:
        for tally in list(counts.tallies.values()):
            for values, number in list(items(tally)):
                yield (tally.name, *values), number

    return read


def per_memory(value: Callable[[RememberedPrefixes, Worker], int]) -> Reader:
    """What the policy remembers for each worker. No samples for a policy without a prefix memory."""

    def read(counts: MetricCounts) -> Iterator[Sample]:
        memory = counts.memory
        if memory is not None:
            for worker in list(counts.fleet):
                yield (worker.url,), value(memory, worker)

    return read


def of_memory(value: Callable[[RememberedPrefixes], int]) -> Reader:
    """Read a value of the prefix memories; nothing for policies without one."""
    return lambda counts: [] if counts.memory is None else [((), value(counts.memory))]


def totals(items: Callable[[Tally], Iterable[Sample]]) -> Reader:
    """Sum over all present and removed workers."""

    def read(counts: MetricCounts) -> Iterator[Sample | None]:
        sums: dict[Values, int] = {}
        for tally in _all_tallies(counts):
            if tally is None:
                yield None
                continue
            for values, count in items(tally):
                sums[values] = sums.get(values, 0) + count
        yield from sums.items()

    return read


def _all_tallies(counts: MetricCounts) -> Iterator[Tally | None]:
    """Yield the tallies of all present and removed workers, and None where the reader may pause.

    Those of the removed come before the first pause, so that a worker that is removed in one is not counted twice.
    """
    present = list(counts.tallies.values())
    yield from list(counts.removed.values())
    for number, tally in enumerate(present, 1):
        yield tally
        if not number % _STEP:
            yield None


def branches_of(policy: str) -> Reader:
    """Decisions of one policy by branch. No samples while another policy is in use."""
    return totals(
        lambda tally: [((branch,), n) for (name, branch), n in tally.decisions.legs.items() if name == policy]
    )


def cache_branch(wanted: str) -> Reader:
    """Decisions of one branch, of any policy; 0 before the first."""

    def read(counts: MetricCounts) -> Iterator[Sample | None]:
        found = 0
        for tally in _all_tallies(counts):
            if tally is None:
                yield None
            else:
                found += sum(n for (_, branch), n in tally.decisions.legs.items() if branch == wanted)
        yield (), found

    return read


def live(source: Callable[[LiveSources], Number | None], values: Values = ()) -> Reader:
    """Read a value at the moment of the scrape; nothing where its source is missing."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        number = source(counts.sources)
        return [] if number is None else [(values, number())]

    return read


def load_of_all(pick: Callable[[list[int]], int]) -> Reader:
    """Over the workers in rotation."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        loads = [worker.own_load for worker in counts.fleet if worker.in_rotation]
        return [((), pick(loads) if loads else 0)]

    return read


def pool(counts: MetricCounts) -> Iterable[Sample]:
    """Count workers by type and model."""
    sizes: dict[Values, int] = {}
    for worker in counts.fleet:
        values = (worker.role, "http", worker.model or "unknown")
        sizes[values] = sizes.get(values, 0) + 1
    return sizes.items()


def selections(counts: MetricCounts) -> Iterable[Sample | None]:
    """Counted when the request ends: only then is the bounded label of its model known."""
    policy_of = counts.sources.policy_of
    policies: dict[str, str] = {}  # looked up once for each model
    for series in counts.series.values():
        if series.model not in policies:
            policies[series.model] = (policy_of(series.model) if policy_of is not None else "") or counts.policy
    legs = requests(lambda s: (*BACKEND, s.model, policies[s.model]), lambda s: s.legs, lambda s: s.legs)
    return legs(counts)


# -- what the readers read -------------------------------------------------------------------------------

_ERROR_TYPES = {
    **dict.fromkeys(("no_workers", "no_available_workers", "workers_starting", "workers_paused"), "no_workers"),
    "shutting_down": "no_workers",
    "worker_timeout": "timeout",
    "internal_error": "internal_error",
}
_BREAKER_STATES = {Breaker.CLOSED: 0, Breaker.OPEN: 1, Breaker.HALF_OPEN: 2}
_OUTCOMES = {outcome.label: outcome for outcome in Outcome}
_FAULTS = (Hears.ANSWER_FAILURE, Hears.BREAK_FAILURE, Hears.CONTACT_FAILURE)
ERRORS = frozenset(outcome.label for outcome in Outcome if outcome.retryable or outcome.hears in _FAULTS)


def everything(series: Series) -> bool:
    """Take all series."""
    return True


def relayed(series: Series) -> bool:
    """Take relayed requests."""
    return bool(series.endpoint)


def failed(series: Series) -> bool:
    """Whether the request ended in an error answer or a broken answer. A client that leaves is no error."""
    return bool(series.endpoint) and (series.code != "" or series.status >= 400)


def answered(series: Series) -> bool:
    """Whether a worker answered, without an error."""
    return bool(series.endpoint) and not series.code and 0 < series.status < 400


def from_worker(series: Series) -> bool:
    """Take requests that a worker answered."""
    return bool(series.endpoint) and not series.code and series.status > 0


def count(series: Series) -> int:
    """Return the number of requests."""
    return sum(series.duration.counts)


def duration(series: Series) -> Histogram:
    """Return the histogram of durations."""
    return series.duration


def route(series: Series) -> Values:
    """Label by path."""
    return (series.path,)


def method_path(series: Series) -> Values:
    """Label by method and path."""
    return (series.method, series.path)


def worker_endpoint(series: Series) -> Values:
    """Label by backend and endpoint."""
    return (BACKEND[0], series.endpoint)


def router_labels(series: Series) -> Values:
    """Label by router, backend, model and endpoint."""
    return (*ROUTER, *BACKEND, series.model, series.endpoint)


def status_code(series: Series) -> Values:
    """Label by status (499: the client left before the answer) and error code."""
    return (str(series.status or 499), series.code)


def upstream_status(series: Series) -> Values:
    """Label by router, status and error code."""
    return (*ROUTER, str(series.status), series.code)


def error_code(series: Series) -> str:
    """Return the error code; "http_" and the status for a worker's own answer."""
    return series.code or f"http_{series.status}"


def error_type(series: Series) -> str:
    """Return one of the reference's five kinds of errors."""
    kind = _ERROR_TYPES.get(series.code)
    if kind is None:
        kind = "validation_error" if 400 <= series.status < 500 else "backend_error"
        kind = "timeout" if series.status == 504 else kind
    return kind


def decisions(tally: Tally) -> Iterable[Sample]:
    """Read the decisions by policy and branch."""
    return tally.decisions.legs.items()


def shadow(items: Callable[[ShadowTally], Iterable[Sample]]) -> Reader:
    """Read what the shadow policies would have done; nothing without them."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        tally = counts.sources.shadows
        return [] if tally is None else [((tally.policy, *values), number) for values, number in items(tally)]

    return read


def tokens(value: Callable[[TokenCounts], int]) -> Callable[[Tally], Iterable[Sample]]:
    """Read a count of tokens by model."""
    return lambda tally: [((model,), value(a.tokens)) for model, a in tally.answers.items() if a.tokens.any]


def transitions(tally: Tally) -> Iterable[Sample]:
    """Read the changes of the breaker by old and new state."""
    return tally.transitions.items()


def outcomes(tally: Tally) -> Iterable[Sample]:
    """Read the legs by outcome."""
    return [((label,), n) for label, n in tally.outcomes.items()]


def heard(tally: Tally) -> Iterable[Sample]:
    """What the breaker heard. Both samples exist from the start."""
    served = failures = 0
    for label, n in tally.outcomes.items():
        hears = _OUTCOMES[label].hears
        served += n if hears is Hears.SUCCESS else 0
        failures += n if hears in _FAULTS else 0
    return [(("success",), served), (("failure",), failures)]


def worker_errors(tally: Tally) -> Iterable[Sample]:
    """Read the failed legs by outcome."""
    return [((tally.role, "http", label), n) for label, n in tally.outcomes.items() if label in ERRORS]


def load(worker: Worker) -> int:
    """Return the requests of this router in flight."""
    return worker.own_load


def healthy(worker: Worker) -> int:
    """Return 1 for a healthy worker."""
    return int(worker.health is Health.HEALTHY)


def down(worker: Worker) -> int:
    """Return 1 for a worker whose engine was given up."""
    return int(worker.health is Health.DOWN)


def breaker(worker: Worker) -> int:
    """Return the number of the breaker's state."""
    return _BREAKER_STATES[worker.breaker]
