"""The options of scripts/bench."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.benchmark.options import LAST, parse


def test_without_options_everything_is_measured_in_less_than_forty_minutes() -> None:
    options = parse([])
    assert (options.only, options.loads, options.rounds, options.seconds) == ((), (), 5, None)
    assert options.minutes <= 40
    assert options.json == LAST


def test_the_core_is_three_targets_and_no_router_in_less_than_twelve_minutes() -> None:
    options = parse(["--core"])
    assert options.only == ("ours", "reference", "haproxy", "direct")
    assert options.loads == ("sizes", "streams")
    assert options.minutes <= 12


def test_quick_is_one_round_of_a_second() -> None:
    options = parse(["--quick"])
    assert (options.rounds, options.seconds) == (1, 1.0)


def test_a_revision_is_measured_beside_this_checkout_alone() -> None:
    options = parse(["--against", "HEAD~1", "--rounds", "9"])
    assert (options.only, options.against, options.rounds) == (("ours", "before"), "HEAD~1", 9)


def test_targets_and_loads_that_are_named_come_before_those_of_the_mode() -> None:
    options = parse(["--core", "--only", "ours, smg", "--loads", "open-*"])
    assert (options.only, options.loads) == (("ours", "smg"), ("open-*",))


def test_what_follows_flags_is_for_the_router() -> None:
    options = parse(["--rounds", "2", "--flags", "--policy", "random", "--quick"])
    assert options.flags == ("--policy", "random", "--quick")
    assert options.rounds == 2


def test_a_file_of_results_is_relative_to_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["--json", "samples.json"]).json == tmp_path / "samples.json"


@pytest.mark.parametrize("words", [["--rounds", "-1"], ["--seconds", "-0.5"], ["--minutes", "-1"], ["--nothing"]])
def test_a_wrong_option_ends_with_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert "usage: scripts/bench" in capsys.readouterr().err
