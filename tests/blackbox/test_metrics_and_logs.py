"""What the command counts and writes: after known traffic, every number and every line is known as well."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from engines import end_engine, engine_processes, start_engine, wait_until_healthy
from routers import WITHIN, Answer, RouterProcess, Samples, free_port, plain_worker, router_process

WORKER_KEY = "worker-key-8LqzP4"
CLIENT_KEY = "client-key-T0vXb1"
PROMPT = "xylophone-prompt-marker"
"""Must be in no line of a log."""


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(2, "--speed", "0", "--api-key", WORKER_KEY) as urls:
        yield urls


@pytest.fixture
def router(urls: list[str]) -> Iterator[RouterProcess]:
    with router_process(urls, "--worker-api-key", WORKER_KEY, "--log-format", "json", "--log-level", "debug") as router:
        yield router


def generate(router: RouterProcess, text: str, **more: Any) -> Answer:
    return router.post("/generate", {"text": text, "sampling_params": {"max_new_tokens": 2}, **more})


def beginnings(n: int) -> list[str]:
    """Return texts without a common prefix."""
    return [f"{chr(97 + i)} {PROMPT} of group {i}. " * 10 for i in range(n)]


# -- counters ----------------------------------------------------------------------------------------------


def test_counts_of_served_requests(router: RouterProcess, urls: list[str]) -> None:
    """Two groups of five: one miss and four hits each, one group on each worker."""
    texts = [f"{beginning} question {n}" for n in range(5) for beginning in beginnings(2)]
    answers = [generate(router, text) for text in texts]
    assert [answer.status for answer in answers] == [200] * 10

    for counted in (router.samples(), router.samples(router.metrics_url)):
        assert counted.total("sgl_router_requests_total", route="/generate") == 10
        assert counted.by("sgl_router_processed_requests_total", "worker") == dict.fromkeys(urls, 5)
        assert counted.by("sgl_router_worker_outcomes_total", "outcome") == {"served": 10}
        assert counted.by("sgl_router_policy_decisions_total", "branch") == {"miss": 2, "hit": 8}
        assert counted.total("sgl_router_cache_misses_total") == 2
        assert counted.total("sgl_router_cache_hits_total") == 8
        assert counted.total("sgl_router_running_requests") == 0
        assert counted.total("sgl_router_retries_total") == 0
        assert counted.total("sgl_router_request_errors_total") == 0
        assert counted.total("sgl_router_request_duration_seconds_count", route="/generate") == 10
        assert counted.total("sgl_router_time_to_first_byte_seconds_count", route="/generate") == 10
        assert counted.total("sgl_router_response_bytes_total") == sum(len(answer.body) for answer in answers)
        assert counted.by("sgl_router_worker_health", "worker") == dict.fromkeys(urls, 1)
        assert counted.total("sgl_router_cb_state") == 0
        # The shares of text: bytes that the workers were believed to have cached, and all bytes.
        whole = sum(len(json.dumps(text)) for text in texts)
        assert abs(counted.total("sgl_router_prefix_bytes_total") - whole) < 0.05 * whole
        assert 0.7 * whole < counted.total("sgl_router_prefix_matched_bytes_total") < 0.8 * whole
        sizes = counted.by("sgl_router_tree_size", "worker")
        assert set(sizes) == set(urls)


def test_both_doors_tell_the_same(router: RouterProcess) -> None:
    def told(samples: Samples) -> dict[Any, float]:
        """Return the samples except those that change with scrapes, with time, or with the engines' reports."""
        moving = (
            *("process_", "python_", "smg_http_", "sgl_router_http_", "sgl_router_active_", "sgl_router_engine_"),
            *("sgl_router_loop_lag_", "sgl_router_request_body_bytes"),
        )
        return {key: value for key, value in samples.all.items() if not key[0].startswith(moving)}

    assert generate(router, "x").status == 200
    first, second = told(router.samples()), told(router.samples(router.metrics_url))
    assert len(first) > 100
    assert first == second


def test_counts_of_errors(router: RouterProcess) -> None:
    statuses = [
        router.post("/generate", b"{").status,
        router.post("/v1/chat/completions", b"[]").status,
        router.post("/v1/chat/completions", {"messages": 3}).status,  # the engine's own error
        router.post("/v1/chat/completions", {"messages": 3}, content_encoding="gzip").status,
        router.get("/nowhere").status,
        router.ask("DELETE", "/generate").status,
        router.post("/remove_worker?url=http%3A%2F%2Fnobody").status,
    ]
    assert statuses == [400, 400, 400, 415, 404, 405, 404]

    counted = router.samples()
    assert counted.by("sgl_router_request_errors_total", "error_type", route="/generate") == {"json_parse_error": 1}
    assert counted.by("sgl_router_request_errors_total", "error_type", route="/v1/chat/completions") == {
        "json_parse_error": 1,
        "http_400": 1,
        "unsupported_media_type": 1,
    }
    assert counted.by("sgl_router_http_responses_total", "error_code") | {"": 0} == {
        "": 0,
        "json_parse_error": 2,
        "unsupported_media_type": 1,
        "not_found": 1,
        "method_not_allowed": 1,
        "WORKER_NOT_FOUND": 1,
    }
    assert counted.total("sgl_router_http_responses_total", status_code="400") == 3
    assert counted.by("sgl_router_worker_outcomes_total", "outcome") == {"rejected": 1}  # a 400 is no failure


@pytest.mark.parametrize("flags", [(), ("--disable-circuit-breaker",)], ids=["breaker", "no breaker"])
def test_counts_of_retries(urls: list[str], flags: tuple[str, ...]) -> None:
    """Requests that the bad worker fails are retried at once on the good one, and do not count against the good one."""
    with plain_worker({"/generate": (500, {}, b"no")}) as bad:
        both = [bad.url, urls[0]]
        with router_process(both, "--policy", "round_robin", "--worker-api-key", WORKER_KEY, *flags) as router:
            assert [generate(router, "x").status for _ in range(12)] == [200] * 12
            counted = router.samples()
            met = bad.asked["/generate"]
            assert met > 4 if flags else met == 4  # the default threshold
            assert counted.total("sgl_router_retries_total", route="/generate") == met
            assert counted.by("sgl_router_processed_requests_total", "worker") == {urls[0]: 12}
            assert counted.by("sgl_router_worker_outcomes_total", "outcome", worker=bad.url) == {"failed": met}
            assert counted.by("sgl_router_worker_outcomes_total", "outcome", worker=urls[0]) == {"served": 12}
            assert counted.total("sgl_router_retries_exhausted_total") == 0
            assert counted.total("sgl_router_request_errors_total") == 0


def test_counts_of_a_breaker() -> None:
    """Four failures in a row open it; the last worker of its pool gets requests all the same."""
    with (
        plain_worker({"/generate": (500, {"x-from": "engine"}, b"no")}) as bad,
        router_process([bad.url], "--disable-retries", "--cb-failure-threshold", "4") as router,
    ):
        answers = [generate(router, "x") for _ in range(5)]
        assert [answer.status for answer in answers] == [500] * 5
        assert answers[4].headers["x-from"] == "engine"
        assert bad.asked["/generate"] == 5

        counted = router.samples()
        assert counted.total("sgl_router_cb_state", worker=bad.url) == 1
        moved = {"worker": bad.url, "from": "closed", "to": "open"}
        assert counted.total("sgl_router_cb_state_transitions_total", **moved) == 1
        assert counted.by("sgl_router_request_errors_total", "error_type") == {"http_500": 5}
        router.until(lambda: "circuit breaker is open" in router.log())


@pytest.mark.parametrize("headers", [{"retry-after": "1"}, {}], ids=["with Retry-After", "without"])
def test_back_pressure_is_no_failure(headers: dict[str, str]) -> None:
    """503 with Retry-After is passed on and is no failure of the worker; without Retry-After it is one, like 500."""
    with (
        plain_worker({"/generate": (503, headers, b"busy")}) as busy,
        router_process([busy.url], "--disable-retries", "--cb-failure-threshold", "4") as router,
    ):
        answers = [generate(router, "x") for _ in range(6)]
        passed = [answer for answer in answers if answer.body == b"busy"]
        assert len(passed) == 6
        counted = router.samples()
        assert counted.by("sgl_router_worker_outcomes_total", "outcome") == {
            "busy" if headers else "failed": len(passed)
        }
        assert counted.total("sgl_router_cb_state") == (0 if headers else 1)


def resident_bytes(router: RouterProcess) -> float:
    return router.samples().total("process_resident_memory_bytes")


def test_slow_readers_cost_little_memory() -> None:
    """Ten clients that do not read ten large answers: each pauses the connection to its own worker, not the router."""
    with (
        plain_worker({"/generate": (200, {}, bytes(32 << 20))}) as worker,
        router_process([worker.url]) as router,
        contextlib.ExitStack() as clients,
    ):
        before = resident_bytes(router)
        for _ in range(10):
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(WITHIN)
            parts = urlsplit(router.url)
            client.connect((parts.hostname, parts.port))
            client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
            assert client.recv(12) == b"HTTP/1.1 200"
        grown = resident_bytes(router) - before
        assert router.worker(worker.url)["load"] == 10
        assert grown < 12 << 20, f"{grown / (1 << 20):.1f} MiB"
        clients.close()
        router.until(lambda: router.worker(worker.url)["load"] == 0)
        assert router.samples().total("sgl_router_client_disconnects_total") == 10


# -- logs --------------------------------------------------------------------------------------------------


def test_one_access_line_for_each_request(router: RouterProcess, urls: list[str]) -> None:
    text = beginnings(1)[0]
    answers = [generate(router, f"{text} {n}") for n in range(3)]
    answers.append(generate(router, f"{text} 3", stream=True))
    answers.append(router.post("/generate", b"{"))
    answers.append(router.get("/nowhere?q=1"))
    ids = [answer.headers["x-request-id"] for answer in answers]
    router.until(lambda: ids[-1] in router.log())

    lines = [line for line in router.records() if line["logger"] == "sglang_router.access"]
    assert Counter(line["id"] for line in lines)[ids[0]] == 1
    assert len({line["id"] for line in lines}) == len(lines)
    mine = {line["id"]: line for line in lines if line["id"] in ids}
    assert list(mine) == ids
    first, *hits, bad, nowhere = mine.values()
    assert (first["branch"], first["matched"], first["worker"] in urls) == ("miss", 0, True)
    assert [(hit["branch"], hit["worker"]) for hit in hits] == [("hit", first["worker"])] * 3
    assert all(hit["matched"] >= 90 for hit in hits)
    assert [line["stream"] for line in (first, *hits)] == [False, False, False, True]
    for line, answer in zip(mine.values(), answers, strict=True):
        assert (line["status"], line["method"]) == (answer.status, "POST" if line is not nowhere else "GET")
        assert line["peer"] == "127.0.0.1"
        assert line["duration_ms"] >= 0
        if answer.status == 200:
            assert line["out"] >= len(answer.body)  # a stream is counted with its chunked coding
            assert line["duration_ms"] >= line["first_byte_ms"] > 0
            assert line["outcome"] == "served"
    assert (bad["code"], bad["worker"], bad["outcome"]) == ("json_parse_error", None, None)
    assert nowhere["path"] == "/nowhere"  # without its query


def test_text_lines_have_the_same_facts(urls: list[str]) -> None:
    with router_process(urls, "--worker-api-key", WORKER_KEY) as router:
        answer = router.post("/generate", {"text": "x"}, x_request_id="one\ttwo")
        assert answer.headers["x-request-id"]
        generate(router, "x", stream=True)
        router.until(lambda: " stream=1" in router.log())
        lines = [line for line in router.log().splitlines() if " POST /generate 200 " in line]
        assert len(lines) == 2
        assert all(" worker=http://127.0.0.1:" in line and " duration_ms=" in line for line in lines)


def test_no_prompt_and_no_key_is_ever_logged(urls: list[str]) -> None:
    """At the lowest log level, with errors of all kinds, and engines that repeat what they were sent."""
    echo = json.dumps({"error": f"{PROMPT} {WORKER_KEY}"}).encode()
    answers: dict[str, tuple[int, dict[str, str], bytes]]
    answers = {"/generate": (500, {}, echo), "/health": (503, {}, echo), "/v1/models": (200, {}, echo)}
    flags = ("--worker-api-key", WORKER_KEY, "--log-level", "debug", "--worker-startup-timeout-secs", "0.3")
    with plain_worker(answers) as talkative, router_process(urls, *flags) as router:
        assert router.post("/workers", {"url": talkative.url, "disable_health_check": True}).status == 202
        key = {"authorization": f"Bearer {CLIENT_KEY}"}
        bodies: list[Any] = [
            {"text": PROMPT, "stream": True},
            {"text": [PROMPT]},
            b'{"text": "' + PROMPT.encode() + b'"',  # broken off
            {"text": PROMPT, "sampling_params": {"max_new_tokens": -1}},
        ]
        statuses = Counter(router.post("/generate", body, **key).status for body in bodies * 3)
        statuses.update(router.get(f"/nowhere?{PROMPT}={CLIENT_KEY}").status for _ in range(3))
        added = router.post(f"/add_worker?url=http%3A%2F%2F127.0.0.1%3A{free_port()}&api_key={CLIENT_KEY}", b"")
        assert added.status in (200, 400)
        ask = router.post("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}, **key)
        last = ask.headers["x-request-id"]
        router.until(lambda: last in router.log())
        assert statuses[400] >= 3
        for answer in (router.get("/workers"), router.get("/metrics")):
            assert WORKER_KEY.encode() not in answer.body
            assert CLIENT_KEY.encode() not in answer.body
            assert PROMPT.encode() not in answer.body
    log = router.log()
    assert log.count("sglang_router.access") > 15
    for secret in (PROMPT, WORKER_KEY, CLIENT_KEY):
        assert secret not in log


def test_a_key_is_used_but_the_clients_own_goes_first(urls: list[str]) -> None:
    process, url = start_engine("--speed", "0", "--api-key", CLIENT_KEY)
    try:
        wait_until_healthy(url)
        with router_process([url], "--worker-api-key", WORKER_KEY) as router:
            assert generate(router, "x").status == 401  # the router's key, which this engine does not accept
            assert router.post("/generate", {"text": "x"}, authorization=f"Bearer {CLIENT_KEY}").status == 200
    finally:
        end_engine(process)


def test_no_access_lines_when_not_wanted(urls: list[str]) -> None:
    with router_process(urls, "--worker-api-key", WORKER_KEY, "--disable-access-log") as router:
        assert generate(router, "x").status == 200
        assert router.samples().total("sgl_router_requests_total") == 1
    assert "sglang_router.access" not in router.log()
