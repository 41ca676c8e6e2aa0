"""--kv-events with the command as users start it: engines that publish, requests with token ids, a stream that ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kv_publisher import CLEARED, Publisher, stored
from routers import COMMAND, WITHIN, PlainWorker, environment, free_port, plain_worker, router_process

T = TypeVar("T")
PROMPT = list(range(1000, 1064))
LIVE, BLOCKS = "sgl_router_kv_events_live", "sgl_router_kv_blocks"


class Engine:
    """A worker that answers, and its publisher, on an event loop in a thread."""

    def __init__(self, worker: PlainWorker, loop: asyncio.AbstractEventLoop) -> None:
        self.worker = worker
        self.url = worker.url
        self._loop = loop
        self.publisher = Publisher()
        self.do(self.publisher.start())
        at = self.publisher.published
        said = [{"data_parallel_rank": 0, "endpoint": at.endpoint, "replay_endpoint": at.replay, "topic": ""}]
        worker.answers = {"/kv_event_sources": (200, {}, json.dumps(said).encode()), "/server_info": (404, {}, b"")}

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WITHIN)

    def publish(self, *events: dict[str, Any]) -> None:
        self.do(self.publisher.publish(*events))

    def has(self, tokens: list[int]) -> dict[str, Any]:
        return stored(list(range(len(tokens) // 16)), None, tokens, 16)

    @property
    def served(self) -> int:
        return self.worker.asked["/generate"]


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    found: list[Engine] = []
    try:
        with plain_worker({}) as one, plain_worker({}) as two:
            found += [Engine(each, loop) for each in (one, two)]
            yield found
    finally:
        for each in found:
            with contextlib.suppress(RuntimeError):
                each.do(each.publisher.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WITHIN)
        loop.close()


@pytest.mark.parametrize("options", [(), ("--relay-processes", "2")], ids=["one process", "relay processes"])
def test_requests_follow_what_the_engines_say_they_hold(engines: list[Engine], options: tuple[str, ...]) -> None:
    one, two = engines
    two.publish(two.has(PROMPT))
    with router_process([one.url, two.url], "--kv-events", *options) as router:

        def gauge(name: str, engine: Engine) -> float:
            return router.samples().total(name, worker=engine.url)

        router.until(lambda: all(gauge(LIVE, each) and each.publisher.subscribed for each in engines))
        assert (gauge(BLOCKS, one), gauge(BLOCKS, two)) == (0, 4)
        for _ in range(3):
            assert router.post("/generate", {"input_ids": PROMPT}).status == 200
        assert (one.served, two.served) == (0, 3)
        two.publish(CLEARED)
        one.publish(one.has(PROMPT))
        router.until(lambda: (gauge(BLOCKS, one), gauge(BLOCKS, two)) == (4, 0))
        for _ in range(3):
            assert router.post("/v1/completions", {"prompt": PROMPT}).status == 200
        assert (one.worker.asked["/v1/completions"], two.worker.asked["/v1/completions"]) == (3, 0)
        one.do(one.publisher.stop())
        router.until(lambda: not gauge(LIVE, one))
        assert gauge(LIVE, two) == 1
        assert "the stream of KV events is cut" in router.log()
        assert router.post("/generate", {"input_ids": PROMPT}).status == 200


def refused(*words: str, **variables: str) -> str:
    """Return what a router writes that does not start."""
    command = [*COMMAND, "--port", str(free_port()), "--kv-events", *words]
    env = environment() | variables
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env=env, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("missing", "words"), [("zmq", ()), ("tokenizers", ("--kv-events-tokenizer", "tokenizer.json"))]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, missing: str, words: tuple[str, ...]
) -> None:
    (tmp_path / f"{missing}.py").write_text(f"raise ImportError('No module named {missing}')\n")
    path = [str(tmp_path), environment().get("PYTHONPATH", "")]
    said = refused(*words, PYTHONPATH=":".join(filter(None, path)))
    assert "pip install 'sglang-router[kv]'" in said
    assert missing in said
