"""Several models behind one router, over HTTP: engines announce them, clients name them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fake_worker import FakeWorker, Gate, answer
from sglang_router.routing.policies.cache_aware import CacheAware
from stack import Reply, Stack, stack

MODELS = "GET /v1/models"
CHAT = "POST /v1/chat/completions"


def engine(*names: str, **adapters: str) -> dict[str, bytes | Gate]:
    """Return the script of an engine; adapters: name and model of each."""
    listed: list[dict[str, Any]] = [{"id": name} for name in names]
    listed += [{"id": name, "parent": model} for name, model in adapters.items()]
    done = answer(200, {"choices": []})
    return {MODELS: answer(200, {"data": listed}), CHAT: done, "POST /generate": done, "POST /v1/messages": done}


def ask(router: Stack, path: str = "/v1/chat/completions", **fields: Any) -> Reply:
    return router.post(path, {"messages": [{"role": "user", "content": "hello"}], **fields})


def got(router: Stack, fake: FakeWorker) -> int:
    return router.call(lambda: sum(seen.route.startswith("POST") for seen in fake.seen))


def test_case_23_engines_get_only_requests_for_the_model_that_they_announce() -> None:
    """Engines with models A and B behind one router were a coin toss."""
    with stack(policy="round_robin") as router:
        a, b = router.fakes(engine("A"), engine("B", "B2", lora="B"))
        for model in ("A", "B", "B2", "lora", "B"):
            assert ask(router, model=model).status == 200
        assert ask(router, "/generate", model="A", text="x").status == 200
        assert (got(router, a), got(router, b)) == (2, 4)
        names = [entry["id"] for entry in router.get("/v1/models").json()["data"]]
        assert names == ["A", "B", "B2", "lora"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate", "/v1/embeddings"])
def test_case_23_an_unknown_model_is_404_model_not_found_on_every_path(path: str) -> None:
    with stack() as router:
        fakes = router.fakes(engine("A"), engine("B"))
        for fields, status, code in (
            ({"model": "C"}, 404, "model_not_found"),
            ({"model": "x" * 3_000_000}, 404, "model_not_found"),
            ({"model": 7}, 404, "model_not_found"),
            ({}, 400, "model_required"),
            ({"model": None}, 400, "model_required"),
        ):
            reply = ask(router, path, **fields)
            assert (reply.status, reply.headers["x-smg-error-code"], len(reply.body) < 1000) == (status, code, True)
            error = reply.json()["error"]
            assert (error["code"], error["param"], error["type"]) == (code, "model", "invalid_request_error")
            assert "A, B" in error["message"]
        assert [got(router, fake) for fake in fakes] == [0, 0]


def test_case_23_the_model_of_a_form_counts() -> None:
    with stack() as router:
        one, two = router.fakes(
            engine("A"), {**engine("W"), "POST /v1/audio/transcriptions": answer(200, {"text": ""})}
        )
        form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n--x--\r\n'
        kind = "multipart/form-data; boundary=x"
        path = "/v1/audio/transcriptions"
        assert router.ask("POST", path, form % b"W", content_type=kind).status == 200
        assert router.ask("POST", path, form % b"V", content_type=kind).status == 404
        assert (got(router, one), got(router, two)) == (0, 1)


def test_case_23_a_folder_that_models_are_loaded_from_is_no_name() -> None:
    """In containers each model lies in /model: two models were taken for one, and an unknown name went to any of them.
    vLLM refuses the name of what it loaded, but got requests for it."""
    with stack(policy="round_robin") as router:
        one, two = (
            {**engine(), MODELS: answer(200, {"data": [{"id": name, "root": root}]}), CHAT: answer(200, {})}
            for name, root in (("A", "/model"), ("B", "/model"))
        )
        small = {**engine(), MODELS: answer(200, {"data": [{"id": "small", "root": "A"}]})}
        a, b, other = router.fakes(one, two, small)
        assert [ask(router, model=model).status for model in ("C", "/model", "B")] == [404, 404, 200]
        assert [ask(router, model="A").status for _ in range(4)] == [200] * 4
        assert [got(router, fake) for fake in (a, b, other)] == [4, 1, 0]


def test_case_23_one_name_that_cannot_be_read_hides_no_other() -> None:
    """Half of a surrogate pair in one name made a worker one that announces nothing, and may get any request."""
    with stack() as router:
        cut = {**engine(), MODELS: answer(200, b'{"data":[{"id":"W"},{"id":"cut \\ud83d"},{"id":"V","x":NaN}]}')}
        a, cutter = router.fakes(engine("A"), cut)
        assert [ask(router, model=model).status for model in ("C", "W", "V", "A")] == [404, 200, 200, 200]
        assert (got(router, a), got(router, cutter)) == (1, 2)
        assert router.get("/workers").status == 200


def test_with_one_model_any_name_is_for_the_engine_to_judge() -> None:
    with stack() as router:
        (fake,) = router.fakes(engine("A"))
        assert [ask(router, **fields).status for fields in ({"model": "gpt-4"}, {}, {"model": "A"})] == [200] * 3
        assert got(router, fake) == 3


def test_f26_another_model_at_the_same_url_is_noticed() -> None:
    """`model_id`, and the metrics by it, stayed `model-one` although the engine told `model-two`."""
    with stack() as router:
        (fake,) = router.fakes(engine("model-one"))
        worker = router.worker(fake.url)
        assert router.get("/workers").json()["workers"][0]["model_id"] == "model-one"
        router.call(lambda: fake.script.update({MODELS: answer(200, {"data": [{"id": "model-two"}]})}))
        router.run(router.survey.introduce(worker))
        assert router.get("/workers").json()["workers"][0]["model_id"] == "model-two"
        sizes = [
            piece for piece in router.call(lambda: list(router.app.metrics.pieces(False))) if "pool_size{" in piece
        ]
        assert sizes == ['smg_worker_pool_size{worker_type="regular",connection_mode="http",model="model-two"} 1.0\n']


def test_adapters_that_are_loaded_later_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_router.workers.engine_survey._NAMES_EVERY", 0.0)
    with stack(interval=0.01) as router:
        (fake, _) = router.fakes(engine("A"), engine("B"))
        assert ask(router, model="sql").status == 404
        router.call(lambda: fake.script.update(engine("A", sql="A")))
        router.run(fake.asked(MODELS, router.call(lambda: fake.count(MODELS)) + 2))
        assert ask(router, model="sql").status == 200


def test_f6_f14_nothing_of_a_model_name_of_megabytes_is_kept() -> None:
    """An engine that does not check names: a hundred such requests took 424 MB for ever, and every label."""
    with stack() as router:
        router.fakes(engine("A"))
        ask(router, model="A")
        for number in range(8):
            assert ask(router, model=f"{number}" + "x" * 1_000_000).status == 200

        def held() -> tuple[int, int]:
            router.app.deferred.flush()
            metrics = router.app.metrics
            keys = [key for series in metrics.counts.series for key in series if isinstance(key, str)]
            policy = router.fleet.pools.default.policy
            assert isinstance(policy, CacheAware)
            return sum(map(len, keys)), max(len(namespace) for namespace in policy.tree._roots)

        size, longest = router.call(held)
        assert size < 1000
        assert longest <= 64
        text = "".join(router.call(lambda: list(router.app.metrics.pieces(False))))
        models = {json.loads(f'"{part.split(chr(34))[0]}"') for part in text.split('model="')[1:]}
        assert models == {"A", "other"}
