"""Real engines in scripts/routing-suite, as far as no engine is needed: counters, and the text of the page."""

from __future__ import annotations

from pathlib import Path

from scripts.routing_suite import page
from scripts.routing_suite.real import PREDICTED, counters
from scripts.routing_suite.rows import ENGINED
from scripts.routing_suite.samples import REAL, About, Cell, Samples
from scripts.routing_suite.tables import REAL_COLUMNS


def test_counters_are_summed_over_their_labels() -> None:
    text = """\
# HELP sglang:prompt_tokens_total tokens
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="built-in",tp_rank="0"} 1.5e+03
sglang:prompt_tokens_total{model_name="built-in",tp_rank="1"} 500.0
llamacpp:prompt_tokens_total 7
"""
    assert counters(text) == {"sglang:prompt_tokens_total": 2000.0, "llamacpp:prompt_tokens_total": 7.0}


def test_predictions_are_shown_where_a_router_tells_them(tmp_path: Path) -> None:
    samples, load = Samples(tmp_path / "routing.jsonl"), ENGINED[0]
    assert page.engines_text(samples) == ""
    samples.add(About(REAL, "sh scripts/routing-suite --engines", "2026-01-01", "a machine"))
    for router, predicted in (("ours cost", 0.25), ("another", -1.0)):
        names = {"requests", *(each.name for each in REAL_COLUMNS)}
        told = {**dict.fromkeys(names, 0.0), PREDICTED: predicted}
        figures = {name: {"mean": value, "half_width": None} for name, value in told.items()}
        samples.add(Cell(REAL, load.name, router, 1, figures))
    text = page.engines_text(samples)
    assert text.startswith("`sh scripts/routing-suite --engines` (2026-01-01). a machine\n")
    lines = {line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith("| ")}
    column = lines["router"].index(next(word for word in lines["router"] if word.strip() == PREDICTED))
    assert lines["ours cost"][column].strip() == "0.250"
    assert lines["another"][column].strip() == "-"
    assert load.about in text
