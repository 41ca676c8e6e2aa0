"""The fake vLLM engines do what real ones were measured to do, without a router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pd_fakes.fleet import Fakes, running
from pd_fakes.texts import answer_text
from pd_fakes.vllm import VllmEngine, VllmPair
from routers import Answer, ask

PROMPT = " ".join(f"tok{n}" for n in range(160))
ASKS = {"do_remote_decode": True, "do_remote_prefill": False}
Pair = Fakes[VllmPair]


@pytest.fixture
def fakes() -> Iterator[Pair]:
    with running(VllmPair(dead_after=0.05)) as pair:
        yield pair


def post(engine: VllmEngine, params: Any = None, prompt: Any = PROMPT, **more: Any) -> Answer:
    body = {"prompt": prompt, "max_tokens": 4, **more}
    if params is not None:
        body["kv_transfer_params"] = params
    return ask(engine.url, "POST", "/v1/completions", body, x_request_id="probe")


def prefill(fakes: Pair, **more: Any) -> dict[str, Any]:
    answer = post(fakes.pair.prefill, ASKS, **{"max_tokens": 1, **more})
    assert answer.status == 200
    params: dict[str, Any] = answer.json()["kv_transfer_params"]
    return params


def text(answer: Answer) -> str:
    assert answer.status == 200, answer
    said: str = answer.json()["choices"][0]["text"]
    return said


def test_prefill_answers_parameters_and_decode_uses_them_once(fakes: Pair) -> None:
    params = prefill(fakes)
    assert params["remote_request_id"].startswith("cmpl-probe-0-")
    assert (params["remote_num_tokens"], params["remote_block_ids"]) == (160, [[1, 2, 3, 4, 5]])
    assert params["remote_blocks_expiry_time"] is None
    assert fakes.call(fakes.pair.prefill.left) == {"blocks": 5}
    assert text(post(fakes.pair.decode, params)) == answer_text(PROMPT, 4)
    assert (fakes.pair.decode.hits, fakes.pair.decode.moves, fakes.pair.decode.recomputed) == (160, 1, 0)
    assert fakes.call(fakes.pair.prefill.left) == {}
    assert text(post(fakes.pair.decode, params)) == answer_text(PROMPT, 4)
    assert (fakes.pair.decode.hits, fakes.pair.decode.recomputed) == (160, 1)


def test_cached_tokens_show_at_prefill_only(fakes: Pair) -> None:
    prefill(fakes)
    params = prefill(fakes)
    assert params["remote_prefill_cached_tokens"] == 159
    usage = post(fakes.pair.decode, params).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_lease_ends_by_the_clock(fakes: Pair) -> None:
    params = prefill(fakes)
    fakes.pair.clock.now += 36
    assert text(post(fakes.pair.decode, params)) == answer_text(PROMPT, 4)
    assert (fakes.pair.prefill.expired, fakes.pair.decode.recomputed, fakes.pair.decode.hits) == (1, 1, 0)
    metrics = ask(fakes.pair.prefill.url, "GET", "/metrics").body.decode()
    assert 'vllm:nixl_num_kv_expired_reqs_total{engine="0",model_name="tiny"} 1' in metrics


def test_without_parameters_it_computes_itself(fakes: Pair) -> None:
    assert text(post(fakes.pair.decode)) == answer_text(PROMPT, 4)
    assert fakes.pair.decode.kinds() == ["plain"]


def test_a_dead_prefill_fails_decode_and_the_engine_lives(fakes: Pair) -> None:
    params = prefill(fakes)
    fakes.call(fakes.pair.prefill.kill)
    answer = post(fakes.pair.decode, params)
    assert answer.status == 500
    assert answer.json()["error"]["message"] == "Internal server error"
    assert text(post(fakes.pair.decode)) == answer_text(PROMPT, 4)


def test_a_restarted_prefill_does_not_know_its_former_blocks(fakes: Pair) -> None:
    params = prefill(fakes)
    fakes.call(fakes.pair.prefill.kill)
    fakes.run(fakes.pair.prefill.start())
    assert text(post(fakes.pair.decode, params)) == answer_text(PROMPT, 4)
    assert fakes.pair.decode.recomputed == 1
    assert text(post(fakes.pair.decode, prefill(fakes))) == answer_text(PROMPT, 4)
    assert fakes.pair.decode.hits == 160


def test_a_request_that_is_no_hand_over_ends_the_engine(fakes: Pair) -> None:
    answer = post(fakes.pair.decode, {"do_remote_prefill": True})
    assert answer.status == 500
    assert "EngineCore encountered an issue" in answer.json()["error"]["message"]
    with pytest.raises(OSError):
        ask(fakes.pair.decode.url, "GET", "/health")
    fakes.run(fakes.pair.decode.start())
    assert text(post(fakes.pair.decode, prefill(fakes))) == answer_text(PROMPT, 4)


def test_an_engine_whose_first_work_is_a_remote_prefill_may_end() -> None:
    with running(VllmPair(crashes_cold=True)) as fakes:
        assert post(fakes.pair.decode, prefill(fakes)).status == 500
        fakes.run(fakes.pair.decode.start())
        assert post(fakes.pair.decode).status == 200
        assert post(fakes.pair.decode, prefill(fakes)).status == 200


def test_batches_and_samples_hand_over_one_sequence(fakes: Pair) -> None:
    assert len(prefill(fakes, prompt=["a " + PROMPT, "b " + PROMPT])["remote_block_ids"]) == 1
    assert prefill(fakes, n=2, temperature=0.7)["remote_request_id"].startswith("1_cmpl-")
    refused = post(fakes.pair.prefill, ASKS, n=2, temperature=0, max_tokens=1)
    assert refused.status == 400
    assert "n must be 1 when using greedy sampling" in refused.json()["error"]["message"]


def test_a_prompt_shorter_than_one_block_works(fakes: Pair) -> None:
    params = prefill(fakes, prompt="short")
    assert params["remote_block_ids"] == [[1]]
    assert text(post(fakes.pair.decode, params, prompt="short")) == answer_text("short", 4)
