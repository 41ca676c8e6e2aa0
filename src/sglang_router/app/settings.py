"""Convert the options into what each part takes: rules, limits and timeouts.

Files with keys and certificates are read here too, and the process's limit on file descriptors.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from sglang_router.access.host_names import OwnNames
from sglang_router.access.permissions import Access, TokenReader
from sglang_router.access.tls import TLSFiles, server_files, worker_files
from sglang_router.access.watched import WatchedFiles
from sglang_router.admin.context import AddRules, AskTimeouts
from sglang_router.config import RouterArgs, key_files, keys
from sglang_router.config.key_files import KeyTerms
from sglang_router.config.models import POLICY_OPTIONS, worker_models
from sglang_router.relay.rules import Timeouts
from sglang_router.resume.continuation import ResumeRules
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import MOST_TEXT
from sglang_router.routing.model_names import text_of
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.quotas import Quotas
from sglang_router.routing.rules import (
    BreakerRules,
    ClientRules,
    FleetRules,
    HealthRules,
    LimitRules,
    ModelRules,
    OutlierRules,
    PairRules,
    PolicySettings,
    QueueRules,
    RetryBudgetRules,
    RetryRules,
)
from sglang_router.routing.session_hints import FIELDS, HEADERS, SessionHints
from sglang_router.routing.sessions import Sessions
from sglang_router.routing.source import Source
from sglang_router.routing.worker import Worker
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.limits import Limits
from sglang_router.workers.sources import ConfiguredWorkers, WorkerDefaults, configured_specs, paired_specs

log = logging.getLogger("sglang_router")

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_SPARE_DESCRIPTORS = 64
_ASKED_WITHIN = 30.0
"""Seconds that a request of the control plane has besides those of its engines."""
_SCRAPERS = 32
"""Most connections of the metrics port."""
_SCRAPER_SILENCE = 10.0
"""Seconds for which a connection of the metrics port may be silent."""


def policy_settings(
    args: RouterArgs, caches: KVCaches | None = None, own: Mapping[str, Any] = _NOTHING
) -> PolicySettings:
    """Return what policies read.

    caches  what workers say of their KV caches; None: they are not asked
    own     options that have other values for one model, see `config.models`
    """
    values = {name: own.get(name, getattr(args, name)) for name in POLICY_OPTIONS}
    del values["policy"]
    return PolicySettings(max_idle=values.pop("max_idle_secs"), kv_caches=caches, **values)


def most_routing_text(args: RouterArgs) -> int:
    """Return how many bytes of a request's routing text count: at most an eighth of what a worker's tree holds."""
    return max(min(args.max_tree_size // 8, MOST_TEXT), args.prefix_hash_bytes)


def session_hints(args: RouterArgs) -> SessionHints | None:
    """Return what recognises the sessions of requests; None when no option asks for them."""
    if not (args.session_affinity or args.session_admission):
        return None
    endpoints = [row for row in ENDPOINTS.values() if row.generates]
    return SessionHints(args.session_headers or HEADERS, args.session_fields or FIELDS, endpoints)


def sessions(args: RouterArgs) -> Sessions:
    """Make what sends the requests of a session to the same worker; it does nothing unless the options ask for it."""
    return Sessions(
        args.session_affinity or args.session_admission,
        backlog=_until_read,
        waits=args.session_admission,
        capacity=args.session_capacity_tokens,
    )


def _until_read(worker: Worker, size: int, now: float) -> float:
    """Return how long a worker takes until it has read a prompt, where its policy measures that."""
    return worker.work.until_read(size, now)


def breaker_rules(args: RouterArgs) -> BreakerRules:
    """Return when a circuit breaker opens and closes."""
    return BreakerRules(
        threshold=args.cb_failure_threshold or args.max_worker_retries + 1,
        successes=args.cb_success_threshold,
        timeout=args.cb_timeout_duration_secs,
        max_timeout=max(args.cb_timeout_duration_secs, args.cb_max_timeout_duration_secs),
        enabled=not args.disable_circuit_breaker,
    )


def retry_rules(args: RouterArgs) -> RetryRules:
    """Return how often a request is retried, and after which pauses."""
    return RetryRules(
        per_worker=args.max_worker_retries,
        total=args.max_total_retries,
        initial_backoff=args.retry_initial_backoff_ms / 1000,
        max_backoff=args.retry_max_backoff_ms / 1000,
        multiplier=args.retry_backoff_multiplier,
        jitter=args.retry_jitter_factor,
    )


def own_names(args: RouterArgs, machine: str) -> OwnNames:
    """Return the names by which browsers may ask for what needs no key. machine: the name of this one."""
    return OwnNames([*args.control_plane_allowed_hosts, args.host, machine.lower()])


def access_rules(
    args: RouterArgs,
    quotas: Quotas | None = None,
    tokens: TokenReader | None = None,
    wall: Callable[[], float] | None = None,
) -> tuple[Access, WatchedFiles]:
    """Load the API keys; return who may send which requests, and the key files, which change that when they change.

    quotas  gets the limits of clients; None: this process does not decide
    tokens  reads tokens of an identity provider; None: there is none
    wall    returns seconds since 1970: files that change count when they have settled; None: at once

    Raises: ConfigError, when a key file cannot be used.
    """
    files = (args.api_key_file, args.control_plane_api_keys_file)
    access = Access(open=args.control_plane_open, tokens=tokens, wall=time.time)

    def load() -> None:
        ring = keys.load(args.api_key, files[0], args.control_plane_api_keys, files[1])
        for warning in ring.warnings:
            log.warning(warning)
        access.use(ring.client, ring.control, ring.expires)
        if ring.tokens and tokens is None:
            log.warning("keys: `tokens` in %s has no effect without --jwt-issuer", files[0])
        if quotas is not None:
            others = ring.tokens.get(key_files.ANYBODY)
            named = {keys.name_of_subject(each): terms for each, terms in ring.tokens.items()}
            rules = {name: _client_rules(terms) for name, terms in {**ring.terms, **named}.items()}
            quotas.use_clients(rules, None if others is None else _client_rules(others))

    return access, WatchedFiles([path for path in files if path], load, "keys", log, wall)


def _client_rules(terms: KeyTerms) -> ClientRules:
    models = None if terms.models is None else frozenset(map(text_of, terms.models))
    return ClientRules(_limit_rules(terms), models, terms.priority, terms.max_priority)


def model_rules(terms: KeyTerms) -> ModelRules:
    """Return what applies to all requests for one model."""
    return ModelRules(_limit_rules(terms), terms.priority or 0)


def _limit_rules(terms: KeyTerms) -> LimitRules:
    return LimitRules(terms.requests_per_second, terms.burst, terms.max_concurrent_requests, terms.tokens_per_minute)


def server_tls(args: RouterArgs) -> TLSFiles | None:
    """Load key and certificate of the main port; None for plain HTTP.

    Raises: ConfigError, when a file cannot be used.
    """
    if args.server_cert_path is None or args.server_key_path is None:
        return None
    return server_files(args.server_cert_path, args.server_key_path)


def worker_tls(args: RouterArgs) -> TLSFiles | None:
    """Load how https workers are verified, and the router's own certificate for them.

    None without such options: the system's authorities are then loaded for the first https worker.

    Raises: ConfigError, when a file cannot be used.
    """
    if not args.ca_cert_paths and args.client_cert_path is None:
        return None
    return worker_files(args.ca_cert_paths, args.client_cert_path, args.client_key_path)


def outlier_rules(args: RouterArgs) -> OutlierRules:
    """Return when a worker is ejected as an outlier."""
    return OutlierRules(
        window=args.outlier_window_secs,
        failure_rate=args.outlier_failure_rate,
        latency_factor=args.outlier_latency_factor,
        ejection=args.outlier_ejection_secs,
        max_ejection=args.outlier_ejection_secs * 10,
    )


def fleet_rules(args: RouterArgs) -> FleetRules:
    """Return what applies to all workers."""
    return FleetRules(
        breaker=breaker_rules(args),
        startup_timeout=args.worker_startup_timeout_secs,
        slow_start=args.slow_start_secs,
        most_load=args.max_running_per_worker,
        elastic=args.scales_to_zero,
        outliers=None if args.disable_outlier_ejection else outlier_rules(args),
    )


def retry_budget_rules(args: RouterArgs) -> RetryBudgetRules:
    """Return the limit on all retries together."""
    return RetryBudgetRules(args.retry_budget_ratio, args.retry_budget_min_per_second)


def resume_rules(args: RouterArgs) -> ResumeRules:
    """Return which broken streams are continued."""
    return ResumeRules(args.resume_max_bytes, args.resume_nonzero_temperature)


def queue_rules(args: RouterArgs) -> QueueRules:
    """Return the limits on requests in flight, queued requests and their rate."""
    return QueueRules(
        max_concurrent=args.max_concurrent_requests if args.max_concurrent_requests > 0 else None,
        queue_size=args.queue_size,
        rate=args.rate_limit_tokens_per_second or None,
        queue_timeout=args.queue_timeout_secs,
        start_timeout=args.autoscale_wake_timeout_secs if args.scales_to_zero else args.startup_wait_secs,
        session_timeout=args.session_wait_secs,
        paused_timeout=args.rl_control_timeout_secs,
        aging=args.priority_aging_secs,
    )


def forward_rules(args: RouterArgs, access: Access, mark: bytes) -> ForwardRules:
    """Return which request fields are forwarded to workers. mark: this process in Via."""
    return ForwardRules(
        everything=args.forward_headers == "all",
        guarded=access.consumes_key,
        trusted=args.trust_client_routing_fields,
        withheld=access.withholds,
        mark=mark,
        readable=args.sse_keepalive_secs > 0 or args.inject_usage,
        traced=args.enable_trace,
    )


def health_rules(args: RouterArgs) -> HealthRules:
    """Return the health checks of workers that do not set their own."""
    return HealthRules(
        failure_threshold=args.health_failure_threshold,
        success_threshold=args.health_success_threshold,
        interval=args.health_check_interval_secs,
        timeout=args.health_check_timeout_secs,
        endpoint=args.health_check_endpoint,
        enabled=not args.disable_health_check,
    )


def add_rules(args: RouterArgs) -> AddRules:
    """Return the defaults of workers that are added through the API."""
    return AddRules(
        startup_timeout=args.worker_startup_timeout_secs,
        health=health_rules(args),
        api_key=args.worker_api_key,
        dp_aware=args.dp_aware,
    )


def ask_timeouts(args: RouterArgs) -> AskTimeouts:
    """Return how long engines have for requests of the control plane, in seconds."""
    return AskTimeouts(control=args.rl_control_timeout_secs)


def control_timeout(args: RouterArgs) -> float:
    """Return the seconds that a whole request of the control plane may take.

    It must not end an order while engines still carry it out, which have a limit of their own. They may do so one
    after the other, however many there are.
    """
    if args.rl_fanout_concurrency:
        return math.inf
    return max(args.request_timeout_secs, args.rl_control_timeout_secs + _ASKED_WITHIN)


def worker_defaults(args: RouterArgs) -> WorkerDefaults:
    """Return the defaults of workers that flags or a file name."""
    return WorkerDefaults(args.worker_api_key, args.dp_aware, health_rules(args))


def configured_workers(args: RouterArgs) -> ConfiguredWorkers:
    """Return the workers that flags or a file name at this start, and which sources look for others."""
    defaults = worker_defaults(args)
    from_file = "worker_urls" in args.from_file
    models = worker_models(args.worker_model, args.worker_urls)
    specs = configured_specs(args.worker_urls, defaults, models, from_file=from_file)

    def source_of(name: str) -> Source:
        return Source.FILE if name in args.from_file else Source.FLAGS

    specs += paired_specs(args.prefill_urls, args.decode_urls, defaults, source_of)
    return ConfiguredWorkers(defaults, specs, looking_sources(args))


def pair_rules(args: RouterArgs) -> PairRules:
    """Return how workers that do one half of a request each work together."""
    policies = {args.prefill_policy or args.policy, args.decode_policy or args.policy}
    return PairRules(
        uncached_tokens=args.pd_uncached_token_threshold,
        by_cost=policies == {"cost"},
        connector={"auto": "", "nixl_push": "nixl"}.get(args.pd_kv_connector, args.pd_kv_connector),
        pushes=args.pd_kv_connector == "nixl_push",
    )


def looking_sources(args: RouterArgs) -> list[Source]:
    """Return the sources that look for workers."""
    wanted = {
        Source.KUBERNETES: args.service_discovery or args.inference_pool is not None,
        Source.DISCOVERY_FILE: args.discovery_file is not None,
        Source.DNS: bool(args.discovery_dns),
    }
    return [source for source, on in wanted.items() if on]


def limits(args: RouterArgs) -> Limits:
    """Return the limits on one request."""
    most_body = min(args.max_payload_size, args.max_buffered_request_bytes)
    return Limits(args.max_head_bytes, args.max_header_count, most_body)


def timeouts(args: RouterArgs) -> Timeouts:
    """Return the timeouts of the relay, in seconds."""
    return Timeouts(
        head=args.head_timeout_secs,
        body=args.body_timeout_secs,
        room=args.queue_timeout_secs,
        idle=args.keepalive_timeout_secs,
        request=args.request_timeout_secs,
        first_byte=args.first_byte_timeout_secs,
        chunk=args.chunk_timeout_secs,
        send=args.send_timeout_secs,
    )


def most_connections() -> tuple[int, int]:
    """Return the most connections of the main port and to workers together, and the most of the metrics port.

    The process's file descriptors bound all of them together; some are left for files and health checks. So a flood on
    one port takes nothing from the other.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(16, soft - _SPARE_DESCRIPTORS)
    scrapers = min(_SCRAPERS, most // 4)
    return most - scrapers, scrapers


def short(usual: Timeouts) -> Timeouts:
    """Return the timeouts of the metrics port, which anyone may use: short ones."""
    most = _SCRAPER_SILENCE
    found: Timeouts = msgspec.structs.replace(
        usual, head=min(usual.head, most), body=min(usual.body, most), idle=min(usual.idle, most)
    )
    return found
