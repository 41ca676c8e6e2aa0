"""The fake SGLang pair does what real ones were measured to do, without a router."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from pd_fakes.edge import Fault, Stage
from pd_fakes.fleet import Fakes, running
from pd_fakes.sglang import SglangEngine, SglangPair, Timing
from pd_fakes.texts import answer_text
from routers import Answer, ask

PROMPT = "alpha beta gamma delta"
QUICK = Timing().scaled(0.01)
Pair = Fakes[SglangPair]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


@pytest.fixture
def fakes() -> Iterator[Pair]:
    with running(SglangPair()) as pair:
        yield pair


def body(fakes: Pair, room: int = 7, **more: Any) -> dict[str, Any]:
    place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": fakes.pair.prefill.bootstrap_port, "bootstrap_room": room}
    return {"text": PROMPT, "sampling_params": {"max_new_tokens": 3}, **place, **more}


def leg(threads: ThreadPoolExecutor, engine: SglangEngine, value: Any, path: str = "/generate") -> Future[Answer]:
    return threads.submit(ask, engine.url, "POST", path, value)


def both(
    fakes: Pair, threads: ThreadPoolExecutor, value: dict[str, Any], path: str = "/generate"
) -> tuple[Answer, Answer]:
    first = leg(threads, fakes.pair.prefill, value, path)
    second = leg(threads, fakes.pair.decode, value, path)
    return first.result(), second.result()


def events(answer: Answer) -> list[Any]:
    lines = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def waits(fakes: Pair, engine: SglangEngine) -> None:
    """Wait until one leg is queued."""
    fakes.until(engine, lambda _: [each.state for each in engine.living] == ["queued"])


@pytest.mark.parametrize("order", ["prefill first", "decode first"])
def test_either_order_works_and_decode_has_all_tokens(fakes: Pair, threads: ThreadPoolExecutor, order: str) -> None:
    pair = fakes.pair
    engines = [pair.prefill, pair.decode] if order == "prefill first" else [pair.decode, pair.prefill]
    first = leg(threads, engines[0], body(fakes))
    fakes.until(engines[0], lambda _: bool(engines[0].living))
    second = leg(threads, engines[1], body(fakes))
    answers = dict(zip(engines, (first.result(), second.result()), strict=True))
    assert answers[pair.decode].json()["text"] == answer_text(PROMPT, 3)
    assert answers[pair.prefill].json()["text"] == answer_text(PROMPT, 1)
    fakes.idle()


def test_prefill_waits_for_its_decode(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    waiting = leg(threads, fakes.pair.prefill, body(fakes))
    waits(fakes, fakes.pair.prefill)
    assert fakes.call(fakes.pair.prefill.left) == {"prefill_bootstrap_queue_reqs": 1}
    assert not waiting.done()
    assert leg(threads, fakes.pair.decode, body(fakes)).result().status == waiting.result().status == 200


def test_it_says_its_role_port_and_window(fakes: Pair) -> None:
    for engine in fakes.pair.engines:
        info = ask(engine.url, "GET", "/server_info").json()
        assert (info["disaggregation_mode"], info["max_running_requests"]) == (engine.role, 8)
        assert info["disaggregation_bootstrap_port"] == engine.bootstrap_port
        load = ask(engine.url, "GET", "/v1/loads?include=core,disagg").json()["loads"][0]
        assert load["num_used_tokens"] == 0
        assert load["disaggregation"]["prefill_bootstrap_queue_reqs"] == 0


def test_streams_carry_all_tokens_from_decode_and_one_event_from_prefill(
    fakes: Pair, threads: ThreadPoolExecutor
) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3, "stream": True}
    value = {**body(fakes), **chat, "stream_options": {"include_usage": True}}
    first, second = both(fakes, threads, value, "/v1/chat/completions")
    assert len(events(first)) == 3  # one token, usage, [DONE]
    told = events(second)
    assert "".join(each["choices"][0]["delta"]["content"] for each in told[:3]) == answer_text(f"<user> {PROMPT}", 3)
    assert told[3]["usage"]["completion_tokens"] == 3
    assert told[4] == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_the_prompt_come_from_prefill_alone(
    fakes: Pair, threads: ThreadPoolExecutor, stream: bool
) -> None:
    answers = both(fakes, threads, body(fakes, return_logprob=True, stream=stream))
    first, second = (events(each)[0] if stream else each.json() for each in answers)
    assert len(first["meta_info"]["input_token_logprobs"]) == 4
    assert second["meta_info"]["input_token_logprobs"] == []
    assert second["meta_info"]["output_token_logprobs"]


def test_both_legs_tell_the_cached_tokens_of_prefill(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    both(fakes, threads, body(fakes, 1))
    again = both(fakes, threads, body(fakes, 2))
    assert [each.json()["meta_info"]["cached_tokens"] for each in again] == [3, 3]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_room_is_refused(fakes: Pair, role: str) -> None:
    engine: SglangEngine = getattr(fakes.pair, role)
    answer = ask(engine.url, "POST", "/generate", {"text": PROMPT})
    assert answer.status == 400
    assert "without bootstrap room id" in answer.json()["error"]["message"]
    assert engine.legs == []


def test_of_a_doubled_field_the_last_counts(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    raw = json.dumps(body(fakes, 5))[:-1].encode()
    first = leg(threads, fakes.pair.prefill, b'{"bootstrap_room": 1,' + raw[1:] + b"}")
    second = leg(threads, fakes.pair.decode, b'{"bootstrap_room": 2,' + raw[1:] + b"}")
    assert (first.result().status, second.result().status) == (200, 200)


def test_headers_override_fields_where_the_engine_lets_them(threads: ThreadPoolExecutor) -> None:
    with running(SglangPair(header_overrides=True)) as fakes:
        headers = {"x_override_bootstrap_room": "9", "x_override_rid": "mine"}
        first = threads.submit(ask, fakes.pair.prefill.url, "POST", "/generate", body(fakes, 1), **headers)
        second = threads.submit(ask, fakes.pair.decode.url, "POST", "/generate", body(fakes, 2), **headers)
        assert (first.result().status, second.result().status) == (200, 200)
        assert [each.rids for each in fakes.pair.decode.legs] == [["mine"]]
        bad = ask(fakes.pair.prefill.url, "POST", "/generate", body(fakes), x_override_bootstrap_port="many")
        assert bad.status == 400
        assert "invalid x-override-bootstrap-port header 'many'" in bad.json()["error"]["message"]


def test_batches_have_a_room_for_each_entry(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    port = fakes.pair.prefill.bootstrap_port
    arrays = {"bootstrap_host": ["127.0.0.1"] * 2, "bootstrap_port": [port] * 2, "bootstrap_room": [4, 90]}
    value = {"prompt": ["one", "two"], "max_tokens": 2, **arrays}
    _, answer = both(fakes, threads, value, "/v1/completions")
    assert [each["text"] for each in answer.json()["choices"]] == [answer_text("one", 2), answer_text("two", 2)]
    _, answer = both(fakes, threads, body(fakes, 11, text=["three", "four"]))  # a scalar room: 11 and 12
    assert [each["text"] for each in answer.json()] == [answer_text("three", 3), answer_text("four", 3)]
    assert fakes.pair.prefill.legs[-1].rooms == [11, 12]
    fakes.idle()


def test_a_finished_room_may_be_used_again(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    for _ in range(2):
        assert [each.status for each in both(fakes, threads, body(fakes, 3))] == [200, 200]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_closing_the_connection_frees_nothing_and_abort_does(
    fakes: Pair, threads: ThreadPoolExecutor, role: str
) -> None:
    engine: SglangEngine = getattr(fakes.pair, role)
    data = json.dumps(body(fakes, rid="mine")).encode()
    with socket.create_connection(("127.0.0.1", engine.port)) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        fakes.until(engine, lambda _: bool(engine.living))
    assert ask(engine.url, "GET", "/health").status == 200
    assert len(engine.living) == 1
    answer = ask(engine.url, "POST", "/abort_request", {"rid": "mine"})
    assert (answer.status, answer.body) == (200, b"")
    fakes.until(engine, lambda _: engine.fates == ["aborted"])
    assert fakes.call(engine.left) == {}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_aborted_leg_ends_at_once_and_the_other_waits_on(
    fakes: Pair, threads: ThreadPoolExecutor, role: str
) -> None:
    engine: SglangEngine = getattr(fakes.pair, role)
    waiting = leg(threads, engine, body(fakes, rid="mine"))
    fakes.until(engine, lambda _: bool(engine.living))
    ask(engine.url, "POST", "/abort_request", {"rid": "other"})
    ask(engine.url, "POST", "/abort_request", {"rid": "mine"})
    assert waiting.result().status == 500
    assert "Aborted by AbortReq" in waiting.result().json()["error"]["message"]
    other = next(each for each in fakes.pair.engines if each is not engine)
    left_alone = leg(threads, other, body(fakes, rid="its"))
    fakes.until(other, lambda _: bool(other.living))
    assert not left_alone.done()
    ask(other.url, "POST", "/abort_request", {"rid": "its"})
    assert left_alone.result().status == 500


def test_a_batch_is_aborted_by_the_names_of_its_entries_only(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    engine = fakes.pair.prefill
    waiting = leg(threads, engine, body(fakes, text=["one", "two"], rid="batch"))
    fakes.until(engine, lambda _: bool(engine.living))
    ask(engine.url, "POST", "/abort_request", {"rid": "batch"})
    assert len(engine.living) == 1
    ask(engine.url, "POST", "/abort_request", {"rid": "batch_0"})
    assert waiting.result().status == 500


def test_several_samples_of_a_chat_hang_decode_until_all_is_aborted(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    chat = {**body(fakes, rid="two"), "messages": [{"role": "user", "content": PROMPT}], "n": 2}
    assert leg(threads, fakes.pair.prefill, chat, "/v1/chat/completions").result().status == 200
    stuck = leg(threads, fakes.pair.decode, chat, "/v1/chat/completions")
    fakes.until(fakes.pair.decode, lambda _: fakes.pair.decode.used_tokens > 0)
    ask(fakes.pair.decode.url, "POST", "/abort_request", {"rid": "two"})
    assert fakes.call(fakes.pair.decode.left)["num_waiting_reqs"] == 1
    ask(fakes.pair.decode.url, "POST", "/abort_request", {"rid": "", "abort_all": True})
    assert stuck.result().status == 500
    fakes.idle()


def test_nothing_at_the_bootstrap_port_fails_decode_late(threads: ThreadPoolExecutor) -> None:
    with running(SglangPair(timing=QUICK)) as fakes:
        answer = leg(threads, fakes.pair.decode, body(fakes, bootstrap_port=9)).result()
        assert answer.status == 500
        assert "Decode handshake failed" in answer.json()["error"]["message"]
        fakes.idle()


@pytest.mark.parametrize("dead", ["prefill", "decode"])
def test_a_leg_whose_other_engine_dies_fails_late(threads: ThreadPoolExecutor, dead: str) -> None:
    with running(SglangPair(timing=QUICK)) as fakes:
        prefill, decode = fakes.pair.prefill, fakes.pair.decode
        held = fakes.hold(Stage.ADMITTED, prefill)
        legs = {name: leg(threads, getattr(fakes.pair, name), body(fakes)) for name in ("prefill", "decode")}
        fakes.reached(held)
        fakes.call((prefill if dead == "prefill" else decode).kill)
        fakes.release(held)
        with pytest.raises(OSError):
            legs.pop(dead).result()
        (answer,) = (each.result() for each in legs.values())
        assert answer.status == 500
        said = answer.json()["error"]["message"]
        assert ("Lost connection with prefill instance" if dead == "prefill" else "Prefill transfer failed") in said


def test_a_restarted_prefill_serves_the_next_pair(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    fakes.call(fakes.pair.prefill.kill)
    with pytest.raises(OSError):
        ask(fakes.pair.prefill.url, "GET", "/health")
    fakes.run(fakes.pair.prefill.start())
    assert [each.status for each in both(fakes, threads, body(fakes))] == [200, 200]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_leg_alone_ends_at_its_deadline(threads: ThreadPoolExecutor, role: str) -> None:
    with running(SglangPair(timing=Timing(bootstrap=0.1, waiting=0.1))) as fakes:
        answer = leg(threads, getattr(fakes.pair, role), body(fakes)).result()
        assert answer.status == 500
        assert "timed out after 0.1s" in answer.json()["error"]["message"]


def test_two_decodes_in_one_room_fail(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    with running(SglangPair(decodes=2, timing=QUICK)) as fakes:
        held = fakes.hold(Stage.ADMITTED, fakes.pair.prefill)
        first = leg(threads, fakes.pair.prefill, body(fakes))
        waiting = leg(threads, fakes.pair.decodes[0], body(fakes))
        fakes.reached(held)
        assert leg(threads, fakes.pair.decodes[1], body(fakes)).result().status == 500
        fakes.release(held)
        assert first.result().status == 500
        fakes.call(fakes.pair.decodes[0].kill)
        with pytest.raises(OSError):
            waiting.result()


def test_decode_admits_no_more_than_its_window(threads: ThreadPoolExecutor) -> None:
    with running(SglangPair(window=2)) as fakes:
        held = fakes.hold(Stage.ADMITTED, fakes.pair.decode)
        legs = [leg(threads, engine, body(fakes, room)) for room in range(5) for engine in fakes.pair.engines]
        decode = fakes.pair.decode
        fakes.until(decode, lambda _: len(decode.living) == 5 and decode.left().get("decode_transfer_queue_reqs") == 2)
        assert fakes.call(decode.left)["decode_prealloc_queue_reqs"] == 3
        fakes.release(held)
        assert {each.result().status for each in legs} == {200}
        assert decode.most == 5
        fakes.idle()


def test_forty_pairs_go_through_a_window_of_eight(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    legs = [leg(threads, engine, body(fakes, room)) for room in range(40) for engine in fakes.pair.engines]
    assert {each.result().status for each in legs} == {200}
    fakes.idle()


def test_a_role_is_switched_when_the_engine_is_idle(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    engine = fakes.pair.prefill
    waiting = leg(threads, engine, body(fakes, rid="mine"))
    fakes.until(engine, lambda _: bool(engine.living))
    assert ask(engine.url, "POST", "/pd_role_switch", {"new_role": "decode"}).status == 400
    ask(engine.url, "POST", "/abort_request", {"rid": "mine"})
    waiting.result()
    assert ask(engine.url, "POST", "/pd_role_switch", {"new_role": "decode"}).status == 200
    assert ask(engine.url, "GET", "/server_info").json()["disaggregation_mode"] == "decode"


def test_health_checks_need_no_other_leg(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    for engine in fakes.pair.engines:
        assert leg(threads, engine, body(fakes, 0, bootstrap_host="2.2.2.2")).result().status == 200


@pytest.mark.parametrize("fault", list(Fault))
def test_scripted_faults(fakes: Pair, fault: Fault) -> None:
    engine = fakes.pair.decode
    fakes.call(lambda: engine.fail("/generate", fault, (503, {"error": {"message": "no memory"}})))
    with socket.create_connection(("127.0.0.1", engine.port), timeout=0.3) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        if fault is Fault.SILENT:
            with pytest.raises(TimeoutError):
                client.recv(100)
        elif fault is Fault.RESET:
            with pytest.raises(ConnectionError):
                client.recv(100)
        else:
            assert client.recv(100) == b"HTTP/1.1 200 OK\r\ncontent-le"
    assert ask(engine.url, "POST", "/generate", {}).status == 503
    assert ask(engine.url, "POST", "/generate", {}).status == 400


def test_a_frozen_engine_answers_nothing(fakes: Pair, threads: ThreadPoolExecutor) -> None:
    engine = fakes.pair.prefill
    fakes.call(engine.freeze)
    asked = threads.submit(ask, engine.url, "GET", "/health")
    with socket.create_connection(("127.0.0.1", engine.port), timeout=0.3) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            client.recv(100)
    assert not asked.done()
    fakes.call(engine.thaw)
    assert asked.result().status == 200
