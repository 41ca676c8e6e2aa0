"""The access line says all it should, nothing it must not, and only the router can write one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from event_makers import finished, leg
from fleets import any_policy
from sglang_router.observe import access, logs
from sglang_router.observe.access import AccessLog, WorkerLog
from sglang_router.observe.short_lines import ShortLines
from sglang_router.routing.events import Finished, WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import BreakerRules, FleetRules, HealthRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.trace_ids import TraceIds
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

WORKER = Worker(WorkerSpec(url="http://w:1", api_key="s3cret"), "id", 1, 0.0)
HIT = leg(WORKER, "hit", 870, 1000)
STREAM: dict[str, Any] = {
    "streaming": True,
    "received": 5120,
    "sent": 20480,
    "duration": 0.8124,
    "first_byte": 0.0951,
}


def served(**fields: Any) -> Finished:
    """A stream that the worker served."""
    return finished(HIT, **{**STREAM, **fields})


PLAIN = finished(
    id="req-2",
    method="GET",
    path="/health",
    endpoint="",
    peer="",
    model="",
    received=0,
    outcome=None,
    duration=0.0004,
    first_byte=0.0004,
    sent=2,
)
REFUSED = finished(**{**STREAM, "status": 503, "code": "no_workers", "outcome": None, "first_byte": -1.0})

Lines = Callable[[], list[str]]


@contextlib.contextmanager
def log_at(level: str, form: str) -> Iterator[tuple[logs.LogWriter, Lines]]:
    """A writer into a pipe, and a function that ends it and gives what it wrote."""
    reading, writing = os.pipe()
    writer = logs.configure(level, form, None, stderr=writing)

    def lines() -> list[str]:
        writer.close(10)
        os.close(writing)
        with open(reading, encoding="utf-8", newline="") as written:
            return written.read().splitlines()

    try:
        yield writer, lines
    finally:
        writer.close()
        for fd in (reading, writing):
            with contextlib.suppress(OSError):
                os.close(fd)


def access_lines(*events: Finished, level: str = "info", form: str = "text") -> list[str]:
    with log_at(level, form) as (writer, lines):
        log = AccessLog(writer, lambda: 1761393600.25)
        for event in events:
            log.finished(event)
        return lines()


def test_text() -> None:
    start = "2025-10-25T12:00:00.250Z INFO  sglang_router.access: "
    assert access_lines(served(), PLAIN, REFUSED) == [
        start + "POST /v1/chat/completions 200 id=chatcmpl-1 peer=10.0.0.9 worker=http://w:1 branch=hit matched=87%"
        " retries=0 duration_ms=812.4 first_byte_ms=95.1 in=5120 out=20480 stream=1 model=m ttft_ms=95.1",
        start + "GET /health 200 id=req-2 peer=- worker=- branch=- matched=-"
        " retries=0 duration_ms=0.4 first_byte_ms=0.4 in=0 out=2 stream=0",
        start + "POST /v1/chat/completions 503 id=chatcmpl-1 peer=10.0.0.9 worker=- branch=- matched=-"
        " retries=0 duration_ms=812.4 first_byte_ms=- in=5120 out=20480 stream=1 code=no_workers outcome=- model=m",
    ]


def test_lines_of_many_kinds_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the head of a line is kept for the next of its kind, or not any more."""
    monkeypatch.setattr(access, "_MOST_HEADS", 50)
    kinds = [(method, f"/v1/{n % 7}", 200 + n) for n, method in enumerate(("GET", "POST") * 60)]
    lines = access_lines(*(served(method=m, path=p, status=s, id=f"r{s}") for m, p, s in kinds * 2))
    assert [line.split()[3:7] for line in lines] == [[m, p, str(s), f"id=r{s}"] for m, p, s in kinds * 2]


def test_a_client_that_left_and_a_broken_worker_are_told() -> None:
    gone = served(outcome=Outcome.GONE)
    cut = served(outcome=Outcome.CUT, code="stream_broken", retries=2)
    one, other = access_lines(gone, cut)
    assert one.endswith(" stream=1 code=- outcome=gone model=m ttft_ms=95.1")
    assert " retries=2 " in other
    assert other.endswith(" stream=1 code=stream_broken outcome=cut model=m ttft_ms=95.1")


def test_both_workers_of_a_pair_are_told() -> None:
    decode = leg(WORKER, "turn")
    decode.partner = leg(Worker(WorkerSpec(url="http://p:1", worker_type="prefill"), "p", 2, 0.0), "hit")
    event = finished(decode, **STREAM)
    assert " worker=http://w:1 prefill=http://p:1 branch=turn " in access_lines(event)[0]
    told = json.loads(access_lines(event, form="json")[0])
    assert (told["worker"], told["prefill"]) == ("http://w:1", "http://p:1")
    assert "prefill" not in json.loads(access_lines(served(), form="json")[0])


def test_the_name_of_a_clients_key_is_told() -> None:
    named = served(client="alice")
    assert access_lines(named)[0].endswith(" stream=1 client=alice model=m ttft_ms=95.1")
    assert json.loads(access_lines(named, form="json")[0])["client"] == "alice"
    assert "client" not in access_lines(served())[0] + access_lines(served(), form="json")[0]


def test_the_model_that_served_is_told_where_the_client_named_another_one() -> None:
    other = leg(WORKER, "hit", 870, 1000)
    other.model = b'"llama 8b"'
    renamed = finished(other, **{**STREAM, "usage": Usage(455, 0, 8)})
    assert ' stream=1 served_model="llama 8b" prompt_tokens=455' in access_lines(renamed)[0]
    assert json.loads(access_lines(renamed, form="json")[0])["served_model"] == "llama 8b"
    assert "served_model" not in access_lines(served())[0] + access_lines(served(), form="json")[0]


def test_streams_that_another_worker_went_on_with_are_told() -> None:
    resumed = served(retries=2, resumed=2)
    assert access_lines(resumed)[0].endswith(" stream=1 resumed=2 model=m ttft_ms=95.1")
    assert json.loads(access_lines(resumed, form="json")[0])["resumed"] == 2
    assert "resumed" not in access_lines(served())[0] + access_lines(served(), form="json")[0]


def test_tokens_are_told_as_far_as_the_engine_tells_them() -> None:
    known, some, none = served(usage=Usage(455, 0, 8)), served(usage=Usage(455, -1, -1), resumed=1), served()
    first, second, third = access_lines(known, some, none)
    assert first.endswith(" stream=1 prompt_tokens=455 cached_tokens=0 completion_tokens=8 model=m ttft_ms=95.1")
    assert second.endswith(" stream=1 prompt_tokens=455 resumed=1 model=m ttft_ms=95.1")
    assert third.endswith(" stream=1 model=m ttft_ms=95.1")
    (unwritten,) = access_lines(served(usage=Usage(455, 64, -1)))
    assert unwritten.endswith(" stream=1 prompt_tokens=455 cached_tokens=64 model=m ttft_ms=95.1")
    lines = map(json.loads, access_lines(known, some, none, form="json"))
    assert [{name: tokens for name, tokens in line.items() if "_tokens" in name} for line in lines] == [
        {"prompt_tokens": 455, "cached_tokens": 0, "completion_tokens": 8},
        {"prompt_tokens": 455},
        {},
    ]


def test_json() -> None:
    stream, plain, refused = map(json.loads, access_lines(served(), PLAIN, REFUSED, form="json"))
    assert stream == {
        "time": "2025-10-25T12:00:00.250Z",
        "level": "info",
        "logger": "sglang_router.access",
        "message": "request",
        "id": "chatcmpl-1",
        "peer": "10.0.0.9",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "code": "",
        "outcome": "served",
        "worker": "http://w:1",
        "branch": "hit",
        "matched": 87,
        "retries": 0,
        "duration_ms": 812.4,
        "first_byte_ms": 95.1,
        "in": 5120,
        "out": 20480,
        "stream": True,
        "model": "m",
        "ttft_ms": 95.1,
    }
    assert (plain["worker"], plain["outcome"], plain["matched"]) == (None, None, None)
    assert (refused["code"], refused["first_byte_ms"]) == ("no_workers", None)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
"""Of a traceparent."""


def test_the_time_in_the_queue_and_the_trace_are_told() -> None:
    event = served()
    event.tag.queued = 0.0204
    event.tag.named = (b"", b"", f"00-{TRACE}-00f067aa0ba902b7-01".encode(), None, False, None)
    assert access_lines(event)[0].endswith(f" ttft_ms=95.1 queue_ms=20.4 trace_id={TRACE}")
    told = json.loads(access_lines(event, form="json")[0])
    assert (told["queue_ms"], told["trace_id"]) == (20.4, TRACE)
    event.tag.named = (b"", b"", b"nonsense", None, False, None)
    assert "trace_id" not in access_lines(event)[0] + access_lines(event, form="json")[0]


def test_the_router_tells_the_traces_that_it_begins() -> None:
    ids = TraceIds(b"key", 1.0)
    with log_at("info", "text") as (writer, lines):
        AccessLog(writer, traces=ids).finished(served())
        assert lines()[0].endswith(f" trace_id={ids.context(served().tag).trace.decode()}")


def test_models_that_clients_choose_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_MOST_HEADS", 50)
    names = [f'"m{n}"' for n in range(120)]
    lines = access_lines(*(served(model=name) for name in names * 2))
    assert [line.split(" model=")[1].split()[0] for line in lines] == [name.strip('"') for name in names * 2]


def test_short_lines_for_people_at_a_terminal() -> None:
    short, stamp = ShortLines(colours=False), "2025-10-25T12:00:00.250Z"
    assert short.request(served(usage=Usage(455, 0, 8), retries=1), stamp) == (
        "12:00:00.250 200 POST /v1/chat/completions  812 ms, first 95 ms  w:1 hit 87%  455+8 tokens  1 retry\n"
    )
    queued = served()
    queued.tag.queued = 0.25
    assert "  812 ms, first 95 ms, queued 250 ms  w:1 " in short.request(queued, stamp)
    assert short.request(REFUSED, stamp) == "12:00:00.250 503 POST /v1/chat/completions  812 ms  no_workers\n"
    assert short.request(served(path="/\x1b[2K\n"), stamp).startswith('12:00:00.250 200 POST "/\\u001b[2K\\n"  ')
    assert short.line(stamp, 30, "x", "worker is\nill", {"worker": "http://w:1"}, "") == (
        "12:00:00.250 WARN worker is\\nill worker=http://w:1\n"
    )
    coloured = ShortLines(colours=True)
    assert "\x1b[32m200\x1b[0m" in coloured.request(served(), stamp)
    assert "\x1b[31m503\x1b[0m" in coloured.request(REFUSED, stamp)
    assert "\x1b[33mWARN\x1b[0m" in coloured.line(stamp, 30, "x", "y", {}, "")


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_short_lines(monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    shown, terminal = pty.openpty()
    writer = logs.configure("info", "auto", None, stderr=terminal)
    assert writer.short is not None
    AccessLog(writer, short=writer.short.request).finished(served())
    writer.close(10)
    line = os.read(shown, 4096).decode()
    os.close(shown)
    os.close(terminal)
    assert "POST /v1/chat/completions  812 ms" in line
    assert ("\x1b[" in line) == coloured


def test_what_is_no_terminal_gets_whole_lines() -> None:
    with log_at("info", "auto") as (writer, _):
        assert writer.short is None


@pytest.mark.parametrize("level", ["warn", "error"])
def test_silence_above_info(level: str) -> None:
    assert access_lines(served(), level=level) == []


FORGERIES = [
    "x\n2025-10-25T12:00:00.250Z INFO  sglang_router.access: GET /health 200",
    "x\r",
    "x\x1b[2K\x1b[1A",
    "x\x00",
    "x\x7f",
    "x\x85y",
    "x\x9b2K",
    "x\u2028y",
    "x status=200 worker=http://evil",
    'x" code="',
    "",
]


@pytest.mark.parametrize("field", ["id", "path"])
@pytest.mark.parametrize("text", FORGERIES, ids=ascii)
def test_clients_cannot_break_or_forge_a_text_line(field: str, text: str) -> None:
    (line,) = access_lines(served(**{field: text}))
    assert line.isprintable()
    quoted = json.dumps(text)
    expected = {
        "path": f"POST {quoted} 200 id=chatcmpl-1 peer=",
        "id": f"POST /v1/chat/completions 200 id={quoted} peer=",
    }
    assert expected[field] in line.replace('"/v1/chat/completions"', "/v1/chat/completions").replace(
        '"chatcmpl-1"', "chatcmpl-1"
    )


@pytest.mark.parametrize("field", ["id", "path"])
@pytest.mark.parametrize("text", FORGERIES, ids=ascii)
def test_clients_cannot_break_or_forge_a_json_line(field: str, text: str) -> None:
    (line,) = access_lines(served(**{field: text}), form="json")
    assert line.isprintable()
    parsed: dict[str, Any] = json.loads(line)
    assert parsed[field] == text
    assert len(parsed) == 22


@pytest.mark.parametrize(
    "spelled", [json.dumps, lambda text: json.dumps(text, ensure_ascii=False)], ids=["escaped", "raw"]
)
@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("text", FORGERIES, ids=ascii)
def test_names_of_models_cannot_break_or_forge_a_line(text: str, form: str, spelled: Callable[[str], str]) -> None:
    (line,) = access_lines(served(model=spelled(text)), form=form)
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["model"] == text
    elif text.isprintable():
        assert f"model={json.dumps(text)}" in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_long_paths_are_cut(form: str) -> None:
    (line,) = access_lines(served(path="/" + "x" * 60000), form=form)
    assert len(line) < 1600


# -- changes of workers ---------------------------------------------------------------------------------


def worker_lines(level: str = "info") -> list[str]:
    """The life of a worker as its fleet tells it."""
    with log_at(level, "text") as (_, lines):
        fleet = Fleet(WorkerLog(), lambda: "id", any_policy, FleetRules(breaker=BreakerRules(threshold=1)))
        health = HealthRules(failure_threshold=1, success_threshold=1)
        worker = fleet.add(WorkerSpec(url="http://w:1", api_key="s3cret", health=health), 0.0)
        fleet.probed(worker, None, 1.0)
        fleet.probed(worker, "401 for\ns3cret", 2.0, refused=True)
        fleet.probed(worker, None, 3.0)
        fleet.lease(worker).close(Outcome.FAILED, 4.0)
        fleet.candidates(100.0)
        fleet.lease(worker).close(Outcome.SERVED, 101.0)
        fleet.set_draining(worker, True)
        fleet.set_draining(worker, False)
        fleet.withhold(worker, "its pod is not ready")
        fleet.withhold(worker, "")
        fleet.remove(worker)
        return [line[25:] for line in lines()]


def test_each_change_of_a_worker_is_a_line() -> None:
    start = "sglang_router.workers: "
    assert worker_lines() == [
        f"INFO  {start}worker added worker=http://w:1 health=starting source=api",
        f"INFO  {start}worker is healthy worker=http://w:1 was=starting",
        f'WARN  {start}worker is unhealthy worker=http://w:1 was=healthy error="401 for\\n***"',
        f"WARN  {start}worker is a new process: its remembered prefixes are dropped worker=http://w:1",
        f"INFO  {start}worker is healthy worker=http://w:1 was=unhealthy",
        f"WARN  {start}circuit breaker is open: the worker gets no requests if others are left"
        " worker=http://w:1 was=closed failures=1 open_seconds=10.0",
        f"INFO  {start}circuit breaker is half open: one request at a time probes the worker"
        " worker=http://w:1 was=open failures=1",
        f"INFO  {start}circuit breaker is closed: the worker gets requests again"
        " worker=http://w:1 was=half_open failures=0",
        f"INFO  {start}worker is draining: it gets no new requests worker=http://w:1 was=active",
        f"INFO  {start}worker gets new requests again worker=http://w:1 was=draining",
        f"INFO  {start}worker is withheld by its source: it gets no new requests"
        ' worker=http://w:1 was=allowed why="its pod is not ready"',
        f"INFO  {start}worker is not withheld any more: it gets new requests again worker=http://w:1 was=withheld",
        f"INFO  {start}worker removed worker=http://w:1 was=healthy source=api",
    ]


def test_only_troubles_above_info() -> None:
    assert [line.split(":", 1)[0] for line in worker_lines("warn")] == ["WARN  sglang_router.workers"] * 3


def test_a_change_that_is_new_to_the_log_is_told_all_the_same() -> None:
    with log_at("info", "text") as (_, lines):
        WorkerLog().worker_changed(WorkerChanged(WORKER, "promoted", "a", "b"))
        assert lines()[0].endswith("worker changed: promoted worker=http://w:1 was=a")
