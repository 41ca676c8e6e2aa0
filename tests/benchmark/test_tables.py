"""The tables, aligned and in Markdown."""

from __future__ import annotations

from scripts.benchmark import tree
from scripts.benchmark.tables import all_tables
from scripts.reporting import table

from bench_samples import results, sample


def test_words_stand_to_the_left_and_numbers_to_the_right() -> None:
    assert table(["load", "target", "ms"], [["4 kB", "smg", "1.25"], ["x", "y", "10.00"]], markdown=False, words=2) == (
        "load  target     ms\n4 kB  smg      1.25\nx     y       10.00"
    )


def test_a_table_in_markdown_says_how_its_columns_stand() -> None:
    assert table(["load", "ms"], [["4 kB", "1.25"]], markdown=True).splitlines() == [
        "| load |   ms |",
        "| ---- | ---: |",
        "| 4 kB | 1.25 |",
    ]


def test_a_row_shows_medians_and_ratios_to_the_reference() -> None:
    made = results(
        _4kB={
            "ours": [sample(cpu=45, p99=1_000), sample(cpu=50, p99=2_000), sample(cpu=55, p99=4_000)],
            "reference": [sample(cpu=100, p99=4_000, memory=800)],
            "direct": [sample(cpu=0)],
        }
    )
    lines = [line.split("  ") for line in all_tables(made, markdown=False).splitlines()]
    rows = [[cell.strip() for cell in line if cell] for line in lines if line[0].startswith("4 kB")]
    assert rows == [
        ["4 kB", "this router 1", "500", "1.00", "2.00", "0.50", "4.00", "50.0", "10%", "0.50", "40", "0"],
        ["4 kB", "sglang-router 0.3.2", "500", "2.00", "4.00", "1.00", "8.00", "100.0", "0%", "1.00", "800", "0"],
        ["4 kB", "no router", "500", "1.00", "2.00", "0.50", "4.00", "-", "-", "-", "-", "0"],
    ]


def test_times_of_nothing_are_no_times() -> None:
    made = results(streams_500={"ours": [sample(p99=0)]})
    assert "0.00" not in all_tables(made, markdown=False)


def test_the_former_revision_comes_before_the_reference() -> None:
    made = results(_4kB={"ours": [sample(cpu=50)], "before": [sample(cpu=40)], "reference": [sample(cpu=100)]})
    made.targets["before"] = "before HEAD"
    assert "1.25" in all_tables(made, markdown=False)


def test_groups_that_were_not_measured_have_no_table() -> None:
    shown = all_tables(results(streams_500={"ours": [sample()]}), markdown=True)
    assert shown.startswith("**Streams")
    assert "CPU us/chunk" in shown
    assert "Closed loop" not in shown


def test_the_prefix_tree_stands_beside_the_published_figures() -> None:
    made = results()
    made.tree = {f"{name} {size}": 2.0 * size for size in tree.SIZES for name in ("insert", "match")}
    assert ["200 B", "400.0", "400", "0.5", "0.8"] in tree.rows(made.tree)
    assert "253 MB/s" in all_tables(made, markdown=False)
