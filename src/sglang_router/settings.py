"""What the options mean for each part: rules, limits and times, made of a router's arguments.

Files of keys and certificates are read here, too, and the process's limit on descriptors.
"""

from __future__ import annotations

import logging
import resource
from typing import TYPE_CHECKING

from sglang_router.config import keys
from sglang_router.core.access import Access
from sglang_router.core.admission import Admission, AdmissionRules
from sglang_router.core.outliers import OutlierRules
from sglang_router.core.policies import PolicySettings
from sglang_router.core.resume import ResumeRules
from sglang_router.core.router import RetryRules
from sglang_router.core.worker import BreakerRules, HealthRules
from sglang_router.net.service import Timeouts
from sglang_router.net.tls import TLSFiles, server_files, worker_files
from sglang_router.wire.request import Limits

if TYPE_CHECKING:
    from sglang_router.config import RouterArgs
    from sglang_router.net.relay import Relay

log = logging.getLogger("sglang_router")

_SPARE_DESCRIPTORS = 64


def policy_settings(args: RouterArgs) -> PolicySettings:
    return PolicySettings(
        cache_threshold=args.cache_threshold,
        balance_abs_threshold=args.balance_abs_threshold,
        balance_rel_threshold=args.balance_rel_threshold,
        max_tree_size=args.max_tree_size,
        max_idle=args.max_idle_secs,
        assignment_mode=args.assignment_mode,
        prefix_hash_bytes=args.prefix_hash_bytes,
        hash_load_factor=args.hash_load_factor,
    )


def breaker_rules(args: RouterArgs) -> BreakerRules:
    return BreakerRules(
        threshold=args.cb_failure_threshold or args.max_worker_retries + 1,
        successes=args.cb_success_threshold,
        timeout=args.cb_timeout_duration_secs,
        max_timeout=max(args.cb_timeout_duration_secs, args.cb_max_timeout_duration_secs),
        enabled=not args.disable_circuit_breaker,
    )


def retry_rules(args: RouterArgs) -> RetryRules:
    return RetryRules(
        per_worker=args.max_worker_retries,
        total=args.max_total_retries,
        initial_backoff=args.retry_initial_backoff_ms / 1000,
        max_backoff=args.retry_max_backoff_ms / 1000,
        multiplier=args.retry_backoff_multiplier,
        jitter=args.retry_jitter_factor,
    )


def access_rules(args: RouterArgs) -> Access:
    ring = keys.load(args.api_key, args.api_key_file, args.control_plane_api_keys, args.control_plane_api_keys_file)
    for warning in ring.warnings:
        log.warning(warning)
    return Access(ring.client, ring.control, open=args.control_plane_open)


def server_tls(args: RouterArgs) -> TLSFiles | None:
    if args.server_cert_path is None or args.server_key_path is None:
        return None
    return server_files(args.server_cert_path, args.server_key_path)


def worker_tls(args: RouterArgs) -> TLSFiles | None:
    """None for the usual, which is worked out when there is an https worker."""
    if not args.ca_cert_paths and args.client_cert_path is None:
        return None
    return worker_files(args.ca_cert_paths, args.client_cert_path, args.client_key_path)


def outlier_rules(args: RouterArgs) -> OutlierRules:
    return OutlierRules(
        window=args.outlier_window_secs,
        failure_rate=args.outlier_failure_rate,
        latency_factor=args.outlier_latency_factor,
        ejection=args.outlier_ejection_secs,
        max_ejection=args.outlier_ejection_secs * 10,
    )


def resume_rules(args: RouterArgs) -> ResumeRules:
    return ResumeRules(args.resume_max_bytes, args.resume_nonzero_temperature)


def admission_rules(args: RouterArgs) -> Admission[Relay] | None:
    """The limits on places and rate; None without any, which costs a request nothing."""
    most = args.max_concurrent_requests
    rate = args.rate_limit_tokens_per_second
    if most < 1 and not rate:
        return None
    return Admission(
        AdmissionRules(
            max_concurrent=most if most > 0 else None,
            queue_size=args.queue_size,
            rate=rate or None,
        )
    )


def health_rules(args: RouterArgs) -> HealthRules:
    """The health checks of workers that name none of their own."""
    return HealthRules(
        failure_threshold=args.health_failure_threshold,
        success_threshold=args.health_success_threshold,
        interval=args.health_check_interval_secs,
        timeout=args.health_check_timeout_secs,
        endpoint=args.health_check_endpoint,
        enabled=not args.disable_health_check,
    )


def limits(args: RouterArgs) -> Limits:
    return Limits(args.max_head_bytes, args.max_header_count, args.max_payload_size)


def timeouts(args: RouterArgs) -> Timeouts:
    return Timeouts(
        head=args.head_timeout_secs,
        body=args.body_timeout_secs,
        idle=args.keepalive_timeout_secs,
        request=args.request_timeout_secs,
        queue=args.queue_timeout_secs,
        first_byte=args.first_byte_timeout_secs,
        chunk=args.chunk_timeout_secs,
        starting=args.autoscale_wake_timeout_secs if args.scales_to_zero else args.startup_wait_secs,
    )


def most_connections() -> int:
    """Of clients and to workers, so that some descriptors are left for files, checks and farewells."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft - _SPARE_DESCRIPTORS)
