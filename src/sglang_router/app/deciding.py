"""Make the parts that keep and compare decisions: see `routing.recorder` and `routing.policies.shadowed`."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

import msgspec

from sglang_router.admin.decision_book import DecisionBook
from sglang_router.config import RouterArgs
from sglang_router.observe.decision_log import DecisionLogWriter, read_key
from sglang_router.observe.deferred import Deferred
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.policies.shadowed import Shadowed, ShadowTally
from sglang_router.routing.recorder import Recorder
from sglang_router.routing.router import Router

Later = Callable[[float, Callable[[], None]], asyncio.TimerHandle]
log = logging.getLogger("sglang_router")


def recorder_of(args: RouterArgs, clock: Callable[[], float]) -> Recorder | None:
    """Make what keeps decisions; None when the options want none."""
    if not (args.decision_records or args.decision_log):
        return None
    every, most_load = args.decision_table_every, args.max_running_per_worker
    return Recorder(args.policy, args.decision_records, every, most_load, lambda: time.time() - clock(), _unexplained)


def book_of(router: Router, deferred: Deferred, clock: Callable[[], float]) -> DecisionBook | None:
    """Make where the control plane reads decisions; None when none are kept."""
    recorder = router.recorder
    if recorder is None or not recorder.most:
        return None
    return DecisionBook(recorder, router.open_leases, deferred.flush, clock)


def open_log(args: RouterArgs, recorder: Recorder | None, later: Later) -> DecisionLogWriter | None:
    """Open the log of decisions; None when the options want none. later: the event loop's `call_later`.

    Raises: ConfigError, when it cannot be opened.
    """
    path = args.decision_log
    if path is None or recorder is None:
        return None
    key = read_key(path)
    opened = DecisionLogWriter(path, args.decision_log_max_bytes, args.decision_log_files, key, later)
    recorder.sink = opened.take
    return opened


def shadows_of(args: RouterArgs) -> ShadowTally | None:
    """Make what sums up the shadow policies of all pools; None when the options want none."""
    return None if args.shadow_policy is None else ShadowTally(args.shadow_policy)


def in_shadow(policy: Policy, tally: ShadowTally) -> Policy:
    """Put a policy into the shadow of another one, or rather the other way round: see `Shadowed`."""
    # A generator of its own: what the shadow draws must not change what the policy draws.
    rng = random.Random(policy.rng.getrandbits(64))
    caches = policy.settings.kv_caches
    settings = msgspec.structs.replace(policy.settings, kv_caches=None if caches is None else caches.for_shadow())
    return Shadowed(policy, POLICIES[tally.policy](settings, rng), tally, _switched_off)


def _switched_off(policy: str, error: Exception) -> None:
    log.error("the shadow policy failed: it is switched off", exc_info=error, extra={"fields": {"policy": policy}})


def _unexplained(error: Exception) -> None:
    log.error("the policy failed to explain a choice: decisions have no tables from now on", exc_info=error)
