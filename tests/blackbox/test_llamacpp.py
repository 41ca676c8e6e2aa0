"""Two real llama.cpp servers behind the router: a cache and a way to close connections that are not ours.

That server closes a kept-alive connection after each streamed answer without announcing it
(tests/engine/test_llamacpp.py tests that). A request that was sent on such a connection is not lost.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from openai import OpenAI

from llama import llama_processes
from routers import WITHIN, RouterProcess, router_process

REQUESTS = 200
CLIENTS = 4


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with llama_processes(2, "--cache-ram", "0") as urls:
        yield urls


@pytest.fixture
def router(urls: list[str]) -> Iterator[RouterProcess]:
    with router_process(urls, "--health-check-interval-secs", "0.5") as router:
        yield router


@pytest.fixture
def client(router: RouterProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=router.url + "/v1", api_key="none", max_retries=0, timeout=WITHIN) as client:
        yield client


def test_a_repeated_prefix_is_reported_as_cached(client: OpenAI, router: RouterProcess) -> None:
    """Four groups of three chats: the first of each is new to the engines, the rest is cached where it is routed."""

    def ask(beginning: str, question: str) -> float:
        messages: Any = [{"role": "system", "content": beginning}, {"role": "user", "content": question}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, temperature=0)
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return (usage.prompt_tokens_details.cached_tokens or 0) / usage.prompt_tokens

    beginnings = [
        f"{place} rules: " + f"ask at the {place} first. " * 30 for place in ("Dock", "Mill", "Barn", "Tower")
    ]
    shares = [[ask(beginning, f"{question} {n}?") for beginning in beginnings] for n, question in enumerate("abc")]

    assert max(shares[0]) < 0.3, shares
    assert min(shares[1] + shares[2]) > 0.8, shares
    processed = router.samples().by("sgl_router_processed_requests_total", "worker")
    assert sorted(processed.values()) == [6, 6]


def test_streams_over_kept_connections(router: RouterProcess, urls: list[str]) -> None:
    """No error, no retry, no failure of a worker: a connection that was closed is replaced by a new one."""

    def ask_many(client: int) -> list[bytes]:
        ends = []
        connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
        with contextlib.closing(connection):
            for n in range(REQUESTS // CLIENTS):
                body = {"prompt": f"{client} counts to {n}", "max_tokens": 2, "stream": True}
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == 200
                ends.append(answer.read()[-14:])
        return ends

    with ThreadPoolExecutor(CLIENTS) as pool:
        ends = [end for answers in pool.map(ask_many, range(CLIENTS)) for end in answers]

    assert ends == [b"data: [DONE]\n\n"] * REQUESTS
    counted = router.samples()
    assert counted.total("sgl_router_requests_total", route="/v1/completions") == REQUESTS
    assert counted.by("sgl_router_worker_outcomes_total", "outcome") == {"served": REQUESTS}
    assert set(counted.by("sgl_router_processed_requests_total", "worker")) == set(urls)
    for nothing in (
        "sgl_router_retries_total",
        "sgl_router_request_errors_total",
        "sgl_router_cb_state_transitions_total",
        "smg_worker_cb_consecutive_failures",
    ):
        assert counted.total(nothing) == 0, nothing
    assert counted.total("sgl_router_cb_outcomes_total", outcome="failure") == 0
    assert all(worker["health"] == "healthy" and not worker["load"] for worker in router.workers().values())


def test_streams_and_whole_answers_in_turn(client: OpenAI, router: RouterProcess) -> None:
    """The next request on the connection is not streamed; the router must neither wait nor fail for it either."""
    for n in range(10):
        stream = client.completions.create(model="tiny", prompt=f"say {n}", max_tokens=3, stream=True)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert client.completions.create(model="tiny", prompt=f"say {n}", max_tokens=3).choices[0].text
    counted = router.samples()
    outcomes = counted.by("sgl_router_worker_outcomes_total", "outcome")
    # The library closes once it has read [DONE], sometimes before the last chunk, which ends the answer.
    assert outcomes.pop("gone", 0) + outcomes.pop("served") == 20
    assert outcomes == {}
    assert counted.total("sgl_router_retries_total") == 0
