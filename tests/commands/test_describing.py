"""What the commands print for people: states, tables, figures, and what a terminal must not get."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_router.commands.describing import (
    option_lines,
    reload_lines,
    state_of,
    status_lines,
    value_text,
    worker_lines,
)
from sglang_router.commands.figures import Scrape, of_workers, overall
from sglang_router.commands.printable import escaped, shown
from sglang_router.commands.tables import duration, milliseconds, size, table
from sglang_router.commands.top import Look, frame, line

A = "http://10.0.0.7:8000"


def worker(**more: Any) -> dict[str, Any]:
    base = {"url": A, "model_id": "m", "worker_type": "regular", "health": "healthy", "circuit_breaker": "closed"}
    return base | {"load": 2, "waiting": 0, "processed": 40, "tree_size": 1536, "registered_secs": 125.0} | more


@pytest.mark.parametrize(
    ("more", "state", "why"),
    [
        ({}, "healthy", ""),
        ({"draining": True, "load": 1}, "draining", "1 request in flight"),
        ({"draining": True, "load": 1, "elsewhere": 2}, "draining", "3 requests in flight"),
        ({"withheld": "the pod is not ready"}, "withheld", "the pod is not ready"),
        ({"paused": ["memory", "weights"]}, "paused", "by the control plane: memory, weights"),
        ({"health": "unhealthy", "last_error": "refused"}, "unhealthy", "refused"),
        ({"health": "starting", "replica": {"reason": "loads"}}, "starting", "loads"),
        ({"held_off": "it fails"}, "ejected", "it fails"),
        ({"circuit_breaker": "half_open"}, "breaker half open", ""),
    ],
)
def test_the_state_of_a_worker_in_a_word_and_why(more: dict[str, Any], state: str, why: str) -> None:
    assert state_of(worker(**more)) == (state, why)


def test_a_table_of_workers_leaves_out_what_nobody_has() -> None:
    assert "\n".join(worker_lines([worker(), worker(url=A + "1", draining=True, load=13)])) == (
        "worker                  model  state     in flight  processed  prefixes        age  why\n"
        "http://10.0.0.7:8000    m      healthy           2         40   1.5 KiB  2 min 5 s\n"
        "http://10.0.0.7:80001   m      draining         13         40   1.5 KiB  2 min 5 s  13 requests in flight"
    ).replace("http://10.0.0.7:80001 ", "http://10.0.0.7:80001").replace("7:8000    m", "7:8000   m").replace(
        "worker                  model", "worker                 model"
    )
    assert list(worker_lines([])) == ["no workers: add one with `sglang-router add URL`"]


def test_the_status_names_what_is_wrong() -> None:
    ready = {"status": "not ready", "reason": "no worker can take requests"}
    found = status_lines(
        A,
        {"version": "1.0", "build": "interpreted"},
        ready,
        [worker(), worker(health="unhealthy", last_error="no")],
        "cost",
    )
    assert list(found) == [
        f"router     {A}, version 1.0 (interpreted)",
        "ready      no: no worker can take requests",
        "policy     cost",
        "workers    2: 1 healthy, 1 unhealthy",
        "in flight  4 requests",
        f"  {A} is unhealthy: no",
    ]


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ({"state": "connected", "peers": 1, "store": "redis://h:6379"}, "1 other router through redis://h:6379"),
        ({"state": "slow", "problem": "redis://h:6379 does not answer"}, "alone: redis://h:6379 does not answer"),
        ({"state": "connecting", "problem": ""}, "alone: connecting"),
        ({"state": "connected", "peers": 0}, "0 other routers"),
    ],
)
def test_the_status_tells_of_the_other_routers(shared: dict[str, Any], said: str) -> None:
    ready = {"status": "ready", "shared_state": shared}
    assert f"fleet      {said}" in list(status_lines(A, {}, ready, [], ""))


def test_options_that_nobody_set_are_left_out() -> None:
    given = {"flag": "--policy", "value": "cost", "origin": "file", "where": "r.yaml", "reload": True}
    usual = {"flag": "--port", "value": 30000, "origin": "default", "where": "", "reload": False}
    assert list(option_lines([given, usual], everything=False)) == [
        "option    value  from         on a change",
        "--policy  cost   file r.yaml  reload",
    ]
    assert len(list(option_lines([given, usual], everything=True))) == 3
    assert list(option_lines([usual], everything=False)) == ["every option has its default; --all shows them"]
    assert [value_text(each) for each in (True, None, [], ["a", 1], {"k": "v"}, 0.5)] == [
        "on",
        "none",
        "none",
        "a 1",
        "k=v",
        "0.5",
    ]


def test_a_reload_says_what_changed_and_what_did_not() -> None:
    report = {"changed": ["--policy"], "needs_restart": ["--port"], "added": [A], "removed": [], "file": "r.yaml"}
    assert list(reload_lines(report)) == [
        "in effect now: --policy",
        f"  added {A}",
        "these changes need a restart: --port",
    ]
    assert next(iter(reload_lines({"file": None}))) == "nothing changed"


def test_what_others_chose_cannot_command_a_terminal() -> None:
    bad = "\x1b[2J"
    for lines in (
        worker_lines([worker(model_id=bad, last_error=bad, health=bad)]),
        frame(look(bad), A, "", bad, 999, 9),
    ):
        assert all(each.isprintable() for each in lines)
    assert shown("a\x1bb") == "a\\x1bb"
    assert escaped('"\x1b\U000e0001"\n') == '"\\u001b\\udb40\\udc01"\n'


def test_figures_have_units() -> None:
    assert [duration(each) for each in (5, 65, 7300, 90000)] == ["5 s", "1 min 5 s", "2 h 1 min", "1 d 1 h"]
    assert [size(each) for each in (17, 2048, 3 << 20, 5 << 30)] == ["17 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert [milliseconds(each) for each in (None, 0.25, 12.0)] == ["-", "250 ms", "12.0 s"]
    assert list(table(("a", "b", "n"), [("x", "", "1"), ("yy", "", "22")], right=("n",))) == [
        "a    n",
        "x    1",
        "yy  22",
    ]


# -- top ---------------------------------------------------------------------------------------------------------------


def scrape(moment: float, requests: int, cached: int) -> Scrape:
    return Scrape(
        moment,
        "# TYPE sgl_router_requests counter\n"
        f'sgl_router_requests_total{{route="/generate"}} {requests}\n'
        f'sgl_router_requests_total{{route="/v1/models"}} {requests}\n'
        "# TYPE sgl_router_processed_requests counter\n"
        f'sgl_router_processed_requests_total{{worker="{A}"}} {requests}\n'
        "# TYPE sgl_router_prompt_tokens counter\n"
        f'sgl_router_prompt_tokens_total{{worker="{A}",model="m"}} {requests * 10}\n'
        "# TYPE sgl_router_cached_tokens counter\n"
        f'sgl_router_cached_tokens_total{{worker="{A}",model="m"}} {cached}\n'
        "# TYPE sgl_router_time_to_first_byte_seconds histogram\n"
        f'sgl_router_time_to_first_byte_seconds_bucket{{route="/generate",le="0.1"}} {requests}\n'
        f'sgl_router_time_to_first_byte_seconds_bucket{{route="/generate",le="0.2"}} {requests * 2}\n'
        f'sgl_router_time_to_first_byte_seconds_bucket{{route="/generate",le="+Inf"}} {requests * 2}\n',
    )


def look(url: str = A) -> Look:
    old, new = scrape(0.0, 10, 0), scrape(10.0, 30, 100)
    return Look([worker(url=url)], overall(old, new), of_workers(old, new))


def test_rates_are_those_of_the_time_between_two_scrapes() -> None:
    rates = look().rates
    assert (rates.requests, rates.errors, rates.cached) == (4.0, 0.0, 0.5)
    assert rates.first_byte_p50 == pytest.approx(0.1)
    assert rates.first_byte_p95 == pytest.approx(0.19)
    assert look().by_worker[A] == (2.0, 0.0, 0.5)


def test_nothing_happened_is_not_zero_percent() -> None:
    same = scrape(1.0, 5, 5)
    rates = overall(same, scrape(2.0, 5, 5))
    assert (rates.requests, rates.first_byte_p50, rates.cached) == (0.0, None, None)
    assert "ttft p50 - p95 -  cached -" in line(Look([], rates, {}), "12:00:00")


def test_a_restarted_router_counts_from_zero_without_negative_rates() -> None:
    rates = overall(scrape(0.0, 50, 50), scrape(1.0, 2, 0))
    assert rates.requests == 0.0


def test_the_screen_is_never_overfull() -> None:
    found = look()
    many = Look([worker(url=f"http://10.0.0.{number}:8000") for number in range(200)], found.rates, {})
    lines = frame(many, A, "12:00:00", "", 60, 20)
    assert len(lines) == 20
    assert max(map(len, lines)) <= 60
    assert lines[-1] == "and 185 more"
    assert frame(found, A, "12:00:00", "gone", 100, 20)[2] == "error: gone"


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 40])
@pytest.mark.parametrize("columns", [1, 10, 200])
def test_a_frame_fits_into_any_terminal(columns: int, rows: int) -> None:
    lines = frame(Look([worker()] * 30, look("").rates, {}), A, "12:00:00", "gone", columns, rows)
    assert len(lines) <= max(rows, 1)
    assert all(len(each) <= columns for each in lines)
