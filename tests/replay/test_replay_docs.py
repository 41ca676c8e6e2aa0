"""docs/replay.md lists every option, generator and column."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_router.replay.generator import SHAPES, LoadShape
from sglang_router.replay.options import KINDS, listed
from sglang_router.replay.table import COLUMNS
from sglang_router.routing.policies import POLICIES

PAGE = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()


def test_options() -> None:
    part = PAGE.split("<!-- options: begin -->\n")[1].split("<!-- options: end -->")[0]
    head = "| flag | meaning | default |\n|---|---|---|\n"
    assert part == head + "".join(f"| `{flag}` | {help} | {default} |\n" for flag, help, default in listed())


def test_generators() -> None:
    table = PAGE.split("| name | what |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == list(SHAPES)
    for name in LoadShape._fields:
        assert f"`{name}`" in PAGE, name


def test_columns() -> None:
    told = re.findall(r"^\| ([^|]+) \|", PAGE.split("## Figures")[1], re.MULTILINE)
    for column in COLUMNS:
        # Quantiles and the mean of the time to first token share a row.
        assert column.title in told or column.title in ("TTFT p50", "p90", "p99", "mean"), column.title


def test_policies() -> None:
    assert set(KINDS) - set(POLICIES) == {"longest_prefix"}
    assert "`longest_prefix`" in PAGE
