"""The last decisions, over the control plane: what each record says, and how it is found."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from engines import engine_processes
from fake_worker import CLOSE, Gate, answer
from sglang_router.admin.shapes import DecisionList
from sglang_router.routing.decision_record import DecisionRecord
from stack import Reply, Stack, stack

OK = {"POST /generate": answer(200)}
PROMPT = "All the world's a stage, and all the men and women merely players. " * 4


def send(router: Stack, prompt: str = PROMPT, **headers: str) -> Reply:
    body = json.dumps({"text": prompt, "model": "tiny"}).encode()
    return router.ask("POST", "/generate", body, content_type="application/json", **headers)


def listed(router: Stack, query: str = "") -> list[dict[str, Any]]:
    reply = router.get(f"/decisions{query}")
    assert reply.status == 200, reply
    msgspec.json.decode(reply.body, type=DecisionList)
    found: list[dict[str, Any]] = reply.json()["decisions"]
    return found


def of(router: Stack, request_id: str) -> dict[str, Any]:
    reply = router.get(f"/decisions/{quote(request_id, safe='')}")
    assert reply.status == 200, reply
    msgspec.json.decode(reply.body, type=DecisionRecord)
    found: dict[str, Any] = reply.json()
    return found


def test_each_request_leaves_a_record_the_newest_first() -> None:
    with stack() as router:
        (fake,) = router.fakes(OK)
        for name in ("one", "two"):
            assert send(router, x_request_id=name, x_smg_routing_key="s-1").status == 200
        two, one = listed(router)
    assert (one["id"], two["id"]) == ("one", "two")
    assert one | {"at": 0, "duration": 0, "first_byte": 0} == {
        "id": "one",
        "at": 0,
        "endpoint": "generate",
        "model": "tiny",
        "session": "s-1",
        "stream": False,
        "body_bytes": len(json.dumps({"text": PROMPT, "model": "tiny"})),
        "policy": "cache_aware",
        "worker": fake.url,
        "branch": "miss",
        "matched": 0,
        "total": len(PROMPT) + 1,
        "retries": 0,
        "outcome": "served",
        "status": 200,
        "code": "",
        "first_byte": 0,
        "duration": 0,
        "prompt_tokens": None,
        "cached_tokens": None,
        "completion_tokens": None,
        "served_model": None,
        "prefill_worker": None,
        "prefill_branch": "",
        "prefill_matched": 0,
        "attempts": [],
    }
    assert (two["branch"], two["matched"]) == ("hit", two["total"])
    assert 0 < one["at"] <= two["at"]
    assert 0 <= one["first_byte"] <= one["duration"]


def test_a_request_that_asks_gets_a_table_of_what_was_looked_at() -> None:
    with stack() as router:
        fakes = router.fakes(OK, OK)
        send(router, x_request_id="before")
        send(router, x_request_id="asked", x_sglang_router_explain="1")
        warm = of(router, "before")["worker"]
        send(router, x_request_id="not-asked", x_sglang_router_explain="0")
        (attempt,) = of(router, "asked")["attempts"]
        assert of(router, "not-asked")["attempts"] == []
    assert attempt["at"] >= 0
    size = len(PROMPT) + 2
    assert attempt | {"at": 0, "considered": []} == {
        "attempt": 1,
        "at": 0,
        "worker": warm,
        "branch": "hit",
        "matched": size - 1,
        "total": size - 1,
        "text_bytes": size - 1,
        "candidates": 2,
        "considered": [],
        "excluded": [],
        "outcome": "served",
        "shadow": None,
        "role": "regular",
    }
    none = {"backlog": None, "cost": None, "load": 0, "excluded": ""}
    assert attempt["considered"] == [
        {"worker": fake.url, "matched": size - 1 if fake.url == warm else 0, **none} for fake in fakes
    ]


def test_workers_that_are_no_candidates_are_named_with_the_reason() -> None:
    with stack() as router:
        first, second, third = router.fakes(OK, OK, OK)
        draining, down = router.worker(second.url), router.worker(third.url)
        router.call(lambda: router.fleet.set_draining(draining, True))
        router.call(lambda: router.fleet.down(down, "gone"))
        send(router, x_request_id="asked", x_sglang_router_explain="1")
        (attempt,) = of(router, "asked")["attempts"]
    assert [each["worker"] for each in attempt["considered"]] == [first.url]
    assert {each["worker"]: each["excluded"] for each in attempt["excluded"]} == {
        second.url: "draining",
        third.url: "down",
    }


def test_a_retry_shows_each_attempt_and_who_had_failed() -> None:
    with stack(policy="round_robin") as router:
        bad, good = router.fakes({"POST /generate": answer(500)}, OK)
        reply = send(router, x_request_id="retried", x_sglang_router_explain="1")
        record = of(router, "retried")
    assert (reply.status, record["retries"], record["worker"], record["outcome"]) == (200, 1, good.url, "served")
    first, second = record["attempts"]
    assert (first["attempt"], first["worker"], first["outcome"]) == (1, bad.url, "failed")
    assert (second["attempt"], second["worker"], second["outcome"]) == (2, good.url, "served")
    assert [(each["worker"], each["excluded"]) for each in second["excluded"]] == [(bad.url, "failed")]
    assert reply.headers["x-sglang-router-decision"] == 'turn; matched=0; total=0; attempt=2; id="retried"'


def test_a_retry_leaves_a_table_without_being_asked() -> None:
    with stack(policy="round_robin") as router:
        router.fakes({"POST /generate": answer(500)}, OK)
        send(router, x_request_id="retried")
        assert [attempt["attempt"] for attempt in of(router, "retried")["attempts"]] == [2]


def test_a_request_in_flight_is_there_already() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /generate": Gate(answer(200))})
        gate = fake.script["POST /generate"]
        assert isinstance(gate, Gate)
        with ThreadPoolExecutor() as pool:
            sent = pool.submit(send, router, x_request_id="running", x_sglang_router_explain="1")
            router.run(fake.asked("POST /generate"))
            record = of(router, "running")
            router.call(gate.open.set)
            assert sent.result().status == 200
        assert (record["outcome"], record["status"], record["first_byte"]) == ("running", 0, None)
        assert (record["worker"], len(record["attempts"])) == (fake.url, 1)
        assert of(router, "running")["outcome"] == "served"


def test_a_request_that_no_worker_was_asked_for_is_unrouted() -> None:
    with stack() as router:
        reply = send(router, x_request_id="nowhere", x_sglang_router_explain="1")
        record = of(router, "nowhere")
    assert (record["worker"], record["outcome"], record["status"]) == (None, "unrouted", reply.status)
    assert record["code"] == reply.headers["x-smg-error-code"]
    assert reply.headers["x-sglang-router-decision"] == 'none; attempt=0; id="nowhere"'
    assert "x-sglang-router-worker" not in reply.headers


def test_filters_and_limit() -> None:
    with stack(policy="round_robin") as router:
        first, second = router.fakes(OK, {"POST /generate": answer(400)})
        for number in range(4):
            send(router, x_request_id=f"r-{number}", x_smg_routing_key=f"s{number // 2}")

        def ids(query: str) -> list[str]:
            return [record["id"] for record in listed(router, query)]

        assert ids("") == ["r-3", "r-2", "r-1", "r-0"]
        assert ids("?limit=3") == ["r-3", "r-2", "r-1"]
        assert ids(f"?worker={quote(first.url, safe='')}") == ["r-2", "r-0"]
        assert ids("?session=s1") == ["r-3", "r-2"]
        assert ids("?outcome=rejected&session=s1") == ["r-3"]
        assert ids("?branch=turn&model=tiny") == ["r-3", "r-2", "r-1", "r-0"]
        assert ids("?branch=hit") == ids("?model=other") == []
        assert [record["worker"] for record in listed(router, "?outcome=rejected")] == [second.url] * 2


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "many", "", "%C2%B2", "0000000011234", "1" + "0" * 5000])
def test_a_limit_that_is_none_is_refused(limit: str) -> None:
    with stack() as router:
        reply = router.get(f"/decisions?limit={limit}")
    assert (reply.status, reply.json()["error"]["param"]) == (400, "limit")


def test_an_id_that_is_not_known_is_not_found() -> None:
    with stack() as router:
        reply = router.get("/decisions/never-sent")
    assert (reply.status, reply.headers["x-smg-error-code"]) == (404, "decision_not_found")


@pytest.mark.parametrize("request_id", ["a/b", "a b?c=%", 'say "hi"', "caf\xe9"])
def test_an_id_may_hold_anything(request_id: str) -> None:
    with stack() as router:
        router.fakes(OK)
        send(router, x_request_id=request_id)
        assert of(router, request_id)["id"] == request_id


def test_the_newest_of_several_with_one_id_is_shown() -> None:
    with stack() as router:
        router.fakes(OK)
        send(router, x_request_id="same")
        send(router, x_request_id="same")
        assert of(router, "same")["branch"] == "hit"


def test_no_record_holds_any_of_the_prompt() -> None:
    with stack() as router:
        router.fakes(OK)
        send(router, "the secret sentence", x_sglang_router_explain="1")
        reply = router.get("/decisions")
    assert b"secret" not in reply.body
    assert len(reply.json()["decisions"][0]["attempts"]) == 1


def test_a_router_that_keeps_none_says_so() -> None:
    with stack(decisions=None) as router:
        replies = [router.get(path) for path in ("/decisions", "/decisions/some")]
    assert [reply.status for reply in replies] == [409, 409]
    assert all("--decision-records" in reply.json()["error"]["message"] for reply in replies)


# -- what the client is told -------------------------------------------------------------------------------------------


def test_only_who_asks_is_told_and_no_worker_hears_of_it() -> None:
    with stack() as router:
        (fake,) = router.fakes(OK)
        told = send(router, x_request_id="asked", x_sglang_router_explain="1")
        others = [send(router), send(router, x_sglang_router_explain="yes")]
        size = len(PROMPT) + 1
        assert told.headers["x-sglang-router-worker"] == fake.url
        decision = told.headers["x-sglang-router-decision"]
        assert decision == f'miss; matched=0; total={size}; attempt=1; id="asked"'
        for reply in others:
            assert not [name for name in reply.headers if name.startswith("x-sglang-router-")]
        assert not [name for seen in fake.seen for name in seen.headers if name.startswith("x-sglang-router-")]


def test_everybody_is_told_when_the_option_says_so() -> None:
    with stack() as router:
        (fake,) = router.fakes(OK)
        router.app.relay.answers.always = True
        assert send(router).headers["x-sglang-router-worker"] == fake.url


def test_the_worker_is_called_by_its_id_where_clients_do_not_know_addresses() -> None:
    with stack() as router:
        (fake,) = router.fakes(OK)
        router.app.relay.answers.by_id = True
        reply = send(router, x_sglang_router_explain="1")
        worker = router.worker(fake.url)
    assert reply.headers["x-sglang-router-worker"] == worker.id
    assert fake.url not in str(reply.headers)


def test_an_answer_with_an_error_of_a_worker_tells_too() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /generate": answer(418)})
        reply = send(router, x_sglang_router_explain="1")
    assert (reply.status, reply.headers["x-sglang-router-worker"]) == (418, fake.url)


def test_an_answer_with_an_error_of_the_router_tells_who_was_asked_last() -> None:
    with stack() as router:
        (fake,) = router.fakes({"POST /generate": CLOSE})
        reply = send(router, x_request_id="broken", x_sglang_router_explain="1")
    assert (reply.status, reply.headers["x-sglang-router-worker"]) == (502, fake.url)
    assert reply.headers["x-sglang-router-decision"].endswith('attempt=1; id="broken"')


def test_a_quote_in_an_id_does_not_end_it() -> None:
    with stack() as router:
        router.fakes(OK)
        reply = send(router, x_request_id='say "hi\\"', x_sglang_router_explain="1")
    assert reply.headers["x-sglang-router-decision"].endswith(r'; id="say \"hi\\\""')


def test_a_stream_tells_in_its_head() -> None:
    with engine_processes(1, "--speed", "0") as urls, stack(*urls) as router:
        body = json.dumps({"text": PROMPT, "stream": True, "sampling_params": {"max_new_tokens": 3}}).encode()
        reply = router.ask("POST", "/generate", body, content_type="application/json", x_sglang_router_explain="1")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-sglang-router-worker"] == urls[0]
    assert reply.body.endswith(b"data: [DONE]\n\n")
