"""The chart is well-formed SVG that shows every target, in light and in dark mode."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from scripts.benchmark.chart import HEIGHT, PANELS, WIDTH, Scale, draw, number, scale_of
from scripts.benchmark.results import Results

from bench_samples import TITLES, results, sample

SVG = "{http://www.w3.org/2000/svg}"


def measured() -> Results:
    """All loads of all panels, on three targets and without a router."""
    made = results()
    for load in {load for panel in PANELS for load, _ in panel.loads}:
        for factor, target in enumerate(TITLES, 1):
            made.add(load, target, sample(cpu=10.0 * factor, p99=700.0 * factor))
    return made


def drawn(made: Results) -> ElementTree.Element:
    return ElementTree.fromstring(draw(made))


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_every_target_has_a_curve_in_every_panel_and_a_line_in_the_legend() -> None:
    root = drawn(measured())
    curves = [each for each in root.iter(f"{SVG}path") if each.get("class") == "curve"]
    assert len(curves) == len(PANELS) * 3
    assert {"this router 1", "sglang-router 0.3.2", "HAProxy 2"} <= set(texts(root))
    assert "no router" not in texts(root)


def test_this_router_is_drawn_on_top_of_the_others() -> None:
    classes = [each.get("class") or "" for each in drawn(measured()).iter(f"{SVG}g")]
    series = [each for each in classes if each.startswith("series")]
    assert series[2::3] == ["series ours s0"] * len(PANELS)


def test_axes_and_their_marks_are_named() -> None:
    found = texts(drawn(measured()))
    assert {panel.title for panel in PANELS} | {panel.axis for panel in PANELS} <= set(found)
    assert {"200 B", "400 kB", "3,000", "10", "50"} <= set(found)


def test_colours_follow_the_readers_mode() -> None:
    style = next(drawn(measured()).iter(f"{SVG}style")).text or ""
    light, _, dark = style.partition("@media(prefers-color-scheme:dark)")
    for name in ("text", ".soft", ".back", ".grid", ".s0", ".s8"):
        pattern = re.compile(rf"{re.escape(name)}{{[^}}]*(#\w+)")
        assert pattern.findall(light) != pattern.findall(dark)
        assert len(pattern.findall(light)) == len(pattern.findall(dark)) == 1


def test_everything_lies_within_the_picture() -> None:
    root = drawn(measured())
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    for group in root.iter(f"{SVG}g"):
        x, _, y = (group.get("transform") or "translate(0 0)")[10:-1].partition(" ")
        assert 0 <= float(x) < WIDTH
        assert 0 <= float(y) < HEIGHT


def test_a_name_with_marks_of_xml_stays_a_name() -> None:
    made = measured()
    made.targets["ours"] = "<ours> & others"
    assert "<ours> & others" in texts(drawn(made))


def test_what_was_not_measured_is_said() -> None:
    assert texts(drawn(results())).count("not measured") == len(PANELS)


def test_a_scale_begins_and_ends_at_marks_around_the_values() -> None:
    scale = scale_of([3.0, 70.0], height=100)
    assert (scale.low, scale.high) == (2.0, 100.0)
    assert scale.ticks() == [2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    assert (scale.y(2.0), scale.y(100.0)) == (100.0, 0.0)


def test_a_single_value_has_a_scale_too() -> None:
    scale = scale_of([10.0], height=50)
    assert scale.low <= 10.0 < scale.high


def test_a_scale_over_many_decades_marks_only_the_decades() -> None:
    assert Scale(0.01, 1_000, 100).ticks() == pytest.approx([0.01, 0.1, 1, 10, 100, 1_000])


@pytest.mark.parametrize(("value", "text"), [(0.05, "0.05"), (0.2, "0.2"), (1.0, "1"), (20_000.0, "20,000")])
def test_marks_have_no_exponents(value: float, text: str) -> None:
    assert number(value) == text
