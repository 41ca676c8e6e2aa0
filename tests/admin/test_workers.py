"""Workers are added, changed and removed while the router serves."""

from __future__ import annotations

import asyncio
import http.client
import socket
import struct
import threading
import uuid
from urllib.parse import quote

import pytest

from engines import engine_processes
from fake_worker import Gate, answer
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.states import Breaker, Health
from stack import Reply, Stack, stack

HEALTH = "GET /health"
CHAT = b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}'


def refusal(reply: Reply) -> tuple[int, str]:
    """The status and message of an error of the router."""
    return reply.status, reply.json()["error"]["message"]


def in_background(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


# -- real engines ----------------------------------------------------------------------------------------


def test_real_engines_come_and_go_while_the_router_serves() -> None:
    with engine_processes(2, "--speed", "0") as (one, two), stack(policy="round_robin") as router:
        assert router.post("/v1/chat/completions", CHAT).status == 503
        for url in (one, two):
            reply = router.post("/add_worker", url=url)
            assert (reply.status, reply.text) == (200, f"Successfully added worker: {url}")
            assert reply.headers["content-type"].startswith("text/plain")
        for _ in range(4):
            assert router.post("/v1/chat/completions", CHAT).status == 200
        workers = router.get("/workers").json()
        assert [worker["processed"] for worker in workers["workers"]] == [2, 2]
        reply = router.post("/remove_worker", url=one)
        assert (reply.status, reply.text) == (200, f"Successfully removed worker: {one}")
        assert router.get("/list_workers").json() == {"urls": [two]}
        for _ in range(2):
            assert router.post("/v1/chat/completions", CHAT).status == 200
        assert router.get("/workers").json()["workers"][0]["processed"] == 4


# -- the three commands ----------------------------------------------------------------------------------


def test_adding_waits_until_the_worker_is_healthy() -> None:
    with stack() as router:
        fake = router.fake({HEALTH: answer(503), "GET /v1/models": answer(200, {"data": [{"id": "m"}]})})
        replies: list[Reply] = []
        adding = in_background(lambda: replies.append(router.post("/add_worker", url=fake.url, api_key="s3cret")))
        router.run(fake.asked(HEALTH, 3))
        assert not replies
        assert router.get("/list_workers").json() == {"urls": [fake.url]}
        fake.script[HEALTH] = answer(200)
        adding.join(10)
        assert (replies[0].status, replies[0].text) == (200, f"Successfully added worker: {fake.url}")
        assert fake.seen[-1].headers["authorization"] == "Bearer s3cret"
        assert router.get("/workers").json()["workers"][0]["model_id"] == "m"
        assert router.worker(fake.url).spec.source is Source.API


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("", "Worker URL required. Provide 'url' query parameter"),
        ("?url=", "Worker URL required. Provide 'url' query parameter"),
        ("?api_key=x", "Worker URL required. Provide 'url' query parameter"),
        ("?url=127.0.0.1:8000", "must begin with http://"),
        ("?url=grpc://127.0.0.1:8000", "only HTTP workers"),
        ("?url=http://u:hunter2@h:1", "must not hold credentials"),
        ("?url=http://h:1%23frag", "fragment"),
        ("?url=http://h:99999", "port"),
        ("?url=http://h:1&api_key=a%0d%0ab", "API key"),
    ],
)
def test_what_cannot_be_added_is_refused_at_once(query: str, said: str) -> None:
    with stack() as router:
        reply = router.ask("POST", "/add_worker" + query)
        status, message = refusal(reply)
        assert status == 400
        assert said in message
        assert "hunter2" not in reply.text
        assert router.get("/list_workers").json() == {"urls": []}


def test_a_known_worker_is_refused() -> None:
    with stack() as router:
        (fake,) = router.fakes({})
        for url in (fake.url, fake.url + "/"):
            assert refusal(router.post("/add_worker", url=url)) == (400, f"Worker {fake.url} already exists")
        assert len(router.get("/list_workers").json()["urls"]) == 1


def test_a_worker_that_does_not_become_healthy_is_removed_again() -> None:
    with stack(startup_timeout=0.3) as router:
        fake = router.fake({HEALTH: answer(503)})
        status, message = refusal(router.post("/add_worker", url=fake.url))
        assert status == 400
        assert message.startswith(f"Timeout 0.3s waiting for worker {fake.url} to become healthy")
        assert "answered 503" in message
        assert router.get("/list_workers").json() == {"urls": []}


def test_case_25_a_client_that_leaves_changes_nothing() -> None:
    """The worker was removed when the client of /add_worker left before it was healthy."""
    with stack() as router:
        fake = router.fake({HEALTH: answer(503)})
        client = http.client.HTTPConnection("127.0.0.1", router.port, timeout=10)
        client.request("POST", f"/add_worker?url={fake.url}", b"")
        router.run(fake.asked(HEALTH))
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves with a reset
        client.close()
        router.until(lambda: not router.clients.connections)
        assert router.get("/list_workers").json() == {"urls": [fake.url]}
        again = refusal(router.post("/add_worker", url=fake.url))
        assert again == (400, f"Worker {fake.url} already exists; it is starting (GET /health answered 503)")
        fake.script[HEALTH] = answer(200)
        router.until_healthy(fake.url)


@pytest.mark.parametrize(("wait", "reason"), [("false", ""), ("0", ""), ("0.2", " (GET /health answered 503)")])
def test_case_25_who_does_not_wait_is_told_at_once(wait: str, reason: str) -> None:
    """There was no way to add a worker by the command without waiting for it in silence."""
    with stack() as router:
        fake = router.fake({HEALTH: answer(503)})
        reply = router.post("/add_worker", url=fake.url, wait=wait)
        place = reply.headers["location"]
        said = f"Worker {fake.url} is registered and takes requests once it is healthy; it is starting{reason}"
        assert (reply.status, reply.text) == (202, f"{said}. See GET {place}")
        router.run(fake.asked(HEALTH, 2))
        shown = router.get(place).json()
        assert (shown["url"], shown["job_status"]["message"]) == (fake.url, "GET /health answered 503")


@pytest.mark.parametrize("wait", ["-1", "soon", "1e9", "nan"])
def test_case_25_a_wait_that_is_no_time_is_refused(wait: str) -> None:
    with stack() as router:
        status, message = refusal(router.post("/add_worker", url="http://127.0.0.1:9", wait=wait))
        assert (status, router.get("/list_workers").json()) == (400, {"urls": []})
        assert "wait must be" in message


def test_case_13_adding_what_is_no_engine_ends_soon_and_names_the_slip() -> None:
    """A URL with /v1 at its end was waited for in silence for half an hour."""
    with stack(startup_timeout=1800.0) as router:
        fake = router.fake()
        status, message = refusal(router.post("/add_worker", url=f"{fake.url}/v1"))
        assert status == 400
        assert message == (
            f"Worker {fake.url}/v1 is not added: no engine answers there (GET /v1/health answered 404:"
            " worker URLs are base URLs; remove /v1 at the end of this one)"
        )
        assert router.get("/list_workers").json() == {"urls": []}


def test_removing_a_worker_that_is_being_added_ends_the_addition() -> None:
    with stack() as router:
        fake = router.fake({HEALTH: answer(503)})
        replies: list[Reply] = []
        adding = in_background(lambda: replies.append(router.post("/add_worker", url=fake.url)))
        router.run(fake.asked(HEALTH))
        assert router.post("/remove_worker", url=fake.url).status == 200
        adding.join(10)
        assert refusal(replies[0]) == (400, f"Worker {fake.url} was removed before it became healthy")


@pytest.mark.parametrize(("query", "status"), [("", 400), ("?url=nonsense", 400), ("?url=http://127.0.0.1:9", 404)])
def test_what_cannot_be_removed(query: str, status: int) -> None:
    with stack() as router:
        assert router.ask("POST", "/remove_worker" + query).status == status


@pytest.mark.parametrize("how", ["POST /remove_worker?url={url}", "DELETE /workers/{id}"])
def test_requests_in_flight_at_a_removed_worker_finish(how: str) -> None:
    with stack() as router:
        gate = Gate(answer(200, {"done": True}))
        (fake,) = router.fakes({"POST /v1/completions": gate})
        worker = router.worker(fake.url)
        replies: list[Reply] = []
        asking = in_background(lambda: replies.append(router.post("/v1/completions", {"prompt": "x"})))
        router.run(fake.asked("POST /v1/completions"))
        method, target = how.format(url=fake.url, id=worker.id).split()
        assert router.ask(method, target).status in (200, 202)
        assert router.get("/workers").json()["total"] == 0
        assert router.post("/v1/completions", {"prompt": "x"}).status == 503
        assert worker.load == 1
        router.call(gate.open.set)
        asking.join(10)
        assert replies[0].json() == {"done": True}
        router.until(lambda: worker.load == 0)
        router.run(fake.hung_up())


# -- the REST API ----------------------------------------------------------------------------------------


def test_a_posted_worker_is_accepted_and_described() -> None:
    with stack(health=HealthRules(interval=3600.0)) as router:
        fake = router.fake({HEALTH: answer(503)})
        wanted = {
            "url": fake.url + "/",
            "api_key": "s3cret",
            "model_id": "m",
            "priority": 7,
            "cost": 0.5,
            "runtime": "sglang",
            "labels": {"zone": "a"},
            "health_check_timeout_secs": 2,
            "health_success_threshold": 1,
            "tokenizer_path": "not for us",
        }
        reply = router.post("/workers", wanted)
        accepted = reply.json()
        worker_id = accepted["worker_id"]
        assert reply.status == 202
        assert reply.headers["location"] == accepted["location"] == f"/workers/{worker_id}"
        assert uuid.UUID(worker_id)
        assert (accepted["status"], accepted["url"]) == ("accepted", fake.url)
        router.run(fake.asked(HEALTH, 2))
        shown = router.get(accepted["location"])
        assert "s3cret" not in shown.text
        info = shown.json()
        assert info.pop("registered_secs") > 0
        assert info.pop("job_status")["status"] == "processing"
        assert info == {
            "id": worker_id,
            "url": fake.url,
            "model_id": "m",
            "priority": 7,
            "cost": 0.5,
            "worker_type": "regular",
            "is_healthy": False,
            "load": 0,
            "elsewhere": 0,
            "waiting": 0,
            "connection_mode": "HTTP",
            "metadata": {"zone": "a"},
            "disable_health_check": False,
            "health": "starting",
            "circuit_breaker": "closed",
            "draining": False,
            "withheld": None,
            "source": "api",
            "paused": [],
            "weight_version": None,
            "held_off": None,
            "processed": 0,
            "tree_size": 0,
            "last_error": "GET /health answered 503",
            "engine": {},
            "runtime_type": "sglang",
        }
        rules = router.worker(fake.url).spec.health
        assert (rules.timeout, rules.success_threshold, rules.interval) == (2.0, 1, 3600.0)
        fake.script[HEALTH] = answer(200)
        router.until_healthy(fake.url)
        info = router.get(accepted["location"]).json()
        assert (info["is_healthy"], info["health"], info["last_error"]) == (True, "healthy", None)
        assert "job_status" not in info


def test_roles_and_bootstrap_ports_are_taken_and_shown() -> None:
    with stack() as router:
        prefill, decode = router.fake({}), router.fake({})
        wanted = {"url": prefill.url, "worker_type": "prefill", "bootstrap_port": 8998}
        assert router.post("/workers", wanted).status == 202
        assert router.post("/workers", {"url": decode.url, "worker_type": "decode"}).status == 202
        listed = router.get("/workers").json()
        assert [worker["worker_type"] for worker in listed["workers"]] == ["prefill", "decode"]
        assert [worker.get("bootstrap_port") for worker in listed["workers"]] == [8998, None]
        counts = {name: listed["stats"][name] for name in ("prefill_count", "decode_count", "regular_count")}
        assert counts == {"prefill_count": 1, "decode_count": 1, "regular_count": 0}


@pytest.mark.parametrize("role", ["regular", "decode"])
def test_a_bootstrap_port_is_kept_until_the_engine_says_that_it_is_a_prefill_worker(role: str) -> None:
    with stack() as router:
        fake = router.fake({})
        assert router.post("/workers", {"url": fake.url, "worker_type": role, "bootstrap_port": 8998}).status == 202
        assert router.worker(fake.url).spec.bootstrap_port == 8998


def test_an_empty_model_id_takes_the_name_back() -> None:
    with stack() as router:
        fake = router.fake({})
        accepted = router.post("/workers", {"url": fake.url, "model_id": "red"}).json()
        assert router.get(accepted["location"]).json()["model_id"] == "red"
        assert router.ask("PUT", accepted["location"], b'{"model_id": ""}').status == 202
        assert router.worker(fake.url).names.bases == ()


def test_workers_are_listed_with_counts() -> None:
    with stack() as router:
        assert router.get("/workers").json()["total"] == 0
        fakes = router.fakes({}, {})
        listed = router.get("/workers").json()
        assert [worker["url"] for worker in listed["workers"]] == [fake.url for fake in fakes]
        assert listed["total"] == 2
        counts = {"prefill_count": 0, "decode_count": 0, "regular_count": 2, "healthy_count": 2}
        assert listed["stats"] == counts


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not a JSON object"),
        (b"{", 400, "not a JSON object"),
        (b"\xff", 400, "not a JSON object"),
        (b"[]", 422, "Expected `object`"),
        (b"{}", 422, "`url`"),
        (b'{"url": 3}', 422, "$.url"),
        (b'{"url": "ftp://h"}', 400, "http://"),
        (b'{"url": "http://h", "priority": "high"}', 422, "$.priority"),
        (b'{"url": "http://h", "health_check_interval_secs": 0}', 422, "$.health_check_interval_secs"),
        (b'{"url": "http://h", "health_failure_threshold": 0}', 422, "$.health_failure_threshold"),
        (b'{"url": "http://h", "api_key": "a b"}', 422, "$.api_key"),
        (b'{"url": "http://h", "labels": {"a": 1}}', 422, "$.labels"),
        (b'{"url": "http://h", "api_kye": "k"}', 422, 'no field "api_kye"; did you mean api_key?'),
        (b'{"url": "http://h", "worker_type": "encode"}', 422, "$.worker_type"),
        (b'{"url": "http://h", "worker_type": "prefill", "bootstrap_port": 0}', 422, "$.bootstrap_port"),
        (b'{"url": "http://h", "worker_type": "prefill", "bootstrap_port": 65536}', 422, "$.bootstrap_port"),
        (b'{"url": "http://h", "model_id": "two\\nlines"}', 422, "$.model_id"),
        (b'{"url": "http://h", "model_id": "%b"}' % (b"m" * 257), 422, "$.model_id"),
    ],
)
def test_descriptions_are_checked(body: bytes, status: int, said: str) -> None:
    with stack() as router:
        got, message = refusal(router.post("/workers", body))
        assert got == status
        assert said in message
        assert router.get("/workers").json()["total"] == 0


def test_a_known_worker_conflicts() -> None:
    with stack() as router:
        (fake,) = router.fakes({})
        assert refusal(router.post("/workers", {"url": fake.url})) == (409, f"Worker {fake.url} already exists")


def test_a_worker_is_changed_in_place() -> None:
    with stack() as router:
        (fake,) = router.fakes({})
        worker = router.worker(fake.url)
        body = b'{"priority": 1, "cost": 2.5, "labels": {"a": "b"}, "api_key": "n3w", "health_check_interval_secs": 60}'
        reply = router.ask("PUT", f"/workers/{worker.id}", body)
        assert reply.status == 202
        assert reply.json()["worker_id"] == worker.id
        info = router.get(f"/workers/{worker.id}").json()
        assert (info["priority"], info["cost"], info["metadata"]) == (1, 2.5, {"a": "b"})
        assert (worker.spec.health.interval, worker.spec.health.success_threshold) == (60.0, 1)
        router.run(fake.asked(HEALTH, 2))  # the change is followed by a check, with the new key
        assert fake.seen[-1].headers["authorization"] == "Bearer n3w"
        assert router.ask("PUT", f"/workers/{worker.id}", b'{"api_key": ""}').status == 202
        assert (worker.key, worker.target.key) == (None, None)
        assert refusal(router.ask("PUT", f"/workers/{worker.id}", b'{"cost": "x"}'))[0] == 422


def test_health_checks_can_be_switched_off_and_on() -> None:
    with stack() as router:
        (fake,) = router.fakes({})
        fake.script[HEALTH] = answer(500)
        worker = router.worker(fake.url)
        router.call(lambda: router.checks.check_now(worker))
        router.until(lambda: worker.health is Health.UNHEALTHY)
        router.ask("PUT", f"/workers/{worker.id}", b'{"disable_health_check": true}')
        info = router.get(f"/workers/{worker.id}").json()
        assert (info["is_healthy"], info["disable_health_check"]) == (True, True)
        router.ask("PUT", f"/workers/{worker.id}", b'{"disable_health_check": false}')
        router.until(lambda: worker.health is Health.UNHEALTHY)


def test_a_drained_worker_gets_nothing_but_stays() -> None:
    with stack(policy="round_robin") as router:
        script = {"POST /v1/completions": answer(200, {})}
        one, two = router.fakes(script, dict(script))
        drained = f"/workers/{router.worker(one.url).id}"
        assert router.post(f"{drained}/drain").json()["draining"] is True
        for _ in range(4):
            assert router.post("/v1/completions", {"prompt": "x"}).status == 200
        assert (one.count("POST /v1/completions"), two.count("POST /v1/completions")) == (0, 4)
        assert router.post(f"{drained}/resume").json()["draining"] is False
        for _ in range(2):
            router.post("/v1/completions", {"prompt": "x"})
        assert one.count("POST /v1/completions") == 1


def test_workers_are_named_by_id_or_url() -> None:
    with stack() as router:
        (fake,) = router.fakes({})
        worker_id = router.worker(fake.url).id
        for name in (worker_id, quote(fake.url, safe=""), fake.url, quote(fake.url + "/", safe="")):
            assert router.get(f"/workers/{name}").json()["id"] == worker_id
        assert router.post(f"/workers/{quote(fake.url, safe='')}/drain").json()["draining"] is True
        assert router.ask("DELETE", f"/workers/{quote(fake.url, safe='')}").status == 202
        assert router.get("/workers").json()["total"] == 0


@pytest.mark.parametrize("name", ["nobody", str(uuid.UUID(int=1)), quote("http://127.0.0.1:9", safe="")])
def test_unknown_workers_are_not_found(name: str) -> None:
    with stack() as router:
        asked = [
            router.get(f"/workers/{name}"),
            router.ask("PUT", f"/workers/{name}", b"{}"),
            router.ask("DELETE", f"/workers/{name}"),
            router.post(f"/workers/{name}/drain"),
            router.post(f"/workers/{name}/resume"),
        ]
        assert [(reply.status, reply.headers["x-smg-error-code"]) for reply in asked] == [(404, "WORKER_NOT_FOUND")] * 5


def test_the_state_of_the_breaker_is_shown() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /v1/completions": answer(500)})
        for _ in range(2):
            router.post("/v1/completions", {"prompt": "x"})
        worker = router.worker(fake.url)
        assert worker.breaker is Breaker.OPEN
        assert router.get(f"/workers/{worker.id}").json()["circuit_breaker"] == "open"


def test_two_additions_of_one_worker_do_not_both_succeed() -> None:
    with stack() as router:
        fake = router.fake({HEALTH: answer(503)})

        async def race(stack: Stack) -> None:
            await fake.asked(HEALTH)
            fake.script[HEALTH] = answer(200)

        first: list[Reply] = []
        adding = in_background(lambda: first.append(router.post("/add_worker", url=fake.url)))
        opening = asyncio.run_coroutine_threadsafe(race(router), router.loop)
        opening.result(10)
        assert router.post("/add_worker", url=fake.url).status == 400
        adding.join(10)
        assert first[0].status == 200
        assert router.get("/list_workers").json() == {"urls": [fake.url]}
