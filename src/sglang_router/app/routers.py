"""What decides where requests go: the fleet with its pools and policies, and the router. Built from the options.

`app.build` connects them with the relay and the workers' checks, `replay` with simulated engines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from sglang_router.app import settings
from sglang_router.app.deciding import in_shadow
from sglang_router.config import RouterArgs
from sglang_router.routing.events import Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.policies.shadowed import ShadowTally
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.queue import Queue
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.roles import DECODE, PREFILL
from sglang_router.routing.router import Router, Soon
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker

MakePolicy = Callable[[], Policy]


class PolicyParts(NamedTuple):
    """What policies are made with beside the options; see `fleet_of`."""

    rng: random.Random
    shadows: ShadowTally | None = None
    caches: KVCaches | None = None


def fleet_of(
    args: RouterArgs,
    listeners: Listeners,
    new_id: Callable[[], str],
    rng: random.Random,
    kind: type[Policy] | None = None,
    shadows: ShadowTally | None = None,
    caches: KVCaches | None = None,
) -> Fleet:
    """Make a fleet without workers.

    kind     the class of its policies; None: the one that the options name
    shadows  counts what the policies in the shadow say; None: there are none
    caches   what workers say of their KV caches; None: they are not asked
    """
    make, roles = usual_policies(args, PolicyParts(rng, shadows, caches), kind)
    fleet = Fleet(listeners, new_id, make, settings.fleet_rules(args))
    fleet.pools.policies = roles
    return fleet


def usual_policies(
    args: RouterArgs, parts: PolicyParts, kind: type[Policy] | None = None
) -> tuple[MakePolicy, dict[str, MakePolicy]]:
    """Return what makes the policies of pools, and what makes those of single roles. kind: see `fleet_of`."""
    rng, shadows = parts.rng, parts.shadows
    rules = settings.policy_settings(args, parts.caches)
    make = partial(_policy, rules, rng, kind or POLICIES[args.policy], shadows)
    named = {PREFILL: args.prefill_policy, DECODE: args.decode_policy}
    roles = {role: partial(_policy, rules, rng, POLICIES[name], shadows) for role, name in named.items() if name}
    return make, dict[str, MakePolicy](roles)


def _policy(rules: PolicySettings, rng: random.Random, kind: type[Policy], shadows: ShadowTally | None) -> Policy:
    """Make the policy of a pool."""
    policy = kind(rules, rng)
    return policy if shadows is None else in_shadow(policy, shadows)


def router_of(
    args: RouterArgs,
    fleet: Fleet,
    listeners: Listeners,
    rng: random.Random,
    soon: Soon,
    check_now: Callable[[Worker], None],
) -> Router:
    """Make the router of a fleet. Add it to the listeners."""
    router = Router(
        fleet,
        Queue(settings.queue_rules(args)),
        listeners,
        settings.retry_rules(args),
        RetryBudget(settings.retry_budget_rules(args)),
        rng,
        soon,
        check_now,
    )
    router.sessions = settings.sessions(args)
    router.pairs.rules = settings.pair_rules(args)
    return router
