"""What other people's code imports from a package of this name, and what it does with it."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import sglang_router
from routers import WITHIN, ask, free_port
from sglang_router import launch_server, mini_lb, router, router_args, sglang_router_rs, version
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.launch_router import launch_router


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("sglang_router", "__version__ RouterArgs Router PolicyType"),
        ("sglang_router.launch_router", "RouterArgs launch_router parse_router_args CustomHelpFormatter main"),
        ("sglang_router.launch_server", "RouterArgs launch_router launch_server main"),
        ("sglang_router.router_args", "RouterArgs"),
        ("sglang_router.router", "Router policy_from_str"),
        ("sglang_router.mini_lb", "MiniLoadBalancer"),
        ("sglang_router.sglang_router_rs", "PolicyType"),
        ("sglang_router.version", "__version__"),
        ("sglang_router.cli", "main"),
    ],
)
def test_case_10_names_that_frameworks_import(module: str, names: str) -> None:
    """`from sglang_router.launch_server import RouterArgs, launch_router` was an ImportError."""
    found = importlib.import_module(module)
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_case_10_they_are_the_same_things() -> None:
    """Two classes of one name would not know each other's instances."""
    assert sglang_router.RouterArgs is launch_server.RouterArgs is router_args.RouterArgs is RouterArgs
    assert sglang_router.Router is router.Router
    assert sglang_router.PolicyType is sglang_router_rs.PolicyType
    assert sglang_router.__version__ == version.__version__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sglang_router.Nothing  # noqa: B018


def test_case_10_a_router_by_keywords_or_from_args() -> None:
    """Both ways to make a `Router`: 0.1's keywords, and `from_args`. Neither changes what it was given."""
    one = router.Router(worker_urls=["http://A:1"], policy=router.PolicyType.RoundRobin, port=3001, verbose=True)
    assert (one.args.worker_urls, one.args.policy, one.args.log_level) == (["http://a:1"], "round_robin", "debug")
    args = RouterArgs(port=3001, balance_abs_threshold=0, request_timeout_secs=7, log_level="warn")
    args._validate_router_args()
    assert router.Router.from_args(args).args.request_timeout_secs == 7
    assert router.Router.from_args(SimpleNamespace(port=3002, policy="random")).args.policy == "random"
    assert (router.policy_from_str("cache_aware"), router.policy_from_str(None)) == (router.PolicyType.CacheAware, None)
    pair = RouterArgs(pd_disaggregation=True, prefill_urls=[("http://P:1", 9000)], decode_urls=["http://D:1/"])
    assert router.Router.from_args(pair).args.prefill_urls == [("http://p:1", 9000)]
    with pytest.raises(ConfigError, match="--prefill needs --decode as well"):
        mini_lb.MiniLoadBalancer(RouterArgs(pd_disaggregation=True, prefill_urls=[("http://p:1", None)]))


def until_answers(port: int, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN
    while True:
        with contextlib.suppress(OSError):
            assert ask(f"http://127.0.0.1:{port}", "GET", "/health").status == 200
            return
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def arguments(port: int) -> RouterArgs:
    return RouterArgs(port=port, prometheus_port=0, log_level="warn", shutdown_drain_secs=0)


def serve_as_a_daemon(args: RouterArgs) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    launch_router(args)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_case_10_a_router_in_a_child_process(method: str) -> None:
    """Training frameworks start the router with `multiprocessing`, and end it with SIGTERM."""
    port = free_port()
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=serve_as_a_daemon, args=(arguments(port),), daemon=True)
    child.start()
    try:
        until_answers(port, child.is_alive)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGUSR1)
        assert ask(f"http://127.0.0.1:{port}", "GET", "/health").status == 200
        child.terminate()
        child.join(WITHIN)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()


def test_case_10_a_router_in_a_thread() -> None:
    """Only the main thread can handle signals: elsewhere the router does without, and leaves the collector on."""
    port = free_port()
    program = (
        "import gc, sys, threading\n"
        "from sglang_router.router import Router\n"
        "from sglang_router.router_args import RouterArgs\n"
        f"args = RouterArgs(port={port}, prometheus_port=0, log_level='error')\n"
        "threading.Thread(target=Router.from_args(args).start, daemon=True).start()\n"
        "sys.stdin.readline()\n"
        "sys.exit(0 if gc.isenabled() else 3)\n"
    )
    host = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until_answers(port, lambda: host.poll() is None)
        _, errors = host.communicate(b"\n", timeout=WITHIN)
        assert (host.returncode, errors) == (0, b"")
    finally:
        host.kill()
        host.wait()
