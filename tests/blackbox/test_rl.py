"""The control plane of trainers by the real command, in one process and in several."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from routers import plain_worker, router_process

JSON = {"content-type": "application/json"}
GOOD = (200, JSON, b'{"success": true, "message": "done"}')
KEYS = ("--control-plane-api-keys", "a:Admin:admin:admin-key-1234", "u:User:user:user-key-12345")
WITH = {"authorization": "Bearer admin-key-1234"}
ONLY_READS = {"authorization": "Bearer user-key-12345"}
UPDATE, PAUSE, CONTINUE = "/update_weights_from_disk", "/pause_generation", "/continue_generation"


@pytest.mark.parametrize("flags", [(), ("--relay-processes", "2")], ids=["one", "relays"])
def test_a_trainer_updates_and_pauses_its_workers(flags: tuple[str, ...]) -> None:
    text = (200, {"content-type": "text/plain"}, b"--api-key hunter2\n" + b"x" * 400_000)
    fine = {"/log": text, UPDATE: GOOD, PAUSE: GOOD, CONTINUE: GOOD, "/generate": (200, JSON, b"{}")}
    with plain_worker(fine) as one, plain_worker({**fine, UPDATE: (400, JSON, b'{"success": false}')}) as two:
        flags = ("--metrics-interval-secs", "0", "--policy", "round_robin", *KEYS, *flags)
        with router_process([one.url, two.url], *flags, healthy=False, key="admin-key-1234") as router:
            router.until_healthy(one.url, two.url)
            body = {"model_path": "x", "weight_version": "step-7"}
            assert router.post(UPDATE, body, **ONLY_READS).status == 403
            assert not one.asked[UPDATE]
            answer = router.post(UPDATE, body, **WITH)
            told = answer.json()
            assert (answer.status, told["success"], told["succeeded"]) == (207, False, 1)
            assert {each["worker"]: each["error"] for each in told["results"]} == {one.url: None, two.url: "HTTP 400"}
            assert router.worker(one.url)["weight_version"] == "step-7"

            selector = quote(f"url={one.url}", safe="")
            assert router.post(f"{PAUSE}?selector={selector}", {}, **WITH).json()["total_workers"] == 1
            assert router.worker(one.url)["paused"] == ["generation"]
            for _ in range(4):
                assert router.post("/generate", {"text": "x"}).status == 200
            assert (one.asked["/generate"], two.asked["/generate"]) == (0, 4)
            if "--relay-processes" not in flags:
                assert router.samples().total("sgl_router_worker_paused", worker=one.url) == 1

            named = quote(one.url, safe="")
            assert router.post(f"/engine/{named}{CONTINUE}", {}, **ONLY_READS).status == 403
            answer = router.post(f"/engine/{named}{CONTINUE}", {}, **WITH)
            assert (answer.status, answer.json()["message"]) == (200, "done")
            assert router.worker(one.url)["paused"] == []
            answer = router.get(f"/engine/{named}/log", **WITH)
            assert (answer.status, answer.body) == (200, b"--api-key ***\n" + b"x" * 400_000)
            assert router.post(f"/engine/{named}/generate", {"text": "x"}, **WITH).status == 400
            assert "admin-key" not in str(one.seen)
