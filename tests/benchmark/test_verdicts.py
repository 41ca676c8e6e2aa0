"""Where rivals are better, and which goals are reached."""

from __future__ import annotations

from scripts.benchmark.loads import BY_NAME
from scripts.benchmark.results import Results
from scripts.benchmark.verdicts import (
    GOALS,
    METRICS,
    goals_head,
    goals_rows,
    losses,
    losses_rows,
    losses_summary,
    rivals,
)

from bench_samples import results, sample


def beaten() -> Results:
    """HAProxy needs less CPU and memory; the reference is faster at p99 under 200 B."""
    ours = sample(cpu=60, p99=2_000, memory=40)
    return results(
        _200B={"ours": [ours], "reference": [sample(cpu=150, p99=1_000, memory=100)], "direct": [sample(cpu=0, p99=1)]},
        _4kB={"ours": [ours], "haproxy": [sample(cpu=15, p99=2_000, memory=16)]},
    )


def test_every_figure_in_which_a_rival_is_better_is_told() -> None:
    assert losses_rows(beaten()) == [
        ["sglang-router 0.3.2", "200 B", "", "2.00", "", ""],
        ["HAProxy 2", "4 kB", "4.00", "", "2.50", ""],
    ]


def test_the_summary_counts_the_loads_that_both_were_measured_under() -> None:
    assert losses_summary(beaten()) == [
        "sglang-router 0.3.2 is better, of 1 load: p99 1.",
        "HAProxy 2 is better, of 1 load: CPU 1, RSS 1.",
    ]


def test_a_rival_that_fails_requests_does_not_win() -> None:
    made = results(_4kB={"ours": [sample(cpu=60)], "haproxy": [sample(cpu=1, errors=500)]})
    assert losses(made) == []


def test_a_rival_that_answers_what_fails_with_us_is_better() -> None:
    made = results(_4kB={"ours": [sample(cpu=1, errors=500)], "haproxy": [sample(cpu=60)]})
    assert losses_rows(made) == [["HAProxy 2", "4 kB", "", "", "", "500"]]
    assert losses_summary(made) == ["HAProxy 2 is better, of 1 load: requests that fail with us 1."]


def test_equal_figures_are_no_loss() -> None:
    made = results(_4kB={"ours": [sample(cpu=60.5)], "haproxy": [sample(cpu=60)]})
    assert losses(made) == []


def test_other_states_of_this_router_are_no_rivals() -> None:
    made = results(_4kB={"ours": [sample(cpu=60)], "compiled": [sample(cpu=40)], "before": [sample(cpu=50)]})
    made.targets |= {"compiled": "this router, compiled 1", "before": "before HEAD"}
    assert losses(made) == []


def test_goals_name_loads_and_figures_that_exist() -> None:
    assert {goal.load for goal in GOALS} <= BY_NAME.keys()
    assert {goal.metric for goal in GOALS} <= METRICS.keys()
    assert {"200B", "4kB", "16kB", "60kB", "streams-500", "streams-3000"} == {goal.load for goal in GOALS}


def test_a_goal_shows_the_ratio_and_whether_it_is_reached() -> None:
    made = results(streams_500={"ours": [sample(p99=900)], "haproxy": [sample(p99=1_000)]})
    row = next(row for row in goals_rows(made) if row[1] == "p99 ms")
    assert dict(zip(goals_head(made), row, strict=True)) == {
        "load": "500 streams",
        "figure": "p99 ms",
        "of": "HAProxy 2",
        "peer's": "1.00",
        "pure / compiled": "1.20 / 1.20",
        "this router 1": "0.90",
        "reached": "yes",
    }


def test_a_goal_that_is_missed_says_no_or_who_of_us_reaches_it() -> None:
    made = results(streams_500={"ours": [sample(p99=1_300)], "haproxy": [sample(p99=1_000)]})
    assert [row[-1] for row in goals_rows(made) if row[1] == "p99 ms"] == ["NO"]
    made.targets["compiled"] = "this router, compiled 1"
    made.add("streams-500", "compiled", sample(p99=800))
    assert [row[-3:] for row in goals_rows(made) if row[1] == "p99 ms"] == [["1.30", "0.80", "compiled"]]


def test_goals_are_of_one_process_and_relays_are_no_rival() -> None:
    made = results(_200B={"ours-relays-1": [sample(cpu=1)], "haproxy": [sample(cpu=15)]})
    made.targets["ours-relays-1"] = "this router, 1 relay 1"
    assert goals_rows(made) == []
    assert "ours-relays-1" not in [*rivals(made), *goals_head(made)]


def test_who_fails_requests_reaches_no_goal() -> None:
    made = results(streams_500={"ours": [sample(p99=1, errors=500)], "haproxy": [sample(p99=1_000)]})
    assert [row[-2:] for row in goals_rows(made) if row[1] == "p99 ms"] == [["-", "NO"]]


def test_goals_without_figures_are_left_out() -> None:
    assert goals_rows(results(streams_500={"ours": [sample()]})) == []
