"""scripts/routing-suite as a user runs it: a short replay, and a short run of our router before two engines."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.routing_suite import live
from scripts.routing_suite.replays import policies
from scripts.routing_suite.routers import Contender, contenders, flags
from scripts.routing_suite.rows import Lived
from scripts.routing_suite.scripted import script

ROOT = Path(__file__).parents[2]
WITHIN = 120.0


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "scripts.routing_suite", *words]


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=WITHIN, check=False)


def ours(folder: Path) -> Contender:
    """Return our router with `cache_aware`; nothing is installed."""
    (found,) = contenders(folder, "ours cache_aware")
    assert isinstance(found, Contender)
    return found


def gone(pid: str) -> bool:
    """Return whether a process has ended, or is ending: a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def interrupted(run: subprocess.Popen[str]) -> str:
    """Press Ctrl-C until a process ends, for Python may lose one while it forks; return its standard error."""
    for _ in range(10):
        os.kill(run.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return run.communicate(timeout=WITHIN / 10)[1]
    raise AssertionError("it does not end")


def test_a_short_replay_gives_all_tables() -> None:
    run = suite("--only", "hot prefix", "--quick")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    summaries = lines[: next(number for number, line in enumerate(lines) if line.startswith("### Where `"))]
    assert len([line for line in summaries if line.startswith("| one hot prefix")]) == 3
    for policy in (each for each in policies() if "session" not in each):
        assert f"one hot prefix: {policy}\n" in run.stderr
    assert run.stdout.count("**") >= 6


def test_our_router_before_two_engines(tmp_path: Path) -> None:
    load = Lived("few groups", "groups,requests=24,groups=2,prefix=256,tail=32,output=8,rate=40", speeds=(20.0, 20.0))
    chains = script(load.trace, 1)
    ((found, reasons),) = live.run(load, [ours(tmp_path)], chains)
    assert reasons == {}
    assert (found["requests"], found["failed"]) == (24, 0)
    prompts = sum(turn.prompt for chain in chains for turn in chain.turns)
    # Each group is computed once at least, and once on each engine at most.
    assert 1 - (4 * 256 + 24 * 48) / prompts <= found["hit"] <= 1 - 2 * 256 / prompts
    assert 0 < found["ttft_p50"] <= found["ttft_p99"]
    assert 1 <= found["balance"] <= 2
    assert found["cpu_engines"] > 0


def test_a_session_finds_its_own_answers_in_the_cache(tmp_path: Path) -> None:
    trace = "sessions,requests=12,turns=4,think=0.05,prefix=256,tail=32,output=32,rate=20"
    load = Lived("sessions", trace, speeds=(20.0,), sessions=True)
    chains = script(trace, 1)
    ((found, reasons),) = live.run(load, [ours(tmp_path)], chains)
    assert reasons == {}
    # With one engine, everything but the new tokens of each turn, rounded up to a page, and the first system prompt.
    turns = [turn for chain in chains for turn in chain.turns]
    new = sum(len(turn.text) // 5 + 16 for turn in turns)
    assert found["hit"] >= 1 - new / sum(turn.prompt for turn in turns)


def test_two_routers_side_by_side_and_an_engine_that_restarts(tmp_path: Path) -> None:
    trace = "groups,requests=60,groups=2,prefix=64,tail=32,output=8,rate=30"
    load = Lived("restart", trace, speeds=(20.0, 20.0), restart=0.5, down=0.5)
    router = ours(tmp_path)
    both = live.run(load, [router, router], script(trace, 1))
    assert len(both) == 2
    for found, _ in both:
        assert found["requests"] == 60
        assert found["failed"] < 30


def test_flags_of_a_policy() -> None:
    assert flags("cache_aware") == ("--policy", "cache_aware")
    assert flags("cost:session-affinity:cache-threshold=0.2") == (
        *("--policy", "cost", "--session-affinity", "--cache-threshold", "0.2"),
    )


def test_ctrl_c_ends_everything() -> None:
    with subprocess.Popen(
        command("--processes", "--quick", "--only", "hot prefix", "--routers", "ours cache_aware"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        found: list[str] = []
        while len(found) < 5 and run.poll() is None:  # four engines and the router
            found = children.read_text().split()
        errors = interrupted(run)
    assert run.returncode == 130, errors
    assert "routing-suite: interrupted" in errors
    until = time.monotonic() + WITHIN  # the kernel kills what was just being started, a moment after its parent ended
    while not all(gone(pid) for pid in found):
        assert time.monotonic() < until, found


def test_a_load_or_router_that_is_not_there_is_an_error() -> None:
    run = suite("--only", "colour", "--quick")
    assert run.returncode == 2
    assert "no load has 'colour' in its name" in run.stderr
