"""Metrics count exactly what happened; what clients choose cannot make them grow; the docs page names all of them."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from event_makers import finished, leg, tag, target
from fleets import any_policy, facts
from sglang_router.observe.catalogue import METRICS, markdown
from sglang_router.observe.clients import ClientCounts
from sglang_router.observe.exposition import wanted
from sglang_router.observe.live_sources import LiveSources
from sglang_router.observe.metrics import DURATION_BUCKETS, Metrics
from sglang_router.observe.tallies import Labels
from sglang_router.routing.candidates import candidates_of
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.events import LegEnded, Listeners, Retried, WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.kv_blocks import Stored
from sglang_router.routing.kv_index import KVIndex
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.policies.shadowed import ShadowTally
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.rules import BreakerRules, FleetRules, HealthRules
from sglang_router.routing.sessions import Sessions
from sglang_router.routing.shared.records import PeerReading, SharedReading
from sglang_router.routing.source import SourceReport
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker
from sglang_router.sharing.traffic import Traffic

ROOT = Path(__file__).parents[2]
FULL = EngineReport(context_length=8192, capacity_tokens=32768, running=3, queued=0, used_tokens=700)
W1, W2 = "http://w1:1", "http://w2:1"
FOUND = SourceReport(
    source="kubernetes",
    looks_at="pods",
    workers=5,
    listed_secs=1.5,
    error="it is away",
    passes=6,
    added=7,
    removed={"gone": 8, "replaced": 9},
    failures={"403": 10, "watch_silent": 11},
)
REPLICAS = [(W1, 2, True), (W2, 0, False)]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def families(metrics: Metrics, accept: str = "") -> dict[str, Metric]:
    body, content_type = metrics.render(accept)
    parse = parse_openmetrics if "openmetrics" in content_type else parse_text
    return {family.name: family for family in parse(body.decode())}


class Memory:
    """A prefix memory with a number of its own for each question."""

    nodes, held, retired_size = 11, 12, 13

    def size(self, worker: Worker) -> int:
        return 1000 + worker.order

    def entries(self, worker: Worker) -> int:
        return 2000 + worker.order

    def evictions(self, worker: Worker) -> int:
        return 3000 + worker.order

    def evicted_bytes(self, worker: Worker) -> int:
        return 4000 + worker.order


def tally_of_a_shadow() -> ShadowTally:
    tally = ShadowTally("least_load")
    tally.agreed, tally.differed, tally.failures = 1, 2, 3
    tally.matched, tally.actual_matched, tally.cost, tally.actual_cost = 40, 50, 6.5, 7.5
    return tally


def index_of_one_cache() -> KVIndex:
    """What the first worker says of its cache: `id0` is its id."""
    index = KVIndex()
    holder = index.join("id0")
    index.settle(holder, live=True, whole=True)
    index.store(holder, Stored([1, 2, 3], None, [1, 2, 3], 1), 0, 9)
    holder.events, holder.unread, holder.gaps, holder.resyncs, holder.orphans, holder.refused = 10, 11, 12, 13, 14, 15
    return index


class Spans:
    sent = 13
    lost = 14


def traffic_of_one_message() -> Traffic:
    """One message was written in 7 ms, and read; two were lost."""
    found = Traffic()
    found.wrote("loads", 20, (1, 0), 100.0)
    found.read("loads", 20, (1, 0), 100.007)
    found.missed("loads")
    found.missed("placements")
    return found


class Shared:
    """A router with one peer."""

    state = "connected"
    losses = 8
    leads = True
    traffic = traffic_of_one_message()
    reading = SharedReading(
        connected=True,
        peers=(PeerReading("ab", 0.1, 3),),
        entries=9,
        size=10,
        homes=11,
        agreed=12,
        waiting=0,
        told=13,
        heard=14,
        dropped={"late": 15},
    )


class Renewed:
    expires_at: float | None = 1.8e9


class Rig:
    """A fleet of two workers whose requests take no time, and its metrics."""

    def __init__(self, policy: str = "cache_aware", buckets: list[float] | None = None, pair: bool = False) -> None:
        listeners = Listeners()
        ids = iter(f"id{n}" for n in range(100))
        self.fleet = Fleet(listeners, lambda: next(ids), any_policy, FleetRules(breaker=BreakerRules(threshold=2)))
        self.policy = policy
        self.sessions = Sessions(True)
        sources = LiveSources(
            connections=lambda: 7,
            active=lambda: 3,
            upstream_connections=lambda: 5,
            tunnels=lambda: 0,
            lost_lines=lambda: 2,
            waiting=lambda: 4,
            waiting_sessions=lambda: 9,
            sessions=self.sessions,
            desired_workers=lambda: 6,
            decisions=lambda: 8,
            unlogged_decisions=lambda: 9,
            shadows=tally_of_a_shadow(),
            kv_index=index_of_one_cache(),
            discovery=lambda: [FOUND],
            retry_budget=RetryBudget(),
            shared=Shared(),
            spans=Spans(),
            version="1.2.3",
            configured=1.7e9,
            certificates={"server": Renewed()},
            body_bytes=lambda: 11,
            body_limit=lambda: 12,
            replicas=lambda: [row for row in REPLICAS if self.fleet.by_url(row[0])],
        )
        paths = ["/health", "/workers/{worker_id}/drain"]
        memory = Memory() if policy == "cache_aware" else None
        for role in ("prefill", "decode") if pair else ():
            worker = self.fleet.add(WorkerSpec(url=f"http://{role}:1", worker_type=role), 0.0)
            worker.window.told(8, 0, 0)
        self.announced = {'"m"': "m"}
        self.metrics = Metrics(
            self.fleet, policy, memory, sources, duration_buckets=buckets, paths=paths, models=self.announced
        )
        listeners.add(self.metrics)
        for url in (W1, W2):
            self.fleet.add(WorkerSpec(url=url, health=HealthRules(enabled=False)), 0.0)

    def worker(self, url: str) -> Worker:
        worker = self.fleet.by_url(url)
        assert worker is not None
        return worker

    def leg(self, url: str = W1) -> PlannedLeg:
        return leg(self.worker(url))

    def request(self, *outcomes: Outcome, branch: str = "miss", matched: int = 0, total: int = 20) -> None:
        """A chat request whose legs end as given, on the workers in turn, reported as the relay does."""
        workers = [self.worker((W1, W2)[n % 2]) for n in range(len(outcomes))]
        legs = [leg(worker, branch, matched, total) for worker in workers]
        for worker in workers:
            worker.decisions.count(self.policy, branch, matched, total)
        for planned, outcome in zip(legs[:-1], outcomes[:-1], strict=True):
            self.metrics.retried(Retried(tag(), planned, outcome, 0.0))
        self.metrics.finished(finished(legs[-1], outcome=outcomes[-1], retries=len(legs) - 1))

    def samples(self, prefix: str = "") -> Samples:
        """All samples of families whose name starts so, by name and labels."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families(self.metrics).values()
            for sample in family.samples
            if sample.name.startswith(prefix)
        }

    def get(self, name: str, **labels: str) -> float:
        labels = {key.rstrip("_"): label for key, label in labels.items()}
        return self.samples(name)[name, frozenset(labels.items())]


# -- requests -------------------------------------------------------------------------------------------

KIND = {
    "router_type": "http",
    "backend_type": "regular",
    "connection_mode": "http",
    "model": "m",
    "endpoint": "chat",
}
ROUTE = {"route": "/v1/chat/completions"}
POOL = {"worker_type": "regular", "connection_mode": "http"}


def test_requests_are_counted_by_every_name() -> None:
    rig = Rig()
    for _ in range(3):
        rig.metrics.finished(finished())
    rig.metrics.finished(finished(streaming=True))
    rig.metrics.finished(finished(method="GET", path="/health", endpoint="", model="", outcome=None))
    assert rig.get("sgl_router_requests_total", **ROUTE) == 4
    assert rig.get("smg_http_requests_total", method="POST", path="/v1/chat/completions") == 4
    assert rig.get("smg_http_requests_total", method="GET", path="/health") == 1
    assert rig.get("smg_http_responses_total", status_code="200", error_code="") == 5
    assert rig.get("sgl_router_http_responses_total", status_code="200", error_code="") == 5
    assert rig.get("smg_router_requests_total", **KIND, streaming="false") == 3
    assert rig.get("smg_router_requests_total", **KIND, streaming="true") == 1
    assert rig.get("smg_router_upstream_responses_total", router_type="http", status_code="200", error_code="") == 4
    assert rig.get("sgl_router_request_bytes_total", **ROUTE) == 400
    assert rig.get("sgl_router_response_bytes_total", **ROUTE) == 4000


def test_histograms() -> None:
    rig = Rig(buckets=[1.0, 0.1, 0.5])
    for duration, first in ((0.1, 0.05), (0.1000001, 0.1), (0.7, -1.0), (9.0, 2.0)):
        rig.metrics.finished(finished(duration=duration, first_byte=first))
    for name, expected, total in (
        ("sgl_router_request_duration_seconds", [1, 2, 3, 4], 9.9000001),
        ("sgl_router_time_to_first_byte_seconds", [2, 2, 2, 3], 2.15),
    ):
        assert [rig.get(f"{name}_bucket", **ROUTE, le=le) for le in ("0.1", "0.5", "1.0", "+Inf")] == expected
        assert rig.get(f"{name}_sum", **ROUTE) == pytest.approx(total)
        assert rig.get(f"{name}_count", **ROUTE) == expected[-1]


def test_the_bounds_are_those_of_the_reference() -> None:
    rig = Rig()
    rig.metrics.finished(finished())
    bounds = [dict(labels)["le"] for _, labels in rig.samples("smg_http_request_duration_seconds_bucket")]
    assert sorted(map(float, bounds)) == [*DURATION_BUCKETS, float("inf")]
    assert len(DURATION_BUCKETS) == 20


@pytest.mark.parametrize(
    ("event", "code", "kind"),
    [
        ({"status": 503, "code": "no_workers", "outcome": None}, "no_workers", "no_workers"),
        ({"status": 504, "code": "worker_timeout", "outcome": Outcome.TIMEOUT}, "worker_timeout", "timeout"),
        ({"status": 502, "code": "worker_broken", "outcome": Outcome.BROKEN}, "worker_broken", "backend_error"),
        ({"status": 200, "code": "stream_broken", "outcome": Outcome.CUT}, "stream_broken", "backend_error"),
        ({"status": 400, "code": "json_parse_error", "outcome": None}, "json_parse_error", "validation_error"),
        ({"status": 500, "code": "internal_error", "outcome": None}, "internal_error", "internal_error"),
        ({"status": 404}, "http_404", "validation_error"),
        ({"status": 500, "outcome": Outcome.FAILED}, "http_500", "backend_error"),
    ],
)
def test_errors_by_code(event: dict[str, Any], code: str, kind: str) -> None:
    rig = Rig()
    rig.metrics.finished(finished())  # makes the model known
    rig.metrics.finished(finished(**event))
    assert rig.get("sgl_router_request_errors_total", **ROUTE, error_type=code) == 1
    assert rig.get("smg_router_request_errors_total", **KIND, error_type=kind) == 1
    assert rig.get("smg_router_request_duration_seconds_count", **KIND) == 1
    labels = {"status_code": str(event["status"]), "error_code": str(event.get("code", ""))}
    assert rig.get("smg_http_responses_total", **labels) == 1
    assert sum(rig.samples("smg_router_request_errors_total").values()) == 1


def test_a_client_that_leaves_is_no_error() -> None:
    rig = Rig()
    rig.metrics.finished(finished(rig.leg(), status=0, outcome=Outcome.GONE, first_byte=-1.0))
    rig.metrics.finished(finished(rig.leg(), outcome=Outcome.GONE))
    assert rig.get("sgl_router_client_disconnects_total", **ROUTE) == 2
    assert rig.get("smg_http_responses_total", status_code="499", error_code="") == 1
    assert rig.samples("sgl_router_request_errors_total") == {}
    assert rig.get("sgl_router_worker_outcomes_total", worker=W1, outcome="gone") == 2
    assert rig.samples("smg_worker_errors_total") == {}


def test_retries() -> None:
    rig = Rig()
    rig.request(Outcome.REFUSED, Outcome.SERVED)
    rig.request(Outcome.BUSY, Outcome.BUSY)
    assert rig.get("sgl_router_retries_total", **ROUTE) == 2
    assert rig.get("sgl_router_retries_exhausted_total", **ROUTE) == 1
    assert rig.get("smg_worker_retries_total", worker_type="regular", endpoint="chat") == 2
    assert rig.get("smg_worker_retries_exhausted_total", worker_type="regular", endpoint="chat") == 1
    assert rig.get("smg_worker_selection_total", **POOL, model="m", policy="cache_aware") == 4
    assert sum(rig.samples("sgl_router_policy_decisions_total").values()) == 4


# -- decisions and the prefix memory --------------------------------------------------------------------


def test_cache_hits_and_prefix_bytes() -> None:
    rig = Rig()
    for branch, matched, total in (("miss", 0, 1003), ("hit", 1000, 1003), ("miss", 4, 14)):
        rig.request(Outcome.SERVED, branch=branch, matched=matched, total=total)
    assert rig.get("sgl_router_cache_hits_total") == 1
    assert rig.get("sgl_router_cache_misses_total") == 2
    assert rig.get("sgl_router_load_balancing_events_total") == 0
    decisions = {"worker": W1, "policy": "cache_aware"}
    assert rig.get("sgl_router_policy_decisions_total", **decisions, branch="miss") == 2
    assert rig.get("sgl_router_policy_decisions_total", **decisions, branch="hit") == 1
    assert rig.get("sgl_router_prefix_matched_bytes_total", worker=W1) == 1004
    assert rig.get("sgl_router_prefix_bytes_total", worker=W1) == 2020
    assert rig.get("sgl_router_prefix_bytes_total", worker=W2) == 0


def test_the_prefix_memory_is_read_at_the_scrape() -> None:
    samples = {
        (name, dict(labels).get("worker", "")): n for (name, labels), n in Rig().samples("sgl_router_tree").items()
    }
    assert samples == {
        ("sgl_router_tree_size", W1): 1001,
        ("sgl_router_tree_size", W2): 1002,
        ("sgl_router_tree_entries", W1): 2001,
        ("sgl_router_tree_entries", W2): 2002,
        ("sgl_router_tree_evictions_total", W1): 3001,
        ("sgl_router_tree_evictions_total", W2): 3002,
        ("sgl_router_tree_evicted_bytes_total", W1): 4001,
        ("sgl_router_tree_evicted_bytes_total", W2): 4002,
        ("sgl_router_tree_nodes", ""): 11,
        ("sgl_router_tree_held_bytes", ""): 12,
        ("sgl_router_tree_retired_bytes", ""): 13,
    }


# -- workers --------------------------------------------------------------------------------------------


def test_load_health_and_breaker_are_read_at_the_scrape() -> None:
    rig = Rig()
    one, two = rig.worker(W1), rig.worker(W2)
    leases = [rig.fleet.lease(one) for _ in range(3)]
    for name in ("sgl_router_running_requests", "sgl_router_worker_load", "smg_worker_requests_active"):
        assert rig.samples(name) == {(name, frozenset({("worker", W1)})): 3, (name, frozenset({("worker", W2)})): 0}
    assert (rig.get("sgl_router_max_load"), rig.get("sgl_router_min_load")) == (3, 0)
    for lease in leases:
        lease.close(Outcome.SERVED, 1.0)
    assert rig.get("sgl_router_processed_requests_total", worker=W1) == 3
    for _ in range(2):
        rig.fleet.lease(two).close(Outcome.FAILED, 2.0)
    rig.fleet.set_draining(one, True)
    for name in ("sgl_router_cb_state", "smg_worker_cb_state"):
        assert (rig.get(name, worker=W1), rig.get(name, worker=W2)) == (0, 1)
    assert rig.get("smg_worker_cb_consecutive_failures", worker=W2) == 2
    assert rig.get("sgl_router_active_workers") == 1
    assert rig.get("sgl_router_worker_draining", worker=W1) == 1
    assert rig.get("sgl_router_worker_withheld", worker=W2) == 0
    rig.fleet.withhold(rig.worker(W2), "its pod ends")
    assert rig.get("sgl_router_worker_withheld", worker=W2) == 1
    assert rig.get("smg_worker_health", worker=W2) == 1
    rig.fleet.candidates(100.0)
    for name in ("sgl_router_cb_state_transitions_total", "smg_worker_cb_transitions_total"):
        assert rig.get(name, worker=W2, from_="closed", to="open") == 1
        assert rig.get(name, worker=W2, from_="open", to="half_open") == 1
    assert rig.get("sgl_router_cb_state", worker=W2) == 2
    assert rig.get("sgl_router_worker_changes_total", what="breaker", state="open") == 1
    assert rig.get("smg_worker_pool_size", **POOL, model="unknown") == 2


def test_what_the_breakers_hear() -> None:
    rig = Rig()
    one = rig.worker(W1)
    for outcome in (Outcome.SERVED, Outcome.SERVED, Outcome.FAILED, Outcome.CUT, Outcome.BUSY, Outcome.GONE):
        rig.metrics.finished(finished(leg(one), outcome=outcome))
    for name in ("sgl_router_cb_outcomes_total", "smg_worker_cb_outcomes_total"):
        assert rig.get(name, worker=W1, outcome="success") == 2
        assert rig.get(name, worker=W1, outcome="failure") == 2
        assert rig.get(name, worker=W2, outcome="failure") == 0
    errors = {dict(key[1])["error_type"]: n for key, n in rig.samples("smg_worker_errors_total").items()}
    assert errors == {"failed": 1, "cut": 1, "busy": 1}


def test_the_series_of_a_removed_worker_disappear_and_totals_stay() -> None:
    rig = Rig()
    one = rig.worker(W1)
    hit = leg(one, "hit", 10, 20)
    for _ in range(3):
        one.decisions.count("cache_aware", "hit", 10, 20)
    rig.metrics.finished(finished(hit, outcome=Outcome.FAILED))
    assert any(("worker", W1) in labels for _, labels in rig.samples())
    rig.fleet.remove(one)
    for _ in range(2):  # requests that outlive their worker
        rig.metrics.retried(Retried(tag(), hit, Outcome.FAILED, 0.0))
        rig.metrics.finished(finished(hit, outcome=Outcome.FAILED))
    rig.metrics.worker_changed(WorkerChanged(one, "breaker", "closed", "open"))
    samples = rig.samples()
    assert not any(("worker", W1) in labels for _, labels in samples)
    assert any(("worker", W2) in labels for _, labels in samples)
    assert rig.get("sgl_router_cache_hits_total") == 3
    assert rig.get("smg_worker_errors_total", **POOL, error_type="failed") == 5
    rig.fleet.add(WorkerSpec(url=W1), 1.0)
    assert rig.get("sgl_router_prefix_bytes_total", worker=W1) == 0
    assert rig.get("sgl_router_cache_hits_total") == 3


def test_a_worker_that_is_removed_during_a_scrape_is_counted_once() -> None:
    """A scrape is made in pieces; whatever comes between two of them, a total must not be too high: the next scrape
    would show less, which Prometheus takes for a restart."""
    totals = {"sgl_router_cache_hits_total": 7.0, "smg_worker_errors_total": 5.0}
    last = len(list(Rig().metrics.pieces(False)))
    for moment in range(last + 1):
        rig = Rig()
        two = rig.worker(W2)
        for url, hits, errors in ((W1, 3, 2), (W2, 4, 3)):
            for _ in range(hits):
                rig.worker(url).decisions.count("cache_aware", "hit", 10, 20)
            for _ in range(errors):
                rig.metrics.finished(finished(rig.leg(url), outcome=Outcome.FAILED))
        rig.fleet.remove(rig.worker(W1))
        text = ""
        for number, piece in enumerate(rig.metrics.pieces(False)):
            if number == moment:
                rig.fleet.remove(two)
            text += piece
        found = {sample.name: sample.value for family in parse_text(text) for sample in family.samples}
        assert {name: found[name] for name in totals} == totals, f"removed before piece {moment}"


def test_a_leg_on_a_removed_worker_counts_for_its_role() -> None:
    rig = Rig()
    for role in ("prefill", "decode", "decode"):
        gone = target(rig.worker(W1))._replace(worker_id="gone", role=role)
        rig.metrics.finished(finished(PlannedLeg(1, gone, "hit"), outcome=Outcome.CUT))
    for role, expected in (("prefill", 1), ("decode", 2)):
        assert rig.get("smg_worker_errors_total", **{**POOL, "worker_type": role}, error_type="cut") == expected


def test_workers_that_were_there_before_the_metrics_are_counted() -> None:
    rig = Rig()
    later = Metrics(rig.fleet, "round_robin")
    rig.worker(W2).decisions.count("round_robin", "", 0, 0)
    (decision,) = families(later)["sgl_router_policy_decisions"].samples
    assert decision.labels == {"worker": W2, "policy": "round_robin", "branch": ""}


# -- bounds ---------------------------------------------------------------------------------------------


def values_of(rig: Rig, label: str) -> set[str]:
    return {dict(labels)[label] for _, labels in rig.samples() if label in dict(labels)}


def test_paths_and_methods_are_bounded() -> None:
    rig = Rig()
    for number in range(300):
        rig.metrics.finished(finished(method=f"M{number}", path=f"/{number}", endpoint="", status=404))
    rig.metrics.finished(finished(method="POST", path="/workers/a%20b/drain", endpoint=""))
    rig.metrics.finished(finished(method="POST", path="/workers/a/b/drain", endpoint=""))
    assert values_of(rig, "path") == {"other", "/workers/{worker_id}/drain"}
    assert values_of(rig, "method") == {"other", "POST"}
    assert rig.get("smg_http_requests_total", method="other", path="other") == 300
    assert len(rig.metrics.counts.series) == 3


def test_models_are_bounded() -> None:
    rig = Rig()
    rig.announced.clear()
    rig.announced.update({f'"model-{number}"': f"model-{number}" for number in range(300)})
    for _ in range(2):
        for number in range(300):
            rig.metrics.finished(finished(model=f'"model-{number}"'))
    models = values_of(rig, "model")
    assert len(models) == 102  # a hundred, "other", and the "unknown" of the pool
    assert {"model-0", "model-99", "other"} <= models
    assert rig.get("smg_router_requests_total", **{**KIND, "model": "other"}, streaming="false") == 400
    assert rig.get("smg_router_requests_total", **{**KIND, "model": "model-7"}, streaming="false") == 2


def test_f14_names_that_clients_invent_take_no_label_from_a_model_that_a_worker_announces() -> None:
    """A hundred invented names took all the places, and the real model was `other` until the restart."""
    rig = Rig()
    for number in range(300):
        rig.metrics.finished(finished(model=f'"invented-{number}"'))
    rig.metrics.finished(finished(model='"m"'))
    rig.metrics.finished(finished(model=""))
    assert values_of(rig, "model") == {"m", "other", "unknown"}
    assert rig.get("smg_router_requests_total", **{**KIND, "model": "other"}, streaming="false") == 300


def test_f6_no_table_of_the_metrics_keeps_what_a_client_invented() -> None:
    """A model name of 4 MB was kept for ever."""
    rig = Rig()
    for number in range(20):
        rig.metrics.finished(finished(model=f'"{number}{"x" * 4_000_000}"'))
    assert (len(rig.metrics.counts.series), rig.metrics._labels._models) == (1, {"": "unknown"})


def test_a_label_stays_when_its_model_is_gone_and_is_escaped_in_the_exposition() -> None:
    rig = Rig()
    name = 'a"b\\'
    rig.announced['"x"'] = name
    rig.metrics.finished(finished(model='"x"'))
    del rig.announced['"x"']
    rig.metrics.finished(finished(model='"x"'))
    assert rig.get("smg_router_requests_total", **{**KIND, "model": name}, streaming="false") == 2


def test_path_parameters() -> None:
    labels = Labels(["/a", "/w/{id}", "/files/{path:path}"], {})
    paths = ["/a", "/a/", "/w/1", "/w/", "/w/1/2", "/files/x/y", "/b"]
    assert [labels.path(path) for path in paths] == [
        "/a", "other", "/w/{id}", "other", "other", "/files/{path:path}", "other",
    ]  # fmt: skip


def test_streams_that_another_worker_went_on_with() -> None:
    rig = Rig()
    one = rig.worker(W1)
    rig.metrics.finished(finished(leg(one), outcome=Outcome.SERVED, retries=2, resumed=2))
    rig.metrics.finished(finished(leg(one), outcome=Outcome.CUT, code="stream_broken", unresumed="sampling"))
    rig.metrics.finished(finished(leg(one), outcome=Outcome.CUT, code="stream_broken"))
    assert sum(rig.samples("sgl_router_resumed_streams_total").values()) == 1
    assert rig.samples("sgl_router_resume_refused_total") == {
        ("sgl_router_resume_refused_total", frozenset({("reason", "sampling")})): 1
    }


def test_requests_of_pairs_are_counted_by_what_was_handed_over() -> None:
    rig = Rig()
    one = rig.worker(W1)
    for result in ("given", "absent", "given", ""):
        event = finished(leg(one), outcome=Outcome.SERVED)
        event.answer.handoff = result
        rig.metrics.finished(event)
    name = "sgl_router_handoffs_total"
    assert rig.samples(name) == {
        (name, frozenset({("result", "given")})): 2,
        (name, frozenset({("result", "absent")})): 1,
    }


def test_tokens_are_counted_per_worker_and_model_as_far_as_they_are_told() -> None:
    rig = Rig()
    one, two = rig.worker(W1), rig.worker(W2)
    told = Usage(455, 300, 8)
    told.predicted, told.missed = 400, False
    missed = Usage(1000, 0, 1)
    missed.predicted, missed.missed = 900, True
    for usage in (told, missed, Usage(7, -1, -1), None):
        rig.metrics.finished(finished(leg(one), usage=usage))
    rig.metrics.finished(finished(leg(two), usage=Usage(5, 1, 1), model='"invented"'))
    rig.metrics.finished(finished(None, usage=None))
    names = ("prompt", "cached", "completion", "predicted_cached")
    found = [rig.get(f"sgl_router_{name}_tokens_total", worker=W1, model="m") for name in names]
    assert found == [1462, 300, 9, 1300]
    assert rig.get("sgl_router_surprising_misses_total", worker=W1, model="m") == 1
    assert rig.get("sgl_router_prompt_tokens_total", worker=W2, model="other") == 5
    assert len(rig.samples("sgl_router_prompt_tokens_total")) == 2
    rig.fleet.remove(one)
    assert len(rig.samples("sgl_router_prompt_tokens_total")) == 1


def test_the_learned_capacity_is_left_out_until_something_is_learnt() -> None:
    rig = Rig()
    assert rig.samples("sgl_router_learned_capacity_bytes") == {}
    rig.worker(W1).belief.capacity = 70_000
    assert list(rig.samples("sgl_router_learned_capacity_bytes").values()) == [70_000]


# -- the exposition -------------------------------------------------------------------------------------


def busy(policy: str) -> Rig:
    """A rig on which everything happened that a metric tells of."""
    rig = Rig(policy, pair=True)
    rig.request(Outcome.REFUSED, Outcome.SERVED)
    rig.request(Outcome.SERVED)
    rig.metrics.finished(finished(status=503, code="no_workers", outcome=None))
    one = rig.worker(W1)
    for state in ("open", "half_open"):
        rig.metrics.worker_changed(WorkerChanged(one, "breaker", "closed", state))
    rig.metrics.finished(finished(leg(one), outcome=Outcome.FAILED))
    rig.metrics.finished(finished(leg(one), outcome=Outcome.CUT, resumed=2, unresumed="no_retry"))
    handed = finished(leg(one))
    handed.answer.handoff = "given"
    rig.metrics.finished(handed)
    rig.fleet.reported(one, FULL)
    rig.metrics.finished(finished(leg(one), usage=Usage(10, 4, 2)))
    one.belief.capacity = 1 << 20
    queued = finished(leg(one), streaming=True, client="alice", usage=Usage(10, 4, 26), duration=0.8, first_byte=0.3)
    queued.tag.queued = 0.2
    rig.metrics.finished(queued)
    renamed = leg(one)
    renamed.model = b'"tiny"'
    rig.metrics.finished(finished(renamed))
    ClientCounts(lambda: ("alice",), rig.metrics.counts.clients).finished(finished(client="alice", code="queue_full"))
    return rig


OWN_POLICY = {
    "smg_manual_policy_branch_total": "manual",
    "smg_consistent_hashing_policy_branch_total": "consistent_hashing",
    "smg_prefix_hash_policy_branch_total": "prefix_hash",
}


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),
        ("Application/OpenMetrics-Text", True),
        ("application/openmetrics-text, */*", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.1, text/plain;q=0.9", False),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;q=nonsense", True),
        ("text/plain", False),
        (";;,=,", False),
    ],
)
def test_f13_the_format_is_the_one_that_the_client_prefers(accept: str, openmetrics: bool) -> None:
    """A client that refuses OpenMetrics (q=0), or prefers text, got OpenMetrics all the same."""
    assert wanted(accept) is openmetrics


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
@pytest.mark.parametrize("policy", ["cache_aware", *OWN_POLICY.values()])
def test_every_row_is_exported_as_declared(policy: str, accept: str) -> None:
    found = families(busy(policy).metrics, accept)
    for row in METRICS:
        family = found[row.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (row.kind, row.help)
        wanted = OWN_POLICY.get(row.name, "cache_aware" if "_tree_" in row.name else policy) == policy
        assert bool(family.samples) == wanted, row.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(row.labels)
    assert {"process_resident_memory_bytes", "python_info", "python_gc_collections"} <= set(found)


def test_sessions_are_told_by_worker_and_by_what_became_of_their_requests() -> None:
    rig = Rig("round_robin")
    for name, url in ((b"a", W1), (b"b", W2), (b"c", W2), (b"c", W2)):
        asked = facts()
        asked.session = name
        candidates = candidates_of([rig.worker(url)])
        rig.sessions.chosen(rig.sessions.place(asked, candidates, 0.0), Choice(rig.worker(url), "turn"), asked, 0.0)
    assert [rig.get("sgl_router_live_sessions", worker=url) for url in (W1, W2)] == [1, 2]
    kinds = ("new", "home", "free", "leave", "visit")
    assert [rig.get("sgl_router_session_legs_total", place=kind) for kind in kinds] == [3, 1, 0, 0, 0]
    assert rig.get("sgl_router_session_time_to_live_seconds") == 900


def test_the_times_of_answers_are_told_by_worker_and_model() -> None:
    rig = busy("cache_aware")
    at = {"worker": W1, "model": "m"}
    assert rig.get("sgl_router_worker_time_to_first_token_seconds_count", **at) == 1, "of the stream"
    assert rig.get("sgl_router_worker_time_to_first_token_seconds_sum", **at) == pytest.approx(0.3)
    assert rig.get("sgl_router_worker_inter_token_seconds_sum", **at) == pytest.approx(0.02), "0.5 s for 25 gaps"
    assert rig.get("sgl_router_worker_inter_token_seconds_bucket", **at, le="0.025") == 1
    served = rig.get("sgl_router_worker_request_duration_seconds_count", **at)
    assert served == rig.get("sgl_router_worker_outcomes_total", worker=W1, outcome="served")


def test_one_token_has_no_pace() -> None:
    rig = Rig()
    rig.metrics.finished(finished(rig.leg(), streaming=True, usage=Usage(10, 4, 1), duration=0.3))
    took = rig.get("sgl_router_worker_request_duration_seconds_sum", worker=W1, model="m")
    assert took == pytest.approx(0.3)
    assert not rig.samples("sgl_router_worker_inter_token_seconds")


def test_queued_requests_are_counted() -> None:
    rig = busy("cache_aware")
    assert rig.get("sgl_router_queue_seconds_count") == 1
    assert rig.get("sgl_router_queue_seconds_sum") == pytest.approx(0.2)


def test_ejections_are_told_by_worker() -> None:
    rig = Rig()
    worker = rig.worker(W1)
    worker.ejected = "it lags"
    rig.metrics.worker_changed(WorkerChanged(worker, "outlier", "kept", "held_off"))
    assert rig.get("sgl_router_worker_ejected", worker=W1) == 1
    assert rig.get("sgl_router_worker_ejections_total", worker=W1) == 1
    assert rig.get("sgl_router_worker_ejections_total", worker=W2) == 0


def test_the_router_tells_of_itself() -> None:
    rig = Rig()
    rig.metrics.late(0.02)
    assert rig.get("sgl_router_loop_lag_seconds_count") == 1
    assert rig.get("sgl_router_loop_lag_seconds_bucket", le="0.025") == 1
    assert rig.get("sgl_router_build_info", version="1.2.3", python=platform.python_version()) == 1
    assert rig.get("sgl_router_certificate_expires_timestamp_seconds", use="server") == 1.8e9
    assert rig.get("sgl_router_trace_spans_total", result="lost") == 14


def test_what_is_shared_with_other_routers() -> None:
    rig = Rig()
    rig.fleet.share(rig.worker(W2), 3)
    name = "sgl_router_shared_"
    assert rig.get(f"{name}state", state="connected") == 1
    assert rig.get(f"{name}lag_seconds") == pytest.approx(0.007)
    assert [rig.get(name + each) for each in ("losses_total", "peers", "leader", "agreed_total")] == [8, 1, 1, 12]
    assert rig.get(f"{name}messages_total", direction="sent", topic="loads") == 1
    assert rig.get(f"{name}bytes_total", direction="received", topic="loads") == 20
    assert [rig.get(f"{name}dropped_total", reason=each) for each in ("unwritten", "late")] == [2, 15]
    assert [rig.get(name + each) for each in ("entries", "entries_bytes", "sessions")] == [9, 10, 11]
    assert [rig.get(f"{name}placements_total", direction=each) for each in ("sent", "received")] == [13, 14]
    assert rig.get(f"{name}worker_requests", worker=W2) == 3


def test_rows_have_unique_names_of_the_two_families() -> None:
    names = [row.name for row in METRICS]
    assert len(set(names)) == len(names)
    for row in METRICS:
        assert row.name.startswith(("sgl_router_", "smg_"))
        assert row.name.endswith("_total") == (row.kind == "counter")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smg_http_connections_active", 7),
        ("sgl_router_active_requests", 3),
        ("sgl_router_waiting_sessions", 9),
        ("sgl_router_log_lines_lost_total", 2),
        ("sgl_router_waiting_requests", 4),
        ("sgl_router_desired_workers", 6),
        ("sgl_router_decision_records", 8),
        ("sgl_router_decision_log_lost_total", 9),
        ("sgl_router_config_loaded_timestamp_seconds", 1.7e9),
        ("sgl_router_request_body_bytes", 11),
        ("sgl_router_request_body_limit_bytes", 12),
        ("sgl_router_retry_budget_retries", 0),
        ("sgl_router_retry_budget_refused_total", 0),
    ],
)
def test_what_others_know(name: str, expected: float) -> None:
    assert Rig().get(name) == expected


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("sgl_router_shadow_decisions_total", {("agrees", "yes"): 1, ("agrees", "no"): 2}),
        ("sgl_router_shadow_matched_bytes_total", {("choice", "shadow"): 40, ("choice", "actual"): 50}),
        ("sgl_router_shadow_cost_total", {("choice", "shadow"): 6.5, ("choice", "actual"): 7.5}),
    ],
)
def test_what_a_shadow_would_have_done(name: str, by: dict[tuple[str, str], float]) -> None:
    expected = {(name, frozenset({("policy", "least_load"), label})): value for label, value in by.items()}
    assert Rig().samples(name) == expected
    assert Rig().get("sgl_router_shadow_failures_total", policy="least_load") == 3


def test_what_a_worker_says_of_its_cache() -> None:
    names = {"live": 1, "whole": 1, "total": 10, "unread_total": 11}
    rig = Rig()
    assert {name: rig.get(f"sgl_router_kv_events_{name}", worker=W1) for name in names} == names
    assert rig.get("sgl_router_kv_blocks", worker=W1) == 3
    assert rig.get("sgl_router_kv_event_gaps_total", worker=W1) == 12
    assert rig.get("sgl_router_kv_event_resyncs_total", worker=W1) == 13
    assert rig.get("sgl_router_kv_blocks_unplaced_total", worker=W1, reason="orphan") == 14
    assert rig.get("sgl_router_kv_blocks_unplaced_total", worker=W1, reason="limit") == 15
    assert not any(("worker", W2) in labels for _, labels in rig.samples("sgl_router_kv_"))
    rig.metrics.sources.kv_index = None
    assert not rig.samples("sgl_router_kv_")


def test_what_the_sources_of_workers_say() -> None:
    rig = Rig()
    assert rig.get("smg_discovery_workers_discovered", source="kubernetes") == 5
    assert rig.get("sgl_router_discovery_age_seconds", source="kubernetes") == 1.5
    assert rig.get("sgl_router_discovery_failing", source="kubernetes") == 1
    assert rig.get("sgl_router_discovery_updates_total", source="kubernetes") == 6
    assert rig.get("smg_discovery_registrations_total", source="kubernetes", result="success") == 7
    for reason, number in FOUND.removed.items():
        assert rig.get("smg_discovery_deregistrations_total", source="kubernetes", reason=reason) == number
    for reason, number in FOUND.failures.items():
        assert rig.get("sgl_router_discovery_failures_total", source="kubernetes", reason=reason) == number
    young = msgspec.structs.replace(FOUND, listed_secs=None, error=None)
    rig.metrics.sources.discovery = lambda: [young]
    assert rig.get("sgl_router_discovery_failing", source="kubernetes") == 0
    assert not rig.samples("sgl_router_discovery_age")


NEEDS_A_SOURCE = (
    "smg_discovery_workers_discovered",
    "sgl_router_discovery_failures",
    "smg_http_connections_active",
    "sgl_router_decision_records",
    "sgl_router_shadow_decisions",
    "sgl_router_desired_workers",
    "sgl_router_replica_up",
    "sgl_router_replica_restarts",
    "sgl_router_engine_running_requests",
    "sgl_router_engine_kv_capacity_tokens",
)


def test_what_nobody_told_is_left_out() -> None:
    rig = Rig()
    bare = Metrics(rig.fleet, rig.policy)
    for name in NEEDS_A_SOURCE:
        assert families(bare)[name].samples == [], name


def test_a_source_may_come_later() -> None:
    rig = Rig()
    replicas: list[tuple[str, int, bool]] = []
    rig.metrics.sources.replicas = lambda: replicas
    assert not rig.samples("sgl_router_replica")
    replicas.append((W2, 3, True))
    assert rig.samples("sgl_router_replica") == {
        ("sgl_router_replica_up", frozenset({("worker", W2)})): 1,
        ("sgl_router_replica_restarts_total", frozenset({("worker", W2)})): 3,
    }


def test_replicas_and_workers_that_are_down() -> None:
    rig = Rig()
    rig.fleet.down(rig.worker(W2), "gave up")
    assert [rig.get("sgl_router_worker_down", worker=url) for url in (W1, W2)] == [0, 1]
    assert [rig.get("sgl_router_replica_up", worker=url) for url in (W1, W2)] == [1, 0]
    assert rig.get("sgl_router_replica_restarts_total", worker=W1) == 2


def test_what_an_engine_says_is_told_as_far_as_it_says_it() -> None:
    rig = Rig()
    rig.fleet.reported(rig.worker(W1), FULL)
    rig.fleet.reported(rig.worker(W2), EngineReport(queued=9))
    told = {
        (name, dict(labels)["worker"]): value for (name, labels), value in rig.samples("sgl_router_engine_").items()
    }
    assert told == {
        ("sgl_router_engine_running_requests", W1): 3,
        ("sgl_router_engine_queued_requests", W1): 0,
        ("sgl_router_engine_kv_capacity_tokens", W1): 32768,
        ("sgl_router_engine_kv_used_tokens", W1): 700,
        ("sgl_router_engine_context_length", W1): 8192,
        ("sgl_router_engine_queued_requests", W2): 9,
    }
    rig.fleet.reported(rig.worker(W1), FULL.without_load())
    assert set(rig.samples("sgl_router_engine_running")) == set()


def test_content_types() -> None:
    render: Callable[[str], tuple[bytes, str]] = Rig().metrics.render
    assert render("")[1] == "text/plain; version=0.0.4; charset=utf-8"
    assert render("application/openmetrics-text; version=1.0.0")[1].startswith("application/openmetrics-text")
    assert render("application/openmetrics-text; version=1.0.0")[0].endswith(b"# EOF\n")


# -- the docs page --------------------------------------------------------------------------------------


def test_the_docs_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown()


def test_the_page_is_printed_by_the_module() -> None:
    command = [sys.executable, "-m", "sglang_router.observe.catalogue"]
    done = subprocess.run([*command, "--markdown"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, markdown())
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")


def test_both_legs_of_a_pair_are_counted_by_role() -> None:
    rig = Rig()
    prefill = rig.fleet.add(WorkerSpec(url="http://p:1", worker_type="prefill"), 0.0)
    decode = rig.fleet.add(WorkerSpec(url="http://d:1", worker_type="decode"), 0.0)
    both = leg(decode)
    both.partner = leg(prefill)

    def half(ended: PlannedLeg, outcome: Outcome) -> None:
        rig.metrics.half_ended(LegEnded(tag(), ended, outcome, 0.0, None, b""))

    half(both.partner, Outcome.SERVED)
    rig.metrics.finished(finished(both))
    half(both, Outcome.ABANDONED)
    rig.metrics.retried(Retried(tag(), leg(prefill), Outcome.FAILED, 0.0))
    half(both.partner, Outcome.ABANDONED)
    rig.metrics.retried(Retried(tag(), both, Outcome.BROKEN, 0.0))
    assert rig.get("sgl_router_pd_prefill_requests_total", worker="http://p:1") == 3
    assert rig.get("sgl_router_pd_prefill_errors_total", worker="http://p:1") == 1
    assert rig.get("sgl_router_pd_decode_requests_total", worker="http://d:1") == 3
    assert rig.get("sgl_router_pd_decode_errors_total", worker="http://d:1") == 1
    errors = {"connection_mode": "http", "error_type": "broken"}
    assert rig.get("smg_worker_errors_total", worker_type="decode", **errors) == 1
    rig.fleet.reported(decode, EngineReport(role="prefill"))
    assert rig.get("sgl_router_pd_prefill_requests_total", worker="http://d:1") == 3
