"""Who may serve a request where workers do one half of it each.

    what                                       goes to
    embeddings and the like                    regular workers; without them, prefill workers
    more than one answer of a prompt           regular workers; without them, a decode worker alone (vLLM), or 400
    a list of prompts, vLLM                    a decode worker alone: only one prompt is handed over
    a short prompt                             regular workers; without them, a decode worker alone (vLLM)
    anything, and no pair is whole             regular workers, if there are any
    all else                                   the pair

A decode worker of vLLM computes a prompt itself when nothing is handed over. One of SGLang refuses what has no room. So
only regular workers can spare an SGLang pair.
"""

from __future__ import annotations

from sglang_router.errors import RouterError, SeveralAnswers, WebSocketUnserved
from sglang_router.routing import sequences
from sglang_router.routing.batches import batch_size
from sglang_router.routing.facts import Facts
from sglang_router.routing.imprint import Imprint
from sglang_router.routing.models import Serving
from sglang_router.routing.naming import Naming
from sglang_router.routing.pair import ServingPair
from sglang_router.routing.pools import Pools
from sglang_router.routing.roles import DECODE, PREFILL
from sglang_router.routing.rules import PairRules
from sglang_router.routing.transfer import NIXL, SGLANG, hands_off
from sglang_router.routing.worker import Worker


class Pairs:
    """See the module. rules: when a pair is spared, and how workers hand over."""

    __slots__ = ("_found", "_naming", "_pools", "_seen", "rules")

    def __init__(self, pools: Pools, naming: Naming) -> None:
        self.rules = PairRules()
        self._pools = pools
        self._naming = naming
        self._found: dict[tuple[Serving, Serving], ServingPair] = {}
        self._seen = -1  # the version of the pools to which they belong

    def __repr__(self) -> str:
        return f"<Pairs {list(self._found.values())}>"

    def serving(self, facts: Facts) -> Serving:
        """Return who serves a request; `Pools.nobody` where nobody can, see `refusal`."""
        pools, find = self._pools, self._naming.find
        regular, prefill, decode = find(facts), find(facts, PREFILL), find(facts, DECODE)
        if not (prefill.workers or decode.workers):
            return regular
        if facts.endpoint.tunnel:
            alone = self.connector_of(self._pair(prefill, decode)) == NIXL
            return regular if regular.workers else decode if alone and decode.workers else pools.nobody
        if not facts.endpoint.generates:
            return regular if regular.workers else prefill if prefill.workers else decode
        prompts = batch_size(facts)
        pair = self._pair(prefill, decode)
        if regular.workers and (not pair.is_whole or self.is_short(facts, 0, regular.workers[0])):
            return regular
        alone = self.connector_of(pair) == NIXL
        if wants_several(facts):
            return regular if regular.workers else decode if alone else pools.nobody
        if alone and (not hands_off(facts.endpoint.name) or prompts):
            return decode
        if alone and decode.workers and not regular.workers and self.is_short(facts, 0, decode.workers[0]):
            return decode
        return ServingPair(prefill, decode, prompts) if prompts > 1 else pair

    def refusal(self, facts: Facts) -> RouterError | None:
        """Return the error for a request that nobody can serve although there are pairs of its model."""
        tunnel = facts.endpoint.tunnel
        if not tunnel and not (facts.endpoint.generates and wants_several(facts)):
            return None
        find = self._naming.find
        if not find(facts, PREFILL).workers and not find(facts, DECODE).workers:
            return None
        return WebSocketUnserved() if tunnel else SeveralAnswers(param="n")

    def _pair(self, prefill: Serving, decode: Serving) -> ServingPair:
        if self._seen != self._pools.version:
            self._seen = self._pools.version
            self._found.clear()
        pair = self._found.get((prefill, decode))
        if pair is None:
            pair = self._found[prefill, decode] = ServingPair(prefill, decode)
        return pair

    def connector_of(self, pair: ServingPair) -> str:
        """Return how the workers of a pair hand over what was computed: NIXL or SGLANG."""
        if self.rules.connector:
            return self.rules.connector
        for half in (pair.prefill, pair.decode):
            for worker in half.workers:  # of one that was never asked nothing is known
                runtime = worker.spec.runtime or worker.report.runtime
                if runtime or worker.report.version:
                    return NIXL if runtime == "vllm" else SGLANG
        return SGLANG

    def is_short(self, facts: Facts, cached: int, worker: Worker) -> bool:
        """Return whether the part of a prompt that is not cached is too short for a pair, in tokens of a worker.

        cached  bytes of the routing text that are
        """
        most = self.rules.uncached_tokens
        return most > 0 and len(facts.text) - cached <= most * worker.tokens.rate.bytes_per_token


def wants_several(facts: Facts) -> bool:
    """Return whether a request wants several answers of a prompt; read once, and only where there are pairs."""
    found = facts.sequences
    if not found:
        body = facts.body
        found = facts.sequences = 1 if isinstance(body, Imprint) else sequences.of(body)
    return found > 1
