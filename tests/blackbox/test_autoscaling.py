"""Autoscaling as users see it: `launch_router` tells others how many workers there should be, `launch_server` acts."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engines import engine_processes
from routers import WITHIN, Answer, RouterProcess, environment, free_port, plain_worker, router_process

SLOW = ("--max-running-requests", "2", "--decode-base-ms", "30")
"""An engine that computes two requests at a time and needs a third of a second for each."""
QUICK = {
    "autoscale-target-queue": "2",
    "autoscale-up-cooldown-secs": "0.2",
    "autoscale-down-cooldown-secs": "1",
    "engine-report-interval-secs": "0.1",
    "health-check-interval-secs": "0.2",
    "worker-startup-check-interval": "0.05",
}
RECORD = """
import os, sys
with open(sys.argv[1], "a") as file:
    file.write(os.environ["SGLANG_ROUTER_DESIRED_WORKERS"] + " " + os.environ["SGLANG_ROUTER_SCALE_REASON"] + "\\n")
"""


def flags(prefix: str = "") -> list[str]:
    """Return the fast options as flags."""
    return [word for name, value in QUICK.items() for word in (f"--{prefix}{name}", value)]


def ask(router: RouterProcess, text: str, tokens: int = 10) -> Answer:
    return router.post("/generate", {"text": text, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}})


def scale(router: RouterProcess) -> dict[str, Any]:
    answer = router.get("/scale")
    assert answer.status == 200, answer
    told: dict[str, Any] = answer.json()
    return told


class Burst:
    """Clients that send one unrelated prompt after the other, from `with` to its end; none may fail."""

    def __init__(self, router: RouterProcess, clients: int) -> None:
        self._router = router
        self._clients = clients
        self._over = threading.Event()

    def __enter__(self) -> Burst:
        self._pool = ThreadPoolExecutor(self._clients)
        self._work = [self._pool.submit(self._ask, client) for client in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        statuses = {status for work in self._work for status in work.result()}
        assert statuses == {200}

    def _ask(self, client: int) -> set[int]:
        statuses: set[int] = set()
        count = 0
        while not self._over.is_set():
            statuses.add(ask(self._router, f"{client} {count} is a text that nobody has seen").status)
            count += 1
        return statuses


def test_a_router_tells_how_many_there_should_be(tmp_path: Path) -> None:
    record = tmp_path / "record"
    command = shlex.join([sys.executable, "-S", "-c", RECORD, str(record)])
    with (
        engine_processes(2, *SLOW) as (first, second),
        plain_worker({}) as hook,
        router_process(
            [first], "--autoscale", "1:3", "--scale-command", command, "--scale-webhook", hook.url + "/hook", *flags()
        ) as router,
    ):
        calm = scale(router)
        assert (calm["desired"], calm["current"], calm["decisions"]) == (1, 1, [])
        with Burst(router, 12):
            router.until(lambda: scale(router)["desired"] == 3)
            router.until(lambda: router.samples().total("sgl_router_desired_workers") == 3)
            newest = scale(router)["decisions"][0]
            assert newest["reason"].startswith("queue: ")
            assert newest["figures"]["queue"] > 2
            assert router.post("/add_worker?url=" + quote(second, safe="")).status == 200  # as if told by the webhook
            router.until(lambda: scale(router)["current"] == 2)
        router.until(lambda: scale(router)["desired"] == 1)
        router.until(lambda: told_all(router))
        told = scale(router)
    numbers = [decision["desired"] for decision in reversed(told["decisions"])]
    peak = numbers.index(3)
    assert numbers[: peak + 1] == sorted(numbers[: peak + 1])
    assert numbers[peak:] == [3, 2, 1]
    lines = record.read_text().splitlines()
    assert set(lines) <= {f"{decision['desired']} {decision['reason']}" for decision in told["decisions"]}
    assert lines[-1].startswith("1 fewer: ")
    assert hook.asked["/hook"] >= 2


def told_all(router: RouterProcess) -> bool:
    """Return whether both have received the last decision."""
    webhook, command = scale(router)["actuators"]
    return bool(webhook["waiting"] is None and webhook["told"]["desired"] == 1 and command["last_status"] == 0) and (
        not command["running"]
    )


@contextlib.contextmanager
def server(log: Path, *more: str) -> Iterator[RouterProcess]:
    """Yield `launch_server` with built-in engines; end it as a user would."""
    port = free_port()
    own = ["--backend", "builtin", "--port", str(port), "--router-prometheus-port", str(free_port())]
    own += ["--router-dp-worker-base-port", str(free_port()), "--router-disable-access-log"]
    own += ["--router-metrics-interval-secs", "0", *more]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "sglang_router.launch_server", *own],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    url = f"http://127.0.0.1:{port}"
    router = RouterProcess(process, url, url + "/metrics", log)
    try:
        with contextlib.suppress(OSError):
            router.get("/health")
        router.until(lambda: listens(router))
        yield router
        router.end()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(WITHIN)


def listens(router: RouterProcess) -> bool:
    try:
        return router.get("/health").status == 200
    except OSError:
        return False


def test_a_server_sleeps_wakes_grows_and_shrinks_to_the_cache_that_is_used(tmp_path: Path) -> None:
    with server(
        tmp_path / "log",
        "--dp-size",
        "1",
        "--router-autoscale",
        "0:2",
        *flags("router-"),
        *SLOW,
        "--startup-delay",
        "0.3",
    ) as router:
        router.until(lambda: len(router.workers()) == 1)
        router.until(lambda: not router.workers())  # no load: scale to zero
        assert scale(router)["desired"] == 0
        assert scale(router)["decisions"][0]["reason"].startswith("idle: ")

        with Burst(router, 12):  # queued until an engine is ready; none fails
            router.until(lambda: len(router.workers()) == 2)
            router.until_healthy()
            router.until(lambda: all(worker["processed"] > 2 for worker in router.workers().values()))
        reasons = [decision["reason"] for decision in scale(router)["decisions"]]
        assert any(reason.startswith("wake: ") for reason in reasons), reasons

        loved = "A conversation that goes on and on, with the same long beginning each time. " * 20
        before = {url: worker["processed"] for url, worker in router.workers().items()}
        statuses = []
        while len(workers := router.workers()) == 2:
            statuses.append(ask(router, loved, 2).status)
        assert set(statuses) == {200}
        (stays,) = workers
        served = {url: worker["processed"] - before[url] for url, worker in workers.items()}
        assert served[stays] >= len(statuses) - 1 > 1  # the other worker was removed
        assert ask(router, loved, 2).json()["meta_info"]["cached_tokens"] > 100
        router.until(lambda: not router.workers())
        assert router.samples().total("sgl_router_desired_workers") == 0
