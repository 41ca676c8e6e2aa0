"""A policy of a user that fails: its request is answered with 500, the log says why, and everybody else is served."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from engines import engine_processes
from hostile.arena import Client, post
from routers import plain_worker, start_router

PROGRAM = """
import sys
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Policy
class Broken(Policy):
    name = "random"
    def choose(self, facts, candidates, now):
        if b"broken" in facts.text or (b"later" in facts.text and len(candidates) == 1):
            raise RuntimeError("this policy is broken")
        return self.in_turn(candidates, candidates.mask, "turn")
POLICIES["random"] = Broken
from sglang_router.launch_router import main
sys.exit(main())
"""
ORDERS = [*itertools.permutations(("good", "broken", "fine"))]


@pytest.mark.parametrize("relays", ["0", "1"])
@pytest.mark.parametrize("queue", [(), ("--max-concurrent-requests", "2")], ids=" ".join)
def test_a_policy_that_fails_fails_its_own_request_only(relays: str, queue: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--policy", "random", "--relay-processes", relays, *queue)
    with engine_processes(1, "--speed", "0") as urls:
        router = start_router(urls, *flags, log=tmp_path / "log", command=(sys.executable, "-c", PROGRAM))
        try:
            router.until_healthy(*urls)
            port = int(router.url.rpartition(":")[2])
            for prompts in ORDERS * 3:
                clients = [Client(port) for _ in prompts]
                for client, prompt in zip(clients, prompts, strict=True):
                    client.send(post("/v1/completions", b'{"prompt": "%b", "max_tokens": 1}' % prompt.encode()))
                answers = [answer.status if (answer := client.answer()) else 0 for client in clients]
                for client in clients:
                    client.close()
                assert answers == [500 if prompt == "broken" else 200 for prompt in prompts]
            assert router.samples().total("sgl_router_active_requests") == 1, "that of the samples"
            router.until(lambda: router.log().count("RuntimeError: this policy is broken") == len(ORDERS) * 3)
        finally:
            router.process.terminate()
            assert router.exit_status() == 0


@pytest.mark.parametrize("relays", ["0", "1"])
def test_a_policy_that_fails_at_a_retry_ends_the_request_with_the_answer_that_it_has(
    relays: str, tmp_path: Path
) -> None:
    busy: dict[str, tuple[int, dict[str, str], bytes]] = {
        "/v1/completions": (503, {}, b"busy"),
        "/health": (200, {}, b""),
    }
    with plain_worker(busy) as one, plain_worker(busy) as two:
        urls, flags = (one.url, two.url), ("--policy", "random", "--relay-processes", relays)
        router = start_router(urls, *flags, log=tmp_path / "log", command=(sys.executable, "-c", PROGRAM))
        try:
            router.until_healthy(*urls)
            client = Client(int(router.url.rpartition(":")[2]))
            client.send(post("/v1/completions", b'{"prompt": "later", "max_tokens": 1}'))
            answer = client.answer()
            client.close()
            assert answer is not None
            assert (answer.status, answer.body) == (503, b"busy")
            router.until(lambda: router.log().count("RuntimeError: this policy is broken") == 1)
        finally:
            router.process.terminate()
            assert router.exit_status() == 0
