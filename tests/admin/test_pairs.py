"""Prefill and decode workers in the control plane: their roles are found out, followed and shown."""

from __future__ import annotations

from typing import Any

from fake_worker import FakeWorker, answer
from stack import Stack, stack

MODELS, INFO, GENERATE = "GET /v1/models", "GET /server_info", "GET /health_generate"


def engine(role: str, **more: Any) -> dict[str, Any]:
    info = {"version": "0.5.23", "disaggregation_mode": role, "disaggregation_bootstrap_port": 8999, "dp_size": 1}
    return {
        MODELS: answer(200, {"data": [{"id": "m"}]}),
        INFO: answer(200, {**info, "max_running_requests": 7}),
        GENERATE: answer(200),
        **more,
    }


def roles(router: Stack) -> list[str]:
    return [row["worker_type"] for row in router.get("/workers").json()["workers"]]


def until_role(router: Stack, fake: FakeWorker, role: str) -> None:
    router.until(lambda: router.fleet.by_url(fake.url).role == role)  # type: ignore[union-attr]


def test_engines_tell_their_roles_before_they_get_a_request() -> None:
    with stack(interval=0.05) as router:
        prefill, decode = router.fakes(engine("prefill"), engine("decode"))
        rows = {row["url"]: row for row in router.get("/workers").json()["workers"]}
        assert [rows[fake.url]["worker_type"] for fake in (prefill, decode)] == ["prefill", "decode"]
        assert rows[decode.url]["engine"]["window"] == 7
        assert rows[prefill.url]["engine"]["bootstrap_port"] == 8999
        stats = router.get("/workers").json()["stats"]
        assert (stats["prefill_count"], stats["decode_count"], stats["regular_count"]) == (1, 1, 0)
        assert [row["worker_type"] for row in router.get("/get_loads").json()["workers"]] == ["prefill", "decode"]
        router.call(router.app.deferred.flush)
        metrics = router.call(lambda: router.app.metrics.render("")[0]).decode()
        assert f'sgl_router_worker_window{{worker="{decode.url}"}} 7' in metrics
        assert f'sgl_router_pd_prefill_requests_total{{worker="{prefill.url}"}} 0' in metrics
        assert f'sgl_router_pd_decode_errors_total{{worker="{decode.url}"}} 0' in metrics
        for role in ("prefill", "decode"):
            assert f'smg_worker_pool_size{{worker_type="{role}",connection_mode="http",model="m"}} 1' in metrics


def test_a_role_that_is_switched_is_followed() -> None:
    with stack(interval=0.02) as router:
        prefill, decode = router.fakes(engine("prefill"), engine("decode"))
        assert roles(router) == ["prefill", "decode"]
        prefill.script.update(engine("decode"))
        decode.script.update(engine("prefill"))
        until_role(router, prefill, "decode")
        until_role(router, decode, "prefill")
        assert roles(router) == ["decode", "prefill"]
        assert router.get("/readiness").status == 200


def test_it_is_ready_when_there_is_one_of_each() -> None:
    with stack(interval=0.05, paired=True) as router:
        assert router.get("/readiness").json()["reason"] == "no prefill and no decode worker can take requests"
        router.fakes(engine("decode"))
        reply = router.get("/readiness")
        assert (reply.status, reply.json()["reason"]) == (503, "no prefill worker can take requests")
        router.fakes(engine("prefill"))
        assert router.get("/readiness").status == 200


def test_a_regular_worker_is_enough_unless_pairs_are_asked_for() -> None:
    with stack(interval=0.05) as router:
        router.fakes(engine("decode"))
        assert router.get("/readiness").status == 503
        router.fakes(engine("null"))
        assert router.get("/readiness").status == 200


def test_both_halves_must_generate() -> None:
    with stack(interval=0.05) as router:
        prefill, decode = router.fakes(engine("prefill"), engine("decode"))
        assert router.get("/health_generate").status == 200
        assert (prefill.count(GENERATE), decode.count(GENERATE)) == (1, 1)
    with stack(interval=0.05) as router:
        router.fakes(engine("prefill"), engine("decode", **{GENERATE: answer(503)}))
        assert router.get("/health_generate").status == 503
