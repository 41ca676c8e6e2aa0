"""Bounds, figures over seeds, tables and reports."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser

import pytest

from sglang_router.engine.scheduler import BatchLimits, CostModel
from sglang_router.replay.bounds import alone, least_mean
from sglang_router.replay.charts import Axis, line_chart, seconds
from sglang_router.replay.command import Progress, compare
from sglang_router.replay.comparison import Row, figure_of
from sglang_router.replay.engine import Gaps
from sglang_router.replay.options import ReplayOptions, parse_options
from sglang_router.replay.report import report
from sglang_router.replay.result import quantile
from sglang_router.replay.table import COLUMNS, as_json, table

# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_request_alone_takes_its_passes() -> None:
    cost, limits = CostModel(1000, 0.010, 0.001), BatchLimits(chunk=100)
    assert alone(250, cost, limits, 1.0) == pytest.approx(3 * 0.010 + 0.250)
    assert alone(250, cost, limits, 2.0) == pytest.approx((3 * 0.010 + 0.250) / 2)


def test_the_shortest_job_goes_first() -> None:
    """At 0: 4 s of work; at 1: 1 s, which goes before the rest of the first. Ends at 2 and 5."""
    assert least_mean([(0.0, 4.0), (1.0, 1.0)]) == pytest.approx((1.0 + 5.0) / 2)
    assert least_mean([(0.0, 1.0), (0.0, 3.0), (10.0, 2.0)]) == pytest.approx((1.0 + 4.0 + 2.0) / 3)
    assert least_mean([]) == 0.0


def test_no_order_is_better_than_the_shortest_first() -> None:
    rng = random.Random(3)
    for _ in range(50):
        jobs = sorted((rng.uniform(0, 5), rng.uniform(0.1, 2)) for _ in range(8))
        now = total = 0.0
        for arrival, work in jobs:  # first come, first served
            now = max(now, arrival) + work
            total += now - arrival
        assert least_mean(jobs) <= total / len(jobs) + 1e-9


@pytest.mark.parametrize("policy", ["round_robin", "least_load", "cache_aware", "longest_prefix"])
def test_nothing_is_better_than_the_bounds(policy: str) -> None:
    (row,) = compare(parse_options(["gen:groups,requests=400", "--policies", policy]), Progress(quiet=True))
    figures = {name: figure.mean for name, figure in row.figures.items()}
    assert 0.0 <= figures["hit"] <= figures["hit_bound"]
    assert figures["hit_regret"] == pytest.approx(figures["hit_bound"] - figures["hit"])
    assert figures["ttft_mean"] >= figures["ttft_mean_bound"] > 0.0
    assert figures["ttft_p90"] >= figures["ttft_p90_bound"] > 0.0
    assert figures["ttft_regret"] >= 1.0
    assert figures["balance"] >= 1.0


# -- figures ----------------------------------------------------------------------------------------------------------


def test_half_widths_are_those_of_student() -> None:
    """Of 1, 2, 3: the standard deviation is 1, and t of two degrees of freedom 4.30."""
    figure = figure_of([1.0, 2.0, 3.0])
    assert figure.mean == 2.0
    assert figure.half == pytest.approx(4.30 / math.sqrt(3))
    assert math.isnan(figure_of([5.0]).half)
    assert figure_of([5.0] * 30).half == 0.0


def test_quantiles() -> None:
    assert [quantile(range(100), share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [0, 50, 90, 99, 99]
    assert quantile([], 0.5) == 0.0


def test_gaps_are_counted() -> None:
    gaps = Gaps()
    assert gaps.quantile(0.99) == 0.0
    gaps.add(0.010, 98)
    gaps.add(0.500, 2)
    assert gaps.quantile(0.5) == pytest.approx(0.010)
    assert gaps.quantile(0.99) == pytest.approx(0.500)


# -- what is shown ----------------------------------------------------------------------------------------------------


def rows_of(*flags: str) -> tuple[list[Row], ReplayOptions]:
    options = parse_options(["gen:sessions,requests=200", *flags])
    return compare(options, Progress(quiet=True)), options


def test_the_table_has_a_line_for_each_policy() -> None:
    rows, _ = rows_of("--policies", "round_robin,cache_aware:cache-threshold=0.2")
    head, *lines = table(rows).splitlines()
    assert head.split()[0] == "policy"
    assert [line.split()[0] for line in lines] == ["round_robin", "cache_aware:cache-threshold=0.2"]


def test_with_several_seeds_the_table_has_half_widths() -> None:
    rows, _ = rows_of("--policies", "round_robin", "--seeds", "3")
    _, _, halves = table(rows).splitlines()
    assert halves.count("+-") == len(COLUMNS)
    assert len(rows[0].runs) == 3
    assert {run.seed for run in rows[0].runs} == {1, 2, 3}


def test_json_has_every_figure() -> None:
    rows, _ = rows_of("--policies", "round_robin,random", "--seeds", "2")
    found = json.loads(as_json("gen:x", rows))
    assert [each["policy"] for each in found["policies"]] == ["round_robin", "random"]
    figures = found["policies"][0]["figures"]
    assert {column.name for column in COLUMNS} <= figures.keys()
    assert "wall_requests_per_s" not in figures
    assert figures["hit"]["half_width"] >= 0.0


def test_json_of_one_seed_has_no_half_widths() -> None:
    rows, _ = rows_of("--policies", "round_robin")
    figures = json.loads(as_json("gen:x", rows))["policies"][0]["figures"]
    assert {figure["half_width"] for figure in figures.values()} == {None}


class Markup(HTMLParser):
    """Checks that elements are closed in order, and collects what they are."""

    VOID = ("meta", "line", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(document: str) -> Markup:
    markup = Markup()
    markup.feed(document)
    markup.close()
    assert not markup.open
    return markup


def test_the_report_is_one_well_formed_file() -> None:
    rows, options = rows_of("--policies", "round_robin,cache_aware", "--seeds", "2", "--speeds", "1,0.5")
    document = report("gen:<sessions>", options.about, rows)
    markup = read(document)
    assert markup.links == []
    assert "http" not in document
    assert markup.seen.count("svg") == 2 + len(rows)
    assert markup.seen.count("polyline") == 2 * len(rows) + 8 * len(rows)
    assert "Replay of gen:<sessions>" in markup.texts
    text = " ".join(markup.texts)
    assert "speeds 1.0,0.5 in turn" in text
    for row in rows:
        for column in COLUMNS:
            assert column.show(row.figures[column.name].mean) in text
    assert "nan" not in document


def test_the_best_of_each_column_is_marked() -> None:
    rows, options = rows_of("--policies", "round_robin,cache_aware")
    best = max(row.figures["hit"].mean for row in rows)
    shown = next(column for column in COLUMNS if column.name == "hit").show(best)
    assert f'<td class="best">{shown}</td>' in report("x", options.about, rows)


def test_a_report_without_answers() -> None:
    rows, options = rows_of("--policies", "round_robin", "--cache-tokens", "160", "--requests", "3")
    assert rows[0].figures["failed"].mean == 3
    assert "No request was answered" in report("x", options.about, rows)
    read(report("x", options.about, rows))


def test_axes_have_round_marks() -> None:
    assert Axis("x", 0, 10).marks() == [0, 2, 4, 6, 8, 10]
    assert Axis("x", 0, 1).marks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis("x", 0.01, 1, log=True).marks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    assert Axis("x", 0.001, 100, log=True).marks() == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100])
    assert Axis("x", 5, 5).marks()  # a range of nothing is one of something


def test_places_on_an_axis() -> None:
    assert [Axis("x", 0, 10).place(value) for value in (-1, 0, 5, 20)] == [0, 0, 0.5, 1]
    assert Axis("x", 0.01, 1, log=True).place(0.1) == pytest.approx(0.5)


def test_a_chart_shows_its_labels_as_text() -> None:
    chart = line_chart("a < b", [("p & q", [(0, 0), (1, 1)])], Axis("x", 0, 1), Axis("y", 0, 1))
    assert "a &lt; b" in chart
    assert "p &amp; q" in chart
    read(chart)


@pytest.mark.parametrize(("value", "text"), [(0.0123, "12.3 ms"), (1.5, "1.5 s"), (12.34, "12.3 s"), (2000, "2,000 s")])
def test_durations_for_people(value: float, text: str) -> None:
    assert seconds(value) == text
