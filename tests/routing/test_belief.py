"""What reports say of a worker's cache: its capacity, and whether it is empty; never by a single odd answer."""

from __future__ import annotations

import itertools
import random

import pytest

from sglang_router.routing.belief import FEW, Belief, surprising
from sglang_router.routing.tokens import TextRate, Tokens
from sglang_router.routing.usage import Usage

SIZE = 1 << 20


def report(cached: int, predicted: int = 1000) -> Usage:
    usage = Usage(predicted, cached, 1)
    usage.predicted = predicted
    usage.missed = surprising(usage)
    return usage


PROMPTS = itertools.count()


def heard(belief: Belief, *cached: int, size: int = SIZE) -> Belief:
    """Let it hear of prompts that have nothing in common."""
    for tokens in cached:
        belief.heard(report(tokens), size, b"%d, and more" % next(PROMPTS), 11)
    return belief


@pytest.mark.parametrize(
    ("cached", "predicted", "missed"),
    [(0, 1000, True), (499, 1000, True), (500, 1000, False), (0, FEW, False), (0, FEW + 1, True), (1000, 900, False)],
)
def test_a_surprising_miss_is_far_below_the_prediction(cached: int, predicted: int, missed: bool) -> None:
    assert surprising(report(cached, predicted)) is missed


def test_an_engine_that_never_had_a_hit_is_not_judged() -> None:
    belief = heard(Belief(), *[0] * 1000)
    assert (belief.empty, belief.capacity, belief.row) == (False, 0, 0)


def test_a_row_of_cold_misses_is_an_empty_cache() -> None:
    belief = heard(Belief(), *[1000] * 600, 0, 0, 0)
    assert not belief.empty
    assert heard(belief, 0).empty
    belief.forget()
    assert not heard(belief, *[0] * 100).empty, "the next process must have hits before it is judged"


@pytest.mark.parametrize("other", [1000, 500, 260])
def test_any_other_report_ends_the_row(other: int) -> None:
    """A hit, or a miss of which a good part was cached."""
    belief = heard(Belief(), *[1000] * 600)
    for _ in range(3):
        assert not heard(belief, 0, 0, 0, other).empty


def test_a_worker_that_misses_often_needs_a_longer_row() -> None:
    belief = heard(Belief(), *[1000, 0] * 400)
    rows = 0
    while not heard(belief, 0).empty:
        rows += 1
    assert 15 <= rows <= 25


def test_chance_does_not_empty_a_memory() -> None:
    rng = random.Random(1)
    for share in (0.05, 0.3, 0.6):
        belief = heard(Belief(), 1000)
        for _ in range(20_000):
            assert not heard(belief, 0 if rng.random() < share else 1000).empty


def test_what_is_missed_again_is_not_cached_by_this_engine_at_all() -> None:
    """Such as requests for the log probabilities of a prompt: an empty cache has it the second time."""
    belief = heard(Belief(), *[1000] * 600)
    for number in range(100):
        belief.heard(report(0), SIZE, b"a prefix of many prompts: %d" % number, 20)
        assert belief.row <= 1
    heard(belief, 0, 0, 0, 0, 0)
    assert not belief.empty, "they are ordinary now"
    heard(belief, 1000)
    for start in (b"one", b"two") * 50:
        belief.heard(report(0), SIZE, start, 3)
        assert belief.row <= 2


def test_a_beginning_that_is_less_than_half_of_what_was_missed_is_no_repetition() -> None:
    belief = heard(Belief(), *[1000] * 600)
    for number in range(4):
        belief.heard(report(0), SIZE, b"all begin so: %d" % number, 15)
    assert belief.empty


def test_the_capacity_is_what_was_remembered_when_misses_began() -> None:
    belief = heard(Belief(), *[1000] * 100)
    assert (belief.share, belief.capacity) == (1.0, 0), "it may hold much more"
    heard(belief, 400)
    assert belief.capacity == 0, "one odd answer says nothing"
    heard(belief, *[400] * 20)
    assert belief.capacity == SIZE
    heard(belief, 400, 1000, size=2 * SIZE)
    assert belief.capacity == SIZE
    assert repr(belief) == "<Belief 0 misses, 0 cold ones in a row, 0.906 is there>"
    heard(belief, *[2000] * 300, size=2 * SIZE)
    assert (belief.share > 0.97, belief.capacity) == (True, 0), "more than predicted is no more than all"


def test_the_capacity_is_near_that_of_the_engine() -> None:
    """Texts of 4 kB, of which an engine holds the last 512 kB. The router remembers all, in the end 2 MB."""
    rng = random.Random(2)
    text, engine = 4096, 1 << 19
    recent: list[int] = []
    belief = Belief()
    for number in range(4000):
        name = rng.randrange(min(500, 20 + number // 8))
        if name in recent:
            cached = 1000 if recent.index(name) < engine // text else 0
            belief.heard(report(cached), len(recent) * text, b"%d." % name, 9)
            recent.remove(name)
        recent.insert(0, name)
    assert engine < belief.capacity < 1.3 * engine
    assert belief.share < 0.5


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_recent_prompts_together() -> None:
    rate = TextRate()
    assert rate.bytes_per_token == 4.0
    rate.told(0, 10)
    rate.told(10, 0)
    assert rate.bytes_per_token == 4.0
    rate.told(300, 100)
    assert repr(rate) == "<TextRate 3.00 bytes a token>"
    for _ in range(200):
        rate.told(50, 100)
        rate.told(4000, 1000)
    assert rate.bytes_per_token == pytest.approx(4050 / 1100, rel=0.05), "a short prompt counts for little"


def test_a_prediction_goes_by_the_prompt_itself_unless_its_text_was_cut() -> None:
    tokens = Tokens()
    assert tokens.predict(400, 1000, 200) == 80
    assert tokens.predict(1000, 1000, 10_000) == 250, "1000 bytes are not 10,000 tokens: the text was cut"
    assert tokens.predict(0, 1000, 200) == 0


def test_cached_tokens_that_are_left_out_are_none_once_the_endpoint_tells_them() -> None:
    tokens = Tokens()
    first, told, left_out, elsewhere, embedded = (
        Usage(10, -1, 1),
        Usage(10, 5, 1),
        Usage(10, -1, 1),
        Usage(10, -1, 1),
        Usage(10),
    )
    for usage in (first, told, left_out, embedded):
        tokens.told(usage, "chat")
    tokens.told(elsewhere, "completions")
    assert [each.cached for each in (first, told, left_out, elsewhere, embedded)] == [-1, 5, 0, -1, -1]
    tokens.emptied()
    tokens.told(again := Usage(10, -1, 1), "chat")
    assert again.cached == -1
