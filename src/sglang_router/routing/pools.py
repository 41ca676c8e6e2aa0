"""Pools: the workers that can serve one model in one role, with their candidates, their policy and its memory.

    Fleet   -- place, remove, changed -->  Pools  --  PoolKey(model, role)  -->  Pool
    Router  -- only, find ------------->                                          |-- candidates(now)
                                                                                  |-- policy, its memory
                                                                                  '-- outliers

Which pool a worker belongs to follows from the names of models that the fleet's workers announce (`routing.models`), or
is said by `assign`, a function given at construction. Pools are made when a worker needs one and closed when their last
worker has left.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator
from typing import Protocol

import msgspec

from sglang_router.errors import RouterError
from sglang_router.routing.models import ServedModels, Serving
from sglang_router.routing.named import NamedWorkers
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.pool import Pool, PoolKey
from sglang_router.routing.roles import REGULAR
from sglang_router.routing.rules import FleetRules, PolicySettings
from sglang_router.routing.worker import Worker


class Tailor(Protocol):
    """Chooses the policies of pools, where models have policies of their own."""

    def rule_of(self, workers: list[Worker], rule: Hashable) -> Hashable:
        """Return which rule is for a pool of these workers; None: the usual one. rule: the present one."""

    def make(self, rule: Hashable) -> Policy:
        """Return a new policy for a rule, which is not None."""

    def adjust(self, policy: Policy, old: Hashable, new: Hashable) -> bool:
        """Make a policy follow another rule, if it can without forgetting anything; return whether it does now."""


def one_pool(worker: Worker) -> PoolKey:
    """Put all workers in one pool, whatever they announce."""
    return PoolKey()


class Pools:
    """See the module. Iteration gives the pools that have workers, or the default one while there are no workers.

    only     the pool, while there is exactly one and each request may go to each of its workers
    nobody   stands for who serves a request that no pool can serve
    paired   there are workers that do one half of each request: see `routing.pair`
    policies makes the policies of a role; those of others are made by `make_policy`
    default  the pool of the first model, and of workers that belong to no other; it is never closed
    models   the names that workers announce
    tailor   chooses the policies of pools; None: all have the usual one
    version  increases when pools or names change: a request may belong to another pool then
    """

    def __init__(
        self,
        make_policy: Callable[[], Policy],
        rules: FleetRules,
        time_up: Callable[[Pool, float], None],
        assign: Callable[[Worker], PoolKey] | None = None,
    ) -> None:
        self._make_policy = make_policy
        self._rules = rules
        self._time_up = time_up
        self._routers = 1
        self.models = ServedModels()
        self._by_model = assign is None
        self._assign = assign or self._pool_of_model
        self.policies: dict[str, Callable[[], Policy]] = {}
        self.paired = False
        self._names: NamedWorkers | None = None  # who serves each announced name; None: not found out yet
        self._pools: dict[tuple[bytes, str], Pool] = {}  # by PoolKey
        self._of: dict[Worker, Pool] = {}
        self._closing: list[Policy] = []  # without workers; their memory is still to be freed
        self.tailor: Tailor | None = None
        self._renames = self._strict = False
        self.nobody = self._new(PoolKey(role=""))
        self.default = self._open(PoolKey())
        self._used: tuple[Pool, ...] = ()
        self.version = 0
        self.only: Pool | None = None
        self._count()

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._used)

    def __len__(self) -> int:
        return len(self._used)

    def __repr__(self) -> str:
        return f"<Pools {list(self._used)}>"

    def find(self, model: bytes, role: str = REGULAR, adapter: bytes = b"", strict: bool = False) -> Serving:
        """Return who serves a model in a role; something without workers, if nobody does, for which see `refusal`.

        adapter  which workers that have it loaded shall serve, if there are any
        strict   only workers that announce the model, or nothing
        """
        pools, models = self._pools, self.models
        if not self._by_model:
            return pools.get((model, role)) or pools.get((b"", role)) or self.nobody
        if self._names is None:
            self._names = NamedWorkers(models, self._of)
        found = self._names.find(model, role, adapter, models.several)
        if found is None and not (models.several or strict or (model and self._strict and models.known)):
            found = next((pool for pool in self._used if pool.key.role == role), None)
        return found or (self._names.nameless.get(role) if model else None) or self.nobody

    def refusal(self, serving: Serving, model: bytes) -> RouterError | None:
        """Return the error for a request to which `find` gave nobody; None for any other request."""
        known = self._by_model and (self.models.several or (self._strict and bool(self.models.known)))
        return self.models.refusal(model) if known and serving is self.nobody else None

    def of(self, worker: Worker) -> Pool:
        """Return the pool of a registered worker."""
        return self._of[worker]

    def remembered(self, worker: Worker) -> int:
        """Return the bytes of prefixes that a worker is believed to have cached; 0 for one that was removed."""
        pool = self._of.get(worker)
        return pool.remembered(worker) if pool is not None else 0

    # -- for the fleet -----------------------------------------------------------------------------------------------

    def place(self, worker: Worker) -> None:
        """Put a worker into its pool: a new one, or one of which something else is known now."""
        others = self.models.note(worker) and self._by_model
        moved = [self._put(each) for each in (list(self.models) if others else [worker])]
        if others or any(moved):
            self._count(others)

    def amended(self, worker: Worker) -> None:
        """The same for a worker of which an operator says something else now: a name, or a policy."""
        self.place(worker)
        if self.tailor is not None:
            self._fit(self._of[worker], self.tailor)

    def _put(self, worker: Worker) -> bool:
        """Put a worker into its pool; return whether it was not there."""
        key, old = self._assign(worker), self._of.get(worker)
        if old is not None:
            if old.key == key:
                return False
            self._take_out(worker)
        pool = self._pools.get(key) or self._open(key)
        self._of[worker] = pool
        pool.add(worker)
        return True

    def remove(self, worker: Worker) -> None:
        """Remove a worker from its pool, and the pool with its last worker unless it is the default."""
        self._take_out(worker)
        others = self.models.forget(worker) and self._by_model
        for each in list(self.models) if others else ():
            self._put(each)
        self._count(others)

    def _take_out(self, worker: Worker) -> None:
        pool = self._of.pop(worker)
        pool.remove(worker)
        if not pool.workers and pool is not self.default:
            del self._pools[pool.key]
            self._closing.append(pool.policy)

    def _pool_of_model(self, worker: Worker) -> PoolKey:
        return PoolKey(self.models.pool_of(worker), worker.role)

    def changed(self, worker: Worker) -> None:
        """Tell the worker's pool that its state changed; do nothing for a removed one."""
        pool = self._of.get(worker)
        if pool is not None:
            pool.changed(worker)

    def tidy(self, now: float, budget: int) -> bool:
        """Do up to `budget` steps of cleaning the policies' memories; return whether there is more to do."""
        policies = [*(pool.policy for pool in self._pools.values()), *self._closing]
        share = max(1, budget // len(policies))
        busy = [policy for policy in policies if policy.tidy(now, share)]
        # A prefix tree must be emptied before it is dropped: the cyclic collector does not see it.
        self._closing = [policy for policy in self._closing if policy in busy]
        return bool(busy)

    def _open(self, key: PoolKey) -> Pool:
        pool = self._pools[key] = self._new(key)
        return pool

    def _new(self, key: PoolKey) -> Pool:
        pool = Pool(key, self._usual(key), self._rules, self._time_up)
        pool.divide(self._routers)
        return pool

    def _usual(self, key: PoolKey) -> Policy:
        """Return a new policy for a pool of whose models nothing is said."""
        return self.policies.get(key.role, self._make_policy)()

    def _count(self, names_changed: bool = False) -> None:
        used = tuple(pool for pool in self._pools.values() if pool.workers) or (self.default,)
        if self.tailor is not None:
            for pool in used:
                self._fit(pool, self.tailor)
        if used != self._used or names_changed:
            self._used = used
            self._names = None
            self.version += 1
        self.paired = any(pool.key.role != REGULAR for pool in used)
        by_name = self._by_model and (self.models.mixed or self._renames or self._strict)
        chosen_by_name = self.paired or by_name
        self.only = self._used[0] if len(self._used) == 1 and not chosen_by_name else None

    def _fit(self, pool: Pool, tailor: Tailor) -> None:
        """Give a pool the policy that its models have now."""
        rule = tailor.rule_of(pool.workers, pool.rule)
        if rule != pool.rule:
            old, pool.rule = pool.rule, rule
            if old is not None and rule is not None and tailor.adjust(pool.policy, old, rule):
                return
            self._closing.append(pool.use(self._usual(pool.key) if rule is None else tailor.make(rule)))

    # -- for a reload --------------------------------------------------------------------------------------------------

    def adjust(self, settings: PolicySettings) -> None:
        """Let the usual policies follow other settings, without forgetting anything."""
        for pool in self._pools.values():
            if pool.rule is None:
                pool.policy.adjust(settings)

    def use(
        self, make_policy: Callable[[], Policy], roles: dict[str, Callable[[], Policy]], anew: Container[str]
    ) -> None:
        """Let others make the usual policies from now on; see `policies` for `roles`.

        anew  the roles whose pools get a new policy at once; the others keep the ones that they have
        """
        self._make_policy, self.policies = make_policy, roles
        for pool in self._pools.values():
            if pool.rule is None and pool.key.role in anew:
                self._closing.append(pool.use(self._usual(pool.key)))

    def limit(self, most_load: int) -> None:
        """Let each worker have at most so many requests in flight from now on; 0: no limit."""
        self._rules = msgspec.structs.replace(self._rules, most_load=most_load)
        for pool in (self.nobody, *self._pools.values()):
            pool.limit(most_load)

    def divide(self, routers: int) -> None:
        """Let so many routers share the workers from now on, see `Pool.divide`."""
        if routers != self._routers:
            self._routers = routers
            for pool in (self.nobody, *self._pools.values()):
                pool.divide(routers)

    # -- for those who set names and policies ------------------------------------------------------------------------

    def look_at_names(self, renames: bool, strict: bool) -> None:
        """Choose by the name of the model although the fleet serves only one.

        renames  requests may be served under other names, see `routing.naming`
        strict   a model that no worker announces is unknown
        """
        self._renames, self._strict = renames, strict
        self._count(True)

    def refit(self, tailor: Tailor) -> None:
        """Let `tailor` choose the policies of pools from now on."""
        self.tailor = tailor
        self._count(True)
