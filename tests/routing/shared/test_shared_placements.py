"""Which worker has which prompt, by the word of other routers; and where prompts go that nobody has."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joined import KEY, Joined, rules
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.shared.agreement import Agreement
from sglang_router.routing.shared.prefixes import SharedPrefixes
from sglang_router.routing.shared.records import SharedTopic
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.sharing import SharedState
from sglang_router.routing.shared.untold import MOST_HASHES
from shared_prompts import POLICIES, matched, place, text


def prompts(joined: Joined, router: int) -> list[bytes]:
    return [payload for number, topic, payload in joined.sent if number == router and topic is SharedTopic.PLACEMENTS]


# -- what others placed ------------------------------------------------------------------------------------------------


@POLICIES
def test_a_prompt_goes_where_another_router_sent_its_beginning(policy: str) -> None:
    joined = Joined(2, 4, policy)
    first = joined.benches[0].serve(text(1))
    joined.flush(0.1)
    second = joined.benches[1].serve(text(1) + text(2, 600))
    assert joined.benches[0].number(first.worker) == joined.benches[1].number(second.worker)
    assert (second.branch, second.matched) == ("hit", 4096)


@POLICIES
def test_before_the_flush_nobody_knows(policy: str) -> None:
    joined = Joined(2, 4, policy)
    joined.benches[0].serve(text(1))
    assert joined.benches[1].serve(text(1)).matched == 0


def test_a_prompt_shorter_than_a_step_is_not_shared() -> None:
    joined = Joined(2, 2, "cache_aware")
    joined.benches[0].serve(text(1, 511))
    joined.flush(0.1)
    assert not prompts(joined, 0)
    assert joined.benches[1].serve(text(1, 511)).branch == "miss"


def test_prefixes_of_another_model_do_not_count() -> None:
    joined = Joined(2, 2, "cache_aware")
    joined.benches[0].serve(text(1), namespace=b"a")
    joined.flush(0.1)
    assert joined.benches[1].serve(text(1), namespace=b"b").branch == "miss"
    assert joined.benches[1].serve(text(1), namespace=b"a").branch == "hit"


def test_what_is_known_already_is_not_told_again() -> None:
    joined = Joined(2, 2, "cache_aware")
    for _ in range(5):
        joined.benches[0].serve(text(1))
        joined.flush(0.1)
        joined.benches[1].serve(text(1))
        joined.flush(0.1)
    assert (len(prompts(joined, 0)), len(prompts(joined, 1))) == (1, 0)
    joined.benches[1].serve(text(1) + text(2, 1024))
    joined.flush(0.1)
    assert len(prompts(joined, 1)) == 1
    assert len(prompts(joined, 1)[0]) < len(prompts(joined, 0)[0])


def test_the_longest_of_several_routers_counts() -> None:
    joined = Joined(3, 3, "cache_aware", cache_threshold=0.1)
    long, other = text(1), text(2)
    place(joined, 0, long[:1024], 0)
    place(joined, 1, long[:3072], 1)
    joined.flush(0.1)
    assert matched(joined, 2, long) == [1024, 3072, 0]
    assert matched(joined, 2, other) == [0, 0, 0]


def test_own_knowledge_is_exact_and_counts_before_that_of_others() -> None:
    joined = Joined(2, 2, "cache_aware")
    place(joined, 0, text(1, 2000), 0)
    place(joined, 1, text(1, 2000), 1)
    joined.flush(0.1)
    assert matched(joined, 0, text(1, 2000)) == [2000, 1536]
    assert matched(joined, 1, text(1, 2000)) == [1536, 2000]


def test_what_others_placed_since_has_evicted_what_was_there() -> None:
    joined = Joined(2, 1, "cache_aware", max_tree_size=1 << 16)
    place(joined, 0, text(1), 0)
    joined.flush(0.1)
    for seed in range(2, 9):
        place(joined, 1, text(seed, 8192), 0)
    joined.flush(0.2)
    assert matched(joined, 1, text(1)) == [4096]
    for seed in range(9, 12):
        place(joined, 0, text(seed, 8192), 0)
        joined.flush(0.3)
    assert matched(joined, 1, text(1)) == [0]


def test_what_is_used_again_stays() -> None:
    joined = Joined(2, 1, "cache_aware", max_tree_size=1 << 16)
    for seed in range(2, 40):
        place(joined, seed % 2, text(1), 0)
        place(joined, 1 - seed % 2, text(seed, 8192), 0)
        joined.flush(0.1)
    assert matched(joined, 0, text(1)) == matched(joined, 1, text(1)) == [4096]
    assert matched(joined, 0, text(20, 8192)) == [0]


def test_the_own_tree_remembers_only_this_routers_part_of_a_cache() -> None:
    joined = Joined(2, 1, "cache_aware", max_tree_size=1 << 16)
    for seed in range(40):
        place(joined, seed % 2, text(seed, 8192), 0)
        joined.flush(0.1)
    for bench in joined.benches:
        assert isinstance(bench.policy, CacheAware)
        assert bench.policy.tree.size(0) <= (1 << 15) + 8192


# -- caches that are emptied -------------------------------------------------------------------------------------------


@POLICIES
def test_a_cache_that_one_router_finds_empty_is_empty_for_all(policy: str) -> None:
    joined = Joined(2, 1, policy)
    place(joined, 0, text(1), 0)
    place(joined, 1, text(2), 0)
    joined.flush(0.1)
    assert matched(joined, 0, text(2)) == matched(joined, 1, text(1)) == [4096]
    bench = joined.benches[0]
    bench.fleet.emptied(bench.workers[0])
    place(joined, 0, text(3), 0)
    joined.flush(0.2)
    for router in range(2):
        assert [matched(joined, router, text(seed)) for seed in (1, 2, 3)] == [[0], [0], [4096]]
    assert joined.benches[1].log.whats()[-1] == "emptied"


def test_an_old_word_that_somebody_writes_again_empties_no_cache() -> None:
    joined = Joined(2, 1, "cache_aware")
    joined.benches[0].fleet.emptied(joined.worker(0, 0))
    joined.flush(0.0)
    told = [message[1:] for message in joined.sent if message[0] == 0]
    place(joined, 0, text(1), 0)
    joined.flush(0.1)
    for topic, payload in told:
        joined.states[1].receive(topic, payload)
    joined.states[1].apply(1000.0, 1 << 30)
    assert matched(joined, 1, text(1)) == [4096]


def test_two_routers_that_see_the_same_restart_forget_once() -> None:
    joined = Joined(2, 1, "cache_aware")
    for bench in joined.benches:
        bench.fleet.probed(bench.workers[0], "refused", 0.0, refused=True)
    joined.benches[0].fleet.probed(joined.worker(0, 0), None, 0.1)
    place(joined, 0, text(1), 0)
    joined.flush(0.2)
    joined.benches[1].fleet.probed(joined.worker(1, 0), None, 1.9)
    joined.flush(2.0)
    joined.flush(2.1)
    assert matched(joined, 0, text(1)) == [4096]
    assert (joined.worker(0, 0).caches, joined.worker(1, 0).caches) == (1, 2)
    assert matched(joined, 1, text(1)) == [4096]
    joined.benches[1].fleet.emptied(joined.worker(1, 0))  # another time
    joined.flush(2.2)
    assert matched(joined, 0, text(1)) == matched(joined, 1, text(1)) == [0]


@pytest.mark.parametrize("others", [False, True])
def test_a_cache_that_is_emptied_twice_within_seconds_is_forgotten_twice(others: bool) -> None:
    joined = Joined(3, 1, "cache_aware")
    for turn in range(3):
        router = turn if others else 0
        joined.benches[router].fleet.emptied(joined.worker(router, 0))
        joined.flush(turn + 0.1)
        assert [matched(joined, each, text(1)) for each in range(3)] == [[0]] * 3
        place(joined, router, text(1), 0)
        joined.flush(turn + 0.2)
        assert [matched(joined, each, text(1)) for each in range(3)] == [[4096]] * 3


def test_a_router_that_says_again_and_again_that_a_cache_is_empty_is_heard_every_30_seconds() -> None:
    joined = Joined(2, 1, "cache_aware")
    for turn in range(100):
        joined.benches[0].fleet.emptied(joined.worker(0, 0))
        joined.flush(turn + 0.1)
    assert joined.worker(1, 0).caches == 4 + 3


def test_what_the_store_did_not_take_of_emptied_caches_is_told_again_for_half_a_minute() -> None:
    joined = Joined(2, 2, "cache_aware")
    state = joined.states[0]
    for number in range(2):
        place(joined, 1, text(number), number)
    joined.flush(0.1)
    joined.lost = True
    for number, until in (0, 40.0), (1, 60.0):
        joined.benches[0].fleet.emptied(joined.worker(0, number))
        now = until - 20.0
        while now <= until:
            joined.flush(now)
            state.missed(SharedTopic.LOADS)
            state.missed(SharedTopic.PLACEMENTS)
            now += 5.0
    joined.lost = False
    joined.flush(60.1)
    assert [matched(joined, 1, text(number)) for number in range(2)] == [[4096, 0], [0, 0]]
    told = len(prompts(joined, 0))
    joined.flush(60.2)
    assert len(prompts(joined, 0)) == told


def test_a_worker_that_is_registered_anew_has_nothing() -> None:
    joined = Joined(2, 1, "cache_aware")
    place(joined, 1, text(1), 0)
    joined.flush(0.1)
    bench = joined.benches[0]
    spec = bench.workers[0].spec
    bench.fleet.remove(bench.workers[0])
    bench.workers[0] = bench.fleet.add(spec, 0.0)
    assert matched(joined, 0, text(1)) == [0]
    joined.flush(0.2)
    assert matched(joined, 1, text(1)) == [4096]  # the other router did not see that


# -- a new router ------------------------------------------------------------------------------------------------------


def test_a_new_router_learns_from_the_past_the_newest_first() -> None:
    joined = Joined(1, 2, "cache_aware", max_tree_size=1 << 16)
    for seed in range(20):
        place(joined, 0, text(seed, 8192), 0)
        joined.flush(0.1)
    _, state = joined.add(2, "cache_aware", max_tree_size=1 << 16)
    for _, topic, payload in reversed(joined.sent):
        state.receive(topic, payload, old=True)
    while state.apply(1.0, 64):
        pass
    for seed in range(20):
        assert matched(joined, 1, text(seed, 8192)) == matched(joined, 0, text(seed, 8192))
    assert state.reading.peers == ()


def test_what_was_placed_before_a_cache_was_emptied_is_not_learnt_later() -> None:
    joined = Joined(1, 1, "cache_aware")
    place(joined, 0, text(1), 0)
    joined.flush(0.1)
    joined.benches[0].fleet.emptied(joined.worker(0, 0))
    place(joined, 0, text(2), 0)
    joined.flush(0.2)
    _, state = joined.add(1, "cache_aware")
    for _, topic, payload in reversed(joined.sent):
        state.receive(topic, payload, old=True)
    while state.apply(1.0, 64):
        pass
    assert (matched(joined, 1, text(1)), matched(joined, 1, text(2))) == ([0], [4096])


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_the_replica_is_bounded_and_keeps_what_was_used_last() -> None:
    prefixes = SharedPrefixes(Secret(KEY, 512), 1024)
    life = prefixes.life(7)
    life.bit, life.owner, life.capacity = 1, None, 1 << 40
    for start in range(0, 20_000, 8):
        prefixes.hear(life, 4096, list(range(start, start + 8)), False)
        assert len(prefixes) <= 1024 + 16
        assert sum(len(part) for part in prefixes._dropped) <= 512 + 16
    assert prefixes.match([19_999], None) == [(0, 1)]
    assert prefixes.match([1], None) == []
    while prefixes.reclaim(100):
        pass


def test_a_beginning_has_at_most_64_owners() -> None:
    prefixes = SharedPrefixes(Secret(KEY, 512), 1024)
    for name in range(200):
        life = prefixes.life(name)
        life.bit, life.owner, life.capacity = 1 << name, None, 1 << 40
        prefixes.hear(life, 4096, [1], False)
    assert prefixes.match([1], None) == [(0, ((1 << 64) - 1) << 136)]


def test_a_flush_of_too_much_is_told_in_part() -> None:
    secret = Secret(KEY, 512)
    prefixes = SharedPrefixes(secret, 1 << 18)
    life = prefixes.life(7)
    life.capacity = 1 << 40
    for start in range(0, 40_000, 8):
        prefixes.note(life, list(range(start, start + 8)))
    seen = 0
    while (found := prefixes.gather()) != (([], []), ([], [])):
        heads, keys = found[0]
        assert len(keys) == sum(count for _, count, _ in heads) <= MOST_HASHES
        seen += len(keys)
    assert seen == 4 * MOST_HASHES
    assert prefixes.crowded == 40_000 - seen


def test_messages_of_placements_are_bounded() -> None:
    joined = Joined(2, 1200, "cache_aware")
    for number in range(1200):
        place(joined, 0, text(number, 4096), number)
    joined.flush(0.1)
    assert len(prompts(joined, 0)) > 1
    assert max(len(payload) for _, _, payload in joined.sent) <= 1 << 16
    assert matched(joined, 1, text(900, 4096))[900] == 4096


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 12)), max_size=40), st.randoms())
def test_replicas_converge_whatever_the_order(steps: list[tuple[int, int, int]], chance: random.Random) -> None:
    """Each step of a router goes to its own worker, so that the order between them does not matter."""
    joined = Joined(3, 3, "cache_aware")
    for router, number, size in steps:
        place(joined, router, text(number, size * 512), router)
        if chance.random() < 0.5:
            joined.tell(0.0)
            for state in joined.states:
                state.apply(0.0, 10)
    joined.flush(0.0)
    for number in range(4):
        seen = [matched(joined, router, text(number, 6144)) for router in range(3)]
        assert seen[0] == seen[1] == seen[2]


# -- strangers ---------------------------------------------------------------------------------------------------------


@POLICIES
@pytest.mark.parametrize("count", [2, 8, 40])
def test_two_routers_send_a_new_prompt_to_the_same_worker_without_a_word(policy: str, count: int) -> None:
    joined = Joined(2, count, policy)
    for state in joined.states:
        state.connected = False
    seen: Counter[int] = Counter()
    for seed in range(60):
        here, there = joined.benches[0].serve(text(seed)), joined.benches[1].serve(text(seed, 5000))
        assert here.worker.url == there.worker.url
        assert here.branch == there.branch == "miss"
        seen[joined.benches[0].number(here.worker)] += 1
    assert max(seen.values()) <= 60 // count + 18
    one, other = [state.reading.agreed for state in joined.states]
    assert one == other >= 45  # by cost one worker alone may be cheap


def new_prompts(filled: int) -> Counter[int]:
    """Let a router fill so many of eight workers, and another one send 32 new prompts; return how many each got."""
    joined = Joined(2, 8, "cache_aware")
    for number in range(filled):
        for seed in range(40):
            place(joined, 0, text(1000 + number * 40 + seed), number)
    joined.flush(0.1)
    bench = joined.benches[1]
    attempts = [bench.serve(text(seed)) for seed in range(32)]
    assert {attempt.branch for attempt in attempts} == {"miss"}
    assert joined.states[1].reading.agreed == 0, "they can tell each other"
    return Counter(bench.number(attempt.worker) for attempt in attempts)


def test_new_prompts_go_where_all_routers_together_have_sent_little() -> None:
    seen = new_prompts(4)
    assert sum(seen[number] for number in range(4, 8)) >= 28
    assert max(seen.values()) <= 12


def test_the_emptiest_worker_does_not_get_all_that_is_new() -> None:
    """All routers know that it is, and each would send it all that is new until it hears of the others."""
    assert 4 <= new_prompts(7)[7] <= 20


def test_what_was_forgotten_because_it_was_too_much_goes_where_it_was() -> None:
    joined = Joined(2, 8, "cache_aware", blocks=256)
    first = {seed: joined.benches[0].serve(text(seed)).worker.url for seed in range(200)}
    joined.flush(0.1)
    again = [joined.benches[1].serve(text(seed)) for seed in range(100, 140)]
    assert {attempt.branch for attempt in again} == {"miss"}
    assert sum(attempt.worker.url == first[100 + place] for place, attempt in enumerate(again)) > 30
    assert joined.states[1].reading.agreed == 40


def test_an_agreed_worker_with_too_many_requests_is_passed_over() -> None:
    joined = Joined(1, 4, "cache_aware")
    joined.states[0].connected = False
    bench = joined.benches[0]
    usual = bench.number(bench.serve(text(1)).worker)
    bench.fleet.emptied(bench.workers[usual])
    joined.flush(0.1)
    bench.load(*[8 if number == usual else 1 for number in range(4)])
    assert bench.number(bench.serve(text(1)).worker) != usual


def test_the_order_of_choice_changes_only_for_a_worker_that_leaves() -> None:
    agreement, chance = Agreement(), random.Random(1)
    names = [chance.getrandbits(64) for _ in range(20)]
    for slot, name in enumerate(names):
        agreement.add(slot, name)
    keys = [chance.getrandbits(64) for _ in range(500)]
    everyone = (1 << 20) - 1
    before = [agreement.order(key, everyone)[0] for key in keys]
    assert max(Counter(before).values()) < 60
    masked = [agreement.order(key, everyone & ~(1 << 3))[0] for key in keys]
    assert all(one == other for one, other in zip(before, masked, strict=True) if one != 3)
    agreement.remove(3)
    assert [agreement.order(key, everyone)[0] for key in keys] == masked
    assert agreement.order(1, 0) == []
    assert Agreement().order(1, 1) == []


def test_a_shadow_tells_nothing() -> None:
    caches = KVCaches(None, shared=SharedPrefixes(Secret(KEY, 512), 1024))
    assert caches.for_shadow() is None
    assert "1024" not in repr(caches)


def test_a_state_without_a_router_hears_nothing() -> None:
    state = SharedState(rules(0))
    state.receive(SharedTopic.PLACEMENTS, b"x")
    assert not state.apply(0.0, 100)
    assert state.outgoing(0.0) == []


def test_workers_that_are_unknown_here_are_bounded() -> None:
    joined = Joined(1, 1)
    state = joined.states[0]
    for name in range(20_000):
        state.members.find(name)
        state.prefixes.hear(state.prefixes.life(name), 512, [name], False)
    assert state.members.strange == 1 << 14
    assert joined.worker(0, 0) in [member.worker for member in state.members.here]
    assert "16385 lives" in repr(state.prefixes) or "16384 lives" in repr(state.prefixes)


@pytest.mark.parametrize("grown", [0, 1 << 32, 1 << 62])
def test_a_life_ends_before_its_stamps_do(grown: int) -> None:
    prefixes = SharedPrefixes(Secret(KEY, 512), 1024)
    life = prefixes.life(7)
    life.bit, life.capacity = 1, 1 << 50
    for key in range(2000):
        prefixes.hear(life, grown, [key], False)
        life.placed += 1 << 33
        assert life.placed < 1 << 42
    assert prefixes.match([1999], None) == [(0, 1)]


def test_equal_workers_are_taken_in_turn_from_another_start_at_each_router() -> None:
    joined = Joined(8, 8, "least_load")
    first = {joined.benches[number].number(joined.benches[number].route().worker) for number in range(8)}
    assert len(first) > 3
