"""Tables and verdicts of scripts/routing-suite, and the file that keeps the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.routing_suite import page
from scripts.routing_suite.rows import SuiteError
from scripts.routing_suite.samples import PROCESSES, REPLAYS, About, Cell, Samples
from scripts.routing_suite.tables import HIT, PROCESS_COLUMNS, TTFT, details, losses, summary, verdict, wins

NAMES = {"requests", *(each.name for each in PROCESS_COLUMNS)}


def cell(load: str, contender: str, hit: float, ttft: float, **more: float) -> Cell:
    figures = dict.fromkeys(NAMES, 0.0) | {"hit": hit, "ttft_p90": ttft} | more
    return Cell(PROCESSES, load, contender, 1, {name: {"mean": v, "half_width": None} for name, v in figures.items()})


def grid(*cells: Cell) -> dict[str, dict[str, Cell]]:
    found: dict[str, dict[str, Cell]] = {}
    for each in cells:
        found.setdefault(each.load, {})[each.contender] = each
    return found


def own(name: str) -> bool:
    return name.startswith("ours")


def test_a_summary_has_the_best_in_bold_and_a_dash_for_what_was_not_run() -> None:
    found = grid(cell("a", "ours", 0.5, 0.3), cell("a", "x", 0.6, 0.2), cell("b", "x", 0.1, 1.5))
    assert summary(found, HIT).splitlines()[2:] == [
        "| a    | 0.500 | **0.600** |",
        "| b    |     - | **0.100** |",
    ]
    assert summary(found, TTFT).splitlines()[2:] == [
        "| a    | 300 ms | **200 ms** |",
        "| b    |      - | **1.50 s** |",
    ]


def test_times_are_marked_when_other_programs_delayed_the_client() -> None:
    found = grid(cell("a", "ours", 0.5, 0.3, late_p99=0.11), cell("a", "x", 0.6, 0.2, late_p99=0.1))
    assert summary(found, TTFT).splitlines()[2] == "| a    | ~300 ms | **200 ms** |"
    assert summary(found, HIT).splitlines()[2] == "| a    | 0.500 | **0.600** |"
    assert "| ~300 ms |" in verdict(found, own, "")


def test_times_are_compared_only_side_by_side() -> None:
    mine = cell("a", "ours", 0.5, 0.3)
    for began, found in ((7.0, ["x"]), (8.0, [])):
        mine.began, its = 7.0, cell("a", "x", 0.5, 0.2)
        its.began = began
        assert [loss.rival.contender for loss in losses(grid(mine, its), own)] == found
        assert len(list(wins(grid(mine, its), own))) == len(found)
    better = cell("a", "x", 0.6, 0.2)
    better.began = 8.0
    assert "**300 ms**" in summary(grid(mine, better), TTFT)
    assert [loss.figure for loss in losses(grid(mine, better), own)] == [HIT], "cached tokens are compared anyway"


def test_a_summary_tells_what_share_failed() -> None:
    found = grid(cell("a", "x", 0.5, 0.3, requests=200, failed=2), cell("a", "y", 0.6, 0.2, requests=200, failed=6))
    assert summary(found, TTFT).splitlines()[2] == "| a    | 300 ms | **200 ms, 3% failed** |"


def test_contenders_are_in_the_order_of_the_load_that_had_most() -> None:
    found = grid(cell("a", "x", 0.5, 0.3), cell("a", "z", 0.5, 0.3), *(cell("b", n, 0.5, 0.3) for n in "xyz"))
    assert [word.strip() for word in summary(found, HIT).splitlines()[0].split("|")[1:-1]] == ["load", "x", "y", "z"]


def test_losses_are_more_than_two_percent_and_name_the_best_rival() -> None:
    found = grid(
        cell("a", "ours", 0.50, 0.100),
        cell("a", "x", 0.505, 0.090),
        cell("a", "y", 0.60, 0.099),
        cell("b", "ours", 0.50, 0.100),
        cell("b", "x", 0.505, 0.0985),
    )
    assert [(loss.ours.load, loss.figure, loss.rival.contender) for loss in losses(found, own)] == [
        ("a", HIT, "y"),
        ("a", TTFT, "x"),
    ]
    assert [round(loss.by, 6) for loss in losses(found, own)] == [0.2, 0.1]


def test_losses_of_each_of_ours_and_none_of_one_another() -> None:
    found = grid(cell("a", "ours 1", 0.5, 0.1), cell("a", "ours 2", 0.7, 0.1), cell("a", "x", 0.6, 0.1))
    assert [(loss.ours.contender, loss.rival.contender) for loss in losses(found, own)] == [("ours 1", "x")]
    assert list(losses(grid(cell("a", "ours 1", 0.5, 0.1), cell("a", "ours 2", 0.7, 0.1)), own)) == []


def test_wins_are_counted_over_the_loads_that_both_had() -> None:
    found = grid(
        cell("a", "ours", 0.5, 0.08),
        cell("a", "x", 0.5, 0.10),
        cell("b", "ours", 0.5, 0.09),
        cell("b", "x", 0.5, 0.10),
        cell("c", "ours", 0.5, 0.11),
        cell("c", "x", 0.5, 0.10),
        cell("d", "ours", 0.5, 0.11),
    )
    assert list(wins(found, own)) == [["ours", "x", "3", "1", "2", "1"]]


def test_a_verdict_without_losses_says_so() -> None:
    text = verdict(grid(cell("a", "ours", 0.5, 0.1), cell("a", "x", 0.5, 0.1)), own, "### Where we lose")
    assert text.startswith("### Where we lose\n")
    assert "None: no rival is better by more than 2%." in text


def test_details_tell_why_requests_failed() -> None:
    failing = cell("a", "x", 0.5, 0.1, failed=3)
    failing.reasons = {"status 503": 2, "cut": 1}
    text = details("a", "`gen:groups`", {"x": failing}, PROCESS_COLUMNS)
    assert "Failed with x: 2 x status 503, 1 x cut." in text
    assert "| x      |" in text
    assert "+-" not in text, "one seed has no interval"


def test_samples_are_kept_and_the_latest_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples.jsonl"
    kept = Samples(path)
    kept.add(About(PROCESSES, "suite --processes", "today", "A machine."))
    for hit in (0.1, 0.2):
        kept.add(cell("a", "x", hit, 0.1))
    kept.add(About(REPLAYS, "suite", "yesterday", "Another machine."))
    kept.add(About(REPLAYS, "suite --only agents", "today", "A machine."))
    again = Samples(path)
    assert again.grid(PROCESSES, ["a", "b"])["a"]["x"].mean("hit") == 0.2
    assert list(again.grid(PROCESSES, ["a", "b"])) == ["a"]
    assert again.grid(PROCESSES, ["a"], ["y"]) == {}
    assert again.about(PROCESSES) == "`suite --processes` (today). A machine."
    assert again.about(REPLAYS) == "`suite` (yesterday), `suite --only agents` (today). A machine."
    again.forget(PROCESSES)
    assert Samples(path).grid(PROCESSES, ["a"]) == {}
    assert Samples(path).about(PROCESSES) == ""
    assert Samples(path).about(REPLAYS) == again.about(REPLAYS) != ""


def test_samples_of_another_version_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"about":{"kind":"replays"}}\n')
    with pytest.raises(SuiteError, match=r"samples.jsonl was not written by this version: .*; remove it"):
        Samples(path)


def test_the_page_has_all_markers() -> None:
    text = page.PAGE.read_text()
    for name in (REPLAYS, PROCESSES):
        assert "new\n" in page.replaced(text, name, "new\n")
    with pytest.raises(SuiteError, match=r"routing.md has no markers for colours"):
        page.replaced(text, "colours", "")
