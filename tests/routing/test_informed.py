"""Policies with what workers themselves say of their caches: when the index counts, and when the tree does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fleets import Bench
from sglang_router.routing.candidates import candidates_of
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.kv_blocks import Holder, Stored
from sglang_router.routing.kv_index import KVIndex
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.prefix_tree.informed import InformedMatch, KVCaches

PROMPT = list(range(100, 164))
BLOCK = 4


def ids(tokens: list[int], **body: Any) -> Facts:
    return read(ENDPOINTS[b"/generate"], json.dumps({"input_ids": tokens, **body}).encode())


class Informed:
    """A fleet under a policy with a memory, and the index that knows what its workers hold."""

    def __init__(self, count: int, encode: Any = None, policy: str = "cache_aware") -> None:
        self.index = KVIndex()
        self.bench = Bench(count, policy, kv_caches=KVCaches(self.index, encode))

    def live(self, number: int, whole: bool = True) -> Holder:
        """Let a worker's events be followed; it has an empty cache."""
        holder = self.index.join(self.bench.workers[number].id)
        self.store(holder, [-1], 1)
        self.index.remove(holder, "last")
        self.index.settle(holder, live=True, whole=whole)
        return holder

    def store(self, holder: Holder, tokens: list[int], size: int = BLOCK, adapter: str = "") -> None:
        names = [f"b{n}" for n in range(len(tokens) // size - 1)] + ["last"]
        self.index.store(holder, Stored(names, None, tokens, size, adapter=adapter), 0, 1 << 20)

    def lengths(self, facts: Facts) -> list[int]:
        """How many bytes of a prompt the policy believes each worker to have."""
        found = self.bench.policy.consider(facts, candidates_of(self.bench.workers), 0.0)
        return [each.matched for each in found]

    def place(self, facts: Facts, number: int) -> None:
        """Let the tree believe that a worker has a prompt."""
        policy = self.bench.policy
        assert isinstance(policy, CacheAware)
        policy.tree.insert(policy.tree.match(facts.namespace, facts.text), self.bench.workers[number].slot, 0.0)


POLICIES = pytest.mark.parametrize("policy", ["cache_aware", "cost"])


@POLICIES
def test_a_request_goes_to_the_worker_that_says_it_has_the_prompt(policy: str) -> None:
    fleet = Informed(3, policy=policy)
    holder = fleet.live(1)
    fleet.store(holder, PROMPT)
    plan = fleet.bench.send(ids(PROMPT))
    assert (plan.worker, plan.branch, plan.matched) == (fleet.bench.workers[1], "hit", plan.total)


def test_what_the_engine_has_evicted_does_not_count_though_the_tree_remembers_it() -> None:
    fleet = Informed(2)
    fleet.place(ids(PROMPT), 0)
    assert fleet.lengths(ids(PROMPT)) == [len(ids(PROMPT).text), 0]
    holder = fleet.live(0)
    assert fleet.lengths(ids(PROMPT)) == [0, 0]
    fleet.store(holder, PROMPT[:32])
    assert fleet.lengths(ids(PROMPT)) == [len(ids(PROMPT).text) // 2, 0]


def test_the_tree_answers_for_workers_without_a_stream_and_again_when_it_is_cut() -> None:
    fleet = Informed(2)
    size = len(ids(PROMPT).text)
    fleet.place(ids(PROMPT), 0)
    fleet.place(ids(PROMPT), 1)
    holder = fleet.live(1)
    assert fleet.lengths(ids(PROMPT)) == [size, 0]
    fleet.index.settle(holder, live=False, whole=False)
    assert fleet.lengths(ids(PROMPT)) == [size, size]


def test_a_stream_that_began_in_the_middle_only_adds_to_the_tree() -> None:
    fleet = Informed(2)
    fleet.place(ids(PROMPT[:32]), 0)
    holder = fleet.live(0, whole=False)
    before = fleet.lengths(ids(PROMPT))
    assert before[0] > 0
    fleet.store(holder, PROMPT[:8])
    assert fleet.lengths(ids(PROMPT)) == before
    fleet.index.clear(holder)
    fleet.store(holder, PROMPT)
    assert fleet.lengths(ids(PROMPT)) == [len(ids(PROMPT).text), 0]


def test_beyond_what_is_looked_up_the_tree_answers() -> None:
    fleet = Informed(2)
    long = list(range(1000, 1000 + 40_000))
    fleet.place(ids(long), 0)
    holder = fleet.live(0)
    assert fleet.lengths(ids(long)) == [0, 0]
    fleet.store(holder, long)
    assert fleet.lengths(ids(long)) == [len(ids(long).text), 0]


def test_a_prompt_whose_tokens_are_not_known_is_a_matter_of_the_tree() -> None:
    fleet = Informed(2)
    text = read(ENDPOINTS[b"/generate"], b'{"text":"a prompt that is long enough to count"}')
    fleet.place(text, 0)
    holder = fleet.live(0)
    fleet.store(holder, PROMPT)
    assert fleet.lengths(text) == [len(text.text), 0]


def test_with_a_tokenizer_a_text_is_known() -> None:
    fleet = Informed(2, encode=lambda text: [ord(letter) for letter in text])
    text = read(ENDPOINTS[b"/generate"], b'{"text":"a prompt that is long enough"}')
    fleet.place(text, 0)
    fleet.live(0)
    fleet.store(fleet.live(1), [ord(letter) for letter in "a prompt that is"])
    assert fleet.lengths(text) == [0, len(text.text) * 16 // 28]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({}, False),
        ({"lora_path": "poet"}, True),
        ({"model": "poet"}, True),
        ({"model": "llama:poet"}, True),
        ({"model": "llama"}, False),
        ({"lora_path": "poet", "cache_salt": "mine"}, False),
    ],
)
def test_adapters_are_found_however_they_are_named(body: dict[str, str], found: bool) -> None:
    fleet = Informed(1)
    fleet.store(fleet.live(0), PROMPT, adapter="poet")
    assert bool(fleet.lengths(ids(PROMPT, **body))[0]) is found


@POLICIES
def test_a_burst_of_one_new_prompt_goes_to_one_worker_before_any_event_tells_of_it(policy: str) -> None:
    fleet = Informed(3, policy=policy)
    for number in range(3):
        fleet.live(number)
    plans = [fleet.bench.send(ids([*PROMPT, number])) for number in range(6)]
    assert len({plan.worker for plan in plans}) == 1
    assert [plan.branch for plan in plans] == ["miss", *["hit"] * 5]
    fleet.index.turn()
    fleet.index.turn()
    assert fleet.lengths(ids(PROMPT)) == [0, 0, 0], "no event has confirmed it"


def test_the_longest_and_all_that_are_equal_are_named_whoever_knows_it() -> None:
    fleet = Informed(4)
    policy = fleet.bench.policy
    assert isinstance(policy, CacheAware)
    for number in (0, 1):
        fleet.place(ids(PROMPT), number)
    fleet.store(fleet.live(2), PROMPT)
    fleet.store(fleet.live(3), PROMPT[:32])
    facts = ids(PROMPT)
    informed = policy.memory.informed  # type: ignore[union-attr]
    match = informed.inform(policy.tree.match(facts.namespace, facts.text), facts)
    assert isinstance(match, InformedMatch)
    seats = [1 << worker.slot for worker in fleet.bench.workers]
    size = len(facts.text)
    assert match.best(-1) == (size, seats[0] | seats[1] | seats[2])
    assert match.best(seats[2] | seats[3]) == (size, seats[2])
    assert match.best(seats[3]) == (size // 2, seats[3])
    assert match.best(seats[0] | seats[3]) == (size, seats[0])
    assert match.best(0) == (0, 0)
    assert match.owners(-1, 9) == [(size, seats[0] | seats[1] | seats[2]), (size // 2, seats[3])]
    assert match.owners(-1, 3) == [(size, seats[0] | seats[1] | seats[2])]
    assert match.owners(seats[1] | seats[3], 1) == [(size, seats[1])]
    assert match.owners(0, 9) == []


def test_workers_may_leave_and_get_other_seats() -> None:
    fleet = Informed(2)
    workers = fleet.bench.workers
    holders = [fleet.live(number) for number in range(2)]
    for holder in holders:
        fleet.store(holder, PROMPT)
    fleet.bench.fleet.remove(workers[0])
    fleet.bench.pool.emptied(workers[1])
    plan = fleet.bench.send(ids(PROMPT))
    assert (plan.worker, plan.branch) == (workers[1], "hit"), "its own events say that it has the prompt"
