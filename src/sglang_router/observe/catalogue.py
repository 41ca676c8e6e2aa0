"""The catalogue of metrics: one row per family, with its name, type, labels, meaning, and how it is read.

Both the exposition (`observe.exposition`) and docs/metrics.md (`markdown`) are made from the rows. Names, types and
labels are those of the Rust router where it has the family (sgl_router_* of its 0.1 and 0.2 series, smg_* of 0.3);
families that only this router has are called sgl_router_*.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from sglang_router.observe import discovery_readings as by_source
from sglang_router.observe import kv_readings as kv
from sglang_router.observe import pair_readings as pairs
from sglang_router.observe import readings as read
from sglang_router.observe import router_readings as router
from sglang_router.observe import shared_readings as shared
from sglang_router.observe.clients import per_client
from sglang_router.observe.readings import Reader, Values
from sglang_router.observe.session_readings import of_sessions
from sglang_router.routing.roles import DECODE, PREFILL

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


class Family(msgspec.Struct, frozen=True):
    """One metric family. `kind` is COUNTER, GAUGE or HISTOGRAM."""

    name: str
    kind: str
    labels: Values
    help: str
    reader: Reader


WORKER = ("worker",)
CLIENT = ("client",)
ROUTE = ("route",)
SOURCE = ("source",)
ANSWERS = ("worker", "model")
MODE = ("worker_type", "connection_mode")
KIND = ("router_type", "backend_type", "connection_mode", "model", "endpoint")

METRICS = (
    # requests, as the 0.1 and 0.2 series name them
    Family(
        "sgl_router_requests_total", COUNTER, ROUTE,
        "Inference requests.", read.requests(read.route, read.count, read.relayed),
    ),
    Family(
        "sgl_router_request_duration_seconds", HISTOGRAM, ROUTE,
        "Seconds from the whole request in to the last byte of the answer out.",
        read.times(read.route, read.duration, read.relayed),
    ),
    Family(
        "sgl_router_time_to_first_byte_seconds", HISTOGRAM, ROUTE,
        "Seconds from the whole request in to the first byte of the answer's body; of a stream, to its first event.",
        read.times(read.route, lambda s: s.first_byte, lambda s: s.endpoint and sum(s.first_byte.counts)),
    ),
    Family(
        "sgl_router_request_errors_total", COUNTER, (*ROUTE, "error_type"),
        "Inference requests that ended in an error, by error code; http_STATUS for a worker's own error.",
        read.requests(lambda s: (s.path, read.error_code(s)), read.count, read.failed),
    ),
    Family(
        "sgl_router_client_disconnects_total", COUNTER, ROUTE,
        "Inference requests whose client left before the end of the answer.",
        read.requests(read.route, lambda s: s.gone, read.relayed),
    ),
    Family(
        "sgl_router_retries_total", COUNTER, ROUTE,
        "Legs sent after a failed leg.", read.requests(read.route, lambda s: s.retries, read.relayed),
    ),
    Family(
        "sgl_router_retries_exhausted_total", COUNTER, ROUTE,
        "Requests whose last outcome is retryable, but no retry or no worker was left.",
        read.requests(read.route, lambda s: s.exhausted, read.relayed),
    ),
    Family(
        "sgl_router_resumed_streams_total", COUNTER, ROUTE,
        "Streams that another worker continued after their worker died (--resume-streams).",
        read.requests(read.route, lambda s: s.resumed, read.relayed),
    ),
    Family(
        "sgl_router_resume_refused_total", COUNTER, ("reason",),
        "Streams that broke and were not continued, by reason, see resume.md (--resume-streams).",
        lambda counts: [((reason,), count) for reason, count in counts.unresumed.items()],
    ),
    Family(
        "sgl_router_handoffs_total", COUNTER, ("result",),
        "Requests of vLLM pairs by what became of what the prefill worker handed over: given, absent, expired, used.",
        lambda counts: [((result,), count) for result, count in counts.handoffs.items()],
    ),
    Family(
        "sgl_router_renamed_requests_total", COUNTER, ("model", "served"),
        "Requests whose engine was told another model than the client named: an alias, or a fallback (models.md).",
        lambda counts: counts.renamed.items(),
    ),
    Family(
        "sgl_router_request_bytes_total", COUNTER, ROUTE,
        "Bytes of request bodies.", read.requests(read.route, lambda s: s.received, read.relayed),
    ),
    Family(
        "sgl_router_response_bytes_total", COUNTER, ROUTE,
        "Bytes of workers' answers sent to clients.",
        read.requests(read.route, lambda s: s.sent, read.relayed),
    ),
    Family(
        "sgl_router_http_responses_total", COUNTER, ("status_code", "error_code"),
        "Answers to requests of every kind; status 499: the client left before an answer.",
        read.requests(read.status_code, read.count, read.everything),
    ),
    Family(
        "sgl_router_active_requests", GAUGE, (),
        "Requests in flight, of every kind.", read.live(lambda s: s.active),
    ),
    Family(
        "sgl_router_waiting_requests", GAUGE, (),
        "Queued inference requests: for a place, a worker with room, a worker that starts, or room for a session.",
        read.live(lambda s: s.waiting),
    ),
    Family(
        "sgl_router_queue_seconds", HISTOGRAM, (),
        "Seconds in the queue, of requests that were queued.", lambda counts: [((), counts.queued)],
    ),
    # of each worker and model
    Family(
        "sgl_router_worker_request_duration_seconds", HISTOGRAM, ANSWERS,
        "Seconds from the whole request in to the last byte of the answer out, of served requests.",
        router.answer_times(lambda t: t.duration),
    ),
    Family(
        "sgl_router_worker_time_to_first_token_seconds", HISTOGRAM, ANSWERS,
        "Seconds from the whole request in to the first event of the answer, of served streams.",
        router.answer_times(lambda t: t.first_token),
    ),
    Family(
        "sgl_router_worker_inter_token_seconds", HISTOGRAM, ANSWERS,
        "Mean seconds between two tokens of a served stream, of those whose engine told how many there were.",
        router.answer_times(lambda t: t.inter_token),
    ),
    # the decision
    Family(
        "sgl_router_policy_decisions_total", COUNTER, ("worker", "policy", "branch"),
        "Legs by worker, policy and the policy's reason.", read.per_tally_items(read.decisions),
    ),
    Family(
        "sgl_router_cache_hits_total", COUNTER, (),
        "Decisions for a worker that holds the prefix (branch hit).", read.cache_branch("hit"),
    ),
    Family(
        "sgl_router_cache_misses_total", COUNTER, (),
        "Decisions for the worker with the smallest tree (branch miss).", read.cache_branch("miss"),
    ),
    Family(
        "sgl_router_load_balancing_events_total", COUNTER, (),
        "Decisions for the least loaded worker because the loads were too unequal (branch imbalance).",
        read.cache_branch("imbalance"),
    ),
    Family(
        "sgl_router_prefix_matched_bytes_total", COUNTER, WORKER,
        "Bytes of routing text that the chosen worker was believed to hold.",
        read.per_tally(lambda t: t.decisions.matched),
    ),
    Family(
        "sgl_router_prefix_bytes_total", COUNTER, WORKER,
        "Bytes of routing text of all decisions, the matched bytes included.",
        read.per_tally(lambda t: t.decisions.total),
    ),
    # prefill and decode workers, as the 0.1 series names them
    Family(
        "sgl_router_pd_prefill_requests_total", COUNTER, WORKER,
        "Legs of a prefill worker.", pairs.legs_of(PREFILL),
    ),
    Family(
        "sgl_router_pd_prefill_errors_total", COUNTER, WORKER,
        "Failed legs of a prefill worker.", pairs.errors_of(PREFILL),
    ),
    Family(
        "sgl_router_pd_decode_requests_total", COUNTER, WORKER,
        "Legs of a decode worker.", pairs.legs_of(DECODE),
    ),
    Family(
        "sgl_router_pd_decode_errors_total", COUNTER, WORKER,
        "Failed legs of a decode worker.", pairs.errors_of(DECODE),
    ),
    Family(
        "sgl_router_worker_window", GAUGE, WORKER,
        "Requests that a decode worker may run at once, by what its engine tells.", pairs.windows,
    ),
    # where workers come from
    Family(
        "smg_discovery_workers_discovered", GAUGE, SOURCE,
        "Workers that the source found and owns.", by_source.per_source(lambda r: [((), r.workers)]),
    ),
    Family(
        "sgl_router_discovery_age_seconds", GAUGE, SOURCE,
        "Seconds since the source knew all of its workers: the last complete list, read of the file, or look-up.",
        by_source.per_source(by_source.age),
    ),
    Family(
        "sgl_router_discovery_failing", GAUGE, SOURCE,
        "1: the source does not know its workers now, and those that it knew stay; else 0.",
        by_source.per_source(lambda r: [((), int(r.error is not None))]),
    ),
    Family(
        "sgl_router_discovery_failures_total", COUNTER, (*SOURCE, "reason"),
        "Looks of the source that failed, by reason: a status, unreachable, silent, broken, invalid; with watch_ "
        "before it for a watch, which a list follows at once.",
        by_source.per_source(lambda r: by_source.by_reason(r.failures)),
    ),
    Family(
        "sgl_router_discovery_updates_total", COUNTER, SOURCE,
        "Comparisons of what the source names with the router's workers.",
        by_source.per_source(lambda r: [((), r.passes)]),
    ),
    Family(
        "smg_discovery_registrations_total", COUNTER, (*SOURCE, "result"),
        "Workers that the source added.", by_source.per_source(lambda r: [(("success",), r.added)]),
    ),
    Family(
        "smg_discovery_deregistrations_total", COUNTER, (*SOURCE, "reason"),
        "Workers that the source removed: gone, or replaced by another instance at the same URL.",
        by_source.per_source(lambda r: by_source.by_reason(r.removed)),
    ),
    # sessions
    Family(
        "sgl_router_live_sessions", GAUGE, WORKER,
        "Sessions at home on the worker of which another request is expected (--session-affinity).",
        of_sessions(lambda s, workers: [((w.url,), s.table.share(w).sessions) for w in workers]),
    ),
    Family(
        "sgl_router_session_reserved_tokens", GAUGE, WORKER,
        "Tokens of the worker's KV cache that its live sessions are expected to need (--session-affinity).",
        of_sessions(lambda s, workers: [((w.url,), s.table.share(w).tokens) for w in workers]),
    ),
    Family(
        "sgl_router_waiting_sessions", GAUGE, (),
        "Queued requests that wait to begin a session (--session-admission); left out without it.",
        read.live(lambda s: s.waiting_sessions),
    ),
    Family(
        "sgl_router_session_legs_total", COUNTER, ("place",),
        "Legs of requests of a session: home; leave, visit (the home is overloaded); free (it is no candidate); new.",
        of_sessions(lambda s, _: [((kind,), count) for kind, count in s.placed.items()]),
    ),
    Family(
        "sgl_router_session_time_to_live_seconds", GAUGE, (),
        "Pause after which a session has ended, as learnt from the pauses of sessions.",
        of_sessions(lambda s, _: [((), s.table.returns.time_to_live)]),
    ),
    # the prefix tree
    Family(
        "sgl_router_tree_size", GAUGE, WORKER,
        "Bytes of routing text remembered for the worker.", read.per_memory(lambda m, w: m.size(w)),
    ),
    Family(
        "sgl_router_tree_entries", GAUGE, WORKER,
        "Texts remembered for the worker.", read.per_memory(lambda m, w: m.entries(w)),
    ),
    Family(
        "sgl_router_tree_evictions_total", COUNTER, WORKER,
        "Nodes of the tree evicted, for room or for age.", read.per_memory(lambda m, w: m.evictions(w)),
    ),
    Family(
        "sgl_router_tree_evicted_bytes_total", COUNTER, WORKER,
        "Bytes of the evicted nodes.", read.per_memory(lambda m, w: m.evicted_bytes(w)),
    ),
    Family(
        "sgl_router_tree_nodes", GAUGE, (),
        "Nodes of the tree, shared by all workers.", read.of_memory(lambda m: m.nodes),
    ),
    Family(
        "sgl_router_tree_held_bytes", GAUGE, (),
        "Bytes of text in memory; a text that several workers hold counts once.", read.of_memory(lambda m: m.held),
    ),
    Family(
        "sgl_router_tree_retired_bytes", GAUGE, (),
        "Bytes of removed or emptied workers that are not freed yet.",
        read.of_memory(lambda m: m.retired_size),
    ),
    # what engines tell in their answers
    Family(
        "sgl_router_prompt_tokens_total", COUNTER, ANSWERS,
        "Tokens of prompts.", read.per_tally_items(read.tokens(lambda t: t.prompt)),
    ),
    Family(
        "sgl_router_cached_tokens_total", COUNTER, ANSWERS,
        "Tokens of prompts that the engine had in its cache.", read.per_tally_items(read.tokens(lambda t: t.cached)),
    ),
    Family(
        "sgl_router_completion_tokens_total", COUNTER, ANSWERS,
        "Tokens of answers.", read.per_tally_items(read.tokens(lambda t: t.completion)),
    ),
    Family(
        "sgl_router_predicted_cached_tokens_total", COUNTER, ANSWERS,
        "Tokens of prompts that the router believed to be cached, of answers that tell what was.",
        read.per_tally_items(read.tokens(lambda t: t.predicted)),
    ),
    Family(
        "sgl_router_surprising_misses_total", COUNTER, ANSWERS,
        "Answers with far fewer cached tokens than predicted: less than half, and more than 256 less.",
        read.per_tally_items(read.tokens(lambda t: t.misses)),
    ),
    Family(
        "sgl_router_learned_capacity_bytes", GAUGE, WORKER,
        "Bytes of routing text that the engine's cache holds: those that were remembered when its reports began to say "
        "that some are not there; left out while nearly all are.",
        read.learned_capacity,
    ),
    # what clients use
    Family(
        "sgl_router_client_requests_total", COUNTER, CLIENT,
        "Inference requests of clients with this key, refused ones included.",
        per_client(lambda c: [((), c.requests)]),
    ),
    Family(
        "sgl_router_client_tokens_total", COUNTER, (*CLIENT, "kind"),
        "Tokens of their prompts (prompt), those of them that the engine had in its cache (cached), and of their"
        " answers (completion), as far as engines tell.",
        per_client(lambda c: [(("prompt",), c.prompt), (("cached",), c.cached), (("completion",), c.completion)]),
    ),
    Family(
        "sgl_router_client_errors_total", COUNTER, (*CLIENT, "error_code"),
        "Their requests that the router answered with an error of its own: limits, a full queue, no worker ...",
        per_client(lambda c: [((code,), count) for code, count in c.refused.items()]),
    ),
    # workers, as the 0.1 and 0.2 series name them
    Family(
        "sgl_router_active_workers", GAUGE, (),
        "Workers registered, and neither draining nor paused.",
        lambda counts: [((), sum(worker.in_rotation for worker in counts.fleet))],
    ),
    Family(
        "sgl_router_worker_health", GAUGE, WORKER,
        "1: the health checks find it healthy, else 0.", read.per_worker(read.healthy),
    ),
    Family(
        "sgl_router_worker_down", GAUGE, WORKER,
        "1: its engine was given up and will not be restarted, else 0.", read.per_worker(read.down),
    ),
    Family(
        "sgl_router_worker_load", GAUGE, WORKER,
        "Requests in flight on the worker.", read.per_worker(read.load),
    ),
    Family(
        "sgl_router_running_requests", GAUGE, WORKER,
        "Requests in flight on the worker.", read.per_worker(read.load),
    ),
    Family(
        "sgl_router_processed_requests_total", COUNTER, WORKER,
        "Requests that the worker answered.", read.per_worker(lambda w: w.processed),
    ),
    Family(
        "sgl_router_worker_withheld", GAUGE, WORKER,
        "1: its source lets it get no new requests (a pod that is not ready, or ends), else 0.",
        read.per_worker(lambda w: bool(w.withheld)),
    ),
    Family(
        "sgl_router_worker_draining", GAUGE, WORKER,
        "1: draining, gets no new requests, else 0.", read.per_worker(lambda w: w.draining),
    ),
    Family(
        "sgl_router_worker_paused", GAUGE, WORKER,
        "1: paused by the control plane (generation paused, memory released), gets no new requests, else 0.",
        read.per_worker(lambda w: bool(w.paused)),
    ),
    Family(
        "sgl_router_max_load", GAUGE, (),
        "Requests in flight on the most loaded worker in rotation.", read.load_of_all(max),
    ),
    Family(
        "sgl_router_min_load", GAUGE, (),
        "Requests in flight on the least loaded worker in rotation.", read.load_of_all(min),
    ),
    Family(
        "sgl_router_worker_ejected", GAUGE, WORKER,
        "1: ejected, because it fails or lags far more than the others, else 0.",
        read.per_worker(lambda w: int(bool(w.ejected))),
    ),
    Family(
        "sgl_router_worker_ejections_total", COUNTER, WORKER,
        "How often the worker was ejected.", read.per_tally(lambda t: t.ejections),
    ),
    Family(
        "sgl_router_cb_state", GAUGE, WORKER,
        "Circuit breaker: 0 closed, 1 open, 2 half open.", read.per_worker(read.breaker),
    ),
    Family(
        "sgl_router_cb_state_transitions_total", COUNTER, ("worker", "from", "to"),
        "State changes of the circuit breaker.", read.per_tally_items(read.transitions),
    ),
    Family(
        "sgl_router_cb_outcomes_total", COUNTER, ("worker", "outcome"),
        "Legs that the circuit breaker counted, as success or failure.", read.per_tally_items(read.heard),
    ),
    Family(
        "sgl_router_worker_outcomes_total", COUNTER, ("worker", "outcome"),
        "Legs by outcome (served, rejected, failed, busy, refused, broken, timeout, gone ...).",
        read.per_tally_items(read.outcomes),
    ),
    Family(
        "sgl_router_worker_changes_total", COUNTER, ("what", "state"),
        "Workers added, removed, restarted or emptied (cache found empty); health, breaker, ejection (outlier), "
        "draining, withheld (by its source), paused and updating (its weights) by the new state.",
        lambda counts: counts.changes.items(),
    ),
    Family(
        "sgl_router_shadow_decisions_total", COUNTER, ("policy", "agrees"),
        "Decisions that the shadow policy agreed with (yes) or not (no) (--shadow-policy).",
        read.shadow(lambda t: [(("yes",), t.agreed), (("no",), t.differed)]),
    ),
    Family(
        "sgl_router_shadow_matched_bytes_total", COUNTER, ("policy", "choice"),
        "Bytes of routing text that the shadow policy believes to be cached: at the worker that it would have chosen"
        " (shadow), and at the one that got the request (actual).",
        read.shadow(lambda t: [(("shadow",), t.matched), (("actual",), t.actual_matched)]),
    ),
    Family(
        "sgl_router_shadow_cost_total", COUNTER, ("policy", "choice"),
        "Sum of the costs that the shadow policy sees at these workers; 0 for a policy without costs.",
        read.shadow(lambda t: [(("shadow",), t.cost), (("actual",), t.actual_cost)]),
    ),
    Family(
        "sgl_router_shadow_failures_total", COUNTER, ("policy",),
        "Shadow policies that failed, and were switched off.",
        read.shadow(lambda t: [((), t.failures)]),
    ),
    # what workers say of their caches
    Family(
        "sgl_router_kv_events_live", GAUGE, WORKER,
        "1: the worker's KV events are followed (--kv-events). 0: its cache is estimated.",
        kv.per_holder(lambda h: int(h.live)),
    ),
    Family(
        "sgl_router_kv_events_whole", GAUGE, WORKER,
        "1: nothing was missed since its cache was empty. 0: it may hold more than its events told.",
        kv.per_holder(lambda h: int(h.live and h.whole)),
    ),
    Family(
        "sgl_router_kv_blocks", GAUGE, WORKER,
        "Blocks that the worker's KV cache holds, by its events.", kv.per_holder(lambda h: len(h.blocks)),
    ),
    Family(
        "sgl_router_kv_events_total", COUNTER, WORKER,
        "KV events that were read.", kv.per_holder(lambda h: h.events),
    ),
    Family(
        "sgl_router_kv_events_unread_total", COUNTER, WORKER,
        "KV events and messages that could not be read.", kv.per_holder(lambda h: h.unread),
    ),
    Family(
        "sgl_router_kv_event_gaps_total", COUNTER, WORKER,
        "How often batches of KV events were missing.", kv.per_holder(lambda h: h.gaps),
    ),
    Family(
        "sgl_router_kv_event_resyncs_total", COUNTER, WORKER,
        "How often all that was known of a worker's cache was forgotten and learnt anew: a gap could not be filled, or"
        " the engine began anew.",
        kv.per_holder(lambda h: h.resyncs),
    ),
    Family(
        "sgl_router_kv_blocks_unplaced_total", COUNTER, (*WORKER, "reason"),
        "Blocks that were told and are not known: the block before is not known (orphan), or there are more than"
        " --kv-events-max-blocks (limit).",
        kv.per_holder_items(lambda h: [(("orphan",), h.orphans), (("limit",), h.refused)]),
    ),
    Family(
        "sgl_router_decision_records", GAUGE, (),
        "Records of decisions that are kept (--decision-records).", read.live(lambda s: s.decisions),
    ),
    Family(
        "sgl_router_decision_log_lost_total", COUNTER, (),
        "Requests that are missing in the log of decisions, because they came too fast or the disk was full.",
        read.live(lambda s: s.unlogged_decisions),
    ),
    Family(
        "sgl_router_desired_workers", GAUGE, (),
        "Number of workers that autoscaling wants; left out without autoscaling.",
        read.live(lambda s: s.desired_workers),
    ),
    Family(
        "sgl_router_replica_up", GAUGE, WORKER,
        "1: the process of this replica runs, else 0; only for replicas that launch_server runs.",
        read.per_replica(lambda restarts, up: int(up)),
    ),
    Family(
        "sgl_router_replica_restarts_total", COUNTER, WORKER,
        "Restarts of this replica.", read.per_replica(lambda restarts, up: restarts),
    ),
    # what engines say of themselves
    Family(
        "sgl_router_engine_running_requests", GAUGE, WORKER,
        "Requests that the engine computes, as it reports.", read.per_report(lambda r: r.running),
    ),
    Family(
        "sgl_router_engine_queued_requests", GAUGE, WORKER,
        "Requests queued in the engine, as it reports.", read.per_report(lambda r: r.queued),
    ),
    Family(
        "sgl_router_engine_kv_capacity_tokens", GAUGE, WORKER,
        "Tokens that the engine's KV cache can hold.", read.per_report(lambda r: r.capacity_tokens),
    ),
    Family(
        "sgl_router_engine_kv_used_tokens", GAUGE, WORKER,
        "Tokens that the KV cache holds for running requests.", read.per_report(lambda r: r.used_tokens),
    ),
    Family(
        "sgl_router_engine_context_length", GAUGE, WORKER,
        "Most tokens of prompt and answer together that the engine accepts.",
        read.per_report(lambda r: r.context_length),
    ),
    # the router
    Family(
        "sgl_router_log_lines_lost_total", COUNTER, (),
        "Log lines lost because a disk was full or a pipe was blocked.", read.live(lambda s: s.lost_lines),
    ),
    Family(
        "sgl_router_build_info", GAUGE, ("version", "python"),
        "1; the labels say which router runs.", router.build_info,
    ),
    Family(
        "sgl_router_config_loaded_timestamp_seconds", GAUGE, (),
        "When the options were read last, seconds since 1970.",
        lambda counts: [((), counts.sources.configured)] if counts.sources.configured else [],
    ),
    Family(
        "sgl_router_certificate_expires_timestamp_seconds", GAUGE, ("use",),
        "When a certificate in use expires, seconds since 1970: that of the router's port (server), or what it shows to"
        " workers (workers).",
        router.certificates,
    ),
    Family(
        "sgl_router_loop_lag_seconds", HISTOGRAM, (),
        "By how much a timer of the event loop was late, measured four times a second: time in which no request moved;"
        " of the deciding process.",
        lambda counts: [((), counts.lag)],
    ),
    Family(
        "sgl_router_retry_budget_retries", GAUGE, (),
        "Retries in the window of the retry budget.", router.budget(lambda b: b.retries),
    ),
    Family(
        "sgl_router_retry_budget_refused_total", COUNTER, (),
        "Retries that the retry budget did not allow.", router.budget(lambda b: b.refused),
    ),
    Family(
        "sgl_router_request_body_bytes", GAUGE, (),
        "Bytes of request bodies in memory, against --max-buffered-request-bytes; left out with --relay-processes.",
        read.live(lambda s: s.body_bytes),
    ),
    Family(
        "sgl_router_request_body_limit_bytes", GAUGE, (),
        "--max-buffered-request-bytes; left out with --relay-processes.", read.live(lambda s: s.body_limit),
    ),
    Family(
        "sgl_router_shared_state", GAUGE, ("state",),
        "1 for what the store of --shared-state is: connecting, connected, or what is wrong with it. This family, as"
        " all of sgl_router_shared_*, has samples only with --shared-state.",
        shared.of_shared(shared.state),
    ),
    Family(
        "sgl_router_shared_losses_total", COUNTER, (),
        "How often the store could not be used any more.", shared.number(lambda s: s.losses),
    ),
    Family(
        "sgl_router_shared_peers", GAUGE, (),
        "Other routers of the fleet that were heard of in the last seconds.",
        shared.number(lambda s: len(s.reading.peers)),
    ),
    Family(
        "sgl_router_shared_lag_seconds", GAUGE, (),
        "From writing a message to the store until it was read again.", shared.of_shared(shared.lag),
    ),
    Family(
        "sgl_router_shared_messages_total", COUNTER, ("direction", "topic"),
        "Messages that were written to the store (sent), and read from it (received, own ones as well).",
        shared.of_shared(shared.messages),
    ),
    Family(
        "sgl_router_shared_bytes_total", COUNTER, ("direction", "topic"),
        "Bytes of those messages.", shared.of_shared(shared.sizes),
    ),
    Family(
        "sgl_router_shared_dropped_total", COUNTER, ("reason",),
        "Messages, or parts of them, that had no effect: unwritten (the store did not take them), late (too many"
        " waited), foreign (another key), forged, malformed, too_long and others.",
        shared.of_shared(shared.dropped),
    ),
    Family(
        "sgl_router_shared_placements_total", COUNTER, ("direction",),
        "Prompts whose placement was told to others (sent), and heard of (received).",
        shared.of_shared(shared.placements),
    ),
    Family(
        "sgl_router_shared_entries", GAUGE, (),
        "Blocks of prompts of which it is known which workers have them, against --shared-state-blocks.",
        shared.number(lambda s: s.reading.entries),
    ),
    Family(
        "sgl_router_shared_entries_bytes", GAUGE, (),
        "About how many bytes these take.", shared.number(lambda s: s.reading.size),
    ),
    Family(
        "sgl_router_shared_sessions", GAUGE, (),
        "Sessions of which it is known where they are at home.", shared.number(lambda s: s.reading.homes),
    ),
    Family(
        "sgl_router_shared_agreed_total", COUNTER, (),
        "New prompts that were placed where every router would have placed them, while the store was away.",
        shared.number(lambda s: s.reading.agreed),
    ),
    Family(
        "sgl_router_shared_worker_requests", GAUGE, WORKER,
        "Requests of other routers in flight on the worker, as they tell.", shared.per_worker,
    ),
    Family(
        "sgl_router_shared_leader", GAUGE, (),
        "1: this router acts for all (autoscaling), else 0.", shared.number(lambda s: int(s.leads)),
    ),
    Family(
        "sgl_router_trace_spans_total", COUNTER, ("result",),
        "Spans of traces that the collector took (sent), and that it did not take, or for which there was no room"
        " (lost); only with --enable-trace.",
        router.spans,
    ),
    # HTTP, as the 0.3 series names it
    Family(
        "smg_http_requests_total", COUNTER, ("method", "path"),
        "Requests of every kind.", read.requests(read.method_path, read.count, read.everything),
    ),
    Family(
        "smg_http_request_duration_seconds", HISTOGRAM, ("method", "path"),
        "Seconds from the whole request in to the last byte of the answer out.",
        read.times(read.method_path, read.duration, read.everything),
    ),
    Family(
        "smg_http_responses_total", COUNTER, ("status_code", "error_code"),
        "Answers to requests of every kind; status 499: the client left before an answer.",
        read.requests(read.status_code, read.count, read.everything),
    ),
    Family("smg_http_connections_active", GAUGE, (), "Open client connections.", read.live(lambda s: s.connections)),
    # the router, as the 0.3 series names it
    Family(
        "smg_router_requests_total", COUNTER, (*KIND, "streaming"),
        "Inference requests.",
        read.requests(lambda s: (*read.router_labels(s), str(s.streaming).lower()), read.count, read.relayed),
    ),
    Family(
        "smg_router_request_duration_seconds", HISTOGRAM, KIND,
        "Seconds from the whole request in to the last byte out, where a worker answered without an error.",
        read.times(read.router_labels, read.duration, read.answered),
    ),
    Family(
        "smg_router_request_errors_total", COUNTER, (*KIND, "error_type"),
        "Inference requests that ended in an error, by the five error types of the 0.3 series.",
        read.requests(lambda s: (*read.router_labels(s), read.error_type(s)), read.count, read.failed),
    ),
    Family(
        "smg_router_upstream_responses_total", COUNTER, ("router_type", "status_code", "error_code"),
        "Workers' own answers passed on to clients.",
        read.requests(read.upstream_status, read.count, read.from_worker),
    ),
    # workers, as the 0.3 series names them
    Family("smg_worker_pool_size", GAUGE, (*MODE, "model"), "Registered workers.", read.pool),
    Family(
        "sgl_router_websockets_active", GAUGE, (),
        "Open WebSockets. Their bytes are counted as those of requests and answers, when they end.",
        read.live(lambda s: s.tunnels),
    ),
    Family(
        "smg_worker_connections_active", GAUGE, MODE,
        "Open connections to workers.", read.live(lambda s: s.upstream_connections, read.BACKEND),
    ),
    Family(
        "smg_worker_requests_active", GAUGE, WORKER,
        "Requests in flight on the worker.", read.per_worker(read.load),
    ),
    Family(
        "smg_worker_health", GAUGE, WORKER,
        "1: the health checks find it healthy, else 0.", read.per_worker(read.healthy),
    ),
    Family(
        "smg_worker_selection_total", COUNTER, (*MODE, "model", "policy"),
        "Legs, counted when their request ends.", read.selections,
    ),
    Family(
        "smg_worker_errors_total", COUNTER, (*MODE, "error_type"),
        "Failed legs by outcome.", read.totals(read.worker_errors),
    ),
    Family(
        "smg_worker_cb_state", GAUGE, WORKER,
        "Circuit breaker: 0 closed, 1 open, 2 half open.", read.per_worker(read.breaker),
    ),
    Family(
        "smg_worker_cb_transitions_total", COUNTER, ("worker", "from", "to"),
        "State changes of the circuit breaker.", read.per_tally_items(read.transitions),
    ),
    Family(
        "smg_worker_cb_outcomes_total", COUNTER, ("worker", "outcome"),
        "Legs that the circuit breaker counted, as success or failure.", read.per_tally_items(read.heard),
    ),
    Family(
        "smg_worker_cb_consecutive_failures", GAUGE, WORKER,
        "Consecutive failures; at the threshold the breaker opens.", read.per_worker(lambda w: w.circuit.failures),
    ),
    Family(
        "smg_worker_cb_consecutive_successes", GAUGE, WORKER,
        "Consecutive served probes; at the threshold a half-open breaker closes.",
        read.per_worker(lambda w: w.circuit.successes),
    ),
    Family(
        "smg_worker_retries_total", COUNTER, ("worker_type", "endpoint"),
        "Legs sent after a failed leg.",
        read.requests(read.worker_endpoint, lambda s: s.retries, read.relayed),
    ),
    Family(
        "smg_worker_retries_exhausted_total", COUNTER, ("worker_type", "endpoint"),
        "Requests whose last outcome is retryable, but no retry or no worker was left.",
        read.requests(read.worker_endpoint, lambda s: s.exhausted, read.relayed),
    ),
    Family(
        "smg_manual_policy_branch_total", COUNTER, ("branch",),
        "Decisions of the policy manual by branch.", read.branches_of("manual"),
    ),
    Family(
        "smg_consistent_hashing_policy_branch_total", COUNTER, ("branch",),
        "Decisions of the policy consistent_hashing by branch.", read.branches_of("consistent_hashing"),
    ),
    Family(
        "smg_prefix_hash_policy_branch_total", COUNTER, ("branch",),
        "Decisions of the policy prefix_hash by branch.", read.branches_of("prefix_hash"),
    ),
)  # fmt: skip


# -- the docs page ---------------------------------------------------------------------------------------

_INTRO = """\
# Metrics

Every metric of the router and its labels. Which of them answers which question, with the PromQL for it, a dashboard and
alerts: [monitoring.md](monitoring.md).

Served on `/metrics` of the router's port and on `--prometheus-host`:`--prometheus-port` (default port 29000), in
Prometheus' text format, or as OpenMetrics where the Accept header asks for it. This page is made by
`python -m sglang_router.observe.catalogue --markdown`; a test holds it equal to the code.

The metrics are made at most once in `--metrics-interval-secs` (1 s): whoever asks meanwhile gets the same bytes. They
are made in slices of a millisecond between the work for clients, so two families may differ by the requests of some
milliseconds. The metrics port takes at most 32 connections at a time and closes one after 10 s without a request.

- Names, types and labels are those of the reference, the router in Rust, where it has the metric: `sgl_router_*` of its
  0.1 and 0.2 series, `smg_*` of 0.3. Metrics that only this router has are called `sgl_router_*`, too.
- `worker` is the worker's URL, with `@` and a number for a data-parallel rank. When a worker is removed, its series
  disappear; totals without that label go on.
- `sgl_router_engine_*` are the engine's last report, read every `--engine-report-interval-secs`. What an engine does
  not report is left out.
- `route` and `path` are paths that the router serves (parameters as in `/workers/{id}`); any other is `other`.
- `model` is a name that a worker announces (`/v1/models`, adapters included), or that an operator gave it (`model_id`);
  or an alias (`--model-alias`); at most 64 of one worker and 100 in all. Any other is `other`, so that clients cannot
  make series; none is `unknown`.
- `error_code` is the code of the router's own errors, and empty for a worker's answer.
- `client` is the name of a client's key, `jwt` for all tokens of the identity provider, `other` for names that are not
  in use any more. There is none while clients need no key.
- A request is counted when it ends, a decision when it is made: each leg of a retried request has its own.
- Histograms have the bounds of `--prometheus-duration-buckets`, in seconds. A stream lasts to its last byte.
- Prefix metrics say what the router remembers (policies `cache_aware` and `cost`). The engines' own metrics say what
  their caches really hold. The matched share:
  `rate(sgl_router_prefix_matched_bytes_total[5m]) / rate(sgl_router_prefix_bytes_total[5m])`.
- The hit rate of the engines' caches, as they tell it in their answers:
  `rate(sgl_router_cached_tokens_total[5m]) / rate(sgl_router_prompt_tokens_total[5m])`. What an engine does not tell is
  not counted, see [routing.md](routing.md#what-the-engines-report).
- `sgl_router_worker_changes_total{what="outlier"}` counts ejections (`state="held_off"`) and their ends (`"kept"`).

The usual `process_*`, `python_info` and `python_gc_*` are there as well. Families of the reference about things that
this router does not do (gRPC, tokenizing, MCP, history, Kubernetes, rate limits, mesh) are left out.

| metric | type | labels | meaning |
|---|---|---|---|
"""


def markdown() -> str:
    """Return docs/metrics.md."""
    lines = [f"| `{each.name}` | {each.kind} | {_names(each.labels)} | {each.help} |\n" for each in METRICS]
    return _INTRO + "".join(lines)


def _names(labels: Values) -> str:
    return ", ".join(f"`{label}`" for label in labels) or "-"


def main(argv: Sequence[str]) -> int:
    """Print docs/metrics.md."""
    if list(argv) != ["--markdown"]:
        sys.stderr.write("usage: python -m sglang_router.observe.catalogue --markdown\n")
        return 2
    sys.stdout.write(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
