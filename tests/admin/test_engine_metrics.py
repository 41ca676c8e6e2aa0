"""The engines' metrics as one exposition that Prometheus reads."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines import engine_processes
from fake_worker import Gate, answer
from sglang_router.admin.engine_metrics import MergedMetrics
from stack import stack

METRICS = "GET /metrics"

ONE = """\
# HELP sglang:num_running_reqs Requests in the batch.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m} \\"x\\""} 3.0
# TYPE sglang:ttft histogram
sglang:ttft_bucket{le="0.1"} 1
sglang:ttft_bucket{le="+Inf"} 2
sglang:ttft_sum 0.25
sglang:ttft_count 2
# TYPE sglang:reqs_total counter
sglang:reqs_total{} 12
bare 1.5 1700000000000
"""
TWO = """\
# TYPE sglang:reqs_total counter
# HELP sglang:reqs_total Requests.
sglang:reqs_total 5

# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 1.0
this is { not a sample
# a comment
# EOF
"""


def merged() -> str:
    union = MergedMetrics()
    union.add(ONE, "http://10.0.0.1:8000")
    union.add(TWO, "http://[::1]:8000")
    return union.exposition()


def test_samples_keep_their_values_and_get_the_workers_address() -> None:
    first, second = {"worker_addr": "http://10.0.0.1:8000"}, {"worker_addr": "http://[::1]:8000"}
    got = {
        family.name: [(sample.name, sample.labels, sample.value) for sample in family.samples]
        for family in text_string_to_metric_families(merged())
    }
    assert got == {
        "sglang_num_running_reqs": [
            ("sglang_num_running_reqs", {**first, "model_name": 'm} "x"'}, 3.0),
            ("sglang_num_running_reqs", {**second, "model_name": "m"}, 1.0),
        ],
        "sglang_ttft": [
            ("sglang_ttft_bucket", {**first, "le": "0.1"}, 1.0),
            ("sglang_ttft_bucket", {**first, "le": "+Inf"}, 2.0),
            ("sglang_ttft_sum", first, 0.25),
            ("sglang_ttft_count", first, 2.0),
        ],
        "sglang_reqs": [("sglang_reqs_total", first, 12.0), ("sglang_reqs_total", second, 5.0)],
        "bare": [("bare", first, 1.5)],
    }


def test_each_metric_is_described_once_before_its_samples() -> None:
    lines = merged().splitlines()
    assert lines.count("# TYPE sglang_reqs_total counter") == 1
    assert lines.index("# HELP sglang_reqs_total Requests.") < lines.index("# TYPE sglang_reqs_total counter")
    assert not [line for line in lines if "not a sample" in line or "EOF" in line]


def test_f25_two_engines_on_one_host_are_told_apart() -> None:
    """`http://host/e0` and `http://host/e1` had the same label, so Prometheus found duplicate series."""
    with stack() as router:
        fake = router.fake({"GET /e0/health": answer(200), "GET /e1/health": answer(200)})
        for number in (0, 1):
            fake.script[f"GET /e{number}/metrics"] = answer(200, b"up %d\n" % number)
            router.add(f"{fake.url}/e{number}")
            router.until_healthy(f"{fake.url}/e{number}")
        families = text_string_to_metric_families(router.get("/engine_metrics").text)
    found = {sample.labels["worker_addr"]: sample.value for family in families for sample in family.samples}
    assert found == {f"{fake.url}/e0": 0.0, f"{fake.url}/e1": 1.0}


@pytest.mark.parametrize(
    ("own", "merged"),
    [
        ('worker_addr="x"', {"exported_worker_addr": "x"}),
        (
            'worker_addr="x",exported_worker_addr="y",',
            {"exported_exported_worker_addr": "x", "exported_worker_addr": "y"},
        ),
        ('"worker_addr" = "x" , a="worker_addr=\\"z\\""', {"exported_worker_addr": "x", "a": 'worker_addr="z"'}),
        ('my_worker_addr="x"', {"my_worker_addr": "x"}),
    ],
)
def test_case_20_an_engines_own_label_of_our_name_is_renamed(own: str, merged: dict[str, str]) -> None:
    """An engine whose metrics have a label `worker_addr` made /engine_metrics invalid."""
    union = MergedMetrics()
    union.add(f"up{{{own}}} 1\n", "http://w:1/e0")
    (family,) = text_string_to_metric_families(union.exposition())
    assert [sample.labels for sample in family.samples] == [{"worker_addr": "http://w:1/e0", **merged}]


@pytest.mark.parametrize(
    "line",
    ['up{a="1",a="2"} 1', "up{a} 1", 'up{a="1"b="2"} 1', 'up{1a="1"} 1', 'up{a="1} 1', f'up{{a="{"x" * 70_000}"}} 1'],
    ids=lambda line: line[:20],
)
def test_lines_whose_labels_cannot_be_read_are_left_out(line: str) -> None:
    union = MergedMetrics()
    union.add(f"# TYPE up nonsense\n{line}\nup 2\n", "http://w:1")
    assert union.exposition() == 'up{worker_addr="http://w:1"} 2\n'


def test_who_asks_at_the_same_time_gets_the_same_and_the_engines_are_asked_once() -> None:
    with stack() as router:
        gate = Gate(answer(200, b"up 1\n"))
        (fake,) = router.fakes({METRICS: gate})

        async def until_all_wait() -> None:
            while len(router.clients.exchanges) < 5:  # noqa: ASYNC110
                await asyncio.sleep(0)

        with ThreadPoolExecutor(5) as threads:
            waiting = [threads.submit(router.get, "/engine_metrics") for _ in range(5)]
            router.run(until_all_wait())
            router.call(gate.open.set)
            assert {each.result().text for each in waiting} == {f'up{{worker_addr="{fake.url}"}} 1\n'}
        assert router.call(lambda: fake.count(METRICS)) == 1


def test_nothing_is_merged_to_nothing() -> None:
    assert MergedMetrics().exposition() == ""


def test_workers_without_metrics_are_left_out() -> None:
    with stack() as router:
        fakes = router.fakes({METRICS: answer(200, b"up 1\n")}, {}, {METRICS: answer(200, b"up 0\n")})
        reply = router.get("/engine_metrics")
        addresses = [fake.url for fake in (fakes[0], fakes[2])]
        assert reply.text == f'up{{worker_addr="{addresses[0]}"}} 1\nup{{worker_addr="{addresses[1]}"}} 0\n'
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_it_is_an_error_when_no_worker_has_metrics() -> None:
    with stack() as router:
        router.fakes({})
        reply = router.get("/engine_metrics")
        assert (reply.status, reply.headers["x-smg-error-code"]) == (502, "worker_unreachable")


def test_real_engines_metrics_are_merged() -> None:
    with engine_processes(1) as urls, stack(*urls) as router:
        families = {
            family.name: family for family in text_string_to_metric_families(router.get("/engine_metrics").text)
        }
        (sample,) = families["sglang_max_total_num_tokens"].samples
        assert sample.labels["worker_addr"] == urls[0]
        assert sample.value > 0


def test_f4_no_secret_of_an_engine_is_in_its_metrics() -> None:
    """Labels and comments passed as they came, also with the worker's own key."""
    text = b"""# HELP info runs with --api-key hunter2
# TYPE info gauge
info{api_key="hunter2",model="m/own-worker-key",token_type="prompt"} 1
"""
    with stack() as router:
        fake = router.fake({METRICS: answer(200, text)})
        router.add(fake.url, api_key="own-worker-key")
        router.until_healthy(fake.url)
        merged = router.get("/engine_metrics").text
    assert "hunter2" not in merged
    assert "own-worker-key" not in merged
    assert f'info{{worker_addr="{fake.url}",api_key="***",model="m/***",token_type="prompt"}} 1' in merged
