"""The demo: send the same requests through the router twice, with `round_robin` and with `cache_aware`.

    load (threads) ── HTTP ──> router ── HTTP ──> engines     each a process of its own, on loopback,
                                                              each with a cache too small for all groups

The requests come in groups. Those of a group share a long prefix, as requests with the same system prompt or document
do. An engine that has the prefix in its cache need not compute it again, and reports that in `usage`. Engines and
router are restarted for each policy, so that both policies start with empty caches. `scripts/demo` (a shell script)
prepares the environment and runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sglang_router.engine.models import SMOLLM2, fetch_smollm2
from sglang_router.errors import ConfigError

POLICIES = ("round_robin", "cache_aware")
PLACES = ("library", "bakery", "railway", "hospital", "harbour", "theatre", "museum", "airport")
DUTIES = ("greet every visitor", "answer briefly", "name the source", "keep numbers exact", "stay calm")
QUESTION = "What is the capital of France?"
READY_WITHIN = 60.0  # seconds; a cold disk and two busy cores
ENDS_WITHIN = 5.0


class DemoError(Exception):
    """The demo cannot continue. The text is for the user."""


@dataclass(frozen=True)
class Scene:
    """The engines and the load on them."""

    title: str
    engines: int
    flags: Sequence[str]  # of each engine
    groups: int
    rounds: int
    rules: int  # sentences in the prefix that a group shares
    answer_tokens: int
    concurrency: int


# The cache of an engine has room for the prefixes of its share of the groups, not for all of them: if every engine gets
# requests of every group, they evict each other.
LLAMA = Scene(
    title=f"2 llama.cpp engines, {SMOLLM2.name.partition('.')[0]}, one thread each",
    engines=2,
    flags=("--threads", "1", "--parallel", "2", "--ctx-size", "2048", "--cache-ram", "0"),
    groups=4,
    rounds=6,
    rules=12,
    answer_tokens=8,
    concurrency=2,
)
SIMULATED = Scene(
    title="4 built-in engines (simulated: a real prefix cache, modelled time, text without a model)",
    engines=4,
    flags=("--prefill-tokens-per-s", "4000", "--capacity-tokens", "6000"),
    groups=8,
    rounds=12,
    rules=100,
    answer_tokens=16,
    concurrency=8,
)


# -- the load ---------------------------------------------------------------------------------------------


def messages_of(scene: Scene) -> list[list[dict[str, str]]]:
    """Return the chats to send: rounds with one chat of every group, in a random order that is the same in all runs.

    So no policy has an advantage, and two chats of a group are rarely in flight at the same time: that would occupy a
    second slot of llama.cpp, whatever the router does.
    """
    chats, lot = [], random.Random(7)
    for n in range(1, scene.rounds + 1):
        for place in lot.sample(PLACES[: scene.groups], scene.groups):
            rules = (f" Rule {m} of the {place}: {DUTIES[m % 5]}, every day." for m in range(1, scene.rules + 1))
            beginning = f"{place.title()} handbook. You work at the desk of the {place}.{''.join(rules)}"
            question = f"Visitor {n} asks: what does rule {n} say?"
            chats.append([{"role": "system", "content": beginning}, {"role": "user", "content": question}])
    return chats


@dataclass(frozen=True)
class Reply:
    """The result of one request. Times in seconds; tokens as the engine reports them."""

    text: str = ""
    error: str = ""
    first_token: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


def ask(address: str, messages: list[dict[str, str]], max_tokens: int) -> Reply:
    """Send one streamed chat request to the router and read the answer to its end."""
    body = {"model": "demo", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    connection = http.client.HTTPConnection(address, timeout=READY_WITHIN)
    began = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Reply(error=f"{response.status} {response.read(300).decode(errors='replace')}")
        return _read_stream(response, began)
    except (OSError, http.client.HTTPException) as error:
        return Reply(error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse, began: float) -> Reply:
    usage: dict[str, Any] = {}
    text, first, ended = "", 0.0, False
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            ended = True
        elif data.startswith(b"{"):
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                return Reply(error=str(event["error"]))
            content = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
            first = first or (time.monotonic() - began if content else 0.0)
            text += content
            usage = event.get("usage") or usage
    if not ended:
        return Reply(error="the stream ended early")
    details = usage.get("prompt_tokens_details") or {}
    first = first or time.monotonic() - began  # an empty answer
    return Reply(text, "", first, usage.get("prompt_tokens", 0), details.get("cached_tokens", 0))


def send_all(address: str, scene: Scene, progress: Callable[[int, int], None]) -> list[Reply]:
    """Send all requests of the scene, `scene.concurrency` at a time."""
    chats, replies = messages_of(scene), []
    pool = ThreadPoolExecutor(scene.concurrency)
    try:
        waiting = [pool.submit(ask, address, chat, scene.answer_tokens) for chat in chats]
        for answered in as_completed(waiting):
            replies.append(answered.result())
            progress(len(replies), len(chats))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return replies


# -- processes --------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    """Called in the child: the kernel kills it if the demo itself is killed (PR_SET_PDEATHSIG of prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Processes:
    """The processes that the demo started. `end()` leaves none of them."""

    folder: Path  # for their logs
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start `python -m arguments` in its own process group; return the process and its log."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the demo handles Ctrl-C: the engines must end after the router
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self.running.append(process)
        return process, log

    def end(self) -> None:
        """End the processes in reverse order, the router before its engines: SIGTERM, then SIGKILL, by group."""
        while self.running:
            process = self.running[-1]
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(ENDS_WITHIN)
            self.running.pop()


def until(ready: Callable[[], str], process: subprocess.Popen[bytes], log: Path, what: str) -> str:
    """Return the first answer of `ready` that is not empty. Raises: DemoError with the end of the log if none comes."""
    deadline = time.monotonic() + READY_WITHIN
    while not (answer := ready()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            raise DemoError(f"{what} ended with status {process.returncode}. Its log:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise DemoError(f"{what} was not ready within {READY_WITHIN:.0f} s. Its log:\n{tail(log)}")
    return answer


def tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in text) or "    (empty)"


def answers(url: str) -> str:
    """Return `url` if GET answers 200, else ""."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return url
    except (OSError, http.client.HTTPException):  # not listening yet, or a status of 400 and above
        return ""


def healthy_engine(log: Path) -> str:
    """Return the URL in an engine's log once the engine is healthy, else ""."""
    told = re.search(r"(http://\S+)\n", log.read_text(errors="replace"))
    return told[1] if told and answers(told[1] + "/health") else ""


def start_engines(processes: Processes, scene: Scene, model: Sequence[str]) -> list[str]:
    """Start the scene's engines at the same time; return their URLs when all are healthy."""
    flags = (*model, "--port", "0", *scene.flags)
    started = [processes.start(f"engine{n}", "sglang_router.engine", *flags) for n in range(scene.engines)]
    return [until(partial(healthy_engine, log), process, log, "an engine") for process, log in started]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_router(processes: Processes, urls: Sequence[str], policy: str) -> tuple[str, str]:
    """Start the router in front of `urls`; when it is ready, return its address and the URL of its metrics."""
    port, metrics_port = free_port(), free_port()
    arguments = ["--policy", policy, "--port", str(port), "--prometheus-port", str(metrics_port)]
    arguments += ["--shutdown-drain-secs", "0"]
    arguments += ["--worker-urls", *urls]
    process, log = processes.start("router", "sglang_router.launch_router", *arguments)
    address = f"127.0.0.1:{port}"
    until(lambda: answers(f"http://{address}/readiness"), process, log, "the router")
    return address, f"http://127.0.0.1:{metrics_port}/metrics"


# -- output -----------------------------------------------------------------------------------------------


class Bar:
    """A progress bar: redrawn in place on a terminal; elsewhere one line for each quarter."""

    WIDTH = 30

    def __init__(self, label: str, unit: str, scale: int = 1) -> None:
        self.label, self.unit, self.scale = label, unit, scale
        self.began = time.monotonic()
        self.quarter = 0

    def __call__(self, done: int, total: int) -> None:
        spent = time.monotonic() - self.began
        count = f"{done // self.scale:>4}/{total // self.scale} {self.unit}  {spent:3.0f} s"
        line = f"  {self.label:<12} [{'#' * (self.WIDTH * done // total):<{self.WIDTH}}] {count}"
        if sys.stdout.isatty():
            if self.quarter < 4:
                print("\r" + line, end="\n" if done == total else "", flush=True)
            self.quarter = 4 * (done == total)
        elif done * 4 // total > self.quarter:
            self.quarter = done * 4 // total
            print(line, flush=True)


@dataclass(frozen=True)
class Result:
    """One policy's column of the table."""

    replies: Sequence[Reply]
    seconds: float
    per_engine: Sequence[int]

    def cells(self) -> dict[str, str]:
        good = [reply for reply in self.replies if not reply.error]
        prompt = sum(reply.prompt_tokens for reply in good)
        cached = sum(reply.cached_tokens for reply in good)
        first = sorted(reply.first_token for reply in good) or [0.0]
        return {
            "requests": f"{len(self.replies)}",
            "errors": f"{len(self.replies) - len(good)}",
            "prompt tokens": f"{prompt:,}",
            "of these cached, say the engines": f"{cached:,}",
            "": f"{cached / max(prompt, 1):.0%}",
            "time to first token, p50": f"{statistics.median(first) * 1e3:,.0f} ms",
            "time to first token, p95": f"{first[int((len(first) - 1) * 0.95)] * 1e3:,.0f} ms",
            "all requests took": f"{self.seconds:.1f} s",
            "requests per engine": " ".join(str(count) for count in self.per_engine),
        }


def table(results: dict[str, Result]) -> str:
    columns = [result.cells() for result in results.values()]
    rows = [["", *results], *([label, *(cells[label] for cells in columns)] for label in columns[0])]
    return "\n".join(f"  {first:<34}" + "".join(f"{cell:>16}" for cell in rest) for first, *rest in rows)


def requests_per_engine(metrics_url: str, urls: Sequence[str]) -> list[int]:
    """Return the router's `sgl_router_processed_requests_total` of each worker."""
    with urllib.request.urlopen(metrics_url, timeout=5) as answer:
        text = answer.read().decode()
    counts = []
    for url in urls:
        line = rf'^sgl_router_processed_requests_total{{[^}}]*worker="{re.escape(url)}"[^}}]*}} (\S+)'
        counts.append(sum(int(float(value)) for value in re.findall(line, text, re.MULTILINE)))
    return counts


# -- the two runs -----------------------------------------------------------------------------------------


def run(processes: Processes, scene: Scene, model: Sequence[str], policy: str) -> tuple[Result, Reply]:
    """Run the whole load with one policy on new engines, then ask one question."""
    urls = start_engines(processes, scene, model)
    address, metrics_url = start_router(processes, urls, policy)
    began = time.monotonic()
    replies = send_all(address, scene, Bar(policy, "requests"))
    result = Result(replies, time.monotonic() - began, requests_per_engine(metrics_url, urls))
    for error in sorted({reply.error for reply in replies if reply.error})[:3]:
        print(f"  error: {error}\n{tail(processes.folder / 'router.log')}")
    polite = {"role": "system", "content": "You are a helpful assistant."}
    answer = ask(address, [polite, {"role": "user", "content": QUESTION}], 40)
    processes.end()
    return result, answer


def show(processes: Processes, simulated: bool) -> bool:
    """Run the demo; return whether every request was answered."""
    scene = SIMULATED if simulated else LLAMA
    print(scene.title, flush=True)
    model: list[str] = []
    if not simulated:
        model = ["--backend", "llamacpp", "--model-path", str(fetch_smollm2(Bar("model", "MB", 10**6)))]
    print(f"{scene.groups} groups of {scene.rounds} chats; those of a group share a prefix\n", flush=True)
    results, answer = {}, Reply()
    for policy in POLICIES:
        results[policy], answer = run(processes, scene, model, policy)
    print(f"\n{table(results)}\n\n  question   {QUESTION}")
    print(f"  answer     {answer.error or answer.text.strip()}")
    replies = [answer, *(reply for result in results.values() for reply in result.replies)]
    return not any(reply.error for reply in replies)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--simulated", action="store_true", help="built-in engines instead of llama.cpp's")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # also if the parent process ignored SIGINT
    with tempfile.TemporaryDirectory(prefix="sglang-router-demo-") as folder:
        processes, complete = Processes(Path(folder)), False
        try:
            complete = show(processes, options.simulated)
        except (DemoError, ConfigError, OSError) as error:
            print(f"\ndemo: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\ndemo: interrupted", file=sys.stderr)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # nothing may interrupt the clean-up
            processes.end()
    print(f"\n{time.time() - options.started:.0f} s in all; nothing is left running")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
