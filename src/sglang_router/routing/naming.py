"""Names that an operator gives to models: aliases, and models that stand in for others.

    a request names      model that serves
    an alias             the model of the alias; "alias:adapter" is "model:adapter"
    a model with         that model while one of its workers can take requests (one that is full can: the request
    fallbacks            waits), else the first of its fallbacks of which that is true; else the model's own error

    resolve(facts)          replaces an alias by its model
    fallbacks(facts)        says which models stand in for it; `Assignment.instead` takes one of them
    dress(leg, worker, ..)  says what the leg's body names: an engine refuses a name that it does not know

The request keeps the name that serves it: a retry, the continuation of a broken stream and its prefixes are of that
model. What the client wrote stays in `Facts.asked`, and in the body as long as the engine knows it.

A worker that an operator has given a name (`model_id`) that its engine does not announce is an alias, too: its engine
gets its own name.
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_router.routing.facts import Facts
from sglang_router.routing.keys import bounded
from sglang_router.routing.model_names import LONGEST_TEXT, base_of, text_of
from sglang_router.routing.models import Serving
from sglang_router.routing.plan import PlannedLeg
from sglang_router.routing.pools import Pools
from sglang_router.routing.roles import REGULAR
from sglang_router.routing.worker import Worker


class Naming:
    """See the module.

    on       there are aliases or fallbacks
    aliases  the model of each alias; labels: the aliases by their JSON text; the same objects for ever
    """

    __slots__ = ("_fallbacks", "_models", "_pools", "aliases", "labels", "on")

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.on = False
        self.aliases: dict[str, str] = {}
        self.labels: dict[str, str] = {}
        self._models: dict[bytes, bytes] = {}  # the same as JSON text
        self._fallbacks: dict[bytes, tuple[bytes, ...]] = {}
        pools.models.aliases = self.aliases

    def __repr__(self) -> str:
        return f"<Naming {len(self.aliases)} aliases, {len(self._fallbacks)} models with fallbacks>"

    def use(self, aliases: Mapping[str, str], fallbacks: Mapping[str, tuple[str, ...]], strict: bool) -> None:
        """Use these names from now on.

        aliases    the model of each alias, which is no alias itself
        fallbacks  what stands in for each model, in this order
        strict     a model that no worker announces is unknown also while the fleet serves only one model
        """
        self.aliases.clear()
        self.aliases.update(aliases)
        self.labels.clear()
        self.labels.update((text_of(alias).decode(), alias) for alias in aliases)
        self._models = {text_of(alias): text_of(model) for alias, model in aliases.items()}
        self._fallbacks = {text_of(model): tuple(map(text_of, others)) for model, others in fallbacks.items()}
        self.on = bool(aliases or fallbacks)
        self._pools.look_at_names(self.on, strict)

    def resolve(self, facts: Facts) -> None:
        """Replace an alias by its model. Doing it again changes nothing."""
        model = facts.model
        found = self._models.get(model)
        if found is None and len(model) < LONGEST_TEXT and (base := base_of(model)):  # a longer text is cut
            found = self._models.get(base)
            if found is not None:
                found = found[:-1] + model[len(base) - 1 :]
        if found is not None:
            rename(facts, found)

    def find(self, facts: Facts, role: str = REGULAR) -> Serving:
        """Return who serves the model of a request in a role, after an alias was replaced."""
        self.resolve(facts)
        return self._pools.find(facts.model, role, adapter_of(facts), facts.model in self._fallbacks)

    def fallbacks(self, facts: Facts) -> tuple[bytes, ...]:
        """Return the models that stand in for that of a request, the first choice first."""
        return self._fallbacks.get(facts.model, ())


def adapter_of(facts: Facts) -> bytes:
    """Return the adapter that SGLang's field `lora_path` names, JSON text; b"" without one."""
    return facts.division.partition(b"\0")[0] if facts.division else b""


def rename(facts: Facts, model: bytes) -> None:
    """Let another model serve a request: its prefixes are those of that model. model: JSON text."""
    facts.asked = facts.asked or facts.model
    facts.model = model
    facts.namespace = bounded(b"%b\0%b" % (model, facts.division) if facts.division else model)


def keep_name(facts: Facts, before: Facts) -> None:
    """Let the model that served a request serve the rest of it. before: the facts at its last attempt."""
    if before.asked and facts is not before:
        rename(facts, before.model)


def dress(leg: PlannedLeg, worker: Worker, facts: Facts) -> None:
    """Say how the body of a leg differs from the client's: its members, and the model that it names."""
    if facts.endpoint.json:  # nothing is added to other bodies
        leg.splice = worker.splice
    if facts.model:
        asked = facts.asked or facts.model
        spoken = worker.spoken(asked, facts.model)
        if spoken != asked:
            leg.model = spoken
