"""Prompts as lists and as token ids, and requests without a model: answered in full, and near their cached prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engines import engine_processes
from routers import RouterProcess, router_process

FLAGS = ("--policy", "cache_aware", "--slow-start-secs", "0", "--metrics-interval-secs", "0")
SAMPLING = {"max_new_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def router() -> Iterator[RouterProcess]:
    with (
        engine_processes(2, "--speed", "0") as urls,
        router_process(urls, *FLAGS, "--decision-headers") as started,
    ):
        yield started


def prompt(seed: int, size: int = 600) -> list[int]:
    """Token ids that no other seed gives."""
    return [1000 + (seed * 7919 + at * at * 31) % 20_000 for at in range(size)]


def chosen(router: RouterProcess, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    answer = router.post(path, body)
    assert answer.status == 200, answer
    return answer.headers["x-sglang-router-worker"], answer.json()


FORMS: list[tuple[str, str]] = [("/generate", "input_ids"), ("/v1/completions", "prompt")]


@pytest.mark.parametrize(("path", "field"), FORMS)
@pytest.mark.parametrize("listed", [False, True], ids=["ids", "list of ids"])
def test_token_ids_go_where_their_prefix_is(router: RouterProcess, path: str, field: str, listed: bool) -> None:
    seeds = range(10 * (2 * listed + (path == "/generate")), 10 * (2 * listed + (path == "/generate")) + 6)
    homes: dict[int, str] = {}
    for turn in range(3):
        for seed in seeds:
            ids = prompt(seed, 600 + 50 * turn)
            more = {"sampling_params": SAMPLING} if path == "/generate" else {"max_tokens": 2, "ignore_eos": True}
            worker, answer = chosen(router, path, {field: [ids] if listed else ids, **more})
            assert homes.setdefault(seed, worker) == worker
            if path == "/generate":
                (one,) = answer if listed else [answer]
                cached = one["meta_info"]["cached_tokens"]
                assert len(one["output_ids"]) == 2
            else:
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert len(answer["choices"]) == 1
            assert (cached > 500) == (turn > 0)
    assert len(set(homes.values())) == 2, "new prompts go to both engines"


def test_lists_are_answered_in_order_and_are_like_single_prompts(router: RouterProcess) -> None:
    texts = ["The first of them", "And the second", "The third"]
    _, together = chosen(router, "/generate", {"text": texts, "sampling_params": SAMPLING})
    alone = [chosen(router, "/generate", {"text": text, "sampling_params": SAMPLING})[1] for text in texts]
    assert [one["text"] for one in together] == [one["text"] for one in alone]
    ids = [router.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    _, by_ids = chosen(router, "/generate", {"input_ids": ids, "sampling_params": SAMPLING})
    assert [one["text"] for one in by_ids] == [one["text"] for one in alone]
    each = [{"max_new_tokens": number, "ignore_eos": True} for number in (1, 2, 3)]
    _, sized = chosen(router, "/generate", {"text": texts, "sampling_params": each})
    assert [len(one["output_ids"]) for one in sized] == [1, 2, 3]
    _, completions = chosen(router, "/v1/completions", {"prompt": texts, "max_tokens": 1, "n": 2})
    assert [choice["index"] for choice in completions["choices"]] == list(range(6))


def test_a_list_is_streamed_with_the_place_of_each(router: RouterProcess) -> None:
    body = {"input_ids": [prompt(90, 5), prompt(91, 5)], "sampling_params": SAMPLING, "stream": True}
    answer = router.post("/generate", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert {b'"index":0' in event for event in answer.body.split(b"\n\n") if b"meta_info" in event} == {True, False}
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "body", [{"text": []}, {"input_ids": [[1], "x"]}, {"input_ids": [[]]}, {}, {"text": ["a", 1]}], ids=str
)
def test_what_is_no_prompt_is_the_engines_400(router: RouterProcess, body: dict[str, Any]) -> None:
    answer = router.post("/generate", body)
    assert answer.status == 400
    assert "x-smg-error-code" not in answer.headers
