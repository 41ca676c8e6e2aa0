"""Requests that go to all workers: sent unchanged, all results in the answer, flushed caches forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engines import engine_processes
from fake_worker import CLOSE, FakeWorker, Gate, answer
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.states import Health
from stack import Stack, stack

FLUSH = "POST /flush_cache"
DISK = "POST /update_weights_from_disk"
PROMPT = (
    b'{"text": "a prompt that is long enough to be remembered by the tree", "sampling_params": {"max_new_tokens": 1}}'
)
PASSED_ON = (
    "/update_weights_from_disk",
    "/update_weights_from_ipc",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weight_version",
    "/get_weights_by_name",
    "/weights_checker",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/slow_down",
    "/set_internal_state",
    "/pause",
    "/resume",
    "/sleep",
    "/wake_up",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/v1/rl/engine/any/path",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/start_profile",
    "/stop_profile",
)


def tree_size(router: Stack, url: str) -> int:
    """Bytes of routing text that the router believes to be cached there."""
    size: int = router.get("/workers/" + router.worker(url).id).json()["tree_size"]
    return size


def remembering(router: Stack, fakes: list[FakeWorker]) -> None:
    """Send each worker a prompt of its own."""
    for fake in fakes:
        fake.script["POST /generate"] = answer(200, {})
    for number in range(len(fakes)):  # a prompt without a match goes to the smallest tree
        assert router.post("/generate", PROMPT.replace(b"a prompt", b"%d prompt" % number)).status == 200
    assert all(tree_size(router, fake.url) for fake in fakes)


# -- in general ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PASSED_ON)
def test_every_worker_gets_the_body_as_it_is_with_its_own_key(path: str) -> None:
    body = b'{"b" :1e2,\t"a":"\xc3\xa9"}'
    with stack() as router:
        route = f"POST {path.removeprefix('/v1/rl/engine')}?x=%20"
        fakes = [router.fake({route: answer(200, {"success": True})}) for _ in range(2)]
        for number, fake in enumerate(fakes):
            router.add(fake.url, api_key=f"key{number}")
        reply = router.ask("POST", f"{path}?x=%20", body, content_type="application/x-own", authorization="Bearer c")
        done = {"status": 200, "body": {"success": True}, "error": None}
        told = reply.json()
        assert all(result.pop("seconds") >= 0 for result in told["results"])
        assert told == {
            "status": "success",
            "success": True,
            "message": "Done by 2 of 2 workers",
            "succeeded": 2,
            "total_workers": 2,
            "results": [{"worker": fake.url, "id": router.worker(fake.url).id, **done} for fake in fakes],
        }
        assert reply.status == 200
        for number, fake in enumerate(fakes):
            (seen,) = [seen for seen in fake.seen if seen.route.startswith("POST")]
            assert seen.body == body
            assert seen.headers["content-type"] == "application/x-own"
            assert seen.headers["authorization"] == f"Bearer key{number}"


def test_the_answer_has_the_result_of_each_worker() -> None:
    with stack() as router:
        fakes = router.fakes({DISK: answer(200, b"done")}, {DISK: answer(400, {"success": False})}, {DISK: CLOSE}, {})
        reply = router.post("/update_weights_from_disk", {"model_path": "x"})
        body = reply.json()
        assert (reply.status, body["status"], body["succeeded"]) == (207, "partial_success", 1)
        assert (body["success"], body["message"]) == (False, "Done by 1 of 4 workers")
        for result, fake in zip(body["results"], fakes, strict=True):
            assert result.pop("id") == router.worker(fake.url).id
            assert result.pop("seconds") >= 0
        good, bad, cut, unknown = body["results"]
        assert good == {"worker": fakes[0].url, "status": 200, "body": "done", "error": None}
        assert bad == {"worker": fakes[1].url, "status": 400, "body": {"success": False}, "error": "HTTP 400"}
        assert (cut["status"], cut["body"]) == (None, None)
        assert "closed the connection" in cut["error"]
        assert (unknown["status"], unknown["body"], unknown["error"]) == (404, None, "HTTP 404")


def test_it_is_an_error_if_all_fail_or_there_are_no_workers() -> None:
    with stack() as router:
        reply = router.post("/abort_request", {"rid": "x"})
        assert (reply.status, reply.json()["error"]["code"]) == (503, "no_workers")
        router.fakes({}, {})
        reply = router.post("/abort_request", {"rid": "x"})
        assert (reply.status, reply.json()["status"], reply.json()["succeeded"]) == (502, "failed", 0)


def test_unhealthy_and_drained_workers_are_asked_too() -> None:
    with stack() as router:
        ill, drained = router.fakes({DISK: answer(200)}, {DISK: answer(200)})
        ill.script["GET /health"] = answer(500)
        worker = router.worker(ill.url)
        router.call(lambda: router.checks.check_now(worker))
        router.until(lambda: worker.health is Health.UNHEALTHY)
        router.post(f"/workers/{router.worker(drained.url).id}/drain")
        starting = router.fake({"GET /health": answer(503), DISK: answer(200)})
        router.add(starting.url)
        assert router.post("/update_weights_from_disk", {}).json()["succeeded"] == 3


def test_workers_are_asked_at_the_same_time() -> None:
    """Two workers that answer only once both have been asked."""
    with stack() as router:
        gates = [Gate(answer(200)), Gate(answer(200))]
        one, two = router.fakes({DISK: gates[0]}, {DISK: gates[1]})

        async def open_when_both_were_asked() -> None:
            await one.asked(DISK)
            await two.asked(DISK)
            for gate in gates:
                gate.open.set()

        opening = asyncio.run_coroutine_threadsafe(open_when_both_were_asked(), router.loop)
        assert router.post("/update_weights_from_disk", {}).status == 200
        opening.result(1)


# -- caches ----------------------------------------------------------------------------------------------


def test_flushing_empties_the_routers_tree_too() -> None:
    with stack() as router:
        fakes = router.fakes({FLUSH: answer(200)}, {FLUSH: answer(200)})
        remembering(router, fakes)
        reply = router.post("/flush_cache")
        assert reply.json() == {
            "status": "success",
            "message": "Successfully flushed cache on all 2 HTTP workers",
            "workers_flushed": 2,
            "total_http_workers": 2,
            "total_workers": 2,
        }
        assert reply.status == 200
        assert [tree_size(router, fake.url) for fake in fakes] == [0, 0]


def test_a_worker_that_did_not_flush_keeps_its_tree() -> None:
    with stack() as router:
        good, bad = router.fakes({FLUSH: answer(200)}, {FLUSH: answer(400)})
        remembering(router, [good, bad])
        reply = router.post("/flush_cache")
        assert reply.status == 206
        assert reply.json() == {
            "status": "partial_success",
            "message": "The cache was flushed on 1 of 2 HTTP workers",
            "successful": [good.url],
            "failed": [{"worker": bad.url, "error": "HTTP 400"}],
            "total_http_workers": 2,
            "total_workers": 2,
        }
        assert tree_size(router, good.url) == 0
        assert tree_size(router, bad.url) > 0


def test_flush_without_workers_or_success() -> None:
    with stack() as router:
        reply = router.ask("GET", "/flush_cache")
        assert (reply.status, reply.json()["workers_flushed"]) == (200, 0)
        assert reply.json()["message"].startswith("No HTTP workers available")
        router.fakes({FLUSH: answer(500)})
        reply = router.ask("GET", "/flush_cache")
        assert (reply.status, reply.json()["status"]) == (502, "failed")


def test_an_engine_with_another_name_for_it_is_flushed_too() -> None:
    with stack() as router:
        router.fakes({"POST /reset_prefix_cache": answer(200)})
        assert router.post("/flush_cache").status == 200


@pytest.mark.parametrize("path", PASSED_ON)
def test_only_new_weights_and_lost_caches_make_prefixes_stale(path: str) -> None:
    with stack() as router:
        fakes = router.fakes({f"POST {path}": answer(200)}, {f"POST {path}": answer(500)})
        remembering(router, fakes)
        router.post(path, {})
        forgotten = [tree_size(router, fake.url) == 0 for fake in fakes]
        lost = ("/release_memory_occupation", "/sleep", "/pause", "/reset_prefix_cache")
        assert forgotten == [path.startswith("/update_weights") or path in lost, False]


def test_policies_without_a_memory_are_flushed_as_well() -> None:
    with stack(policy="round_robin") as router:
        router.fakes({FLUSH: answer(200)})
        assert router.post("/flush_cache").status == 200


# -- real engines ----------------------------------------------------------------------------------------


def cached(router: Stack) -> int:
    meta: dict[str, Any] = router.post("/generate", PROMPT).json()["meta_info"]
    count: int = meta["cached_tokens"]
    return count


def test_real_engines_forget_what_they_cached() -> None:
    with engine_processes(2, "--speed", "0") as urls, stack(*urls, health=HealthRules(interval=3600.0)) as router:
        assert (cached(router), cached(router) > 0) == (0, True)
        assert router.post("/flush_cache").json()["workers_flushed"] == 2
        assert (cached(router), cached(router) > 0) == (0, True)
        reply = router.post("/update_weights_from_disk", {"model_path": "other"})
        assert [result["body"]["success"] for result in reply.json()["results"]] == [True, True]
        assert cached(router) == 0
        assert router.post("/abort_request", {"abort_all": True}).status == 200
        assert router.post("/pause_generation", {"mode": "nonsense"}).status == 502
        assert router.post("/pause_generation", {}).status == 200
        assert router.post("/continue_generation", {}).status == 200
        assert cached(router) > 0
