"""Adapters (LoRA) that are loaded and unloaded at all workers of a model, by either of the two engines' paths."""

from __future__ import annotations

import pytest

from fake_worker import FakeWorker, answer
from sglang_router.routing.model_names import Names
from stack import Reply, Stack, stack

VLLM, SGLANG = "/v1/load_lora_adapter", "/load_lora_adapter"
UNLOAD = "/unload_lora_adapter"
LONG = b'{"lora_name":"a","x":"%b"}' % (b"x" * (1 << 18))
SQL = {"lora_name": "sql", "lora_path": "/adapters/sql"}


def serving(router: Stack, fake: FakeWorker, *bases: str, adapters: tuple[str, ...] = ()) -> None:
    worker = router.worker(fake.url)
    router.call(lambda: router.fleet.announced(worker, Names(bases, adapters)))


def adapters(router: Stack, fake: FakeWorker) -> tuple[str, ...]:
    return router.worker(fake.url).names.adapters


def refusal(reply: Reply) -> tuple[int, str, str]:
    error = reply.json()["error"]
    return reply.status, error["code"], error["message"]


@pytest.mark.parametrize("path", [VLLM, SGLANG])
def test_all_workers_are_asked_and_know_the_name_at_once(path: str) -> None:
    with stack() as router:
        both = router.fakes({f"POST {path}": answer(200)}, {f"POST {path}": answer(200)})
        for fake in both:
            serving(router, fake, "A")
        reply = router.ask("POST", path, b'{"lora_name" : "sql", "x": 1.0}', content_type="application/json")
        assert (reply.status, reply.json()["status"], reply.json()["succeeded"]) == (200, "success", 2)
        for fake in both:
            (seen,) = [seen for seen in fake.seen if seen.route == f"POST {path}"]
            assert seen.body == b'{"lora_name" : "sql", "x": 1.0}', "byte for byte"
            assert adapters(router, fake) == ("sql",)


def test_an_engine_that_has_the_other_path_gets_that() -> None:
    with stack() as router:
        sglang, vllm = router.fakes({f"POST {SGLANG}": answer(200)}, {f"POST {VLLM}": answer(200)})
        for fake in (sglang, vllm):
            serving(router, fake, "A")
        for path in (VLLM, SGLANG):
            assert router.post(path, SQL).json()["succeeded"] == 2


def test_only_workers_that_succeeded_serve_the_name() -> None:
    with stack() as router:
        good, bad = router.fakes(
            {f"POST {VLLM}": answer(200)}, {f"POST {VLLM}": answer(400, {"error": "no such path"})}
        )
        serving(router, good, "A")
        serving(router, bad, "A")
        reply = router.post(VLLM, SQL)
        assert reply.json()["status"] == "partial_success"
        assert 200 < reply.status < 300
        assert [each["error"] for each in reply.json()["results"]] == [None, "HTTP 400"]
        assert (adapters(router, good), adapters(router, bad)) == (("sql",), ())


def test_of_several_models_one_must_be_named() -> None:
    with stack() as router:
        script = {f"POST {VLLM}?model={name}": answer(200) for name in ("gpt-4", "B")}
        a, b = router.fakes(script, script)
        serving(router, a, "A")
        serving(router, b, "B")
        router.context.aliases = {"gpt-4": "A"}
        assert refusal(router.post(VLLM, SQL))[:2] == (400, "model_required")
        assert "?model=NAME" in refusal(router.post(VLLM, SQL))[2]
        assert refusal(router.post(VLLM + "?model=C", SQL))[:2] == (404, "model_not_found")
        for name, fake in (("gpt-4", a), ("B", b)):
            assert [each["worker"] for each in router.post(f"{VLLM}?model={name}", SQL).json()["results"]] == [fake.url]
            assert adapters(router, fake) == ("sql",)


def test_an_adapter_is_unloaded_where_it_is() -> None:
    with stack() as router:
        script = {f"POST {UNLOAD}": answer(200), f"POST {UNLOAD}?model=A": answer(200)}
        having, other, else_ = router.fakes(script, script, script)
        serving(router, having, "A", adapters=("sql", "law"))
        serving(router, other, "A")
        serving(router, else_, "B", adapters=("sql",))
        asked = router.post(f"{UNLOAD}?model=A", {"lora_name": "sql"}).json()
        assert [each["worker"] for each in asked["results"]] == [having.url]
        assert (adapters(router, having), adapters(router, else_)) == (("law",), ("sql",))
        asked = router.post(UNLOAD, {"lora_name": "sql"}).json()
        assert [each["worker"] for each in asked["results"]] == [else_.url]


def test_where_nobody_is_known_to_have_it_all_are_asked_to_unload_it() -> None:
    with stack() as router:
        fakes = router.fakes({f"POST {UNLOAD}": answer(200)}, {f"POST {UNLOAD}": answer(400)})
        for fake in fakes:
            serving(router, fake, "A")
        assert router.post(UNLOAD, {"lora_name": "sql"}).json()["total_workers"] == 2


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"lora_name":7}', b'{"lora_name":""}', b'{"lora_name":"a\\nb"}', b"\xff", LONG]
)
def test_a_body_without_a_name_reaches_no_engine(body: bytes) -> None:
    with stack() as router:
        (fake,) = router.fakes({f"POST {VLLM}": answer(200)})
        reply = router.ask("POST", VLLM, body, content_type="application/json")
        assert refusal(reply)[:2] == (400, "invalid_request")
        assert not fake.count(f"POST {VLLM}")


def test_without_workers_it_is_503() -> None:
    with stack() as router:
        for path in (VLLM, VLLM + "?model=A", UNLOAD):
            assert refusal(router.post(path, SQL))[:2] == (503, "no_workers")


def test_an_engine_that_announces_nothing_is_asked_too_and_goes_on_to_serve_any_name() -> None:
    with stack() as router:
        (fake,) = router.fakes({f"POST {VLLM}": answer(200)})
        serving(router, fake)
        assert router.post(VLLM, SQL).status == 200
        assert router.worker(fake.url).names == Names()
