"""What engines report about themselves, through the command: in GET /workers and in metrics; and ranks as workers."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

from engines import engine_processes
from routers import Samples, router_process

CHAT = "/v1/chat/completions"


def chat(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **more}


def computes(samples: Samples) -> bool:
    """Whether an engine runs one request, and has tokens of it: its reports tell the one before the other."""
    running = samples.total("sgl_router_engine_running_requests")
    return running == 1 and samples.total("sgl_router_engine_kv_used_tokens") > 0


def test_reports_are_in_workers_and_metrics() -> None:
    flags = ("--model", "tiny", "--context-length", "9000", "--capacity-tokens", "40000")
    with (
        engine_processes(2, *flags) as urls,
        router_process(urls, "--engine-report-interval-secs", "0.05") as router,
    ):
        asserted = {"model", "context_length", "capacity_tokens"}  # told by several answers of the engine
        router.until(lambda: all(asserted <= worker["engine"].keys() for worker in router.workers().values()))
        for worker in router.workers().values():
            told = worker["engine"]
            assert (told["model"], told["context_length"], told["capacity_tokens"]) == ("tiny", 9000, 40000)
        parts = urlsplit(router.url)
        client = http.client.HTTPConnection(parts.netloc, timeout=30)
        endless = chat("write", stream=True, max_tokens=8000, ignore_eos=True)
        client.request("POST", CHAT, json.dumps(endless), {"content-type": "application/json"})
        assert client.getresponse().status == 200
        router.until(lambda: computes(router.samples()))
        client.close()
        router.until(lambda: router.samples().total("sgl_router_engine_running_requests") == 0)
        samples = router.samples()
        assert samples.by("sgl_router_engine_kv_capacity_tokens", "worker") == dict.fromkeys(urls, 40000)
        assert samples.by("sgl_router_engine_context_length", "worker") == dict.fromkeys(urls, 9000)
        assert ("sgl_router_waiting_requests", ()) in samples.all
        assert ("sgl_router_desired_workers", ()) not in samples.all


def test_nothing_is_asked_when_nobody_wants_to_know() -> None:
    with (
        engine_processes(1, "--speed", "0") as urls,
        router_process(urls, "--engine-report-interval-secs", "0") as router,
    ):
        router.until(lambda: bool(router.worker(urls[0])["engine"]))
        assert set(router.worker(urls[0])["engine"]) <= {"model", "context_length"}


def test_ranks_are_workers_of_their_own() -> None:
    with (
        engine_processes(1, "--speed", "0", "--dp-size", "3") as (url,),
        router_process([url], "--dp-aware", "--policy", "round_robin", healthy=False) as router,
    ):
        ranks = [f"{url}@{rank}" for rank in range(3)]
        router.until(lambda: sorted(router.workers()) == ranks)
        router.until(lambda: all(worker["is_healthy"] for worker in router.workers().values()))
        for turn in range(6):
            answer = router.post(CHAT, chat("a prompt that is long enough to be cached " * 10, max_tokens=1))
            assert answer.status == 200
            cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert bool(cached) == (turn >= 3)  # each rank has to see it once
        assert router.samples().by("sgl_router_processed_requests_total", "worker") == dict.fromkeys(ranks, 2)
        assert router.post(f"/remove_worker?url={url}").status == 200
        assert router.workers() == {}
