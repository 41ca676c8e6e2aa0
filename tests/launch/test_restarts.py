"""When a replica may be restarted: examples, and properties that always hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_router.launch.restarts import RestartHistory, RestartRules


def pauses(rules: RestartRules, *moments: float) -> list[float | None]:
    restarts = RestartHistory(rules)
    return [restarts.pause(moment) for moment in moments]


def test_the_pause_doubles_and_then_there_is_none() -> None:
    assert pauses(RestartRules(), 0, 10, 20, 30, 40, 50, 60) == [1, 2, 4, 8, 16, None, None]


def test_the_pause_has_a_limit() -> None:
    rules = RestartRules(initial_backoff=20, max_backoff=60, most=5)
    assert pauses(rules, 0, 1, 2, 3, 4) == [20, 40, 60, 60, 60]
    assert pauses(RestartRules(initial_backoff=90, max_backoff=60), 0) == [60]


def test_who_ran_for_longer_than_the_window_starts_afresh() -> None:
    assert pauses(RestartRules(window=100), 0, 10, 111) == [1, 2, 1]
    assert pauses(RestartRules(window=100), 0, 10, 110) == [1, 2, 2]  # the second still counts


def test_who_was_left_down_may_start_again_when_the_window_has_passed_or_somebody_says_so() -> None:
    rules = RestartRules(most=1, window=100)
    assert pauses(rules, 0, 50, 101) == [1, None, 1]
    restarts = RestartHistory(rules)
    restarts.pause(0)
    restarts.forget()
    assert restarts.pause(1) == 1


def test_no_restarts_at_all() -> None:
    assert pauses(RestartRules(most=0), 0, 1000) == [None, None]


seconds = st.floats(0, 1e6, allow_nan=False)
any_rules = st.builds(
    RestartRules,
    initial_backoff=st.floats(0, 1e3),
    max_backoff=st.floats(0, 1e3),
    multiplier=st.floats(1, 1e6),
    most=st.integers(0, 50),
    window=seconds,
)


@given(any_rules, st.lists(seconds, max_size=100).map(sorted))
def test_no_window_ever_sees_more_restarts_than_allowed_and_no_pause_is_too_long(
    rules: RestartRules, moments: list[float]
) -> None:
    said = pauses(rules, *moments)
    granted = [moment for moment, pause in zip(moments, said, strict=True) if pause is not None]
    for moment in moments:
        assert sum(moment - rules.window <= each <= moment for each in granted) <= rules.most
    assert all(0 <= pause <= rules.max_backoff for pause in said if pause is not None)


@given(any_rules, st.lists(seconds, max_size=100).map(sorted))
def test_it_gives_up_only_when_it_must(rules: RestartRules, moments: list[float]) -> None:
    granted: list[float] = []
    for moment, pause in zip(moments, pauses(rules, *moments), strict=True):
        recent = sum(moment - each <= rules.window for each in granted)
        assert (pause is None) == (recent >= rules.most)
        if pause is not None:
            granted.append(moment)
