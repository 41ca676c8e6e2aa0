"""What is read of engines' answers: the shapes of each engine, ranks, and that nonsense says nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.engine_report import NOTHING, EngineReport
from sglang_router.routing.model_names import Names
from sglang_router.workers import engine_answers
from sglang_router.workers.engine_answers import Reader, ReportFields, Sample

M = {"model": "m", "names": Names(("m",))}
A = {"model": "a", "names": Names(("a",))}
A_AND_B = Names(("a", "b"))

READERS: dict[str, Reader] = {
    "models": engine_answers.models,
    "server_info": engine_answers.server_info,
    "model_info": engine_answers.model_info,
    "version": engine_answers.version,
    "props": engine_answers.props,
    "loads": engine_answers.loads,
    "get_load": engine_answers.get_load,
    "server_load": engine_answers.server_load,
}


def rank_row(rank: int, running: int, waiting: int, used: int, held: int, capacity: int = 1000) -> dict[str, Any]:
    """A row of SGLang's /v1/loads."""
    return {
        "dp_rank": rank,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_used_tokens": used,
        "num_total_tokens": held,
        "max_total_num_tokens": capacity,
        "token_usage": 0.5,
    }


SGLANG_LOADS = {
    "timestamp": "now",
    "version": "0.5.23",
    "loads": [rank_row(0, 3, 1, 70, 90), rank_row(1, 2, 0, 10, 10)],
}
SGLANG_INFO = {
    "model_path": "/models/m",
    "served_model_name": "m",
    "version": "0.5.23",
    "context_length": None,
    "dp_size": 2,
    "max_total_num_tokens": 1000,
    "internal_states": [{"memory_usage": {"token_capacity": 1000}}, {"memory_usage": {"token_capacity": 900}}],
}
GET_LOAD = [
    {"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 40},
    {"dp_rank": 1, "num_reqs": 1, "num_waiting_reqs": 0, "num_tokens": 4},
]


@pytest.mark.parametrize(
    ("reader", "answer", "rank", "said"),
    [
        ("models", {"data": [{"id": "m", "max_model_len": 8192}]}, None, {**M, "context_length": 8192}),
        ("models", {"data": [{"id": "a", "meta": {"n_ctx": 512}}]}, None, {**A, "context_length": 512}),
        ("models", {"data": [{"id": "a", "owned_by": "vllm"}]}, None, {**A, "runtime": "vllm"}),
        ("models", {"data": [{"id": "a", "owned_by": "sglang"}]}, None, A),
        ("models", {"data": [{"id": "a"}, {"id": "b", "max_model_len": 9}]}, 1, {"model": "a", "names": A_AND_B}),
        (
            "server_info",
            SGLANG_INFO,
            None,
            {"model": "m", "version": "0.5.23", "ranks": 2, "capacity_tokens": 1900},
        ),
        ("server_info", SGLANG_INFO, 1, {"model": "m", "version": "0.5.23", "ranks": 2, "capacity_tokens": 900}),
        ("server_info", {"dp_size": 4, "max_total_num_tokens": 10}, None, {"ranks": 4, "capacity_tokens": 40}),
        ("server_info", {"dp_size": 4, "max_total_num_tokens": 10}, 3, {"ranks": 4, "capacity_tokens": 10}),
        ("server_info", {"max_total_num_tokens": 10, "internal_states": [{}]}, None, {"capacity_tokens": 10}),
        ("server_info", {"internal_states": [{"max_total_num_tokens": 7}]}, None, {"capacity_tokens": 7}),
        ("server_info", {"dp_size": 0}, None, {}),
        ("model_info", {"model_path": "/m"}, None, {"model": "/m"}),
        ("version", {"version": "0.32.0"}, None, {"version": "0.32.0", "runtime": "vllm"}),
        ("version", {"version": 3}, None, {}),
        ("server_info", {"disaggregation_mode": "null"}, None, {"role": "regular"}),
        ("server_info", {"disaggregation_mode": "encode"}, None, {}),
        (
            "server_info",
            {
                "disaggregation_mode": "prefill",
                "disaggregation_bootstrap_port": 8999,
                "max_running_requests": 64,
                "dp_size": 2,
            },
            None,
            {"role": "prefill", "bootstrap_port": 8999, "window": 64, "ranks": 2},
        ),
        (
            "server_info",
            {"disaggregation_mode": "decode", "disaggregation_bootstrap_port": 70000, "max_running_requests": 64}
            | {"dp_size": 2},
            1,
            {"role": "decode", "window": 32, "ranks": 2},
        ),
        (
            "server_info",
            {"internal_states": [{"effective_max_running_requests_per_dp": 7}] * 2},
            None,
            {"window": 14},
        ),
        (
            "props",
            {"default_generation_settings": {"n_ctx": 8192}, "total_slots": 4, "build_info": "b8681"},
            None,
            {"version": "b8681", "context_length": 8192},
        ),
        (
            "loads",
            SGLANG_LOADS,
            None,
            {"running": 5, "queued": 1, "used_tokens": 80, "load_tokens": 100, "capacity_tokens": 2000},
        ),
        (
            "loads",
            SGLANG_LOADS,
            1,
            {"running": 2, "queued": 0, "used_tokens": 10, "load_tokens": 10, "capacity_tokens": 1000},
        ),
        ("loads", SGLANG_LOADS, 2, {}),
        ("loads", {"loads": [{"num_used_tokens": 5}]}, None, {"used_tokens": 5, "load_tokens": 5}),
        ("loads", {"loads": [{"num_running_reqs": 5, "max_total_num_tokens": 0}]}, 0, {"running": 5}),
        ("loads", {"loads": [{"num_running_reqs": 1}, {}]}, None, {}),
        ("get_load", GET_LOAD, None, {"running": 4, "queued": 2, "load_tokens": 44}),
        ("get_load", GET_LOAD, 0, {"running": 3, "queued": 2, "load_tokens": 40}),
        ("get_load", {"load": 3}, None, {}),
        ("get_load", {"num_tokens": 6}, None, {"load_tokens": 6}),
        ("get_load", {"num_reqs": 1, "num_waiting_reqs": 2}, None, {"queued": 2}),
        ("server_load", {"server_load": 3}, None, {"running": 3}),
        ("server_load", {"server_load": 0}, None, {}),
        ("server_load", {"server_load": 3}, 0, {}),
    ],
)  # fmt: skip
def test_what_each_engine_says(reader: str, answer: Any, rank: int | None, said: ReportFields) -> None:
    assert READERS[reader](answer, rank) == said


ODD = [-1, 1.5, math.nan, math.inf, -math.inf, 1e300, 1 << 70, True, "7", None, [], {}]


def test_the_counters_of_prefill_are_those_of_all_ranks() -> None:
    counters = {"total_prefill_uncached_tokens": 800, "total_prefill_busy_us": 100_000}
    answer = {"loads": [{**rank_row(rank, 1, 0, 1, 1), **counters} for rank in (0, 1)]}
    for rank, ranks in ((None, 2), (1, 1)):
        found = engine_answers.loads(answer, rank)
        assert (found["prefilled_tokens"], found["prefill_busy_us"]) == (800 * ranks, 100_000 * ranks)
    assert "prefilled_tokens" not in engine_answers.loads(SGLANG_LOADS, None)


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_number_that_is_none_says_nothing(odd: Any) -> None:
    rows = [{**rank_row(0, 1, 1, 1, 1), "num_running_reqs": odd, "num_total_tokens": odd}]
    assert engine_answers.loads({"loads": rows}, None) == {
        "queued": 1,
        "used_tokens": 1,
        "load_tokens": 1,
        "capacity_tokens": 1000,
    }
    assert engine_answers.get_load([{"num_reqs": odd, "num_waiting_reqs": 0, "num_tokens": odd}], None) == {"queued": 0}
    assert engine_answers.server_info({"dp_size": odd, "max_total_num_tokens": odd, "context_length": odd}, None) == {}
    assert engine_answers.models({"data": [{"id": 5, "max_model_len": odd}]}, None) == {}


FIELDS = [
    *("data", "id", "meta", "n_ctx", "version", "server_load"),
    *("loads", "dp_rank", "num_tokens", "num_reqs", "num_running_reqs", "max_total_num_tokens"),
    *("dp_size", "internal_states", "memory_usage"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=20,
)


@given(st.sampled_from(sorted(READERS)), JSON, st.none() | st.integers(0, 3))
def test_whatever_is_answered_a_report_holds_names_and_counts(reader: str, answer: Any, rank: int | None) -> None:
    said = READERS[reader](answer, rank)
    names = said.pop("names", Names(("m",)))
    assert isinstance(names, Names)
    assert names.bases
    assert said.keys() <= set(EngineReport.__struct_fields__)
    for name, value in said.items():
        if name in ("model", "version"):
            assert isinstance(value, str)
        else:
            assert type(value) is int
            assert value >= 0


# -- metrics -----------------------------------------------------------------------------------------------


def vllm(engine: int, running: float, waiting: float, usage: float, **cache: str) -> list[Sample]:
    labels = {"engine": str(engine), "model_name": "m"}
    info = {"engine": str(engine), "num_gpu_blocks": "200", "block_size": "32", **cache}
    return [
        Sample("vllm:num_requests_running", labels, running),
        Sample("vllm:num_requests_waiting", labels, waiting),
        Sample("vllm:kv_cache_usage_perc", labels, usage),
        Sample("vllm:cache_config_info", info, 1.0),
        Sample("vllm:num_requests_waiting_by_reason", {**labels, "reason": "capacity"}, 99.0),
    ]


def test_one_vllm_engine() -> None:
    assert engine_answers.metrics(vllm(0, 16.0, 24.0, 0.34), None) == {
        "ranks": 1,
        "running": 16,
        "queued": 24,
        "capacity_tokens": 6400,
        "used_tokens": 2176,
    }


def test_vllm_tells_the_blocks_of_all_its_ranks_under_each() -> None:
    samples = vllm(0, 3.0, 1.0, 0.5) + vllm(1, 2.0, 0.0, 0.25)
    both = {"ranks": 2, "running": 5, "queued": 1, "capacity_tokens": 6400, "used_tokens": 2400}
    assert engine_answers.metrics(samples, None) == both
    assert engine_answers.metrics(samples, 1) == {
        "ranks": 2,
        "running": 2,
        "queued": 0,
        "capacity_tokens": 3200,
        "used_tokens": 800,
    }


def test_newer_vllm_tells_the_size_of_one_rank() -> None:
    samples = [sample for engine in (0, 1) for sample in vllm(engine, 0.0, 0.0, 0.1, kv_cache_size_tokens="5000")]
    said = engine_answers.metrics(samples, None)
    assert (said["capacity_tokens"], said["used_tokens"]) == (10000, 1000)


@pytest.mark.parametrize("usage", [math.nan, -0.1, 1.5, math.inf])
def test_a_share_that_is_none_says_nothing(usage: float) -> None:
    assert "used_tokens" not in engine_answers.metrics(vllm(0, 1.0, 1.0, usage), None)


@pytest.mark.parametrize("blocks", ["None", "-3", "", "1e9", "9" * 40])
def test_a_cache_of_unknown_size(blocks: str) -> None:
    said = engine_answers.metrics(vllm(0, 1.0, math.nan, 0.5, num_gpu_blocks=blocks), None)
    assert said == {"ranks": 1, "running": 1}


def test_llama_cpp() -> None:
    samples = [Sample("llamacpp:requests_processing", {}, 2.0), Sample("llamacpp:requests_deferred", {}, 0.0)]
    assert engine_answers.metrics(samples, None) == {"running": 2, "queued": 0}
    assert engine_answers.metrics([], None) == {}


# -- the report --------------------------------------------------------------------------------------------


def test_a_report_grows_and_comes_to_rest() -> None:
    full = NOTHING.updated({"model": "m", "running": 2, "load_tokens": 9})
    assert full.known() == {"model": "m", "running": 2, "load_tokens": 9}
    assert full.without_load() == EngineReport(model="m")
    assert NOTHING.known() == {}
