"""The catalogue of metrics: one row per family, with its name, type, labels, meaning, and how it is read.

Both the exposition (`Row.family`) and docs/metrics.md (`markdown`) are made from the rows. Names, types and
labels are those of the Rust router where it has the family (sgl_router_* of its 0.1 and 0.2 series, smg_* of
0.3); own ones are sgl_router_*.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from sglang_router.observe import readings as read

if TYPE_CHECKING:
    from prometheus_client import Metric

    from sglang_router.observe.metrics import Metrics
    from sglang_router.observe.readings import Reader, Values


class Row(msgspec.Struct, frozen=True):
    """One family."""

    name: str
    kind: str  # counter, gauge or histogram
    labels: Values
    help: str
    reader: Reader

    def family(self, metrics: Metrics) -> Metric:
        """The family with its present samples, for prometheus_client."""
        if self.kind == "counter":
            counter = CounterMetricFamily(self.name, self.help, labels=self.labels)
            for values, number in self.reader(metrics):
                counter.add_metric(values, number)
            return counter
        if self.kind == "gauge":
            gauge = GaugeMetricFamily(self.name, self.help, labels=self.labels)
            for values, number in self.reader(metrics):
                gauge.add_metric(values, number)
            return gauge
        histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        bounds = [*map(floatToGoString, metrics.bounds), "+Inf"]
        for values, observed in self.reader(metrics):
            cumulated = list(zip(bounds, accumulate(observed.counts), strict=True))
            histogram.add_metric(values, cumulated, observed.sum)
        return histogram


COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
WORKER = ("worker",)
ROUTE = ("route",)
MODE = ("worker_type", "connection_mode")
KIND = ("router_type", "backend_type", "connection_mode", "model", "endpoint")

METRICS = (
    # requests, as the 0.1 and 0.2 series name them
    Row(
        "sgl_router_requests_total", COUNTER, ROUTE,
        "Inference requests.", read.requests(read.route, read.count, read.relayed),
    ),
    Row(
        "sgl_router_request_duration_seconds", HISTOGRAM, ROUTE,
        "From the whole request in to the last byte of the answer out.",
        read.times(read.route, read.duration, read.relayed),
    ),
    Row(
        "sgl_router_time_to_first_byte_seconds", HISTOGRAM, ROUTE,
        "From the whole request in to the head of a worker's answer.",
        read.times(read.route, lambda s: s.first_byte, lambda s: s.endpoint and sum(s.first_byte.counts)),
    ),
    Row(
        "sgl_router_request_errors_total", COUNTER, (*ROUTE, "error_type"),
        "Inference requests that ended in an error, by its code; http_STATUS for a worker's own.",
        read.requests(lambda s: (s.path, read.error_code(s)), read.count, read.failed),
    ),
    Row(
        "sgl_router_client_disconnects_total", COUNTER, ROUTE,
        "Clients that left before the end of their answer.",
        read.requests(read.route, lambda s: s.gone, read.relayed),
    ),
    Row(
        "sgl_router_retries_total", COUNTER, ROUTE,
        "Legs sent after one that failed.", read.requests(read.route, lambda s: s.retries, read.relayed),
    ),
    Row(
        "sgl_router_retries_exhausted_total", COUNTER, ROUTE,
        "Requests whose last leg failed in a way that is retried, but no retry or no worker was left.",
        read.requests(read.route, lambda s: s.exhausted, read.relayed),
    ),
    Row(
        "sgl_router_resumed_streams_total", COUNTER, ROUTE,
        "Streams whose worker died and with which another one went on (--resume-streams).",
        read.requests(read.route, lambda s: s.resumed, read.relayed),
    ),
    Row(
        "sgl_router_resume_refused_total", COUNTER, ("reason",),
        "Streams that broke and that no other worker went on with, see resume.md (--resume-streams).",
        lambda metrics: [((reason,), count) for reason, count in metrics.unresumed.items()],
    ),
    Row(
        "sgl_router_request_bytes_total", COUNTER, ROUTE,
        "Bytes of request bodies.", read.requests(read.route, lambda s: s.received, read.relayed),
    ),
    Row(
        "sgl_router_response_bytes_total", COUNTER, ROUTE,
        "Bytes of workers' answers sent to clients.",
        read.requests(read.route, lambda s: s.sent, read.relayed),
    ),
    Row(
        "sgl_router_http_responses_total", COUNTER, ("status_code", "error_code"),
        "Answers of every kind; status 499: the client left before one.",
        read.requests(read.status_code, read.count, read.everything),
    ),
    Row("sgl_router_active_requests", GAUGE, (), "Requests under way, of every kind.", read.live("active")),
    Row(
        "sgl_router_waiting_requests", GAUGE, (),
        "Of these, inference requests held here because no worker is ready.", read.live("waiting"),
    ),
    # the decision
    Row(
        "sgl_router_policy_decisions_total", COUNTER, ("worker", "policy", "branch"),
        "Legs by worker and by the policy's reason for it.", read.per_tally_items(read.decisions),
    ),
    Row(
        "sgl_router_cache_hits_total", COUNTER, (),
        "Decisions for the worker that holds the prefix (branch hit).", read.cache_branch("hit"),
    ),
    Row(
        "sgl_router_cache_misses_total", COUNTER, (),
        "Decisions for the smallest tree (branch miss).", read.cache_branch("miss"),
    ),
    Row(
        "sgl_router_load_balancing_events_total", COUNTER, (),
        "Decisions for the shortest queue because the loads were too unequal (branch imbalance).",
        read.cache_branch("imbalance"),
    ),
    Row(
        "sgl_router_prefix_matched_bytes_total", COUNTER, WORKER,
        "Bytes of routing text that the chosen worker was believed to hold.",
        read.per_tally(lambda t: t.matched),
    ),
    Row(
        "sgl_router_prefix_bytes_total", COUNTER, WORKER,
        "Bytes of routing text; the matched bytes are a part of them.", read.per_tally(lambda t: t.total),
    ),
    # the prefix tree
    Row(
        "sgl_router_tree_size", GAUGE, WORKER,
        "Bytes of routing text remembered.", read.per_tree_slot(lambda t, s: t.size(s)),
    ),
    Row(
        "sgl_router_tree_entries", GAUGE, WORKER,
        "Texts remembered.", read.per_tree_slot(lambda t, s: t.entries(s)),
    ),
    Row(
        "sgl_router_tree_evictions_total", COUNTER, WORKER,
        "Nodes given up, for room or for age.", read.per_tree_slot(lambda t, s: t.evictions(s)),
    ),
    Row(
        "sgl_router_tree_evicted_bytes_total", COUNTER, WORKER,
        "Bytes of those nodes.", read.per_tree_slot(lambda t, s: t.evicted_bytes(s)),
    ),
    Row(
        "sgl_router_tree_nodes", GAUGE, (),
        "Nodes of the tree, shared by all workers.", read.of_tree(lambda t: t.nodes),
    ),
    Row(
        "sgl_router_tree_held_bytes", GAUGE, (),
        "Bytes of text in memory, each once however many workers hold it.", read.of_tree(lambda t: t.held),
    ),
    Row(
        "sgl_router_tree_retired_bytes", GAUGE, (),
        "Bytes of removed or emptied workers that are still to be freed.",
        read.of_tree(lambda t: t.retired_size),
    ),
    # workers, as the 0.1 and 0.2 series name them
    Row(
        "sgl_router_active_workers", GAUGE, (),
        "Workers registered and not draining.",
        lambda metrics: [((), sum(worker.in_rotation for worker in metrics.fleet))],
    ),
    Row(
        "sgl_router_worker_health", GAUGE, WORKER,
        "1: the health checks say well, else 0.", read.per_worker(read.healthy),
    ),
    Row(
        "sgl_router_worker_down", GAUGE, WORKER,
        "1: its engine was given up and will not be started again, else 0.", read.per_worker(read.down),
    ),
    Row(
        "sgl_router_worker_load", GAUGE, WORKER,
        "Requests running on the worker.", read.per_worker(read.load),
    ),
    Row(
        "sgl_router_running_requests", GAUGE, WORKER,
        "Requests running on the worker.", read.per_worker(read.load),
    ),
    Row(
        "sgl_router_processed_requests_total", COUNTER, WORKER,
        "Requests the worker answered.", read.per_worker(lambda w: w.processed),
    ),
    Row(
        "sgl_router_worker_draining", GAUGE, WORKER,
        "1: takes no new requests, on an operator's word.", read.per_worker(lambda w: w.draining),
    ),
    Row(
        "sgl_router_max_load", GAUGE, (),
        "Running requests of the most loaded worker in rotation.", read.load_of_all(max),
    ),
    Row(
        "sgl_router_min_load", GAUGE, (),
        "Running requests of the least loaded worker in rotation.", read.load_of_all(min),
    ),
    Row(
        "sgl_router_cb_state", GAUGE, WORKER,
        "Circuit breaker: 0 closed, 1 open, 2 half open.", read.per_worker(read.breaker),
    ),
    Row(
        "sgl_router_cb_state_transitions_total", COUNTER, ("worker", "from", "to"),
        "Moves of the circuit breaker.", read.per_tally_items(read.transitions),
    ),
    Row(
        "sgl_router_cb_outcomes_total", COUNTER, ("worker", "outcome"),
        "What the circuit breaker heard: success or failure.", read.per_tally_items(read.heard),
    ),
    Row(
        "sgl_router_worker_outcomes_total", COUNTER, ("worker", "outcome"),
        "Legs by how they ended (served, failed, busy, refused, broken, timeout, gone ...).",
        read.per_tally_items(read.outcomes),
    ),
    Row(
        "sgl_router_worker_changes_total", COUNTER, ("what", "state"),
        "Workers added, removed, restarted; health, breaker and draining by the new state.",
        lambda metrics: metrics.changes.items(),
    ),
    Row(
        "sgl_router_desired_workers", GAUGE, (),
        "Workers there should be; left out without autoscaling.", read.live("desired_workers"),
    ),
    Row(
        "sgl_router_replica_up", GAUGE, WORKER,
        "1: the process of this replica runs, else 0; left out for engines that others run.",
        read.per_replica(lambda restarts, up: int(up)),
    ),
    Row(
        "sgl_router_replica_restarts_total", COUNTER, WORKER,
        "Times this replica was started again.", read.per_replica(lambda restarts, up: restarts),
    ),
    # what engines say of themselves
    Row(
        "sgl_router_engine_running_requests", GAUGE, WORKER,
        "Requests the engine computes, by its own word.", read.per_report(lambda r: r.running),
    ),
    Row(
        "sgl_router_engine_queued_requests", GAUGE, WORKER,
        "Requests that wait for their turn in the engine.", read.per_report(lambda r: r.queued),
    ),
    Row(
        "sgl_router_engine_kv_capacity_tokens", GAUGE, WORKER,
        "Tokens the engine's KV cache can hold.", read.per_report(lambda r: r.capacity_tokens),
    ),
    Row(
        "sgl_router_engine_kv_used_tokens", GAUGE, WORKER,
        "Tokens it holds for running requests.", read.per_report(lambda r: r.used_tokens),
    ),
    Row(
        "sgl_router_engine_context_length", GAUGE, WORKER,
        "Tokens of prompt and answer together that the engine takes.", read.per_report(lambda r: r.context_length),
    ),
    # the router
    Row(
        "sgl_router_log_lines_lost_total", COUNTER, (),
        "Log lines that a full disk or a blocked pipe did not take.", read.live("lost_lines"),
    ),
    # HTTP, as the 0.3 series names it
    Row(
        "smg_http_requests_total", COUNTER, ("method", "path"),
        "Requests of every kind.", read.requests(read.method_path, read.count, read.everything),
    ),
    Row(
        "smg_http_request_duration_seconds", HISTOGRAM, ("method", "path"),
        "From the whole request in to the last byte of the answer out.",
        read.times(read.method_path, read.duration, read.everything),
    ),
    Row(
        "smg_http_responses_total", COUNTER, ("status_code", "error_code"),
        "Answers of every kind; status 499: the client left before one.",
        read.requests(read.status_code, read.count, read.everything),
    ),
    Row("smg_http_connections_active", GAUGE, (), "Open client connections.", read.live("connections")),
    # the router, as the 0.3 series names it
    Row(
        "smg_router_requests_total", COUNTER, (*KIND, "streaming"),
        "Inference requests.",
        read.requests(lambda s: (*read.router_labels(s), str(s.streaming).lower()), read.count, read.relayed),
    ),
    Row(
        "smg_router_request_duration_seconds", HISTOGRAM, KIND,
        "From the whole request in to the last byte out, where a worker answered without an error.",
        read.times(read.router_labels, read.duration, read.answered),
    ),
    Row(
        "smg_router_request_errors_total", COUNTER, (*KIND, "error_type"),
        "Inference requests that ended in an error, by the five kinds of the 0.3 series.",
        read.requests(lambda s: (*read.router_labels(s), read.error_type(s)), read.count, read.failed),
    ),
    Row(
        "smg_router_upstream_responses_total", COUNTER, ("router_type", "status_code", "error_code"),
        "Workers' own answers that were passed on.",
        read.requests(read.upstream_status, read.count, read.from_worker),
    ),
    # workers, as the 0.3 series names them
    Row("smg_worker_pool_size", GAUGE, (*MODE, "model"), "Registered workers.", read.pool),
    Row(
        "smg_worker_connections_active", GAUGE, MODE,
        "Open connections to workers.", read.live("upstream_connections", read.BACKEND),
    ),
    Row(
        "smg_worker_requests_active", GAUGE, WORKER,
        "Requests running on the worker.", read.per_worker(read.load),
    ),
    Row(
        "smg_worker_health", GAUGE, WORKER,
        "1: the health checks say well, else 0.", read.per_worker(read.healthy),
    ),
    Row(
        "smg_worker_selection_total", COUNTER, (*MODE, "model", "policy"),
        "Legs, counted when their request ends.", read.selections,
    ),
    Row(
        "smg_worker_errors_total", COUNTER, (*MODE, "error_type"),
        "Legs that failed, by outcome.", read.totals(read.worker_errors),
    ),
    Row(
        "smg_worker_cb_state", GAUGE, WORKER,
        "Circuit breaker: 0 closed, 1 open, 2 half open.", read.per_worker(read.breaker),
    ),
    Row(
        "smg_worker_cb_transitions_total", COUNTER, ("worker", "from", "to"),
        "Moves of the circuit breaker.", read.per_tally_items(read.transitions),
    ),
    Row(
        "smg_worker_cb_outcomes_total", COUNTER, ("worker", "outcome"),
        "What the circuit breaker heard: success or failure.", read.per_tally_items(read.heard),
    ),
    Row(
        "smg_worker_cb_consecutive_failures", GAUGE, WORKER,
        "Failures in a row, which open the breaker at its threshold.", read.per_worker(lambda w: w.failures),
    ),
    Row(
        "smg_worker_cb_consecutive_successes", GAUGE, WORKER,
        "Served probes in a row, which close a half-open breaker.", read.per_worker(lambda w: w.successes),
    ),
    Row(
        "smg_worker_retries_total", COUNTER, ("worker_type", "endpoint"),
        "Legs sent after one that failed.",
        read.requests(read.worker_endpoint, lambda s: s.retries, read.relayed),
    ),
    Row(
        "smg_worker_retries_exhausted_total", COUNTER, ("worker_type", "endpoint"),
        "Requests whose last leg failed in a way that is retried, but no retry or no worker was left.",
        read.requests(read.worker_endpoint, lambda s: s.exhausted, read.relayed),
    ),
    Row(
        "smg_manual_policy_branch_total", COUNTER, ("branch",),
        "Decisions of the policy manual.", read.branches_of("manual"),
    ),
    Row(
        "smg_consistent_hashing_policy_branch_total", COUNTER, ("branch",),
        "Decisions of the policy consistent_hashing.", read.branches_of("consistent_hashing"),
    ),
    Row(
        "smg_prefix_hash_policy_branch_total", COUNTER, ("branch",),
        "Decisions of the policy prefix_hash.", read.branches_of("prefix_hash"),
    ),
)  # fmt: skip


# -- the docs page ---------------------------------------------------------------------------------------

_INTRO = """\
# Metrics

Served in Prometheus' text format, or OpenMetrics where the Accept header asks for it, on `/metrics` of the
router's port and on `--prometheus-host`:`--prometheus-port` (default port 29000). This page is made by
`python -m sglang_router.observe.metrics --markdown`, and a test holds it equal to the code.

- Names, types and labels are those of the reference, the router in Rust, where it has the metric:
  `sgl_router_*` of its 0.1 and 0.2 series, `smg_*` of 0.3. What is new is called `sgl_router_*` too.
- `worker` is the worker's URL, with `@` and a number for a data-parallel rank. The series of a removed worker
  disappear; totals without that label go on.
- `sgl_router_engine_*` are what the engine last told, every `--engine-report-interval-secs`; what it does not
  tell is left out.
- `route` and `path` are paths the router knows (parameters as in `/workers/{worker_id}`), others are `other`.
- `model` has at most 100 names, the first that were answered without an error; others are `other`, none is
  `unknown`.
- `error_code` is the code of the router's own errors, and empty for a worker's answer.
- Requests are counted when they end; decisions when they are made, each leg of a retried request by itself.
- Histograms have the bounds of `--prometheus-duration-buckets`, in seconds. A stream's duration is all of it.
- Prefix metrics tell what the router remembers (policy `cache_aware`); the engines' own reports are the truth
  about their caches. The matched share:
  `rate(sgl_router_prefix_matched_bytes_total[5m]) / rate(sgl_router_prefix_bytes_total[5m])`.

Beside these there are the usual `process_*`, `python_info` and `python_gc_*`. Families of the reference about
what this router does not do (gRPC, tokenizing, MCP, history, Kubernetes, rate limits, mesh) are left out.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def markdown() -> str:
    """docs/metrics.md."""
    lines = [f"| `{row.name}` | {row.kind} | {_names(row.labels)} | {row.help} |\n" for row in METRICS]
    return _INTRO + "".join(lines)


def _names(labels: Values) -> str:
    return ", ".join(f"`{label}`" for label in labels) or "-"
