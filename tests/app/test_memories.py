"""The prefix memories of all pools, read as one."""

from __future__ import annotations

from fleets import Bench, by_model, facts
from sglang_router.app.memories import memories_of
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec

LONG, SHORT = b"a prompt that is long enough to count", b"a short one"


def test_the_memories_of_two_pools_are_read_as_one() -> None:
    bench = Bench(0, "cache_aware", assign=by_model, max_tree_size=8 * 41)
    workers = [
        bench.fleet.add(WorkerSpec(url=f"http://{model}", model_id=model, health=HealthRules(enabled=False)), 0.0)
        for model in "AB"
    ]
    memories = memories_of(bench.fleet.pools)
    assert memories is not None
    for model, text in (("A", LONG), ("B", SHORT)):
        bench.send(facts(text, model=f'"{model}"'.encode()))
    assert [memories.size(worker) for worker in workers] == [len(LONG), len(SHORT)]
    assert [memories.entries(worker) for worker in workers] == [1, 1]
    assert (memories.nodes, memories.held, memories.retired_size) == (2, len(LONG) + len(SHORT), 0)
    for n in range(8):  # there is no room for all
        bench.send(facts(b"%d" % n + b"." * 40, model=b'"A"'), 1.0 + n)
    assert [memories.evictions(worker) for worker in workers] == [1, 0]
    assert [memories.evicted_bytes(worker) for worker in workers] == [len(LONG), 0]
    bench.fleet.remove(workers[1])
    asked = memories.size, memories.entries, memories.evictions, memories.evicted_bytes
    assert [ask(workers[1]) for ask in asked] == [0, 0, 0, 0], "it was removed"


def test_without_a_memory_there_is_nothing_to_read() -> None:
    assert memories_of(Bench(1, "round_robin").fleet.pools) is None
