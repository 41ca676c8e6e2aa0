"""The index of KV blocks against a plain model: a table from engine hash to the whole prefix, compared as it is."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.routing.kv_blocks import DEVICE, Holder, Stored
from sglang_router.routing.kv_index import MOST_BLOCKS, Held, KVIndex

SIZE = 2
ALL = 1 << 20
CPU = 2
NAMES = ("a", "b", "c")


def tokens_of(held: Held, holder: Holder) -> int:
    return next((tokens for tokens, holders in held.levels if holders & holder.bit), 0)


def store(index: KVIndex, holder: Holder, event: Stored, piece: int = ALL) -> None:
    done = 0
    while done < len(event.hashes):
        done = index.store(holder, event, done, piece)


class Model:
    """What one cache holds: by the engine's hash the prefix up to the end of that block, and the tiers."""

    def __init__(self) -> None:
        self.blocks: dict[Any, tuple[Any, ...]] = {}
        self.tiers: dict[Any, set[int]] = {}

    def store(self, event: Stored) -> None:
        prefix: tuple[Any, ...] | None = (event.size, event.adapter, event.salt)
        if event.parent is not None:
            prefix = self.blocks.get(event.parent)
        if prefix is None:
            return
        for number, key in enumerate(event.hashes):
            prefix = (*prefix, *event.tokens[number * event.size : (number + 1) * event.size])
            if self.blocks.get(key, prefix) != prefix:
                self.tiers[key] = set()
            self.blocks[key] = prefix
            self.tiers.setdefault(key, set()).add(event.tier)

    def remove(self, key: Any, tier: int) -> None:
        self.tiers.get(key, set()).discard(tier)
        if not self.tiers.get(key):
            self.blocks.pop(key, None)
            self.tiers.pop(key, None)

    def tokens(self, prompt: list[int], adapter: str, salt: str) -> int:
        prefixes = set(self.blocks.values())
        count = 0
        while (count + 1) * SIZE <= len(prompt):
            if (SIZE, adapter, salt, *prompt[: (count + 1) * SIZE]) not in prefixes:
                break
            count += 1
        return count * SIZE


token = st.integers(0, 2)
key = st.integers(-6, 6)
name = st.sampled_from(NAMES)
tier = st.sampled_from((DEVICE, CPU))
adapter = st.sampled_from(("", "x"))
step = st.one_of(
    st.tuples(
        st.just("store"), name, st.lists(key, min_size=1, max_size=4), st.none() | key,
        st.lists(token, min_size=8, max_size=8), tier, adapter, st.integers(1, 3),
    ),
    st.tuples(st.just("remove"), name, key, tier),
    st.tuples(st.just("clear"), name),
    st.tuples(st.just("leave"), name),
    st.tuples(st.just("reclaim"), st.integers(1, 3)),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(step, max_size=30), st.lists(st.lists(token, max_size=9), min_size=1, max_size=4))
def test_the_index_says_what_the_model_says(steps: list[Any], prompts: list[list[int]]) -> None:
    index = KVIndex()
    holders = {each: index.join(each) for each in NAMES}
    models = {each: Model() for each in NAMES}
    for what, *given_ in steps:
        if what == "store":
            who, hashes, parent, tokens, where, lora, piece = given_
            event = Stored(hashes, parent, tokens, SIZE, where, lora)
            store(index, holders[who], event, piece)
            models[who].store(event)
        elif what == "remove":
            who, block, where = given_
            index.remove(holders[who], block, where)
            models[who].remove(block, where)
        elif what == "clear":
            index.clear(holders[given_[0]])
            models[given_[0]] = Model()
        elif what == "leave":
            index.leave(given_[0])
            holders[given_[0]] = index.join(given_[0])
            models[given_[0]] = Model()
        else:
            index.reclaim(given_[0])
        for prompt in prompts:
            for lora in ("", "x"):
                held = index.match(prompt, lora)
                for each in NAMES:
                    assert tokens_of(held, holders[each]) == models[each].tokens(prompt, lora, "")
    while index.reclaim(ALL):
        pass
    assert len(index) == len({prefix for model in models.values() for prefix in model.blocks.values()})
    for each in NAMES:
        index.leave(each)
    index.reclaim(ALL)
    assert len(index) == 0


def test_a_prompt_is_held_up_to_the_first_block_that_is_missing() -> None:
    index = KVIndex()
    one, two = index.join("one"), index.join("two")
    store(index, one, Stored([31, 77, 5], None, [1, 2, 3, 4, 5, 6], 2))
    store(index, two, Stored([b"sha", b"other"], None, [1, 2, 3, 9], 2))
    held = index.match([1, 2, 3, 4, 5, 6, 7])
    assert held.levels == [(6, one.bit), (2, two.bit)]
    assert held.beyond == 0
    index.remove(one, 77)
    assert index.match([1, 2, 3, 4, 5, 6]).levels == [(2, one.bit | two.bit)]
    assert index.match([9, 9]).levels == []


def test_what_follows_an_unknown_block_is_counted_and_not_learnt() -> None:
    index = KVIndex()
    holder = index.join("w")
    store(index, holder, Stored([2, 3], 1, [3, 4, 5, 6], 2))
    assert (holder.orphans, len(holder.blocks)) == (2, 0)


def test_blocks_above_the_limit_are_refused_and_the_others_stay() -> None:
    index = KVIndex(most_blocks=3)
    holder = index.join("w")
    store(index, holder, Stored([1, 2], None, [1, 1, 2, 2], 2))
    store(index, holder, Stored([3, 4, 5], 2, [3, 3, 4, 4, 5, 5], 2), piece=1)
    assert (len(holder.blocks), holder.refused) == (3, 2)
    assert index.match([1, 1, 2, 2, 3, 3, 4, 4]).levels == [(6, holder.bit)]
    index.remove(holder, 3)
    store(index, holder, Stored([4], 2, [7, 7], 2))
    assert index.match([1, 1, 2, 2, 7, 7]).levels == [(6, holder.bit)]


def test_adapter_and_salt_divide_the_cache_and_marked_blocks_are_not_found() -> None:
    index = KVIndex()
    holder = index.join("w")
    store(index, holder, Stored([1], None, [1, 1], 2, adapter="lora"))
    store(index, holder, Stored([2], None, [1, 1], 2, salt="mine"))
    store(index, holder, Stored([3, 4, 5], None, [5, 5, 6, 6, 7, 7], 2, marks=[None, ["picture"], None]))
    assert [index.match([1, 1], *names).levels for names in ((), ("lora",), ("", "mine"), ("lora", "mine"))] == [
        [], [(2, holder.bit)], [(2, holder.bit)], [],
    ]  # fmt: skip
    assert index.match([5, 5, 6, 6, 7, 7]).levels == [(2, holder.bit)]
    assert index.adapters == {"lora"}


def test_caches_with_blocks_of_different_sizes_are_compared_in_tokens() -> None:
    index = KVIndex()
    fine, coarse = index.join("fine"), index.join("coarse")
    store(index, fine, Stored([1, 2, 3], None, [1, 2, 3], 1))
    store(index, coarse, Stored([1], None, [1, 2], 2))
    assert index.match([1, 2, 3, 4]).levels == [(3, fine.bit), (2, coarse.bit)]


def test_who_has_all_that_was_looked_at_of_a_longer_prompt_is_named() -> None:
    index = KVIndex()
    holder, other = index.join("w"), index.join("v")
    long = list(range(MOST_BLOCKS + 3))
    store(index, holder, Stored(long, None, long, 1))
    store(index, other, Stored([0], None, [0], 1))
    assert index.match(long).beyond == holder.bit
    assert index.match(long).levels == [(MOST_BLOCKS, holder.bit), (1, other.bit)]
    assert index.match(long[:100], whole=False).beyond == holder.bit
    assert index.match(long[:100]).beyond == 0


def test_a_promise_counts_until_it_has_turned_twice() -> None:
    index = KVIndex()
    holder, other = index.join("w"), index.join("v")
    for each in (holder, other):
        store(index, each, Stored([1], None, [0], 1))
        index.remove(each, 1)
    index.promise(holder, index.match([1, 2, 3]))
    assert index.match([1, 2, 9]).levels == [(2, holder.bit)]
    assert index.match([1, 2, 3], whole=False).beyond == holder.bit
    assert index.match([1, 2, 3], salt="other").levels == []
    index.turn()
    assert index.match([1, 2, 9]).levels == [(2, holder.bit)]
    index.turn()
    assert index.match([1, 2, 9]).levels == []


def test_a_promise_ends_when_the_engine_tells_of_the_block() -> None:
    index = KVIndex()
    holder, other = index.join("w"), index.join("v")
    for each in (holder, other):
        store(index, each, Stored([1], None, [0], 1))
        index.remove(each, 1)
    for each in (holder, other):
        index.promise(each, index.match([1, 2]))
    store(index, holder, Stored([7, 8], None, [1, 2], 1))
    index.promise(holder, index.match([1, 2]))
    index.remove(holder, 8)
    assert index.match([1, 2]).levels == [(2, other.bit), (1, holder.bit)]
    index.remove(holder, 7)
    assert index.match([1, 2]).levels == [(2, other.bit)]


def test_a_cleared_holder_keeps_no_promise_and_may_be_promised_to() -> None:
    index = KVIndex()
    holder = index.join("w")
    store(index, holder, Stored([1], None, [0], 1))
    index.promise(holder, index.match([1, 2]))
    index.clear(holder)
    assert index.match([1, 2]).levels == index.match([0]).levels == []
    index.promise(holder, index.match([1, 2]))
    assert index.match([1, 2]).levels == [(2, holder.bit)]
    index.leave("w")
    index.reclaim(ALL)
    assert index.match([1, 2]).levels == []
    again = index.join("again")
    assert again.bit in (1, 2), "bits that nobody has are used again"
    assert index.match([1, 2]).levels == []


def test_a_long_prompt_is_promised_at_distances_with_its_end() -> None:
    index = KVIndex()
    holder = index.join("w")
    store(index, holder, Stored([1], None, [0], 1))
    prompt = list(range(1, 2050))
    index.promise(holder, index.match(prompt))
    assert index.match(prompt).levels == [(2049, holder.bit)]
    (level,) = index.match([*prompt[:1000], -1]).levels
    assert 992 <= level[0] <= 1000


def test_too_many_promises_turn_by_themselves() -> None:
    index = KVIndex()
    holder = index.join("w")
    store(index, holder, Stored([1], None, [-1], 1))
    for number in range((1 << 15) + 1):
        index.promise(holder, index.match([number]))
    assert index.match([0]).levels == []
    assert index.match([1 << 15]).levels == [(1, holder.bit)]


def test_what_a_caller_may_watch_rises_with_each_change() -> None:
    index = KVIndex()
    holder = index.join("w")
    seen = [index.version]
    index.settle(holder, live=True, whole=True)
    seen.append(index.version)
    store(index, holder, Stored([1], None, [1], 1))
    seen.append(index.version)
    index.clear(holder)
    seen.append(index.version)
    index.leave("w")
    seen.append(index.version)
    assert seen == sorted(set(seen))
    index.leave("w")
    assert index.version == seen[-1], "it has left already"
