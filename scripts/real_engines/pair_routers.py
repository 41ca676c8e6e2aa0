"""Routers in front of a pair: ours, and those that it is compared with, each in its own environment.

The others are installed as `sh scripts/bench` installs them, and left out where that is not possible.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.benchmark.environments import python_of
from scripts.real_engines.engines import CHECKOUT
from scripts.real_engines.launched import CourseError, end_with_parent, free_port
from scripts.real_engines.pairs import RealPair, call

READY_WITHIN = 120.0
OURS = "this router"


def _pairs(pair: RealPair, port_of: Callable[[int], str]) -> list[str]:
    words = ["--prefill", pair.prefill.url, port_of(pair.prefill.place.side)]
    for decode in pair.decodes:
        words += ["--decode", decode.url]
    return words


def _sglang_way(pair: RealPair) -> list[str]:
    return ["--pd-disaggregation", *_pairs(pair, str)]


def _vllm_way(pair: RealPair) -> list[str]:
    return ["--vllm-pd-disaggregation", *_pairs(pair, lambda _: "none"), "--kv-connector", "nixl"]


class RouterKind(NamedTuple):
    """One router.

    name    in the table
    place   its folder below .bench-venv; "" for ours
    package what pip installs there
    module  what starts it
    way     how it is told of a pair
    more    flags beside those
    """

    name: str
    place: str
    package: str
    module: str
    way: Callable[[RealPair], list[str]]
    more: Sequence[str]

    def python(self) -> Path | None:
        """Return its interpreter; None if it cannot be had."""
        return python_of(self.place, self.package) if self.place else Path(sys.executable)


_SAME = ("--policy", "round_robin", "--request-timeout-secs", "60", "--health-check-interval-secs", "5")
_OTHERS = (*_SAME, "--log-level", "error")
REFERENCE = RouterKind(
    *("sglang-router 0.3.2", "reference", "sglang-router==0.3.2", "sglang_router.launch_router", _sglang_way, _OTHERS)
)
SMG = RouterKind("smg 1.13.0", "smg", "smg==1.13.0", "smg.launch_router", _sglang_way, _OTHERS)
VLLM_ROUTER = RouterKind(
    *("vllm-router 0.1.17", "vllm-router", "vllm-router==0.1.17", "vllm_router.launch_router", _vllm_way, _OTHERS)
)
THIS = RouterKind(
    *(OURS, "", "", "sglang_router.launch_router", _sglang_way),
    (*_SAME, "--metrics-interval-secs", "0"),
)
PUSHED = THIS._replace(way=lambda pair: [*_sglang_way(pair), "--pd-kv-connector", "nixl_push"])
FRONTS = {"sglang-pd": (THIS, REFERENCE, SMG), "vllm-pd": (THIS, SMG, VLLM_ROUTER), "vllm-push-pd": (PUSHED,)}


class FrontRouter:
    """A running router. A context manager: ready inside, gone after it."""

    def __init__(self, kind: RouterKind, python: Path, pair: RealPair, folder: Path) -> None:
        self.kind = kind
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = folder / f"router-{kind.place or 'ours'}.log"
        port = self.url.rpartition(":")[2]
        words = ["--host", "127.0.0.1", "--port", port, "--prometheus-port", str(free_port())]
        environ = {name: value for name, value in os.environ.items() if kind.place == "" or name != "PYTHONPATH"}
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                [str(python), "-m", kind.module, *kind.way(pair), *words, *kind.more],
                cwd=CHECKOUT if kind.place == "" else folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
                env={**environ, "SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "0"},
            )

    def __enter__(self) -> FrontRouter:
        try:
            self._until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
                raise CourseError(f"{self.kind.name} does not become ready:\n{tail}")
            time.sleep(0.2)

    def ready(self) -> bool:
        try:
            return call(self.url, "GET", "/readiness", timeout=5.0).status == 200
        except OSError:
            return False

    def until_ready(self) -> None:
        """Wait until it knows again that there is a whole pair."""
        self._until_ready()
