"""`sglang-router replay` as a process: what it prints, what it refuses, and how it stops."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-W", "error", "-m", "sglang_router", "replay")
SHORT = "gen:sessions,requests=200"


def replay(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)


def test_it_prints_a_table_and_how_fast_it_was() -> None:
    done = replay(SHORT, "--policies", "cache_aware,round_robin,longest_prefix", "--workers", "3")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.startswith("policy")
    assert [line.split()[0] for line in lines] == ["cache_aware", "round_robin", "longest_prefix"]
    assert done.stderr.startswith("600 requests in ")
    assert done.stderr.endswith(" per second\n")


def test_the_same_seed_prints_the_same() -> None:
    words = (SHORT, "--policies", "random,cache_aware", "--json", "--seeds", "2", "--restart", "1@5", "--quiet")
    one, same, other = replay(*words), replay(*words), replay(*words, "--seed", "9")
    assert one.stderr == ""
    assert one.stdout == same.stdout != other.stdout
    assert [each["seeds"] for each in json.loads(one.stdout)["policies"]] == [[1, 2], [1, 2]]


def test_options_of_the_router_count_for_all_policies_or_for_one() -> None:
    """No request may begin while another runs: those that come meanwhile are refused at once."""
    flags = ("--max-concurrent-requests", "1", "--queue-size", "0", "--json")
    policies = "round_robin,round_robin:queue-size=1000:queue-timeout-secs=600"
    done = replay("gen:groups,requests=50,rate=1000", "--policies", policies, *flags)
    assert done.returncode == 0, done.stderr
    few, all_of_them = (each["figures"]["failed"]["mean"] for each in json.loads(done.stdout)["policies"])
    assert few > 30
    assert all_of_them == 0


def test_it_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    done = replay(SHORT, "--policies", "round_robin", "--report", str(path))
    assert done.returncode == 0, done.stderr
    document = path.read_text()
    assert document.startswith("<!doctype html>")
    assert document.count("<svg") == 3


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("nowhere.jsonl",), "nowhere.jsonl: cannot be read: No such file or directory"),
        (("gen:nothing",), "unknown generator 'nothing'"),
        (("--workers", "3"), "the trace must come first"),
        ((SHORT, "--policies", "cache_awrae"), "unknown policy 'cache_awrae'; did you mean cache_aware?"),
        ((SHORT, "--polices", "random"), "unknown flag --polices"),
        ((SHORT, "--policies", "random:colour=red"), "unknown flag --colour"),
        ((SHORT, "--policy", "random"), "--policy has no effect here; name the policies in --policies"),
        ((SHORT, "--workers", "0"), "--workers must be at least 1"),
        ((SHORT, "--cache-tokens", "10"), "--cache-tokens must be at least 16"),
        ((SHORT, "--speedup", "nan"), "--speedup must be above 0"),
        ((SHORT, "--speeds", "1,-1"), "--speeds: '1,-1' is not a list of numbers above 0"),
        ((SHORT, "--leave", "0"), "--leave: '0' is not a list of WORKER@SECONDS"),
        ((SHORT, "--restart", "8@10"), "--restart: there is no worker 8; they are numbered from 0 to 7"),
        ((SHORT, "--report", "/nowhere/x.html"), "--report /nowhere/x.html: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], what: str) -> None:
    done = replay(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert what in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_help() -> None:
    for words in ((), ("--help",), ("-h",)):
        done = replay(*words)
        assert done.returncode == 0
        assert "--cache-tokens" in done.stdout


def test_ctrl_c_ends_it() -> None:
    """It shows its progress on a terminal, and clears that line at its end."""
    ours, theirs = pty.openpty()
    endless = (*COMMAND, "gen:groups,requests=100000000")
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background ignore it
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=theirs, text=True, preexec_fn=heard)
    watchdog = threading.Timer(60.0, process.kill)
    watchdog.start()
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal has no other end any more
        while data := os.read(ours, 4096):
            if b"requests ended" in data and b"requests ended" not in shown:
                process.send_signal(signal.SIGINT)
            shown += data
    os.close(ours)
    out, _ = process.communicate(timeout=30)
    watchdog.cancel()
    assert (process.returncode, out) == (130, "")
    assert re.fullmatch(rb"(\rcache_aware, seed 1: [0-9,]+ s, [0-9,]+ requests ended \x1b\[K)+\r\x1b\[K", shown), shown
