"""Passes that are taken at once leave the engine exactly as single ones do."""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.engine.kv import CacheNode, KVCache, pack
from sglang_router.engine.scheduler import (
    BatchLimits,
    BatchStep,
    CostModel,
    EngineRequest,
    EngineScheduler,
    TooLongError,
)
from sglang_router.replay.engine import Gaps, PagedRequest, SimulatedEngine
from sglang_router.replay.load import UNIT, LoadRequest, pages_of

COST = CostModel(prefill_tokens_per_s=1000, decode_base=0.010, decode_per_request=0.001)


class Stepper(EngineScheduler):
    """Knows of no two passes that they are alike."""

    def alike(self) -> int:
        return 0


class Sent(NamedTuple):
    """A request: pages that it shares with the others of its kind, further tokens, tokens of the answer, pause."""

    kind: int
    shared: int
    own: int
    output: int
    pause: float


def asks(sent: list[Sent], page: int) -> list[LoadRequest]:
    at, found = 0.0, []
    for number, one in enumerate(sent):
        at += one.pause
        prompt = one.shared * page + one.own
        pages = pages_of(one.kind, one.shared) + pages_of(100 + number, (one.own + one.output) // page + 1)
        found.append(LoadRequest(number, at, pages, prompt, one.output))
    return found


def tree(node: CacheNode) -> tuple[object, ...]:
    """Return a cache's tree, and which of its nodes are used after which."""
    return node.key, node.locks, sorted((repr(edge), tree(child)) for edge, child in node.children.items())


def order_of_use(cache: KVCache) -> list[bytes]:
    nodes, found = [cache._root], []
    while nodes:
        node = nodes.pop()
        found.append(node)
        nodes += node.children.values()
    return [node.key for node in sorted(found, key=lambda node: (node.used, node.key))]


class Run(NamedTuple):
    firsts: list[tuple[int, float]]
    ends: list[tuple[int, float, int, int]]
    stretched: int
    engine: SimulatedEngine


def run(scheduler: EngineScheduler, load: list[LoadRequest], page: int) -> Run:
    engine = SimulatedEngine("e", scheduler, 1.0, Gaps())
    left, firsts, ends, stretched = list(load), [], [], 0
    while left or engine.due < math.inf:
        if left and left[0].at <= engine.due:
            ask = left.pop(0)
            try:
                engine.submit(PagedRequest(ask, page), ask.at)
            except TooLongError:
                ends.append((ask.number, ask.at, -1, 0))
            continue
        now = engine.due
        stretched += engine._stretch
        first, ended = engine.advance()
        firsts += [(int(request.rid), now) for request in first]
        ends += [(int(request.rid), now, request.cached, request.retractions) for request in ended]
    return Run(firsts, ends, stretched, engine)


def approximately(events: list[tuple[int, float, int, int]] | list[tuple[int, float]]) -> list[tuple[object, ...]]:
    return [(event[0], pytest.approx(event[1], abs=1e-6), *event[2:]) for event in events]


LOADS = st.lists(
    st.builds(
        Sent,
        kind=st.integers(0, 2),
        shared=st.integers(0, 6),
        own=st.integers(1, 70),
        output=st.integers(1, 60),
        # Odd durations: a request that comes exactly at the end of a pass may be seen by it or by the next.
        pause=st.sampled_from([0.0, 0.0071234, 0.0432177, 0.3033311, 2.0199993]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=500, deadline=None)
@given(LOADS, st.sampled_from([1, 4, 16]), st.integers(3, 40), st.integers(1, 5), st.booleans(), st.integers(0, 40))
def test_stretches_are_as_single_passes(
    sent: list[Sent], page: int, capacity: int, running: int, mixed: bool, reserve: int
) -> None:
    """With caches so small that requests queue for slots, are retracted and evict each other's prefixes."""
    limits = BatchLimits(chunk=32, max_running=running, reserve=reserve, mixed=mixed)
    load = asks(sent, page)

    def engine(kind: type[EngineScheduler]) -> EngineScheduler:
        return kind(KVCache(capacity * 16, page, UNIT), COST, limits)

    singly, at_once = run(engine(Stepper), load, page), run(engine(EngineScheduler), load, page)
    assert singly.stretched == 0
    assert at_once.firsts == approximately(singly.firsts)
    assert at_once.ends == approximately(singly.ends)
    one, other = singly.engine.scheduler, at_once.engine.scheduler
    assert other.totals == one.totals
    assert (other.kv.tree, other.kv.private, other.kv.locked, other.kv.evicted) == (
        one.kv.tree,
        one.kv.private,
        one.kv.locked,
        one.kv.evicted,
    )
    assert tree(other.kv._root) == tree(one.kv._root)
    assert order_of_use(other.kv) == order_of_use(one.kv)
    assert at_once.engine.busy == pytest.approx(singly.engine.busy)
    assert at_once.engine.gaps.quantile(0.99) == pytest.approx(singly.engine.gaps.quantile(0.99), abs=2e-4)


class Numbering:
    """Writes tokens that occur nowhere else."""

    def __init__(self, first: int) -> None:
        self.last = first - 1

    def next(self) -> tuple[int, str | None]:
        self.last += 1
        return self.last, None


def in_tokens(one: LoadRequest, shared: int, page: int) -> EngineRequest:
    """Return the same request with a token for each token: those of shared pages, then some of its own."""
    units = array("Q", one.pages[: shared * UNIT]).tolist()
    tokens = [(unit % 1000) * 100_000 + (unit >> 32) * page + n for unit in units for n in range(page)]
    own = (one.number + 1) * 10_000_000
    tokens += range(own, own + one.prompt - len(tokens))
    return EngineRequest(str(one.number), pack(tokens), Numbering(own + 1_000_000), one.output)


@settings(max_examples=150, deadline=None)
@given(LOADS, st.integers(3, 40), st.integers(1, 5))
def test_pages_are_as_tokens(sent: list[Sent], capacity: int, running: int) -> None:
    """An engine that knows pages only finds, evicts and takes as long as one that knows each token."""
    limits, load, page = BatchLimits(chunk=32, max_running=running, reserve=8), asks(sent, 16), 16
    paged = run(Stepper(KVCache(capacity * 16, page, UNIT), COST, limits), load, page)
    engine = EngineScheduler(KVCache(capacity * 16, page), COST, limits)
    left, now, due = list(zip(load, sent, strict=True)), 0.0, math.inf
    step: BatchStep | None = None
    ends: list[tuple[int, float, int, int]] = []
    while left or step is not None:
        if left and left[0][0].at <= due:  # as `SimulatedEngine`: whoever finds the engine idle begins a pass
            one, said = left.pop(0)
            now = one.at
            try:
                engine.submit(in_tokens(one, said.shared, page))
            except TooLongError:
                ends.append((one.number, now, -1, 0))
            if step is not None:
                continue
        elif step is not None:
            now = due
            ends += [(int(done.rid), now, done.cached, done.retractions) for done in step.finished]
        step = engine.step()
        due = math.inf if step is None else now + step.duration
    assert sorted(ends) == sorted(approximately(paged.ends))
    assert (engine.kv.tree, engine.kv.evicted) == (
        paged.engine.scheduler.kv.tree,
        paged.engine.scheduler.kv.evicted,
    )


def test_a_lone_answer_is_one_stretch() -> None:
    """Prefill with the first token, all further tokens but the last at once, and the pass that ends it."""
    engine = SimulatedEngine("e", EngineScheduler(KVCache(1600, 16, UNIT), COST), 2.0, Gaps())
    engine.submit(PagedRequest(LoadRequest(1, 0.0, pages_of(1, 20), 100, 50), 16), 0.0)
    times = []
    while engine.due < math.inf:
        times.append(engine.due)
        engine.advance()
    assert times == pytest.approx([0.055, 0.055 + 48 * 0.0055, 0.055 + 49 * 0.0055])
