"""Apply what the options say of single models: names, and policies of their own. At the start, and at SIGHUP.

    use_models(args, router, tailor)
      names     aliases, fallbacks, strictness            --> routing.naming
      policies  settings of models, labels of workers     --> routing.pools, by a `Tailor`
      limits    settings of models                        --> routing.quotas

With --enable-igw, the label `policy` of a worker sets the policy of its model, as in the reference router: the first
label among the model's workers decides, and counts until the last of them is removed. Settings in the file, or of
--models, come before it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

from sglang_router.app import settings
from sglang_router.app.deciding import in_shadow
from sglang_router.config import RouterArgs
from sglang_router.config.key_files import KeyTerms
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.model_names import text_of
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.policies.shadowed import ShadowTally
from sglang_router.routing.pools import Pools
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.router import Router
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker

log = logging.getLogger("sglang_router")

Dress = Callable[[Policy], Policy]
"""Puts a policy into what surrounds all of them: the shadow of another one."""
_LABEL: Final = "policy"
_SIZES: Final = ("max_tree_size", "prefix_hash_bytes", "assignment_mode")
"""Settings of policies for which they are made anew."""
Rule = tuple[str, str, PolicySettings]
"""Who says so (FILE or LABEL), the policy's name, and its options."""
_FILE, _HINT = "file", "label"


class ModelPolicies:
    """The policies of models: a `routing.pools.Tailor`. Owner of what is in effect: `use`."""

    def __init__(self, rng: random.Random, caches: KVCaches | None, dress: Dress) -> None:
        self._rng = rng
        self._caches = caches
        self._dress = dress
        self._usual: tuple[str, PolicySettings] | None = None
        self._rules: dict[str, Rule] = {}  # by model
        self._hints = False
        self._unknown: set[str] = set()  # names of policies in labels that were warned of

    def __repr__(self) -> str:
        return f"<ModelPolicies of {', '.join(self._rules) or 'no model'}>"

    def use(self, args: RouterArgs) -> bool:
        """Use these options from now on; return whether any model may have a policy of its own."""
        self._usual = (args.policy, settings.policy_settings(args, self._caches))
        self._hints = args.enable_igw
        self._rules = {
            name: self._rule(args, each.policy_options)
            for name, each in args.model_table().settings.items()
            if each.policy_options
        }
        return bool(self._rules or self._hints)

    def _rule(self, args: RouterArgs, own: Mapping[str, Any]) -> Rule:
        return (_FILE, own.get("policy", args.policy), settings.policy_settings(args, self._caches, own))

    def rule_of(self, workers: list[Worker], rule: Hashable) -> Hashable:
        """Return which rule is for a pool of these workers; see `routing.pools.Tailor`."""
        if self._rules:
            for names in dict.fromkeys(worker.names for worker in workers):
                for name in names.bases:
                    if name in self._rules:
                        return self._rules[name]
        if not self._hints or self._usual is None:
            return None
        if isinstance(rule, tuple) and rule[0] == _HINT and workers:
            return rule
        hint = next((name for worker in workers if (name := self._hint(worker))), "")
        return (_HINT, hint, self._usual[1]) if hint and hint != self._usual[0] else None

    def _hint(self, worker: Worker) -> str:
        """Return the policy that a worker's label names; "" without one."""
        name = worker.spec.labels.get(_LABEL, "").lower().replace("-", "_")
        if name and name not in POLICIES and name not in self._unknown and len(self._unknown) < 16:
            self._unknown.add(name)
            log.warning("%s: its label names the policy %r, which is none of %s", worker.url, name, ", ".join(POLICIES))
        return name if name in POLICIES else ""

    def make(self, rule: Hashable) -> Policy:
        """Return a new policy for a rule."""
        assert isinstance(rule, tuple)
        _, name, rules = rule
        return self._dress(POLICIES[name](rules, self._rng))

    def adjust(self, policy: Policy, old: Hashable, new: Hashable) -> bool:
        """Let a policy follow another rule, if only thresholds differ; return whether it does."""
        assert isinstance(old, tuple)
        assert isinstance(new, tuple)
        (_, was, before), (_, name, rules) = old, new
        if name != was or any(getattr(before, size) != getattr(rules, size) for size in _SIZES):
            return False
        policy.adjust(rules)
        return True


def use_models(args: RouterArgs, router: Router, policies: ModelPolicies) -> None:
    """Let names and policies be as the options say, from now on."""
    table = args.model_table()
    pools = router.fleet.pools
    if table.aliases or table.fallbacks or args.enable_igw or router.naming.on:
        router.naming.use(table.aliases, table.fallbacks, args.enable_igw)
    if policies.use(args) or pools.tailor is not None:
        pools.refit(policies)
        if router.recorder is not None:
            router.recorder.policy_of = worker_policy(router.fleet)
    limited = {text_of(name): each.terms for name, each in table.settings.items() if each.terms != KeyTerms()}
    aliases = {text_of(alias): text_of(name) for alias, name in table.aliases.items()}
    router.quotas.use_models({name: settings.model_rules(terms) for name, terms in limited.items()}, aliases)


def models_of(
    args: RouterArgs, router: Router, rng: random.Random, caches: KVCaches | None, shadows: ShadowTally | None
) -> ModelPolicies:
    """Make what chooses the policies of models, and let names and policies be as the options say.

    caches   what workers say of their KV caches; None: they are not asked
    shadows  counts what policies in the shadow say; None: there are none
    """
    policies = ModelPolicies(rng, caches, lambda policy: policy if shadows is None else in_shadow(policy, shadows))
    use_models(args, router, policies)
    return policies


def policy_of(pools: Pools) -> Callable[[str], str]:
    """Return what tells the policy of a model by the model's name; "" for the usual one."""

    def name(model: str) -> str:
        return "" if pools.tailor is None else pools.find(text_of(model)).policy.label

    return name


def worker_policy(fleet: Fleet) -> Callable[[str], str]:
    """Return what tells the policy that chooses a worker, by the worker's name; "" for the usual one."""

    def name(worker: str) -> str:
        found = None if fleet.pools.tailor is None else fleet.by_url(worker)
        return "" if found is None else fleet.pools.of(found).policy.label

    return name
