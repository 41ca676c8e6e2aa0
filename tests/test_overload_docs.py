"""docs/overload.md: its options have the defaults it names, its examples are taken, its codes and metrics exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_router import errors
from sglang_router.config import RouterArgs
from sglang_router.config.args import parse
from sglang_router.config.table import OPTIONS
from sglang_router.observe.catalogue import METRICS

PAGE = (Path(__file__).parents[1] / "docs" / "overload.md").read_text()
BY_FLAG = {option.flag: option for option in OPTIONS.values()}
ENGINE = {"--max-running-requests", "--max-num-seqs", "--parallel", "--decode-base-ms"}


def kinds(error: type[errors.RouterError] = errors.RouterError) -> Iterator[type[errors.RouterError]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds(kind)


def test_every_flag_is_an_option_and_every_option_of_the_groups_is_told_of() -> None:
    named = set(re.findall(r"--[a-z][a-z-]+[a-z]", PAGE))
    assert named - ENGINE <= BY_FLAG.keys()
    told = {option.flag for option in OPTIONS.values() if option.group in ("Overload", "Outliers")}
    assert told | {"--retry-budget-ratio", "--retry-budget-min-per-second"} <= named


def test_the_defaults_of_timeouts() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| ([\d.]+) s \|", PAGE, re.MULTILINE)
    assert len(rows) >= 10
    assert [(flag, float(seconds)) for flag, seconds in rows] == [(flag, BY_FLAG[flag].default) for flag, _ in rows]


def test_the_defaults_of_limits() -> None:
    lines = re.findall(r"^\*\*`(--[a-z-]+) [\d.]+`\*\* \(([^:)]+)", PAGE, re.MULTILINE)
    assert len(lines) == 6
    for flag, said in lines:
        default = {None: "none", 0: "0", -1: "-1", 1 << 30: "1 GiB"}.get(BY_FLAG[flag].default)
        assert said == (default or f"{BY_FLAG[flag].default:g}"), flag


@pytest.mark.parametrize("line", re.findall(r"^ *(--[^`]*?)(?:   .*)?$", PAGE, re.MULTILINE))
def test_examples_are_taken(line: str) -> None:
    assert isinstance(parse(shlex.split(line), {}).checked(), RouterArgs)


def test_codes_have_the_status_it_names() -> None:
    known = {(str(kind.status), kind.code) for kind in kinds()}
    rows = re.findall(r"^\| (\d{3}) \| ([`a-z_, ]+) \|", PAGE, re.MULTILINE)
    named = {(status, code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert named <= known
    owners = [kind for kind in kinds() if "code" in vars(kind)]
    busy = {(str(kind.status), kind.code) for kind in owners if kind.status in (408, 429, 502, 503, 504)}
    never_seen = {("503", "workers_full"), ("504", "worker_timeout")}  # the first waits, the second is the others' base
    never_seen |= {("504", "websocket_idle"), ("504", "websocket_overdue")}  # the WebSocket is closed
    assert busy - named - never_seen <= {("504", "chunk_timeout"), ("502", "stream_broken")}


def test_metrics_exist() -> None:
    known = {row.name for row in METRICS}
    assert set(re.findall(r"`(sgl_router_\w+)", PAGE)) <= known


def test_the_table_is_there() -> None:
    measured = PAGE.partition("<!-- measured: begin -->\n")[2].partition("<!-- measured: end -->")[0]
    shares = dict(re.findall(r"^\| (\S+) +\| +yes \|[^|]*\|[^|]*\| +(\d+)%", measured, re.MULTILINE))
    assert int(shares["3x"]) >= 90
