"""Who serves which name in which role: the pools of a model, or the sections of them that have a name of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from sglang_router.routing.model_names import base_of, joined
from sglang_router.routing.models import Section, ServedModels, Serving, Whole
from sglang_router.routing.worker import Worker

P = TypeVar("P", bound=Whole)


class NamedWorkers:
    """See the module.

    by_name   by role and announced name, JSON text
    nameless  by role: the workers that announce nothing
    """

    __slots__ = ("by_name", "nameless")

    def __init__(self, models: ServedModels, pool_of: Mapping[Worker, P]) -> None:
        self.by_name: dict[str, dict[bytes, Serving]] = {}
        self.nameless: dict[str, Serving] = {}
        for name, serving in models.by_name().items():
            for role, workers in _by_role(serving).items():
                pool = pool_of[workers[0]]
                mine = [worker for worker in workers if pool_of[worker] is pool]
                whole = len(mine) == len(pool.workers)
                self.by_name.setdefault(role, {})[name] = pool if whole else Section(pool, mine)
        for role, workers in _by_role(models.nameless()).items():
            self.nameless[role] = Section(pool_of[workers[0]], workers)

    def __repr__(self) -> str:
        return f"<NamedWorkers {self.by_name}>"

    def find(self, model: bytes, role: str, adapter: bytes, several: bool) -> Serving | None:
        """Return who announces a name, or the model of which it is an adapter, in a role; None: nobody does.

        adapter  which workers that have it loaded shall serve, if there are any
        several  the fleet serves several models
        """
        names = self.by_name.get(role)
        if names is None:
            return None
        found = names.get(model) or names.get(base_of(model))
        if adapter and (found is not None or not model or not several):
            found = names.get(joined(model, adapter)) or found or names.get(adapter)
        return found


def _by_role(workers: Iterable[Worker]) -> dict[str, list[Worker]]:
    """Return the workers of each role."""
    found: dict[str, list[Worker]] = {}
    for worker in workers:
        found.setdefault(worker.role, []).append(worker)
    return found
