"""The control plane of trainers: selected workers, what is done to them, what that means for routing, one engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import math
import socket
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from fake_worker import CLOSE, HANG, FakeWorker, Gate, answer
from sglang_router.admin.context import AskTimeouts
from sglang_router.admin.effects import NOTHING, Effect, effect_of, fields_of
from sglang_router.admin.engine_relay import searched
from sglang_router.app.settings import control_timeout
from sglang_router.config import RouterArgs
from sglang_router.errors import WorkerInvalid
from sglang_router.routing.model_names import names_of
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec
from stack import Reply, Stack, stack

OK = answer(200, {"success": True})
PROMPT = {"text": "a prompt that is long enough to be remembered", "sampling_params": {"max_new_tokens": 1}}


def code(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json()["error"]["code"]


def labelled(router: Stack, script: dict[str, bytes | Gate], **labels: str) -> FakeWorker:
    """A healthy worker with labels."""
    fake = router.fake(script)
    reply = router.ask("POST", "/workers", json.dumps({"url": fake.url, "labels": labels}).encode())
    assert reply.status == 202
    router.until_healthy(fake.url)
    return fake


def state(router: Stack, fake: FakeWorker) -> Any:
    return router.get(f"/workers/{router.worker(fake.url).id}").json()


def asked(fake: FakeWorker, path: str) -> int:
    return sum(seen.route.split()[1].partition("?")[0] == path for seen in fake.seen)


# -- selectors ---------------------------------------------------------------------------------------------------------


def test_a_selector_names_workers_by_labels_and_by_what_the_router_knows() -> None:
    with stack() as router:
        one = labelled(router, {"POST /pause?mode=keep": OK}, zone="a", tier="x")
        two = labelled(router, {"POST /pause?mode=keep": OK}, zone="a", tier="y")
        three = labelled(router, {"POST /pause?mode=keep": OK}, zone="b")
        everyone = [one, two, three]
        identity = router.worker(three.url).id
        cases: list[tuple[str, list[FakeWorker]]] = [
            ("", everyone),
            ("&selector=zone=a", [one, two]),
            ("&selector=zone%3Da%2Ctier%3Dy", [two]),
            ("&selector=zone=b&selector=tier=x", [one, three]),
            (f"&selector=id={identity}", [three]),
            (f"&selector=url={quote(one.url, safe='')}", [one]),
            ("&selector=role=regular", everyone),
            ("&selector=role=regular,zone=b", [three]),
        ]
        for selector, meant in cases:
            before = [asked(fake, "/pause") for fake in everyone]
            reply = router.post(f"/pause?mode=keep{selector}", {})
            assert [result["worker"] for result in reply.json()["results"]] == [fake.url for fake in meant], selector
            assert reply.status == 200
            assert [asked(fake, "/pause") - count for fake, count in zip(everyone, before, strict=True)] == [
                fake in meant for fake in everyone
            ]


def test_a_selector_by_model_takes_any_name_of_it() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /slow_down": OK})
        worker, names = router.worker(fake.url), names_of(["base"], ["tuned"])
        router.call(lambda: router.fleet.announced(worker, names))
        for name in ("base", "tuned"):
            assert router.post(f"/slow_down?selector=model={name}", {}).status == 200
        assert code(router.post("/slow_down?selector=model=other", {})) == (404, "WORKER_NOT_FOUND")


@pytest.mark.parametrize("selector", ["zone", "=a", "a=b,", "a=b,c", "", ",".join(["a=b"] * 65)])
def test_a_selector_that_cannot_be_read_reaches_no_worker(selector: str) -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /pause": OK})
        assert code(router.post(f"/pause?selector={quote(selector)}", {})) == (400, "invalid_request")
        assert code(router.post("/pause?selector=zone=nowhere", {})) == (404, "WORKER_NOT_FOUND")
        assert not asked(fake, "/pause")


def test_a_flush_can_be_for_some_workers() -> None:
    with stack() as router:
        one = labelled(router, {"POST /flush_cache": answer(200)}, zone="a")
        two = labelled(router, {"POST /flush_cache": answer(200)}, zone="b")
        assert router.post("/flush_cache?selector=zone=a").json()["total_workers"] == 1
        assert (asked(one, "/flush_cache"), asked(two, "/flush_cache")) == (1, 0)


# -- results -----------------------------------------------------------------------------------------------------------


def test_each_way_to_fail_is_told_of_its_worker_alone() -> None:
    path = "/update_weights_from_disk"
    said = {"success": False, "message": "no such file, api_key=hunter2"}
    long = answer(200, b"x" * (2 << 20))
    with stack(timeouts=AskTimeouts(control=0.3)) as router:
        scripts = (OK, answer(500, b"fault"), CLOSE, HANG, answer(200, said), b"nonsense\r\n\r\n", long)
        fakes = router.fakes(*({f"POST {path}": script} for script in scripts))
        reply = router.post(path, {"model_path": "x"})
        results = reply.json()["results"]
        assert (reply.status, reply.json()["succeeded"], len(results)) == (207, 1, len(fakes))
        errors = [result["error"] for result in results]
        assert errors[0] is None
        assert errors[1] == "HTTP 500"
        assert "closed the connection" in errors[2]
        assert errors[3] == "No answer within 0.3 s."
        assert errors[4] == "The engine answered success: false. no such file, api_key=***"
        assert "not well-formed HTTP" in errors[5]
        assert "larger than 1048576 bytes" in errors[6]
        assert results[3]["seconds"] >= 0.3
        assert "hunter2" not in reply.text


def test_at_most_so_many_engines_work_at_once() -> None:
    with stack(fan_out=1) as router:
        gate = Gate(OK)
        one, two = router.fakes({"POST /slow_down": gate}, {"POST /slow_down": OK})
        replies: list[Reply] = []
        asking = threading.Thread(target=lambda: replies.append(router.post("/slow_down", {})))
        asking.start()
        router.run(one.asked("POST /slow_down"))
        assert not asked(two, "/slow_down")
        router.call(gate.open.set)
        asking.join(20)
        assert (replies[0].status, asked(two, "/slow_down")) == (200, 1)


def test_what_engines_do_together_is_sent_to_all_at_once() -> None:
    """Each waits for the others: one after the other, the first would wait for ever."""
    with stack(fan_out=1) as router:
        gates = [Gate(OK), Gate(OK)]
        one, two = router.fakes(*({"POST /init_weights_update_group": gate} for gate in gates))

        async def open_when_both_were_asked() -> None:
            await one.asked("POST /init_weights_update_group")
            await two.asked("POST /init_weights_update_group")
            for gate in gates:
                gate.open.set()

        opening = asyncio.run_coroutine_threadsafe(open_when_both_were_asked(), router.loop)
        assert router.post("/init_weights_update_group", {"world_size": 3}).status == 200
        opening.result(1)


def test_questions_go_to_all_workers_too() -> None:
    with stack() as router:
        router.fakes(
            {"GET /is_sleeping": answer(200, {"is_sleeping": True})},
            {"GET /is_sleeping": answer(200, {"is_sleeping": False})},
        )
        reply = router.get("/is_sleeping")
        assert [result["body"]["is_sleeping"] for result in reply.json()["results"]] == [True, False]


# -- what it does to routing -------------------------------------------------------------------------------------------

ALL = ("cuda_graph", "kv_cache", "other_memory", "weights")
UPDATED = Effect(("weights_update",), forgets=True, passes=True)
EFFECTS: list[tuple[str, bytes, Any, Effect]] = [
    ("/pause_generation", b"", None, Effect(("generation",))),
    ("/continue_generation", b"", None, Effect(continues=("generation",))),
    ("/pause", b"", None, Effect(("generation",), forgets=True)),
    ("/pause", b"mode=keep&clear_cache=False", None, Effect(("generation",))),
    ("/flush_cache", b"", None, Effect(forgets=True)),
    ("/release_memory_occupation", b"", {"tags": ["weights"]}, Effect(("weights",))),
    ("/release_memory_occupation", b"", {"tags": ["kv_cache"]}, Effect(("kv_cache",), forgets=True)),
    ("/release_memory_occupation", b"", {"tags": ["new", "other"]}, Effect(("other_memory",))),
    ("/sleep", b"level=1", None, Effect(("kv_cache", "weights"), forgets=True)),
    ("/sleep", b"level=0", None, Effect(("generation",))),
    ("/wake_up", b"tags=weights&tags=kv_cache", None, Effect(continues=("kv_cache", "weights"))),
    ("/wake_up", b"tags=scheduling", None, Effect(continues=("generation",))),
    ("/update_weights_from_disk", b"", {"weight_version": "7"}, UPDATED._replace(version="7")),
    (
        "/update_weights_from_disk",
        b"",
        {"flush_cache": False, "weight_version": 8},
        UPDATED._replace(forgets=False, version="8"),
    ),
    ("/update_weights_from_tensor", b"", None, UPDATED),
    ("/update_weight_version", b"", {"new_version": "x" * 200}, Effect(version="x" * 128)),
    ("/update_weight_version", b"", {"new_version": True}, NOTHING),
    ("/generate", b"", {"tags": ["weights"]}, NOTHING),
]


@pytest.mark.parametrize(("path", "query", "body", "effect"), EFFECTS)
def test_what_a_request_does_to_an_engine(path: str, query: bytes, body: Any, effect: Effect) -> None:
    assert effect_of(path, query, b"" if body is None else json.dumps(body).encode()) == effect


def test_memory_is_given_back_in_parts() -> None:
    everything = effect_of("/release_memory_occupation", b"", b"")
    assert (tuple(sorted(everything.pauses)), everything.forgets) == (ALL, True)
    assert tuple(sorted(effect_of("/resume_memory_occupation", b"", b"").continues)) == ALL


@pytest.mark.parametrize("body", [b"[1]", b"{", b"\xff", b'{"tags": 5}', b"[" * 5000, b'{"x":"' + b"y" * 70000 + b'"}'])
def test_a_body_that_cannot_be_read_is_the_engines_matter(body: bytes) -> None:
    body = asyncio.run(fields_of(body))
    assert effect_of("/update_weights_from_disk", b"", body) == UPDATED
    assert effect_of("/update_weight_version", b"", body) == NOTHING


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_what_stands_behind_weights_in_a_long_body_is_read_too(kind: type[bytes]) -> None:
    weights = [["x" * 70_000] * 20]
    said = {"serialized_named_tensors": weights, "flush_cache": False, "weight_version": "9", "tags": ["y" * 70_000]}
    body = asyncio.run(fields_of(kind(json.dumps(said).encode())))
    assert len(body) < 100
    assert effect_of("/update_weights_from_tensor", b"", body) == UPDATED._replace(forgets=False, version="9")


def test_a_paused_worker_gets_no_new_requests_until_it_continues() -> None:
    with stack(policy="round_robin") as router:
        script = {"POST /pause_generation": OK, "POST /continue_generation": OK, "POST /generate": answer(200, {})}
        one, two = router.fakes(dict(script), dict(script))
        url = quote(one.url, safe="")
        assert router.post(f"/pause_generation?selector=url={url}", {}).status == 200
        assert (state(router, one)["paused"], state(router, two)["paused"]) == (["generation"], [])
        for _ in range(4):
            assert router.post("/generate", PROMPT).status == 200
        assert (asked(one, "/generate"), asked(two, "/generate")) == (0, 4)
        assert router.post("/continue_generation", {}).status == 200
        for _ in range(4):
            assert router.post("/generate", PROMPT).status == 200
        assert (asked(one, "/generate"), asked(two, "/generate")) == (2, 6)
        assert state(router, one)["paused"] == []


def test_requests_wait_while_all_workers_are_paused() -> None:
    with stack() as router:
        (fake,) = router.fakes(
            {"POST /sleep?level=1": OK, "POST /wake_up": OK, "POST /generate": answer(200, {"text": "x"})}
        )
        router.post("/sleep?level=1", {})
        replies: list[Reply] = []
        asking = threading.Thread(target=lambda: replies.append(router.post("/generate", PROMPT)))
        asking.start()
        while not router.call(lambda: len(router.app.router.queue)):
            assert asking.is_alive()
        assert [queued.why for queued in router.app.router.queue] == ["paused"]
        assert not asked(fake, "/generate")
        assert router.post("/wake_up", {}).status == 200
        asking.join(20)
        assert (replies[0].status, asked(fake, "/generate")) == (200, 1)
        assert router.worker(fake.url).load == 0


def test_a_request_that_waited_too_long_for_paused_workers_is_told_so() -> None:
    with stack() as router:
        router.fakes({"POST /pause_generation": OK})
        queue = router.app.router.queue
        queue.rules = msgspec.structs.replace(queue.rules, paused_timeout=0.1)
        router.post("/pause_generation", {})
        assert code(router.post("/generate", PROMPT)) == (503, "workers_paused")


def test_a_worker_is_paused_from_before_its_engine_is_asked_and_not_if_that_fails() -> None:
    with stack() as router:
        gate = Gate(answer(500))
        (fake,) = router.fakes({"POST /release_memory_occupation": gate})
        asking = threading.Thread(target=lambda: router.post("/release_memory_occupation", {"tags": ["weights"]}))
        asking.start()
        router.run(fake.asked("POST /release_memory_occupation"))
        assert state(router, fake)["paused"] == ["weights"]
        router.call(gate.open.set)
        asking.join(20)
        assert state(router, fake)["paused"] == []


class Asking:
    """A request to the router in a thread of its own."""

    def __init__(self, router: Stack, path: str, value: Any = None) -> None:
        self.replies: list[Reply] = []
        self._thread = threading.Thread(target=lambda: self.replies.append(router.post(path, value or {})))
        self._thread.start()

    @property
    def reply(self) -> Reply:
        """The answer; waits for it."""
        self._thread.join(20)
        return self.replies[0]


@pytest.mark.parametrize("end", [HANG, CLOSE, b"nonsense\r\n\r\n", answer(504), answer(502)])
def test_what_nobody_knows_the_engine_did_is_believed_where_that_is_safe(end: bytes) -> None:
    """It may be paused: requests that went there could hang for ever. And its old prefixes count no more."""
    routes = ("POST /pause", "POST /update_weights_from_disk", "POST /continue_generation")
    with stack(timeouts=AskTimeouts(control=0.3)) as router:
        (fake,) = router.fakes({"POST /generate": answer(200, {}), "POST /update_weight_version": OK})
        worker = router.worker(fake.url)
        router.post("/update_weight_version", {"new_version": "6"})
        for route in routes:
            fake.script[route] = end
        assert router.post("/generate", PROMPT).status == 200
        assert state(router, fake)["tree_size"] > 0
        assert router.post("/update_weights_from_disk", {"weight_version": "7"}).status == 502
        assert [state(router, fake)[name] for name in ("tree_size", "weight_version", "paused")] == [0, None, []]
        told = router.post("/pause", {}).json()["results"][0]
        assert "It may have done it all the same" in told["error"]
        assert state(router, fake)["paused"] == ["generation"]
        router.post("/continue_generation", {})
        assert list(worker.paused) == ["generation"]
        fake.script["POST /continue_generation"] = OK
        router.post("/continue_generation", {})
        assert list(worker.paused) == []


def test_an_engine_that_was_not_asked_is_not_paused() -> None:
    with stack() as router:
        (fake,) = router.fakes({})
        router.run(fake.stop())
        told = router.post("/pause", {}).json()["results"][0]["error"]
        assert "It may have" not in told
        assert router.worker(fake.url).paused == ()


def test_a_client_that_leaves_leaves_the_engine_paused_that_it_asked() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /pause_generation": HANG, "POST /generate": answer(200, {})})
        worker = router.worker(fake.url)
        with socket.create_connection(("127.0.0.1", router.port)) as client:
            client.sendall(b"POST /pause_generation HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
            router.run(fake.asked("POST /pause_generation"))
        router.until(lambda: not router.clients.exchanges)
        assert list(worker.paused) == ["generation"]


def test_an_order_is_sent_once_on_a_connection_of_its_own() -> None:
    """A kept connection that closes at once cannot be told from one that was closed before: it would be sent again."""
    with stack() as router:
        (fake,) = router.fakes({"GET /server_info": answer(200, {})})
        assert engine(router, fake, "/server_info", "GET", b"").status == 200  # leaves a connection that is kept
        fake.script["POST /init_weights_update_group"] = CLOSE
        assert router.post("/init_weights_update_group", {}).status == 502
        assert asked(fake, "/init_weights_update_group") == 1


def test_a_path_is_followed_as_the_engine_understands_it() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /%70ause_generation": OK, "POST /continue%5Fgeneration": OK})
        assert engine(router, fake, "/%70ause_generation").status == 200
        assert state(router, fake)["paused"] == ["generation"]
        assert router.post("/v1/rl/engine/continue%5Fgeneration", {}).status == 200
        assert state(router, fake)["paused"] == []


def test_an_engine_that_loads_new_weights_gets_no_new_requests_meanwhile() -> None:
    with stack(fan_out=1) as router:
        gate = Gate(answer(400, {"success": False}))
        script = {"POST /update_weights_from_disk": OK, "POST /generate": answer(200, {})}
        one, two = router.fakes({**script, "POST /update_weights_from_disk": gate}, script)
        update = Asking(router, "/update_weights_from_disk")
        router.run(one.asked("POST /update_weights_from_disk"))
        assert (state(router, one)["paused"], state(router, two)["paused"]) == (["weights_update"], [])
        for _ in range(4):
            assert router.post("/generate", PROMPT).status == 200
        assert (asked(one, "/generate"), asked(two, "/generate")) == (0, 4)
        router.call(gate.open.set)
        assert update.reply.status == 207
        assert [state(router, fake)["paused"] for fake in (one, two)] == [[], []]


def test_orders_that_overlap_end_only_what_they_began() -> None:
    with stack() as router:
        slow = Gate(answer(400))
        (fake,) = router.fakes({"POST /pause_generation": slow, "POST /pause": OK, "POST /resume": OK})
        worker = router.worker(fake.url)
        first = Asking(router, "/pause_generation")
        router.run(fake.asked("POST /pause_generation"))
        assert router.post("/pause", {}).status == 200
        router.call(slow.open.set)
        assert first.reply.status == 502
        assert list(worker.paused) == ["generation"]  # the second one has paused it

        slow = fake.script["POST /pause_generation"] = Gate(OK)
        first = Asking(router, "/pause_generation")
        router.run(fake.asked("POST /pause_generation", 2))
        assert router.post("/resume", {}).status == 200
        assert list(worker.paused) == []
        router.call(slow.open.set)
        assert first.reply.status == 200
        assert list(worker.paused) == []  # it was told to continue after it was told to pause

        slow = fake.script["POST /resume"] = Gate(OK)
        last = Asking(router, "/resume")
        router.run(fake.asked("POST /resume", 2))
        assert router.post("/pause", {}).status == 200
        router.call(slow.open.set)
        assert last.reply.status == 200
        assert list(worker.paused) == ["generation"]
        assert not router.context.pausing._engines


def test_a_worker_that_is_added_again_meanwhile_is_paused_too() -> None:
    with stack() as router:
        gate = Gate(OK)
        (fake,) = router.fakes({"POST /pause_generation": gate})
        pausing = Asking(router, "/pause_generation")
        router.run(fake.asked("POST /pause_generation"))
        worker = router.worker(fake.url)
        router.call(lambda: router.fleet.remove(worker))
        router.add(fake.url)
        assert router.worker(fake.url).paused == ()
        router.call(gate.open.set)
        assert pausing.reply.status == 200
        assert router.worker(fake.url).paused == ("generation",)


@pytest.mark.parametrize("path", ["/workers/{}/resume", ""])
def test_who_is_resumed_while_a_pause_hangs_is_not_paused_by_its_end(path: str) -> None:
    """An operator knows better, and so does another process of the engine."""
    with stack(timeouts=AskTimeouts(control=0.5)) as router:
        (fake,) = router.fakes({"POST /pause_generation": HANG})
        worker = router.worker(fake.url)
        pausing = Asking(router, "/pause_generation")
        router.run(fake.asked("POST /pause_generation"))
        if path:
            router.post(path.format(worker.id))
        else:
            router.call(lambda: router.fleet.lost(worker, router.context.clock()))
        assert pausing.reply.status == 502
        assert list(worker.paused) == []


def test_a_long_order_is_not_ended_by_the_limit_of_requests() -> None:
    args = RouterArgs(request_timeout_secs=60.0, rl_control_timeout_secs=3600.0)
    assert control_timeout(args) > 3600.0
    assert control_timeout(dataclasses.replace(args, request_timeout_secs=7200.0)) == 7200.0
    assert control_timeout(dataclasses.replace(args, rl_fanout_concurrency=1)) == math.inf


def test_a_failed_second_pause_does_not_end_the_first_one() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /pause_generation": OK})
        router.post("/pause_generation", {})
        fake.script["POST /pause_generation"] = answer(500)
        assert router.post("/pause_generation", {}).status == 502
        assert state(router, fake)["paused"] == ["generation"]


def test_a_worker_serves_again_when_it_has_all_of_its_memory() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /release_memory_occupation": OK, "POST /resume_memory_occupation": OK})
        router.post("/release_memory_occupation", {"tags": ["weights", "kv_cache"]})
        router.post("/resume_memory_occupation", {"tags": ["weights"]})
        assert state(router, fake)["paused"] == ["kv_cache"]
        router.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
        assert state(router, fake)["paused"] == []


def test_an_operator_can_end_a_pause_that_the_router_only_believes_in() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /pause_generation": OK})
        router.post("/pause_generation", {})
        reply = router.post(f"/workers/{router.worker(fake.url).id}/resume")
        assert (reply.json()["paused"], reply.json()["draining"]) == ([], False)


def test_a_new_process_is_not_paused_and_has_weights_of_its_own() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /pause_generation": OK, "POST /update_weight_version": OK})
        router.post("/pause_generation", {})
        router.post("/update_weight_version", {"new_version": "step-3"})
        assert state(router, fake)["weight_version"] == "step-3"
        worker = router.worker(fake.url)
        router.call(lambda: router.fleet.lost(worker, router.context.clock()))
        assert (worker.paused, worker.weights) == ((), "")


def test_all_ranks_of_an_engine_are_paused_together() -> None:
    with stack() as router:
        fake = router.fake({"POST /pause_generation": OK})
        for rank in (0, 1):
            spec = WorkerSpec(url=fake.url, dp_rank=rank)
            router.call(partial(router.fleet.add, spec, 0.0))
        router.until_healthy(f"{fake.url}@0")
        assert router.post(f"/pause_generation?selector=id={router.worker(f'{fake.url}@1').id}", {}).status == 200
        assert [worker.paused for worker in router.fleet] == [("generation",)] * 2
        assert asked(fake, "/pause_generation") == 1
        router.post(f"/workers/{quote(fake.url, safe='')}@1/resume")
        assert [worker.paused for worker in router.fleet] == [(), ()]


# -- one engine --------------------------------------------------------------------------------------------------------


def engine(router: Stack, fake: FakeWorker, path: str, method: str = "POST", body: bytes = b"{}", **how: str) -> Reply:
    return router.ask(method, f"/engine/{router.worker(fake.url).id}{path}", body, **how)


def test_a_request_goes_to_one_engine_with_its_key() -> None:
    with stack() as router:
        route = "PUT /a%20b/c%3Fd?x=%20&y"
        one, two = router.fake({route: answer(201, {"own": 1}, "application/own+json")}), router.fake({})
        router.add(one.url, api_key="worker-key")
        router.add(two.url)
        for name in (router.worker(one.url).id, quote(one.url, safe="")):
            reply = router.ask(
                "PUT",
                f"/engine/{name}/a%20b/c%3Fd?x=%20&y",
                b'{"b" :1}',
                content_type="application/x",
                authorization="Bearer operator",
                cookie="secret=1",
            )
            assert (reply.status, reply.json()) == (201, {"own": 1})
            assert reply.headers["content-type"] == "application/own+json"
        seen = [each for each in one.seen if each.route == route]
        assert [each.body for each in seen] == [b'{"b" :1}'] * 2
        assert seen[0].headers["authorization"] == "Bearer worker-key"
        assert seen[0].headers["content-type"] == "application/x"
        assert "cookie" not in seen[0].headers
        assert not [each for each in two.seen if each.route == route]


def test_it_has_other_names_too() -> None:
    with stack() as router:
        (fake,) = router.fakes({"GET /server_info": answer(200, {"x": 1}), "POST /pause": OK})
        assert router.get("/v1/rl/workers").json()["workers"][0]["url"] == fake.url
        identity = router.worker(fake.url).id
        assert router.get(f"/v1/rl/workers/{identity}/engine/server_info").json() == {"x": 1}
        assert router.post("/v1/rl/engine/pause?selector=role=regular", {}).json()["succeeded"] == 1
        assert state(router, fake)["paused"] == ["generation"]


def test_what_it_does_to_the_engine_is_followed() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /pause_generation": OK, "POST /continue_generation": OK})
        assert engine(router, fake, "/pause_generation").status == 200
        assert state(router, fake)["paused"] == ["generation"]
        assert engine(router, fake, "/continue_generation").status == 200
        assert state(router, fake)["paused"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/a/../b"),
        ("GET", "/a/%2e%2E/b"),
        ("GET", "/./b"),
        ("GET", "/a%2Fb"),
        ("GET", "/a%5cb"),
        ("GET", "/"),
        ("POST", "//generate"),
        ("GET", "/a//b"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/chat%2dcompletions/../completions"),
        ("POST", "/%67enerate"),
    ],
)
def test_paths_that_are_not_what_they_say_or_generate_reach_no_engine(method: str, path: str) -> None:
    with stack() as router:
        (fake,) = router.fakes({})
        before = len(fake.seen)
        assert code(engine(router, fake, path, method)) == (400, "invalid_request")
        assert not [seen for seen in fake.seen[before:] if "health" not in seen.route and "GET" not in seen.route]
        assert code(router.ask("GET", "/engine/nobody/server_info", b"")) == (404, "WORKER_NOT_FOUND")


def test_secrets_of_an_engine_stay_there() -> None:
    with stack() as router:
        fake = router.fake(
            {
                "GET /server_info": answer(200, {"api_key": "hunter2", "x": 1}),
                "GET /text": answer(200, b"line one\n--api-key hunter2\nthe key is own-worker-key\n", "text/plain"),
                "GET /binary": answer(200, bytes(range(256)), "application/octet-stream"),
                "GET /long": answer(200, b'["' + b"x" * (1 << 20) + b'"]', "application/json"),
            }
        )
        router.add(fake.url, api_key="own-worker-key")
        assert engine(router, fake, "/server_info", "GET", b"").json() == {"api_key": "***", "x": 1}
        text = engine(router, fake, "/text", "GET", b"").text
        assert text == "line one\n--api-key ***\nthe key is ***\n"
        assert engine(router, fake, "/binary", "GET", b"").body == bytes(range(256))
        assert code(engine(router, fake, "/long", "GET", b"")) == (502, "worker_invalid_response")


def test_an_engine_that_fails_is_told_so() -> None:
    with stack(timeouts=AskTimeouts(control=0.2)) as router:
        fake = router.fake(
            {"GET /no": answer(418, {"why": "tea"}), "GET /cut": CLOSE, "GET /never": HANG, "GET /bad": b"x\r\n\r\n"}
        )
        router.add(fake.url)
        reply = engine(router, fake, "/no", "GET", b"")
        assert (reply.status, reply.json()) == (418, {"why": "tea"})
        assert code(engine(router, fake, "/cut", "GET", b"")) == (502, "worker_broken")
        assert code(engine(router, fake, "/never", "GET", b"")) == (504, "worker_timeout")
        assert code(engine(router, fake, "/bad", "GET", b"")) == (502, "worker_invalid_response")
        router.run(fake.stop())
        assert code(engine(router, fake, "/no", "GET", b"")) == (502, "worker_unreachable")


# -- one engine: answers that come in parts ---------------------------------------------------------------------------


class SlowEngine:
    """An engine that the test plays: it listens, and answers one request."""

    def __init__(self, router: Stack) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(20.0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        router.add(self.url, health=HealthRules(enabled=False), api_key="own-worker-key")

    def accept(self) -> socket.socket:
        """Take the next request for /own."""
        while True:
            connection, _ = self.listener.accept()
            connection.settimeout(20.0)
            if connection.recv(65536).startswith(b"GET /own "):
                return connection
            connection.close()  # the router asks what the engine is

    def __enter__(self) -> SlowEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()


def head_of(kind: str, *more: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"content-type: {kind}", *(more or ("transfer-encoding: chunked",))]
    return "\r\n".join([*lines, "", ""]).encode()


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def asking(router: Stack, engine: SlowEngine) -> http.client.HTTPConnection:
    client = http.client.HTTPConnection("127.0.0.1", router.port, timeout=20.0)
    client.request("GET", f"/engine/{quote(engine.url, safe='')}/own")
    return client


def test_a_text_is_passed_on_line_by_line_as_it_comes_without_secrets() -> None:
    with stack() as router, SlowEngine(router) as slow:
        client = asking(router, slow)
        with contextlib.closing(client), slow.accept() as worker:
            worker.sendall(head_of("text/event-stream") + chunked(b"data: one\n\ndata: own-wor"))
            reply = client.getresponse()
            assert reply.status == 200
            assert reply.headers["content-type"] == "text/event-stream"
            assert reply.readline() + reply.readline() == b"data: one\n\n"
            worker.sendall(chunked(b"ker-key --api-key hun") + chunked(b"ter2\nend \xe2") + chunked(b"\x82\xac"))
            assert reply.readline() == b"data: *** --api-key ***\n"
            worker.sendall(b"0\r\n\r\n")
            assert reply.read() == "end \u20ac".encode()
        router.until(lambda: not router.clients.exchanges)


def test_bytes_of_any_number_pass_and_a_client_that_does_not_read_pauses_the_engine() -> None:
    size = 96 << 20
    with stack() as router, SlowEngine(router) as slow:
        client = asking(router, slow)
        with contextlib.closing(client), slow.accept() as worker:
            worker.sendall(head_of("application/octet-stream", f"content-length: {size}"))
            sending = threading.Thread(target=worker.sendall, args=(b"x" * size,))
            sending.start()
            reply = client.getresponse()
            assert int(reply.headers["content-length"]) == size
            (connection,) = router.connections.at(router.worker(slow.url).target).live
            while not router.call(lambda: connection._paused):
                assert sending.is_alive()
            got = 0
            while data := reply.read(1 << 20):
                got += len(data)
            sending.join(20.0)
            assert got == size


def test_an_answer_that_breaks_has_no_clean_end() -> None:
    with stack() as router, SlowEngine(router) as slow:
        client = asking(router, slow)
        with contextlib.closing(client), slow.accept() as worker:
            worker.sendall(head_of("text/plain") + chunked(b"one\n"))
            reply = client.getresponse()
            assert reply.readline() == b"one\n"
            worker.close()
            with pytest.raises(http.client.IncompleteRead):
                reply.read()


def test_silence_in_an_answer_ends_it() -> None:
    with stack(timeouts=AskTimeouts(control=0.2)) as router, SlowEngine(router) as slow:
        client = asking(router, slow)
        with contextlib.closing(client), slow.accept() as worker:
            worker.sendall(head_of("text/plain") + chunked(b"one\n"))
            with pytest.raises(http.client.IncompleteRead):
                client.getresponse().read()
            assert worker.recv(1) == b""


def test_a_client_that_leaves_in_an_answer_closes_the_engines_connection() -> None:
    with stack() as router, SlowEngine(router) as slow:
        client = asking(router, slow)
        with slow.accept() as worker:
            worker.sendall(head_of("text/plain") + chunked(b"one\n"))
            reply = client.getresponse()
            assert reply.readline() == b"one\n"
            reply.close()
            client.close()
            with contextlib.suppress(ConnectionResetError):
                assert worker.recv(1) == b""
        router.until(lambda: not router.clients.exchanges)


@pytest.mark.parametrize(
    "answered",
    [
        head_of("text/plain", "content-encoding: gzip", "content-length: 4") + b"abcd",
        head_of("application/json", "content-length: 2000000") + b'"' + b"x" * 1_999_998 + b'"',
    ],
)
def test_what_cannot_be_searched_is_not_passed_on(answered: bytes) -> None:
    with stack() as router, SlowEngine(router) as slow:
        client = asking(router, slow)
        with contextlib.closing(client), slow.accept() as worker:
            with contextlib.suppress(ConnectionError):
                worker.sendall(answered)
            reply = client.getresponse()
            assert (reply.status, json.loads(reply.read())["error"]["code"]) == (502, "worker_invalid_response")


def test_a_line_without_end_is_not_passed_on() -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"one\n"
        while True:
            yield b"x" * 100_000

    seen = b""

    async def read() -> None:
        nonlocal seen
        async for part in searched(parts(), set()):
            seen += part

    with pytest.raises(WorkerInvalid):
        asyncio.run(read())
    assert seen == b"one\n"
