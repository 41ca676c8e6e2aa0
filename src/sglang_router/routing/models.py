"""Which models the fleet serves: where a worker belongs by the names that it announces, and who may serve a name.

    announced            pool       gets requests for
    A                    main       A
    A, adapter x         main       A, x
    B                    "B"        B
    nothing              main       any name that nobody announces

As long as all workers that announce names have one in common, the fleet serves one model: there is one pool, and a
request goes to any worker, whatever name it has, because the engine decides (vLLM refuses a name that it does not know,
SGLang and llama.cpp serve it). Only a name that some workers announce and others do not (an adapter) goes to these.

With several models, workers that share a name are one pool, and a request without a model (400) or with one that
nobody serves (404) is refused. The first model's pool is the main one: its workers stay where they are and keep what
the policy remembers of them when a second model comes.

A name counts from the time it is announced until its last worker is removed or announces another: a model whose workers
are all down or starting again is unavailable, not unknown.

Workers with the same names are one *profile*, and there are few of them, however many workers there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from sglang_router.errors import ModelNotFound, ModelRequired, RouterError, Unavailable, WorkersStarting
from sglang_router.routing.candidates import Candidates, candidates_of
from sglang_router.routing.model_names import Names, joined, text_of
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.standing import standing
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker

_SHOWN_NAMES: Final = 10
_SHOWN_CHARACTERS: Final = 100
_MAIN: Final = b""
_BASES, _ADAPTERS = 0, 1  # fields of `Names`
_RETRY_AFTER: Final = 5.0
"""Retry-After in seconds: nothing better is known."""


class Serving(Protocol):
    """The workers that may serve a request, as the router sees them: a pool, or a section of one.

    policy   chooses one of the candidates
    workers  in order of registration
    """

    @property
    def policy(self) -> Policy: ...
    @property
    def workers(self) -> list[Worker]: ...

    def __hash__(self) -> int: ...

    def candidates(self, now: float) -> Candidates:
        """Return the workers that may take a request now."""

    def able(self, now: float) -> Candidates:
        """Return the candidates and the workers left out only for their load."""

    def unavailable(self, now: float) -> Unavailable:
        """Return the error that says why there are no candidates, and when to retry."""


class Whole(Serving, Protocol):
    """A pool, as its sections see it.

    refreshed  increases when the state of a worker may have changed
    """

    @property
    def refreshed(self) -> int: ...

    def has_room(self, worker: Worker) -> bool:
        """Return whether a worker is below the most load that one may have."""


class Section:
    """The workers of a pool that serve one name, while others of the pool do not.

    That at most half of them are judged out holds for a section too: others of the pool are no help to its requests.
    """

    __slots__ = ("_mine", "_pool", "_refreshed", "_set", "_spared", "workers")

    def __init__(self, pool: Whole, workers: list[Worker]) -> None:
        self._pool = pool
        self.workers = sorted(workers, key=lambda worker: worker.order)
        self._refreshed = -1  # `pool.refreshed` for which the next two were found
        self._set = 0  # the able workers of the section
        self._spared: list[Worker] = []  # judged out in the pool, but not in the section
        self._mine: Candidates | None = None  # those seen last; the same object until they change

    def __repr__(self) -> str:
        return f"<Section {len(self.workers)} workers of {self._pool!r}>"

    @property
    def policy(self) -> Policy:
        """The policy of the pool."""
        return self._pool.policy

    def candidates(self, now: float) -> Candidates:
        """Return those of the pool's candidates that serve the name."""
        found = self._pool.candidates(now)
        spared = self._spare(now)
        return self._those(found, [*filter(self._pool.has_room, spared)] if spared else spared)

    def able(self, now: float) -> Candidates:
        """Return those of the pool's able workers that serve the name."""
        return self._those(self._pool.able(now), self._spare(now))

    def _spare(self, now: float) -> list[Worker]:
        """Return the workers that are judged out in the pool, but not in the section. Call it after the pool."""
        if self._refreshed != self._pool.refreshed:
            able = self._pool.able(now)
            self._refreshed = self._pool.refreshed
            self._mine = None
            self._set = able.set_of(self.workers)
            self._spared = [w for w in standing(self.workers, Health.HEALTHY) if w not in able]
        return self._spared

    def _those(self, found: Candidates, spared: list[Worker]) -> Candidates:
        """Return those of the pool that are of this section, and the others of the section. Call it after `_spare`."""
        if spared:
            return candidates_of([*found.those(self._set), *spared])
        mine = self._mine
        if mine is None or mine.mask != found.mask & self._set:
            self._mine = mine = found.those(self._set)
        return mine

    def unavailable(self, now: float) -> Unavailable:
        """Return the pool's reason, unless that is the reason of other workers."""
        rotation = [worker for worker in self.workers if worker.in_rotation]
        starting = all(worker.health is Health.STARTING for worker in rotation)
        if rotation and starting and not all(worker.hopeless for worker in rotation):
            return WorkersStarting(retry_after=_RETRY_AFTER)
        if self.able(now) or not self._pool.able(now):
            return self._pool.unavailable(now)
        return Unavailable(retry_after=_RETRY_AFTER)


class ServedModels:
    """See the module.

    several  the fleet serves several models, so that a request must name one of them
    mixed    there are workers with different names, so that not every worker may get every request
    known    the announced names, by their JSON text
    aliases  what an operator calls models besides, see `routing.naming`
    """

    def __init__(self) -> None:
        self.several = False
        self.mixed = False
        self.known: dict[str, str] = {}
        self.aliases: Mapping[str, str] = {}
        self._profile_of: dict[Worker, Names] = {}
        self._workers: dict[Names, dict[Worker, None]] = {}  # by profile
        self._keys: dict[Names, bytes] = {}  # the pool of each profile with names
        self._main = _MAIN

    def __repr__(self) -> str:
        return f"<ServedModels {', '.join(self.known.values()) or 'unknown'}{', several' * self.several}>"

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._profile_of)

    # -- what workers announce ---------------------------------------------------------------------------------------

    def note(self, worker: Worker) -> bool:
        """Take note of a worker's names; return whether others may belong elsewhere now, or get other requests."""
        new, old = worker.names, self._profile_of.get(worker)
        if new == old:
            return False
        changed = new not in self._workers
        self._profile_of[worker] = new
        self._workers.setdefault(new, {})[worker] = None
        if old is not None:
            changed |= self._leave(worker, old)
        if changed:
            self._group()
        return changed or self.mixed

    def forget(self, worker: Worker) -> bool:
        """Forget a worker that is removed; return what `note` returns."""
        changed = self._leave(worker, self._profile_of.pop(worker))
        if changed:
            self._group()
        return changed or self.mixed

    def _leave(self, worker: Worker, profile: Names) -> bool:
        """Take a worker out of a profile; return whether it was the last one."""
        rest = self._workers[profile]
        del rest[worker]
        if not rest:
            del self._workers[profile]
        return not rest

    # -- where a worker belongs --------------------------------------------------------------------------------------

    def pool_of(self, worker: Worker) -> bytes:
        """Return the key of the pool to which a worker belongs."""
        return self._keys.get(worker.names, self._main)

    def _group(self) -> None:
        """Find out again which profiles belong together. A group keeps its key as long as one of its profiles stays."""
        named = [profile for profile in self._workers if profile.bases]
        self.mixed = len(named) > 1
        self.several = self.mixed and not set(named[0].bases).intersection(*(each.bases for each in named[1:]))
        self.known.clear()
        self.known.update((text_of(name).decode(), name) for each in named for name in (*each.bases, *each.adapters))
        keys: dict[Names, bytes] = {}
        taken: set[bytes] = set()
        uses = Counter(key for profile, key in self._keys.items() if profile in self._workers)
        for group in _groups(named) if self.several else [named] * bool(named):
            key = self._key(group, taken, uses)
            taken.add(key)
            keys |= dict.fromkeys(group, key)
        self._keys = keys
        if keys and self._main not in keys.values():
            self._main = keys[named[0]]

    def _key(self, group: list[Names], taken: set[bytes], uses: Counter[bytes]) -> bytes:
        """Return the key of a group.

        taken  the keys of other groups
        uses   how many of the present profiles had each key until now
        """
        kept = [self._keys[each] for each in group if each in self._keys]
        for key in kept:
            if key not in taken:
                return key
        mine = Counter(kept)
        for key in (self._main, *(text_of(name) for each in group for name in each.bases)):
            if key not in taken and uses[key] == mine[key]:  # no other group has it
                return key
        return max((*taken, *uses), key=len) + b"'"

    # -- who may serve a request -------------------------------------------------------------------------------------

    def by_name(self) -> dict[bytes, list[Worker]]:
        """Return the workers that may serve each announced name; those come first that say it is their model's."""
        found: dict[bytes, list[Worker]] = {}
        for names in (_BASES, _ADAPTERS):
            for profile, workers in self._workers.items():
                for name in profile[names]:
                    found.setdefault(text_of(name), []).extend(workers)
        for text, those in self._with_adapters().items():
            found.setdefault(text, those)
        if not self.several:
            for serving in found.values():
                serving += self.nameless()
        return found

    def _with_adapters(self) -> dict[bytes, list[Worker]]:
        """Return the workers that have an adapter loaded, by "model:adapter", as SGLang calls the two."""
        found: dict[bytes, list[Worker]] = {}
        for profile, workers in self._workers.items():
            for adapter in profile.adapters:
                for base in profile.bases:
                    found.setdefault(joined(text_of(base), text_of(adapter)), []).extend(workers)
        return found

    def nameless(self) -> list[Worker]:
        """Return the workers that announce nothing."""
        return [worker for profile, workers in self._workers.items() if not profile.bases for worker in workers]

    def refusal(self, model: bytes, hint: str = "") -> RouterError:
        """Return the error for a request for which there is no worker: without a model, or with an unknown one.

        hint  how to name a model, where that is not the field of the body
        """
        names = sorted({*self.known.values(), *self.aliases})
        shown = ", ".join(name[:_SHOWN_CHARACTERS] for name in names[:_SHOWN_NAMES])
        if len(names) > _SHOWN_NAMES:
            shown += f" and {len(names) - _SHOWN_NAMES} more"
        if not model:
            return ModelRequired(f"The request names no model. This router serves {shown}.{hint}", param="model")
        wanted = model.decode("utf-8", "replace")
        wanted = wanted if len(wanted) <= _SHOWN_CHARACTERS else wanted[:_SHOWN_CHARACTERS] + "..."
        return ModelNotFound(f"No worker serves the model {wanted}. This router serves {shown}.", param="model")


def _groups(profiles: list[Names]) -> list[list[Names]]:
    """Divide profiles into groups that share no name of a model, in the order of their first ones."""
    group_of: dict[str, list[Names]] = {}
    for profile in profiles:
        joined = {id(group_of[name]): group_of[name] for name in profile.bases if name in group_of}
        group, *others = joined.values() or ([],)
        new = [profile, *(each for other in others for each in other)]
        group += new
        group_of.update((name, group) for each in new for name in each.bases)
    groups = {id(group): group for group in group_of.values()}.values()
    order = {profile: place for place, profile in enumerate(profiles)}
    return sorted((sorted(group, key=order.__getitem__) for group in groups), key=lambda each: order[each[0]])
