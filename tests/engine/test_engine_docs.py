"""docs/engine.md names every option with its default, every endpoint and every metric."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from sglang_router.engine.control import EngineCollector
from sglang_router.engine.options import EngineOptions
from sglang_router.engine.runner import EngineLatencies
from sglang_router.engine.server import create_app

PAGE = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()


def test_options() -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*?) *\|", PAGE, re.MULTILINE))
    assert set(rows) == {"--" + option.name.replace("_", "-") for option in fields(EngineOptions)}
    for option in fields(EngineOptions):
        told: Any = rows["--" + option.name.replace("_", "-")]
        default: Any = option.default
        assert default == ((told != "off") if isinstance(default, bool) else type(default)(told)), option.name


def test_endpoints() -> None:
    table = PAGE.split("## Endpoints")[1].split("\n\n")[1]
    told = {path for row in table.splitlines() for path in re.findall(r"`(/[\w/]+)`", row.split("|")[1])}
    assert told == {route.path for route in create_app().routes if isinstance(route, Route)}


def test_metrics() -> None:
    registry = CollectorRegistry()
    EngineLatencies(registry, "m")
    registry.register(EngineCollector(EngineOptions().scheduler(), "m"))
    names = {f.name + ("_total" if f.type == "counter" else "") for f in registry.collect()}
    told = set(re.findall(r"`(sglang:\w+)`", PAGE))
    assert told == {name for name in names if not name.endswith("_created")}


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"speed": -1.0}, {"prefill_tokens_per_s": 0.0}])
def test_options_that_make_no_engine(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"page|negative|positive"):
        EngineOptions(**wrong).scheduler()  # type: ignore[arg-type]
