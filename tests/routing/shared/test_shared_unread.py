"""What a worker refused, or never had, leaves no trace in what the routers tell each other."""

from __future__ import annotations

import msgspec
import pytest

from joined import KEY, LARGE, Joined
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.shared.packing import numbers, packed
from sglang_router.routing.shared.prefixes import SharedPrefixes
from sglang_router.routing.shared.records import FORM, PlacementsMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.untold import MOST_HASHES
from shared_prompts import POLICIES, matched, place, text

UNREAD = [Outcome.REJECTED, Outcome.BUSY, Outcome.REFUSED]
KNOWN, MORE = text(1), text(2)


def placed(joined: Joined, router: int) -> int:
    """Return how much was placed at the worker by the word of all routers."""
    prefixes = joined.states[router].prefixes
    return prefixes.life(prefixes.secret.worker(joined.worker(router, 0).url)).placed


@POLICIES
@pytest.mark.parametrize("outcome", UNREAD)
@pytest.mark.parametrize("told", [False, True])
def test_a_prompt_that_was_refused_leaves_all_as_it_was(policy: str, outcome: Outcome, told: bool) -> None:
    joined = Joined(2, 1, policy)
    joined.benches[0].serve(KNOWN)
    joined.flush(0.1)
    before = [placed(joined, router) for router in range(2)]
    refused = joined.benches[0].route(KNOWN + MORE, now=0.2)
    if told:
        joined.flush(0.3)
        assert matched(joined, 1, KNOWN + MORE) == [8192]
    refused.end(outcome, 0.4)
    joined.flush(0.5)
    for router in range(2):
        assert matched(joined, router, KNOWN + MORE) == [4096]
        assert placed(joined, router) == before[router]
    joined.benches[1].serve(KNOWN + MORE, now=0.6)
    joined.flush(0.7)
    assert matched(joined, 0, KNOWN + MORE) == [8192]


@POLICIES
def test_what_another_request_used_since_stays(policy: str) -> None:
    for used, stays in (KNOWN, 4096), (KNOWN[:2100], 2048), (KNOWN + MORE, 4096):
        joined = Joined(2, 1, policy)
        refused = joined.benches[0].route(KNOWN)
        joined.benches[0].serve(used, now=1.0)
        joined.flush(0.1)
        refused.end(Outcome.REJECTED, 2.0)
        joined.flush(0.2)
        assert matched(joined, 1, KNOWN) == [stays]


def test_what_other_workers_have_of_it_stays() -> None:
    joined = Joined(2, 3, "cache_aware")
    for number in (0, 1):
        place(joined, 1, KNOWN, number)
    joined.flush(0.1)
    bench = joined.benches[0]
    bench.fleet.set_draining(bench.workers[0], True)
    bench.fleet.set_draining(bench.workers[1], True)
    refused = bench.route(KNOWN)
    assert refused.worker is bench.workers[2]
    joined.flush(0.2)
    refused.end(Outcome.REJECTED, 0.3)
    joined.flush(0.4)
    assert matched(joined, 0, KNOWN) == matched(joined, 1, KNOWN) == [4096, 4096, 0]


def test_refused_prompts_take_nothing_from_the_caches_as_they_are_believed() -> None:
    joined = Joined(2, 1, "cache_aware", max_tree_size=1 << 16)
    joined.benches[0].serve(KNOWN)
    joined.flush(0.1)
    for seed in range(100):
        refused = joined.benches[0].route(text(100 + seed, 8192), now=1.0 + seed)
        joined.flush(1.1 + seed)
        refused.end(Outcome.REJECTED, 1.2 + seed)
    joined.flush(200.0)
    assert matched(joined, 0, KNOWN) == matched(joined, 1, KNOWN) == [4096]


def test_a_new_router_does_not_learn_of_it() -> None:
    joined = Joined(1, 1, "cache_aware", max_tree_size=1 << 16)
    joined.benches[0].serve(KNOWN)
    for seed in range(20):
        refused = joined.benches[0].route(text(100 + seed, 8192), now=1.0 + seed)
        joined.flush(1.1 + seed)
        refused.end(Outcome.REJECTED, 1.2 + seed)
    joined.flush(100.0)
    _, state = joined.add(1, "cache_aware", max_tree_size=1 << 16)
    for _, topic, payload in reversed(joined.sent):
        state.receive(topic, payload, old=True)
    while state.apply(100.0, 64):
        pass
    assert matched(joined, 1, text(100, 8192)) == [0]
    assert matched(joined, 1, KNOWN) == [4096]


def test_an_engine_that_was_emptied_meanwhile_loses_nothing_of_its_new_life() -> None:
    joined = Joined(2, 1, "cache_aware")
    refused = joined.benches[0].route(KNOWN)
    joined.flush(0.1)
    joined.benches[0].fleet.emptied(joined.worker(0, 0))
    joined.flush(0.2)
    joined.benches[0].serve(KNOWN, now=0.2)
    joined.flush(0.3)
    refused.end(Outcome.REJECTED, 0.4)
    joined.flush(0.5)
    assert matched(joined, 0, KNOWN) == matched(joined, 1, KNOWN) == [4096]


def test_too_many_are_told_in_parts_and_after_what_they_are_about() -> None:
    prefixes = SharedPrefixes(Secret(KEY, 512), 1 << 18)
    life = prefixes.life(7)
    life.capacity = 1 << 40
    chains = [list(range(start, start + 8)) for start in range(0, 24_000, 8)]
    for chain in chains:
        prefixes.note(life, chain)
        prefixes.take_back(life, chain, 0)
    seen: list[tuple[int, int]] = []
    while (told := prefixes.gather()) != (([], []), ([], [])):
        (heads, keys), (back, gone) = told
        assert len(heads) + len(back) <= 1024
        assert len(keys) + len(gone) <= MOST_HASHES
        seen.append((len(keys), len(gone)))
    assert sum(gone for _, gone in seen) == 4 * MOST_HASHES
    assert not any(gone for keys, gone in seen[:3])
    assert prefixes.crowded > 0
    assert not prefixes.known(chains[0])


def test_what_is_taken_back_takes_no_room() -> None:
    prefixes = SharedPrefixes(Secret(KEY, 512), 1024)
    life = prefixes.life(7)
    life.bit, life.owner, life.capacity = 1, None, 1 << 40
    kept = list(range(400))
    prefixes.hear(life, 4096, kept, False)
    for start in range(1000, 41_000, 8):
        chain = list(range(start, start + 8))
        prefixes.note(life, chain)
        prefixes.take_back(life, chain, 0)
        prefixes.gather()
    assert len(prefixes) == 400
    assert prefixes.known(kept) == 400


# -- routers of other versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [8, 12])
def test_a_message_of_an_earlier_or_a_later_version_of_the_same_form_is_understood(fields: int) -> None:
    """Fields are added at the end only: an earlier router does not write them, and one that reads them skips them."""
    joined = Joined(1, 1, "cache_aware")
    state = joined.states[0]
    chain = state.secret.chain(b"", KNOWN)
    worker = state.secret.worker(joined.worker(0, 0).url)
    message = PlacementsMessage(
        *(FORM, b"a router", 1, packed([worker]), b""), packed([len(chain) << 16 | 4096 << 32]), packed(chain)
    )
    values = [*msgspec.to_builtins(message, builtin_types=(bytes,)), b"later", 7][:fields]
    assert numbers(values[6]) == chain
    state.receive(SharedTopic.PLACEMENTS, state.secret.seal("placements", msgspec.msgpack.encode(values)))
    state.apply(0.0, LARGE)
    assert matched(joined, 0, KNOWN) == [4096]
    assert not state.reading.dropped
