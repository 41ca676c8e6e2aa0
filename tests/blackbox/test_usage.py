"""What engines report of tokens is counted and logged, whatever the protocol, and a cache that is empty is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from engines import engine_processes
from routers import RouterProcess, ask, router_process

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
NAMES = ("prompt", "cached", "completion")


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(1, "--speed", "0") as found:
        yield found


def bodies(text: str) -> dict[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    return {
        "/generate": {"text": text, "sampling_params": {"max_new_tokens": 5}},
        "/v1/completions": {"model": "m", "prompt": text, "max_tokens": 5},
        "/v1/chat/completions": {"model": "m", "messages": messages, "max_tokens": 5},
        "/v1/responses": {"model": "m", "input": text, "max_output_tokens": 5},
        "/v1/messages": {"model": "m", "messages": messages, "max_tokens": 5},
    }


def logged(router: RouterProcess, ident: str) -> dict[str, Any]:
    router.until(lambda: f'"id":"{ident}"' in router.log())
    (line,) = [line for line in router.records() if line.get("id") == ident]
    return line


def counted(router: RouterProcess) -> list[float]:
    samples = router.samples()
    return [samples.total(f"sgl_router_{name}_tokens_total") for name in NAMES]


@pytest.mark.parametrize("flags", [(), ("--relay-processes", "2")])
def test_tokens_of_every_protocol_streamed_or_not(urls: list[str], flags: tuple[str, ...]) -> None:
    with router_process(urls, "--log-format", "json", "--inject-usage", *flags) as router:
        sums = [0.0, 0.0, 0.0]
        for path, body in bodies(f"{path_of(flags)} {TEXT}").items():
            for stream in (False, True):
                ident = f"id{path.replace('/', '-')}-{stream}"
                answer = router.post(path, {**body, "stream": stream}, x_request_id=ident)
                assert answer.status == 200
                line = logged(router, ident)
                told = [line[f"{name}_tokens"] for name in NAMES]
                assert told[0] > 400, path
                assert told[0] > told[1] > told[0] * 0.7 or not stream, "the prompt was asked for just before"
                assert told[2] == 5
                sums = [a + b for a, b in zip(sums, told, strict=True)]
        router.until(lambda: counted(router) == sums)


def path_of(flags: tuple[str, ...]) -> str:
    """Return a beginning of its own for each test: the engine's cache stays."""
    return f"These prompts are for {' '.join(flags) or 'one process'}."


def test_clients_that_have_not_asked_get_the_bytes_that_they_would_get(urls: list[str]) -> None:
    """Only ids and times of the answers differ."""
    body = {**bodies(TEXT)["/v1/chat/completions"], "stream": True}

    def events(router: RouterProcess, **more: Any) -> list[Any]:
        data = router.post("/v1/chat/completions", {**body, **more}).body
        assert data.endswith(b"data: [DONE]\n\n")
        found = [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n")[:-2]]
        return [{key: value for key, value in event.items() if key not in ("id", "created")} for event in found]

    with router_process(urls) as plain, router_process(urls, "--inject-usage") as injecting:
        assert events(injecting) == events(plain)
        asked = {"stream_options": {"include_usage": True}}
        assert events(injecting, **asked)[-1]["usage"]["completion_tokens"] == 5
        assert "usage" not in events(injecting)[-1]


def test_a_cache_that_was_emptied_behind_the_routers_back_is_noticed(urls: list[str]) -> None:
    with router_process(urls, "--log-format", "json") as router:
        prompts = [f"{number} is the number of this group. {TEXT}" for number in range(10)]

        def generate(group: int) -> None:
            assert router.post("/generate", bodies(prompts[group])["/generate"]).status == 200

        for number in range(300):
            generate(number % 10)
        assert router.samples().total("sgl_router_surprising_misses_total") == 0
        assert ask(urls[0], "POST", "/flush_cache").status == 200
        for group in range(10):
            generate(group)
        router.until(lambda: "reports that nothing is cached" in router.log())
        samples = router.samples()
        assert samples.total("sgl_router_worker_changes_total", what="emptied") == 1
        assert 4 <= samples.total("sgl_router_surprising_misses_total") < 10
