"""Several models behind one router, as an operator starts it: aliases, fallbacks, policies, adapters.

The engines are built-in ones under different names. They serve any name, as SGLang does, and answer with the name that
they were asked for: so their answers show what each was told.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from engines import end_engine, engine_processes, start_engine, wait_until_healthy
from routers import Answer, RouterProcess, router_process

BIG, SMALL = "llama-70b", "llama-8b"
NAMES = ("--model-alias", f"gpt-4={BIG}", f"mini={SMALL}", "--model-fallback", f"{BIG}={SMALL}")
ONE_AND_TWO = pytest.mark.parametrize("processes", [(), ("--relay-processes", "2")], ids=["one", "relays"])
SERVED = "x-sglang-router-model"


@pytest.fixture(scope="module")
def big() -> Iterator[str]:
    with engine_processes(1, "--speed", "0", "--model", BIG) as (url,):
        yield url


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    with engine_processes(1, "--speed", "0", "--model", SMALL) as (url,):
        yield url


def chat(router: RouterProcess, model: str | None, **more: Any) -> Answer:
    named = {} if model is None else {"model": model}
    body = {**named, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, **more}
    return router.post("/v1/chat/completions", body, x_sglang_router_explain="1")


def worker(answer: Answer) -> str:
    assert answer.status == 200, answer
    return answer.headers["x-sglang-router-worker"]


def kill(process: subprocess.Popen[str]) -> None:
    """End an engine at once."""
    process.kill()
    end_engine(process)


def announced(router: RouterProcess, *models: str) -> None:
    """Wait until the router knows these models."""
    router.until(lambda: {entry["id"] for entry in router.get("/v1/models").json()["data"]} >= set(models))
    router.until(lambda: chat(router, "nobody").status == 404 or len(models) == 1)


@ONE_AND_TWO
def test_each_model_its_workers_and_aliases_are_other_names(big: str, small: str, processes: tuple[str, ...]) -> None:
    with router_process([big, small], *NAMES, *processes) as router:
        announced(router, BIG, SMALL)
        for name, model, url in ((BIG, BIG, big), (SMALL, SMALL, small), ("gpt-4", BIG, big), ("mini", SMALL, small)):
            answer = chat(router, name)
            assert worker(answer) == url
            assert answer.json()["model"] == model, "the engine is told the name that it knows"
            assert answer.headers.get(SERVED) == (model if model != name else None)
        unknown, unnamed = chat(router, "gpt-5"), chat(router, None)
        assert (unknown.status, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert "gpt-4" in unknown.json()["error"]["message"]
        assert (unnamed.status, unnamed.json()["error"]["code"]) == (400, "model_required")
        listed = {entry["id"]: entry.get("alias_of") for entry in router.get("/v1/models").json()["data"]}
        assert listed == {BIG: None, SMALL: None, "gpt-4": BIG, "mini": SMALL}
        assert router.get("/v1/models/gpt-4").json()["alias_of"] == BIG
        streamed = chat(router, "gpt-4", stream=True)
        assert streamed.headers[SERVED] == BIG
        assert f'"model":"{BIG}"'.encode() in streamed.body.replace(b" ", b"")
        counts = router.samples()
        assert counts.total("sgl_router_renamed_requests_total", model="gpt-4", served=BIG) == 2
        assert counts.total("smg_router_requests_total", model="gpt-4") == 2
        record = next(each for each in router.get("/decisions").json()["decisions"] if each["model"] == "gpt-4")
        assert (record["served_model"], record["worker"]) == (BIG, big)


@ONE_AND_TWO
def test_bodies_of_any_size_are_renamed(big: str, small: str, processes: tuple[str, ...]) -> None:
    with router_process([big, small], *NAMES, *processes) as router:
        announced(router, BIG, SMALL)
        padding = "x" * 700_000
        for more in ({"padding": padding}, {"padding": "x" * 100_000}, {}):
            body = json.dumps({**more, "model": "gpt-4", "prompt": "hi", "max_tokens": 1}).encode() + b" \n"
            answer = router.post("/v1/completions", body)
            assert (answer.status, answer.json().get("model")) == (200, BIG), answer.body[:300]


@ONE_AND_TWO
def test_a_fallback_serves_while_no_worker_of_the_model_can(small: str, processes: tuple[str, ...]) -> None:
    process, url = start_engine("--speed", "0", "--model", BIG)
    with ExitStack() as ends:
        ends.callback(kill, process)
        wait_until_healthy(url)
        router = ends.enter_context(router_process([url, small], *NAMES, *processes))
        announced(router, BIG, SMALL)
        assert worker(chat(router, "gpt-4")) == url
        kill(process)
        for name in (BIG, "gpt-4"):
            answer = chat(router, name)
            assert worker(answer) == small, "also the request that finds the dead worker first"
            assert (answer.json()["model"], answer.headers[SERVED]) == (SMALL, SMALL)
        assert chat(router, "gpt-5").status == 404
        assert router.samples().total("sgl_router_renamed_requests_total", model=BIG, served=SMALL) == 1
        router.until(lambda: f"served_model={SMALL}" in router.log())
        router.until(lambda: router.samples().total("smg_worker_requests_active") == 0)


def test_without_a_fallback_a_model_that_is_down_is_503(small: str) -> None:
    process, url = start_engine("--speed", "0", "--model", BIG)
    with ExitStack() as ends:
        ends.callback(kill, process)
        wait_until_healthy(url)
        router = ends.enter_context(router_process([url, small], "--model-alias", f"gpt-4={BIG}"))
        announced(router, BIG, SMALL)
        kill(process)
        router.until(lambda: chat(router, BIG).status == 503)
        assert worker(chat(router, SMALL)) == small


def test_strict_names_in_a_fleet_of_one_model(big: str) -> None:
    with router_process([big]) as lenient:
        assert chat(lenient, "anything").status == 200, "the engine decides"
    with router_process([big], "--enable-igw") as router:
        router.until(lambda: chat(router, "anything").status == 404)
        error = chat(router, "anything").json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert chat(router, None).status == 200, "no model: the only one"
        assert chat(router, BIG).status == 200


def test_workers_are_called_what_the_operator_says(big: str, small: str) -> None:
    told = ("--worker-model", f"{big}=red", f"{small}=blue")
    with router_process([big, small], *told) as router:
        announced(router, BIG, SMALL)
        answer = chat(router, "red")
        assert (worker(answer), answer.json()["model"]) == (big, BIG)
        assert worker(chat(router, "blue")) == small
        assert worker(chat(router, BIG)) == big, "what the engine announces counts beside it"
        assert router.get("/v1/models/red").json()["alias_of"] == BIG


def test_a_model_has_its_own_policy_and_sighup_changes_it(big: str, small: str, tmp_path: Path) -> None:
    config = tmp_path / "router.yaml"

    def write(policy: str, alias: str) -> None:
        config.write_text(f"models:\n  {SMALL}:\n    policy: {policy}\n    aliases: [{alias}]\n")

    write("round_robin", "mini")
    with router_process([big, small], "--config", str(config)) as router:
        announced(router, BIG, SMALL)
        chat(router, BIG), chat(router, "mini")

        def policies() -> dict[str, str]:
            found = router.get("/decisions").json()["decisions"]
            return {each["model"]: each["policy"] for each in reversed(found)}

        assert policies() == {BIG: "cache_aware", "mini": "round_robin"} | policies()
        write("least_load", "tiny")
        router.send_signal(signal.SIGHUP)
        router.until(lambda: chat(router, "tiny").status == 200)
        assert policies()["tiny"] == "least_load"
        assert chat(router, "mini").status == 404


def test_sighup_applies_what_it_says_and_nothing_else_of_the_file(big: str, small: str, tmp_path: Path) -> None:
    config = tmp_path / "router.yaml"

    def write(called: str, more: str, *urls: str) -> None:
        names = f"worker-model:\n  {urls[-1]}: {called}\n"
        config.write_text(f"worker-urls: [{', '.join(urls)}]\n{names}model-alias: {{mini: {called}}}\n{more}")

    write("blue", "", big, small)
    with router_process([], "--config", str(config)) as router:
        router.until(lambda: chat(router, "blue").status == 200)
        announced(router, BIG, SMALL)
        assert worker(chat(router, "blue")) == small
        write("green", "", big, small)
        router.send_signal(signal.SIGHUP)
        router.until(lambda: worker(chat(router, "green")) == small)
        assert chat(router, "blue").status == 404
        assert worker(chat(router, "mini")) == small
        write("red", "enable-igw: true\nqueue-timeout-secs: 7\n", big)  # the other one is gone, and its name with it
        router.send_signal(signal.SIGHUP)
        router.until(lambda: worker(chat(router, "mini")) == big)
        router.until(lambda: "these changes need a restart: --enable-igw, --queue-timeout-secs" in router.log())
        assert chat(router, "whatever").status == 200, "names are as strict as before"


@ONE_AND_TWO
def test_adapters_are_loaded_everywhere_and_known_at_once(big: str, small: str, processes: tuple[str, ...]) -> None:
    with router_process([big, small], "--engine-report-interval-secs", "0", *processes) as router:
        announced(router, BIG, SMALL)
        adapter = {"lora_name": "sql", "lora_path": "/adapters/sql"}
        assert router.post("/v1/load_lora_adapter", adapter).status == 400, "which model?"
        assert chat(router, "sql").status == 404
        loaded = router.post(f"/v1/load_lora_adapter?model={BIG}", adapter)
        assert (loaded.status, [each["worker"] for each in loaded.json()["results"]]) == (200, [big])
        for name in ("sql", f"{BIG}:sql"):
            assert worker(chat(router, name)) == big
        assert (
            worker(
                router.post(
                    "/generate",
                    {"text": "x", "lora_path": "sql", "sampling_params": {"max_new_tokens": 1}},
                    x_sglang_router_explain="1",
                )
            )
            == big
        ), "an adapter tells the model"
        assert router.get("/v1/models/sql").json()["parent"] == BIG
        assert router.post("/unload_lora_adapter", adapter).status == 200
        assert chat(router, "sql").status == 404
