"""Nothing leaves or enters that should not: secrets of engines, decoded bytes, loops, unlimited work, keys."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from functools import partial
from typing import Any

import pytest

from fake_worker import FakeWorker, Gate, Seen, answer
from sglang_router.access.permissions import Access
from sglang_router.admin.context import SharedAnswer
from sglang_router.config.keys import control_keys
from sglang_router.wire.headers import ForwardRules
from sglang_router.workers.fetch import Sent
from stack import Reply, stack

MODELS, GENERATE, CHAT = "GET /v1/models", "GET /health_generate", "POST /v1/chat/completions"
KEYED = {"authorization": "Bearer theirs"}
STATES: dict[str, Any] = {
    "internal_states": [{"api_key": "hunter2", "admin_api_key": "hunter2", "env_vars": {"HF_TOKEN": "hunter2"}}],
    "ssl_keyfile_password": "hunter2",
    "max_total_tokens": 4096,
}


def code(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json()["error"]["code"]


def last(fake: FakeWorker, route: str) -> Seen:
    return [seen for seen in fake.seen if seen.route == route][-1]


# -- F4: secrets of engines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/get_server_info", "/server_info", "/get_model_info", "/model_info"])
@pytest.mark.parametrize("told", [STATES, [STATES], {**STATES, "x": float("nan")}], ids=["object", "list", "NaN"])
def test_f4_no_secret_of_an_engine_leaves_at_any_depth(path: str, told: Any) -> None:
    """`internal_states[0].api_key` passed to anyone, and a list or a body with NaN passed whole."""
    with stack() as router:
        router.fakes({f"GET {path}": answer(200, json.dumps(told).encode(), "application/json")})
        reply = router.get(path)
        assert reply.status == 200
        assert "hunter2" not in reply.text
        assert "4096" in reply.text


def test_f4_what_cannot_be_searched_is_not_passed_on() -> None:
    with stack() as router:
        (fake,) = router.fakes({"GET /server_info": answer(200, b'{"api_key":"hunter2"', "application/json")})
        reply = router.get("/server_info")
        assert code(reply) == (502, "worker_invalid_response")
        assert "hunter2" not in reply.text
        fake.script["GET /server_info"] = answer(200, b'["' + b"x" * (1 << 20) + b'"]')
        assert code(router.get("/server_info")) == (502, "worker_invalid_response")
        fake.script["GET /server_info"] = answer(400, b"api_key: hunter2")
        reply = router.get("/server_info")
        assert (reply.status, "hunter2" in reply.text) == (400, False)


def test_f4_models_and_results_of_broadcasts_hold_no_secret() -> None:
    with stack() as router:
        fake = router.fake(
            {
                MODELS: answer(
                    200, {"data": [{"id": "m", "root": "--api-key hunter2", "meta": {"api_key": "hunter2"}}]}
                ),
                "POST /start_profile": answer(200, {"args": {"api_key": "hunter2"}, "said": "own-worker-key"}),
                "POST /stop_profile": answer(500, b"failed with api_key=hunter2 own-worker-key"),
            }
        )
        router.add(fake.url, api_key="own-worker-key")
        router.until_healthy(fake.url)
        replies = [router.get("/v1/models"), router.get("/v1/models/m")]
        replies += [router.post("/start_profile"), router.post("/stop_profile")]
        for reply in replies:
            assert "hunter2" not in reply.text
            assert "own-worker-key" not in reply.text
        assert replies[0].json()["data"][0]["id"] == "m"


def test_f4_of_a_long_result_only_its_size_is_shown() -> None:
    with stack() as router:
        router.fakes({"POST /start_profile": answer(200, b"x" * 100_000)})
        assert router.post("/start_profile").json()["results"][0]["body"] == "(100000 bytes)"


@pytest.mark.parametrize(
    "told",
    [
        b'{"said":"cut \\ud83d"}',
        b"[" * 700 + b"]" * 700,
        b"[" * 50_000,
        b'{"a":"' + b"[" * 50_000 + b'"}',
        b'{"data":[NaN]}',
    ],
    ids=["surrogate", "deep", "open", "deep text", "NaN"],
)
def test_f4_no_answer_of_an_engine_makes_the_router_fail(told: bytes) -> None:
    """Half of a surrogate pair, and deep nesting, were a 500 with a traceback."""
    with stack() as router:
        models = b'{"data":[{"id":"m","more":%s}]}' % told
        (fake,) = router.fakes({MODELS: answer(200, models), "POST /start_profile": answer(200, told)})
        assert router.post("/start_profile").status == 200
        fake.script["GET /server_info"] = answer(200, told)
        assert router.get("/server_info").status in (200, 502)
        assert router.get("/v1/models").status in (200, 503)


def test_case_16_models_are_read_as_tolerantly_as_bodies() -> None:
    """A list of models with NaN or half of a surrogate pair was "no models"."""
    for odd in (b"NaN", b'"cut \\ud83d"', b"1" * 40):
        with stack() as router:
            router.fakes({MODELS: answer(200, b'{"data":[{"id":"m","x":%s}]}' % odd)})
            reply = router.get("/v1/models")
            assert (reply.status, reply.json()["data"][0]["id"]) == (200, "m")


# -- F19: decoded bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["%0a", "%0A", "%0d%0a", "%0d%0aX:%20y", "%00", "%7f", "%c2%85", "%e2%80%a8", "/%0a"])
def test_f19_no_control_character_reaches_a_worker_or_another_endpoint(end: str) -> None:
    """`GET /get_server_info%0a` matched, and went to the worker with a raw LF in the request line."""
    with stack() as router:
        (fake,) = router.fakes({})
        before = len(fake.seen)
        for method, path in (
            ("GET", "/get_server_info"),
            ("POST", "/flush_cache"),
            ("GET", "/health"),
            ("GET", "/v1/models/m"),
        ):
            assert code(router.ask(method, path + end, b"")) == (404, "not_found")
        assert len(fake.seen) == before


@pytest.mark.parametrize("path", ["/get_server_info", "/get%5fserver%5finfo", "/%67et_server_info"])
def test_f19_a_worker_is_asked_for_the_path_of_the_endpoint(path: str) -> None:
    with stack() as router:
        (fake,) = router.fakes({"GET /get_server_info": answer(200, {})})
        assert router.get(path).status == 200
        assert fake.seen[-1].route == "GET /get_server_info"


# -- F20: changes by GET -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localtest.me", "evil.example:80", "127.0.0.1.nip.io", "flush.localhost.evil.example"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_f20_a_page_cannot_flush_caches_by_a_name_of_its_own(host: str, method: str) -> None:
    """`<img src="http://localtest.me:PORT/flush_cache">` has neither Origin nor Sec-Fetch-*; it emptied all caches."""
    with stack() as router:
        (fake,) = router.fakes({"POST /flush_cache": answer(200)})
        assert router.ask(method, "/flush_cache", b"", host=host).status == 403
        assert fake.count("POST /flush_cache") == 0


# -- F22: generating for a check ---------------------------------------------------------------------------------------


def test_f22_all_who_ask_for_a_token_at_once_share_it_and_it_is_load() -> None:
    """30 of 30 requests at once made 30 completions, whatever the limits; the router's load said 1."""
    gate = Gate(answer(200))
    with stack() as router:
        (fake,) = router.fakes({GENERATE: gate})
        router.call(lambda: setattr(router.context, "clock", lambda: 1.0))  # all of this takes no time
        sockets = [socket.create_connection(("127.0.0.1", router.port)) for _ in range(8)]
        for number, asking in enumerate(sockets):
            method = "HEAD" if number % 2 else "GET"
            asking.sendall(
                f"{method} /health_generate HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
            )
        router.run(fake.asked(GENERATE))
        assert router.worker(fake.url).load == 1
        router.call(gate.open.set)
        for asking in sockets:
            with asking, asking.makefile("rb") as answered:
                assert b" 200 " in answered.readline()
        assert fake.count(GENERATE) == 1
        assert router.worker(fake.url).load == 0


def test_f22_a_client_that_leaves_gives_the_load_back() -> None:
    with stack() as router:
        (fake,) = router.fakes({GENERATE: Gate(answer(200))})
        with socket.create_connection(("127.0.0.1", router.port)) as asking:
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves with a reset
            asking.sendall(b"GET /health_generate HTTP/1.1\r\nhost: localhost\r\n\r\n")
            router.run(fake.asked(GENERATE))
        worker = router.worker(fake.url)

        async def some_turns() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        router.run(some_turns())
        assert worker.load == 0


def test_f22_who_sends_another_key_each_time_gets_the_same_token() -> None:
    """Each Authorization had a token of its own, so anybody could let engines generate without a limit."""
    with stack() as router:
        (fake,) = router.fakes({GENERATE: answer(200)})
        router.call(lambda: setattr(router.context, "clock", lambda: 1.0))
        for number in range(5):
            assert router.get("/health_generate", authorization=f"Bearer {number}", via=f"1.1 p{number}").status == 200
        assert fake.count(GENERATE) == 1


# -- F32 and case 9: whose key goes where ------------------------------------------------------------------------------


def test_f32_a_key_of_the_control_plane_stays_here() -> None:
    """It was forwarded as the client's Authorization when it was used for inference."""
    with stack() as router:
        (fake,) = router.fakes({CHAT: answer(200, {}), MODELS: answer(200, {"data": [{"id": "m"}]})})
        access = Access((), control_keys(["ops:Ops:admin:admin-key"]))
        router.app.relay.forward = router.context.forward = ForwardRules(withheld=access.withholds)
        for key in ("Bearer admin-key", "admin-key"):
            assert router.ask("POST", CHAT.split()[1], b"{}", authorization=key).status == 200
            assert "authorization" not in last(fake, CHAT).headers
            assert router.get("/v1/models", authorization=key).status == 200
            assert "authorization" not in last(fake, MODELS).headers
        router.ask("POST", CHAT.split()[1], b"{}", authorization="Bearer theirs")
        assert last(fake, CHAT).headers["authorization"] == "Bearer theirs"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/m", "/get_model_info", "/get_server_info", "/health_generate"]
)
def test_case_9_look_ups_pass_on_the_key_that_inference_passes_on(path: str) -> None:
    """In front of engines with keys of their own, GET /v1/models with such a key was 503, "no worker"."""
    asked = f"GET {path.removesuffix('/m')}"
    with stack() as router:
        open_one = router.fake({asked: answer(401, {"error": {"message": "wrong key"}})})
        router.add(open_one.url)
        router.until_healthy(open_one.url)
        reply = router.get(path, authorization="Bearer wrong")
        assert (reply.status, reply.json()["error"]["message"]) == (401, "wrong key")
        assert last(open_one, asked).headers["authorization"] == "Bearer wrong"
        open_one.script[asked] = answer(200, {"data": [{"id": "m"}]})
        assert router.get(path, authorization="Bearer theirs").status == 200  # not the answer for another key
        assert last(open_one, asked).headers["authorization"] == "Bearer theirs"
        router.call(lambda: setattr(router.context, "forward", ForwardRules(guarded=True)))
        router.call(lambda: setattr(router.context, "generated", SharedAnswer()))
        router.get(path, authorization="Bearer ours")
        assert "authorization" not in last(open_one, asked).headers


def test_case_9_broadcasts_too_and_a_worker_with_a_key_gets_its_own() -> None:
    route = "POST /flush_cache"
    with stack() as router:
        own, none = (router.fake({route: answer(200)}) for _ in range(2))
        router.add(own.url, api_key="its-own-key")
        router.add(none.url)
        assert router.ask("POST", "/flush_cache", b"", **KEYED).status == 200
        assert last(own, route).headers["authorization"] == "Bearer its-own-key"
        assert last(none, route).headers["authorization"] == "Bearer theirs"
        own.script[route] = none.script[route] = answer(401)
        assert router.ask("POST", "/flush_cache", b"").status == 401
        own.script[route] = answer(200)
        assert router.ask("POST", "/flush_cache", b"").status == 206


# -- F17: loops --------------------------------------------------------------------------------------------------------


def test_f17_a_router_does_not_become_its_own_worker() -> None:
    """It was accepted, and one request became thousands."""
    with stack() as router:
        reply = router.post("/add_worker", url=f"http://localhost:{router.port}")
        assert reply.status == 400
        assert "this URL is the router itself" in reply.text
        assert router.get("/list_workers").json() == {"urls": []}
        router.post("/workers", {"url": f"http://127.0.0.1:{router.port}/base"})
        router.until(lambda: any(worker.last_error for worker in router.fleet))
        assert "itself" in router.get("/workers").json()["workers"][0]["last_error"]


def test_f17_two_routers_that_have_each_other_answer_508_and_a_chain_works() -> None:
    with stack(policy="round_robin") as front, stack() as back:
        (engine,) = back.fakes({CHAT: answer(200, {}), MODELS: answer(200, {"data": [{"id": "m"}]})})
        front.add(f"http://127.0.0.1:{back.port}")
        front.until_healthy(f"http://127.0.0.1:{back.port}")
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
            assert front.ask(method, path, b"{}").status == 200
        marks = last(engine, CHAT).headers["via"], engine.seen[0].headers["via"]
        assert all(mark.startswith("1.1 sglang-router-") for mark in marks)
        back.call(lambda: back.fleet.remove(next(iter(back.fleet))))
        back.add(f"http://127.0.0.1:{front.port}")
        back.until_healthy(f"http://127.0.0.1:{front.port}")
        assert code(front.post("/v1/chat/completions", {})) == (508, "loop_detected")
        assert front.worker(f"http://127.0.0.1:{back.port}").load == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/get_server_info"), ("GET", "/v1/models"), ("GET", "/health_generate"), ("POST", "/start_profile")],
)
def test_f17_look_ups_and_broadcasts_of_two_routers_that_have_each_other_end(method: str, path: str) -> None:
    """They carried the mark of the last router only: one GET /get_server_info was thousands of relays in 5 s."""
    with stack() as one, stack() as other:
        for each, neighbour in ((one, other), (other, one)):
            each.call(partial(setattr, each.context, "access", Access(open=True)))
            each.add(f"http://127.0.0.1:{neighbour.port}")
        for each, neighbour in ((one, other), (other, one)):
            each.until_healthy(f"http://127.0.0.1:{neighbour.port}")
        asked: list[str] = []
        plane = other.context.sent

        def counted(*given: Any) -> Sent:
            asked.append(path)
            return plane(*given)

        other.call(partial(setattr, other.context, "sent", counted))
        reply = one.ask(method, path, None if method == "GET" else b"{}")
        assert reply.status in (502, 503, 508)
        assert len(asked) <= 2  # /get_server_info is asked for by its other name, too


def test_f17_nothing_is_served_to_a_request_that_was_here_before() -> None:
    with stack() as router:
        (fake,) = router.fakes({CHAT: answer(200, {})})
        router.post("/v1/chat/completions", {})
        mark = last(fake, CHAT).headers["via"]
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/health"),
            ("POST", "/flush_cache"),
            ("GET", "/x"),
        ):
            reply = router.ask(method, path, b"{}", via=f"1.0 edge, {mark}, 1.1 other (x)")
            assert code(reply) == (508, "loop_detected"), path
        assert router.ask("GET", "/health", via=mark.upper()).status == 508
        assert router.ask("GET", "/health", via="1.1 sglang-router-0123456789abcdef").status == 200


# -- case 24 -----------------------------------------------------------------------------------------------------------


def test_case_24_routing_fields_of_clients_reach_no_engine_unless_they_are_trusted() -> None:
    """`kv_transfer_params` in a client's body was passed on, and ended a vLLM engine."""
    body = b'{"messages":[], "kv_transfer_params" : {"do_remote_prefill":true}}'
    with stack() as router:
        (fake,) = router.fakes({CHAT: answer(200, {})})
        reply = router.ask("POST", "/v1/chat/completions", body)
        assert code(reply) == (400, "reserved_field")
        assert reply.json()["error"]["param"] == "kv_transfer_params"
        large = b'{"messages":[],"x":"%s","bootstrap_host":"h"}' % (b"x" * (2 << 20))
        assert code(router.ask("POST", "/v1/chat/completions", large)) == (400, "reserved_field")
        assert fake.count(CHAT) == 0
        router.app.relay.forward = ForwardRules(trusted=True)
        assert router.ask("POST", "/v1/chat/completions", body, x_data_parallel_rank="1").status == 200
        assert last(fake, CHAT).body == body
        assert last(fake, CHAT).headers["x-data-parallel-rank"] == "1"


# -- case 19 -----------------------------------------------------------------------------------------------------------


def test_case_19_a_rank_that_was_removed_comes_back() -> None:
    """POST /add_worker?url=U@1 was refused."""
    with stack(dp_aware=True) as router:
        fake = router.fake({"GET /server_info": answer(200, {"version": "1", "dp_size": 3})})
        assert router.post("/add_worker", url=fake.url, api_key="k").status == 200
        ranks = [f"{fake.url}@{rank}" for rank in range(3)]
        assert router.post("/remove_worker", url=ranks[1]).status == 200
        assert sorted(router.get("/list_workers").json()["urls"]) == [ranks[0], ranks[2]]
        reply = router.post("/add_worker", url=ranks[1])
        assert (reply.status, reply.text) == (200, f"Successfully added worker: {ranks[1]}")
        assert sorted(router.get("/list_workers").json()["urls"]) == ranks
        assert router.worker(ranks[1]).spec.api_key == "k"
        for url, said in ((ranks[1], "already exists"), (f"{fake.url}@3", "3 ranks"), (f"x@{1}", "http://")):
            refused = router.post("/add_worker", url=url)
            assert (refused.status, said in refused.text) == (400, True)
        for rank in ranks:
            assert router.post("/remove_worker", url=rank).status == 200
        assert router.post("/add_worker", url=ranks[2]).status == 200


def test_case_19_a_rank_that_is_not_healthy_leaves_the_others() -> None:
    with stack(dp_aware=True, startup_timeout=0.2) as router:
        fake = router.fake({"GET /server_info": answer(200, {"version": "1", "dp_size": 2})})
        assert router.post("/add_worker", url=fake.url).status == 200
        router.post("/remove_worker", url=f"{fake.url}@1")
        fake.script["GET /health"] = answer(503)
        assert router.post("/add_worker", url=f"{fake.url}@1").status == 400
        assert router.get("/list_workers").json()["urls"] == [f"{fake.url}@0"]
    with stack() as router:
        assert "--dp-aware" in router.post("/add_worker", url="http://127.0.0.1:9@1").text
