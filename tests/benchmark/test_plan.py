"""Loads are selected by name, group or pattern; rounds rotate; the whole fits into the planned time."""

from __future__ import annotations

from collections import Counter

import pytest
from scripts.benchmark.loads import BY_NAME, GROUPS, LOADS, Load, selected, unknown
from scripts.benchmark.options import parse
from scripts.benchmark.plan import LONGEST, SHORTEST, Progress, fitting_seconds, planned_seconds, rooms, steps
from scripts.benchmark.targets import TARGETS

TWO = [BY_NAME["200B"], BY_NAME["4kB"]]


def everything(name: str, load: Load) -> bool:
    return True


def names(*patterns: str) -> list[str]:
    return [load.name for load in selected(patterns)]


def test_names_are_unique_and_every_load_is_of_a_group() -> None:
    assert len(BY_NAME) == len(LOADS)
    assert len({load.label for load in LOADS}) == len(LOADS)
    assert {load.group for load in LOADS} == {group.name for group in GROUPS}


def test_loads_are_selected_by_name_group_or_pattern() -> None:
    assert names("4kB", "alone") == ["4kB", "alone"]
    assert names("streams") == ["streams-100", "streams-500", "streams-1500", "streams-3000"]
    assert names("*-4kB") == ["open-4kB"]
    assert names() == [load.name for load in LOADS]
    assert names("nothing") == []


def test_patterns_that_fit_nothing_are_found() -> None:
    assert unknown(["4kB", "streams-*", "5kB", "x*"], ["4kB", "streams-100"]) == ["5kB", "x*"]
    assert unknown([], ["4kB"]) == []


def test_loads_with_the_same_workers_share_a_room() -> None:
    found = rooms(selected([]))
    assert [(room.workers, room.interval_ms) for room, _ in found] == [(4, 0), (4, 20), (100, 0), (1000, 0)]
    assert sum(len(loads) for _, loads in found) == len(LOADS)


def test_the_order_of_the_targets_rotates_from_round_to_round() -> None:
    found = steps(TWO[:1], ["a", "b", "c"], 4, everything)
    assert ["".join(step.target for step in found if step.round == number) for number in (1, 2, 3, 4)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]


def test_every_target_meets_every_load_it_takes_once_in_each_round() -> None:
    found = steps(TWO, ["a", "b"], 3, lambda name, load: (name, load.name) != ("b", "4kB"))
    assert Counter((step.target, step.load.name) for step in found) == {
        ("a", "200B"): 3,
        ("a", "4kB"): 3,
        ("b", "200B"): 3,
    }


def test_all_targets_get_the_same_prompts_and_no_prompt_comes_twice() -> None:
    found = steps(LOADS, ["a", "b"], 5, everything)
    distinct = {(step.round, step.load.name, step.seed) for step in found}
    assert len(distinct) == len({seed for *_, seed in distinct}) == 5 * len(LOADS)
    assert 0 not in {seed for *_, seed in distinct}, "that is the warm-up's"


def test_the_planned_time_is_what_the_steps_take_and_the_starts() -> None:
    one = planned_seconds(TWO, ["a"], 1, everything, 2.0)
    assert planned_seconds(TWO, ["a"], 2, everything, 2.0) - one == pytest.approx(2 * (2.0 + 0.2))
    assert planned_seconds([], ["a"], 5, everything, 2.0) == 0


@pytest.mark.parametrize(
    ("mode", "count", "minutes"), [([], sum(not target.apart for target in TARGETS) + 1, 40), (["--core"], 4, 12)]
)
def test_all_targets_and_loads_of_a_mode_fit_into_its_minutes(mode: list[str], count: int, minutes: float) -> None:
    options = parse(mode)
    loads, targets = selected(options.loads), [f"target {number}" for number in range(count)]
    seconds = fitting_seconds(loads, targets, options.rounds, everything, options.minutes)
    assert seconds > SHORTEST
    assert planned_seconds(loads, targets, options.rounds, everything, seconds) < minutes * 60


def test_the_seconds_of_a_load_are_bounded() -> None:
    assert fitting_seconds(TWO, ["a"], 1, everything, 60) == LONGEST
    assert fitting_seconds(TWO, ["a"], 100, everything, 1) == SHORTEST
    assert fitting_seconds([], [], 5, everything, 1) == LONGEST


def test_the_time_left_is_corrected_by_the_pace_so_far() -> None:
    progress = Progress(planned=100.0, began=1_000.0)
    assert progress.left(1_005.0) == 100.0
    progress.done = 50.0
    assert progress.left(1_100.0) == 100.0
    progress.done = 120.0
    assert progress.left(1_200.0) == 0.0


def test_a_round_that_would_end_too_late_for_its_room_is_not_allowed() -> None:
    progress = Progress(planned=100.0, began=0.0, limit=100.0, done=20.0)
    assert progress.allows(20.0, 10.0, room=40.0)
    assert not progress.allows(31.0, 10.0, room=40.0)
    assert not progress.allows(20.0, 30.0, room=40.0)
    assert progress.allows(20.0, 30.0, room=60.0)


def test_a_slow_machine_makes_rounds_longer_and_a_fast_one_not_shorter() -> None:
    assert not Progress(planned=100.0, began=0.0, limit=100.0, done=15.0).allows(30.0, 10.0, room=40.0)
    assert not Progress(planned=100.0, began=0.0, limit=100.0, done=30.0).allows(15.0, 30.0, room=40.0)


def test_without_a_limit_every_round_is_allowed() -> None:
    assert Progress(planned=100.0, began=0.0, done=10.0).allows(1e6, 50.0, room=20.0)
