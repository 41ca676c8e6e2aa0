"""Data-parallel ranks as workers, over real sockets: how they come, what reaches the engine, how they go."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from engines import engine_processes
from fake_worker import FakeWorker, Gate, Seen, answer
from sglang_router.routing.facts import LARGE
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.states import Health
from sglang_router.wire.headers import ForwardRules
from stack import Reply, Stack, stack

HEALTH, INFO, CHAT = "GET /health", "GET /server_info", "POST /v1/chat/completions"
BODY = b'{ "model":"m", "messages" : [{"role":"user","content":"hi }"}] , "n":1.0 }\n'


def engine(ranks: int, **more: bytes) -> dict[str, bytes | Gate]:
    """What an engine with that many ranks answers."""
    rows = [{"dp_rank": k, "num_running_reqs": k, "num_waiting_reqs": 0, "num_total_tokens": 10 * k} for k in range(9)]
    return {
        INFO: answer(200, {"version": "1", "dp_size": ranks, "max_total_num_tokens": 100}),
        "GET /v1/loads": answer(200, {"loads": rows[:ranks]}),
        CHAT: answer(200, {"ok": True}),
        "POST /flush_cache": answer(200),
        **more,
    }


def engine_with_ranks(router: Stack, ranks: int = 2, script: Mapping[str, bytes | Gate] | None = None) -> FakeWorker:
    fake = router.fake({**engine(ranks), **(script or {})})
    assert router.post("/add_worker", url=fake.url).status == 200
    return fake


def urls(router: Stack) -> list[str]:
    found: list[str] = router.get("/list_workers").json()["urls"]
    return found


def all_well(router: Stack) -> list[str]:
    """The workers there are, once all of them are healthy; on the router's loop."""
    return sorted(w.url for w in router.fleet if all(other.health is Health.HEALTHY for other in router.fleet))


def chats(fake: FakeWorker, route: str = CHAT) -> list[Seen]:
    return [seen for seen in fake.seen if seen.route == route]


# -- how they come ---------------------------------------------------------------------------------------


def test_adding_an_engine_answers_when_its_ranks_are_there() -> None:
    with stack(dp_aware=True) as router:
        fake = router.fake(engine(3))
        reply = router.post("/add_worker", url=fake.url, api_key="k")
        assert (reply.status, reply.text) == (200, f"Successfully added worker: {fake.url}")
        assert urls(router) == [f"{fake.url}@{rank}" for rank in range(3)]
        workers = router.get("/workers").json()["workers"]
        assert [worker["health"] for worker in workers] == ["healthy"] * 3
        assert len({worker["id"] for worker in workers}) == 3
        assert [(w["base_url"], w["dp_rank"]) for w in workers] == [(fake.url, rank) for rank in range(3)]
        assert workers[2]["engine"] == {
            "version": "1", "capacity_tokens": 100, "ranks": 3, "running": 2, "queued": 0, "load_tokens": 20,
        }  # fmt: skip
        assert router.get("/workers/" + quote(f"{fake.url}@1", safe="")).json()["dp_rank"] == 1
        loads = router.get("/get_loads").json()["workers"]
        assert [row["load"] for row in loads] == [0, 10, 20]


def test_an_engine_of_one_rank_and_one_that_does_not_tell_stay_whole() -> None:
    with stack(dp_aware=True) as router:
        one, silent = router.fake(engine(1)), router.fake({CHAT: answer(200)})
        for fake in (one, silent):
            assert router.post("/add_worker", url=fake.url).status == 200
        assert urls(router) == [one.url, silent.url]
        assert router.post("/v1/chat/completions", BODY).status == 200
        ((seen,),) = [found for fake in (one, silent) if (found := chats(fake))]
        assert seen.body == BODY
        assert "x-data-parallel-rank" not in seen.headers


def test_the_body_of_a_registration_decides() -> None:
    with stack() as router:
        aware, plain = router.fake(engine(2)), router.fake(engine(2))
        reply = router.post("/workers", {"url": aware.url, "dp_aware": True})
        assert reply.status == 202
        router.until(lambda: len(router.fleet) == 2 and all(w.health is Health.HEALTHY for w in router.fleet))
        assert router.post("/workers", {"url": plain.url}).status == 202
        router.until(lambda: len(router.fleet) == 3 and all(w.health is Health.HEALTHY for w in router.fleet))
        assert urls(router) == [f"{aware.url}@0", f"{aware.url}@1", plain.url]


def test_an_engine_is_there_once() -> None:
    with stack(dp_aware=True) as router:
        fake = engine_with_ranks(router)
        assert router.post("/add_worker", url=fake.url).status == 400
        assert router.post("/workers", {"url": fake.url}).status == 409
        assert len(urls(router)) == 2


def test_the_whole_serves_until_a_rank_does() -> None:
    rules = HealthRules(interval=3600.0, timeout=60.0, failure_threshold=1, success_threshold=1)
    with stack(dp_aware=True, health=rules) as router:
        info = Gate(answer(200, {"dp_size": 2}))
        fake = router.fake({**engine(2), INFO: info})
        replies: list[Reply] = []
        adding = threading.Thread(target=lambda: replies.append(router.post("/add_worker", url=fake.url)))
        adding.start()
        router.run(fake.asked(INFO))  # it is healthy, and being asked what it is
        gate = fake.script[HEALTH] = Gate(answer(200))
        router.call(info.open.set)
        router.run(fake.asked(HEALTH, 3))  # its ranks are checked
        assert len(urls(router)) == 3
        assert router.post("/v1/chat/completions", BODY).status == 200
        assert chats(fake)[-1].body == BODY
        assert not replies
        router.call(gate.open.set)
        adding.join(20)
        assert replies[0].status == 200
        assert urls(router) == [f"{fake.url}@0", f"{fake.url}@1"]


# -- what reaches the engine -----------------------------------------------------------------------------


def test_a_request_names_its_rank_and_is_otherwise_as_it_came() -> None:
    with stack(dp_aware=True, policy="round_robin") as router:
        fake = engine_with_ranks(router)
        for _ in range(4):
            assert router.post("/v1/chat/completions", BODY).status == 200
        bodies = [seen.body for seen in chats(fake)]
        assert bodies == [BODY[:-2] + b',"data_parallel_rank":%d}\n' % rank for rank in (0, 1, 0, 1)]
        assert [seen.headers["x-data-parallel-rank"] for seen in chats(fake)] == ["0", "1", "0", "1"]
        assert [int(seen.headers["content-length"]) for seen in chats(fake)] == [len(body) for body in bodies]
        assert [worker["processed"] for worker in router.get("/workers").json()["workers"]] == [2, 2]


def test_f10_a_large_request_names_its_rank_and_is_otherwise_as_it_came() -> None:
    """F10: the rank made a copy of the whole body."""
    body = b'{ "model":"m", "x":[' + b'["}"],' * LARGE + b"1]"
    with stack(dp_aware=True, policy="round_robin") as router:
        fake = engine_with_ranks(router)
        for _ in range(2):
            assert router.post("/v1/chat/completions", body + b" }\n").status == 200
        assert [seen.body for seen in chats(fake)] == [body + b' ,"data_parallel_rank":%d}' % rank for rank in (0, 1)]


def test_a_rank_of_the_clients_own_does_not_count() -> None:
    with stack(dp_aware=True) as router:
        fake = engine_with_ranks(router)
        refused = router.post("/v1/chat/completions", {"messages": [], "data_parallel_rank": 7})
        assert (refused.status, refused.json()["error"]["param"]) == (400, "data_parallel_rank")
        router.app.relay.forward = ForwardRules(trusted=True)  # --trust-client-routing-fields
        router.post("/v1/chat/completions", {"messages": [], "data_parallel_rank": 7})
        (seen,) = chats(fake)
        assert json.loads(seen.body)["data_parallel_rank"] in (0, 1)


def test_a_retry_names_the_other_rank_in_the_body_as_it_came() -> None:
    with stack(dp_aware=True, policy="round_robin") as router:
        fake = engine_with_ranks(router, script={CHAT: answer(500)})
        assert router.post("/v1/chat/completions", b"{}").status == 500
        bodies = [seen.body for seen in chats(fake)]
        assert len(bodies) == 2
        assert set(bodies) == {b'{"data_parallel_rank":0}', b'{"data_parallel_rank":1}'}
        assert bodies[0] != bodies[1]


def test_a_body_that_is_not_read_is_not_touched() -> None:
    route = "/v1/audio/transcriptions"
    with stack(dp_aware=True) as router:
        fake = engine_with_ranks(router, script={f"POST {route}": answer(200)})
        assert router.ask("POST", route, b"--x\r\n}", content_type="multipart/form-data; boundary=x").status == 200
        (seen,) = chats(fake, f"POST {route}")
        assert seen.body == b"--x\r\n}"
        assert seen.headers["x-data-parallel-rank"] in "01"


def test_what_is_said_to_all_workers_is_said_once_to_an_engine() -> None:
    with stack(dp_aware=True) as router:
        fake = engine_with_ranks(router, 3, {"GET /metrics": answer(200, b"up 1\n")})
        for _ in range(3):
            router.post("/v1/chat/completions", BODY)
        reply = router.post("/flush_cache").json()
        assert reply["workers_flushed"] == 1
        assert fake.count("POST /flush_cache") == 1
        assert [worker["tree_size"] for worker in router.get("/workers").json()["workers"]] == [0, 0, 0]
        assert router.get("/engine_metrics").text == f'up{{worker_addr="{fake.url}"}} 1\n'


# -- how they go -----------------------------------------------------------------------------------------


def test_removing_an_engine_removes_all_its_ranks() -> None:
    with stack(dp_aware=True) as router:
        fake = engine_with_ranks(router)
        assert router.post("/remove_worker", url=fake.url).status == 200
        assert urls(router) == []
        assert router.post("/remove_worker", url=fake.url).status == 404


def test_one_rank_can_be_removed() -> None:
    with stack(dp_aware=True) as router:
        fake = engine_with_ranks(router, 3)
        assert router.post("/remove_worker", url=f"{fake.url}@1").status == 200
        rank = quote(f"{fake.url}@0", safe="")
        assert router.ask("DELETE", f"/workers/{rank}").status == 202
        assert urls(router) == [f"{fake.url}@2"]


def test_entries_follow_an_engine_that_restarts_with_another_number_of_ranks() -> None:
    rules = HealthRules(interval=0.05, failure_threshold=1, success_threshold=1)
    with stack(dp_aware=True, health=rules) as router:
        fake = engine_with_ranks(router, 3)
        for ranks in (2, 4, 1):
            router.run(fake.stop())
            router.until(lambda: all(worker.health is Health.UNHEALTHY for worker in router.fleet))
            fake.script.update(engine(ranks))
            router.run(fake.start())
            wanted = [f"{fake.url}@{rank}" for rank in range(ranks)] if ranks > 1 else [fake.url]
            router.until(lambda wanted=wanted: all_well(router) == wanted)  # type: ignore[misc]
            assert router.post("/v1/chat/completions", BODY).status == 200


# -- a real engine ---------------------------------------------------------------------------------------


def test_the_built_in_engine_keeps_a_cache_for_each_rank() -> None:
    def ask(router: Stack, text: str) -> dict[str, Any]:
        reply = router.post("/generate", {"text": text, "sampling_params": {"max_new_tokens": 1}})
        assert reply.status == 200, reply.text
        found: dict[str, Any] = reply.json()["meta_info"]
        return found

    with engine_processes(1, "--speed", "0", "--dp-size", "2") as (url,):
        with stack(dp_aware=True) as router:
            assert router.post("/add_worker", url=url).status == 200
            assert urls(router) == [f"{url}@0", f"{url}@1"]
            cached = [ask(router, f"{text} " * 200)["cached_tokens"] for text in "abab"]
            assert cached[:2] == [0, 0]
            assert min(cached[2:]) > 100  # each came back to the rank that holds it
        with stack(dp_aware=True, policy="round_robin") as router:
            assert router.post("/add_worker", url=url).status == 200
            cached = [ask(router, "c " * 200)["cached_tokens"] for _ in range(4)]
            assert [count > 100 for count in cached] == [False, False, True, True]
