"""Health and information: what the router answers itself, and what it passes on from workers."""

from __future__ import annotations

from functools import partial

import pytest

from engines import engine_processes
from fake_worker import CLOSE, HANG, answer
from sglang_router import version
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.worker import Worker
from stack import Reply, Stack, stack

MODELS = "GET /v1/models"


def error(reply: Reply) -> tuple[int, str]:
    """Check the shape and headers of an error of the router; return its status and code."""
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-smg-error-code"] == body["error"]["code"]
    assert reply.headers["x-request-id"]
    return reply.status, body["error"]["code"]


# -- in front of real engines ----------------------------------------------------------------------------


def test_real_engines_answer_through_the_router() -> None:
    with engine_processes(2, "--speed", "0", "--model", "tiny") as urls, stack(*urls) as router:
        assert router.get("/health_generate").text == "OK"
        (model,) = router.get(MODELS.split()[1]).json()["data"]
        assert (model["id"], model["owned_by"]) == ("tiny", "sglang")
        assert router.get("/v1/models/tiny").json() == model
        assert router.get("/get_model_info").json()["model_path"] == "tiny"
        assert router.get("/server_info").json()["served_model_name"] == "tiny"
        rows = router.get("/get_loads").json()["workers"]
        assert rows == [
            {"worker": url, "load": 0, "running": 0, "worker_type": "regular", "source": "engine"} for url in urls
        ]
        assert all(worker["model_id"] == "tiny" for worker in router.get("/workers").json()["workers"])


# -- the router alone ------------------------------------------------------------------------------------


def test_version_says_which_router_this_is_and_how_it_runs() -> None:
    with stack() as router:
        told = router.get("/version").json()
    assert told == {"version": version.__version__, "build": version.build()}
    assert told["build"] in ("interpreted", "compiled by mypyc")


def test_without_workers_the_router_is_up_but_not_ready() -> None:
    with stack() as router:
        for path in ("/health", "/liveness"):
            reply = router.get(path)
            assert (reply.status, reply.text) == (200, "OK")
            assert reply.headers["content-type"].startswith("text/plain")
        reply = router.get("/readiness")
        assert reply.status == 503
        assert reply.json()["status"] == "not ready"
        assert reply.json()["reason"] == "insufficient healthy workers"
        for path in ("/health_generate", "/get_model_info", "/get_server_info", "/v1/models", "/engine_metrics"):
            reply = router.get(path)
            assert error(reply) == (503, "no_workers"), path
            assert int(reply.headers["retry-after"]) >= 1


def test_a_router_that_scales_to_zero_is_ready_without_workers_because_a_request_starts_one() -> None:
    with stack(options={"autoscale": "0:2"}) as router:
        assert router.get("/readiness").json() == {"status": "ready", "healthy_workers": 0, "total_workers": 0}
        router.fakes({})
        open_breakers(router)
        assert router.get("/readiness").status == 503  # it has a worker, so no request is held for another one


def open_breakers(router: Stack) -> None:
    """Let as many requests fail at each worker as its breaker takes to open."""

    def fail(worker: Worker) -> None:
        router.fleet.lease(worker).close(Outcome.REFUSED, router.loop.time())

    for worker in router.fleet:
        for _ in range(router.fleet.rules.breaker.threshold):
            router.call(partial(fail, worker))


def test_ready_means_that_a_healthy_worker_can_take_a_request() -> None:
    with stack() as router:
        router.fakes({})
        assert router.get("/readiness").json() == {"status": "ready", "healthy_workers": 1, "total_workers": 1}
        open_breakers(router)
        assert router.get("/readiness").status == 503  # healthy, but its breaker is open


def test_metrics_are_rendered_as_the_client_accepts_them() -> None:
    with stack() as router:
        reply = router.get("/metrics", accept="application/openmetrics-text")
        assert reply.text == "for application/openmetrics-text\n"
        assert reply.headers["content-type"] == "text/plain"


# -- health_generate -------------------------------------------------------------------------------------


def test_health_generate_goes_on_to_the_next_worker() -> None:
    with stack(generate_timeout=0.3) as router:
        bad = [{"GET /health_generate": answer(503)}, {"GET /health_generate": HANG}]
        fakes = router.fakes(*bad, {"GET /health_generate": answer(200)})
        assert router.get("/health_generate").status == 200
        assert [fake.count("GET /health_generate") for fake in fakes] == [1, 1, 1]


def test_an_engine_without_health_generate_gets_a_real_prompt() -> None:
    done = {"POST /v1/completions": answer(200, {}), MODELS: answer(200, {"data": [{"id": "m"}]})}
    with stack() as router:
        (fake,) = router.fakes(done)
        assert router.get("/health_generate").status == 200
        (seen,) = [seen for seen in fake.seen if seen.route == "POST /v1/completions"]
        assert b'"max_tokens":1' in seen.body
        assert b'"model":"m"' in seen.body


def test_health_generate_fails_when_no_worker_can() -> None:
    with stack() as router:
        router.fakes({"GET /health_generate": answer(500)}, {})
        reply = router.get("/health_generate")
        assert error(reply) == (503, "no_available_workers")
        assert "HTTP 500" in reply.text
        assert "HTTP 404" in reply.text


# -- what one worker answers ---------------------------------------------------------------------------


def test_a_workers_answer_passes_as_it_is() -> None:
    body = b'{"model_path" :  "x", "n": 1.0}'
    with stack() as router:
        router.fakes({"GET /get_model_info": answer(200, body, "application/json; charset=x")})
        reply = router.get("/get_model_info")
        assert reply.body == body
        assert reply.headers["content-type"] == "application/json; charset=x"


@pytest.mark.parametrize(("asked", "known"), [("/get_model_info", "/model_info"), ("/server_info", "/get_server_info")])
def test_engines_are_asked_by_the_name_they_know(asked: str, known: str) -> None:
    with stack() as router:
        router.fakes({f"GET {known}": answer(200, {"by": known})})
        assert router.get(asked).json() == {"by": known}


def test_another_worker_is_asked_when_the_first_one_breaks() -> None:
    info = "GET /get_server_info"
    with stack() as router:
        router.fakes({info: CLOSE}, {info: answer(500)}, {info: answer(200, {"third": True})})
        assert router.get("/get_server_info").json() == {"third": True}


def test_it_is_an_error_when_no_worker_answers() -> None:
    with stack() as router:
        router.fakes({"GET /get_model_info": CLOSE})
        assert error(router.get("/get_model_info")) == (502, "worker_unreachable")


# -- models ----------------------------------------------------------------------------------------------


def test_models_are_merged_by_id_and_keep_their_fields() -> None:
    one = {"id": "a", "object": "model", "max_model_len": 8192, "owned_by": "sglang"}
    two = {"id": "b/lora", "object": "model", "parent": "a"}
    with stack() as router:
        router.fakes(
            {MODELS: answer(200, {"object": "list", "data": [one]})},
            {MODELS: answer(200, {"object": "list", "data": [{**one, "owned_by": "other"}, two]})},
        )
        reply = router.get("/v1/models")
        assert reply.json() == {"object": "list", "data": [one, two]}
        assert reply.headers["content-type"] == "application/json"
        assert router.get("/v1/models/b/lora").json() == two
        assert error(router.get("/v1/models/c")) == (404, "not_found")


def test_aliases_are_listed_once_and_marked_with_the_fields_of_their_model() -> None:
    one = {"id": "a", "object": "model", "max_model_len": 8192, "root": "/models/a"}
    with stack() as router:
        router.fakes({MODELS: answer(200, {"data": [one]})}, {MODELS: answer(200, {"data": [one, {"id": "known"}]})})
        router.context.aliases = {"gpt-4": "a", "sql": "a:sql", "known": "a", "nobody": "gone"}
        listed = {entry["id"]: entry for entry in router.get("/v1/models").json()["data"]}
        assert listed == {
            "a": one,
            "known": {"id": "known"},
            "gpt-4": {**one, "id": "gpt-4", "alias_of": "a"},
            "sql": {**one, "id": "sql", "alias_of": "a:sql"},
        }
        assert router.get("/v1/models/gpt-4").json() == listed["gpt-4"]
        assert error(router.get("/v1/models/nobody")) == (404, "not_found")


def test_models_are_not_asked_for_at_every_request_but_again_when_workers_change() -> None:
    with stack() as router:
        (fake,) = router.fakes({MODELS: answer(200, {"data": [{"id": "a"}]})})
        before = fake.count(MODELS)
        for _ in range(3):
            router.get("/v1/models")
        assert fake.count(MODELS) == before + 1
        router.fakes({MODELS: answer(200, {"data": [{"id": "b"}]})})
        assert [model["id"] for model in router.get("/v1/models").json()["data"]] == ["a", "b"]


@pytest.mark.parametrize("broken", [answer(500), answer(200, b"no json"), answer(200, [1, 2]), CLOSE])
def test_a_known_model_is_listed_while_its_worker_does_not_answer(broken: bytes) -> None:
    with stack() as router:
        (fake,) = router.fakes({MODELS: answer(200, {"data": [{"id": "a"}]})})
        fake.script[MODELS] = broken
        listed = router.get("/v1/models").json()["data"]
        assert listed == [{"id": "a", "object": "model", "owned_by": "local"}]


def test_what_is_not_a_model_is_not_listed() -> None:
    with stack() as router:
        router.fakes({MODELS: answer(200, {"data": [{"id": 3}, 4, {}]})})
        assert error(router.get("/v1/models")) == (503, "no_available_workers")


# -- loads -----------------------------------------------------------------------------------------------


def test_loads_are_reported_by_the_engine_or_else_counted_by_the_router() -> None:
    ranks = [{"dp_rank": 0, "num_tokens": 10}, {"dp_rank": 1, "num_tokens": 4}]
    newer = {"loads": [{"num_used_tokens": 5, "num_total_tokens": 7}]}
    older = {"loads": [{"num_used_tokens": 5}]}
    scripts: list[dict[str, bytes]] = [
        {"GET /get_load": answer(200, ranks)},
        {"GET /v1/loads": answer(200, newer)},
        {"GET /v1/loads": answer(200, older)},
        {"GET /get_load": answer(500)},
        {"GET /get_load": answer(200, [{"num_tokens": -1}])},
        {},
    ]
    with stack() as router:
        fakes = router.fakes(*scripts)
        last = router.worker(fakes[-1].url)
        lease = router.call(lambda: router.fleet.lease(last))
        rows = router.get("/get_loads").json()["workers"]
        assert [row["worker"] for row in rows] == [fake.url for fake in fakes]
        assert [row["load"] for row in rows] == [14, 7, 5, 0, 0, 1]
        assert [row["running"] for row in rows] == [0, 0, 0, 0, 0, 1]
        assert [row["source"] for row in rows] == ["engine"] * 3 + ["router"] * 3
        router.call(lambda: lease.close(Outcome.SERVED, router.loop.time()))


def test_there_are_no_loads_without_workers() -> None:
    with stack() as router:
        assert router.get("/get_loads").json() == {"workers": []}


def test_the_keys_of_engines_are_masked() -> None:
    told = {"version": "0.5", "api_key": "hidden-1", "admin_api_key": "hidden-2", "ssl_keyfile_password": None}
    with stack() as router:
        router.fakes({"GET /get_server_info": answer(200, told)})
        reply = router.get("/get_server_info")
        assert "hidden" not in reply.text
        assert reply.json() == {**told, "api_key": "***", "admin_api_key": "***"}
