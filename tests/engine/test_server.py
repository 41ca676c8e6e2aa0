"""The engine as clients see it: real processes, real sockets, the `openai` client."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from openai import BadRequestError, OpenAI

from engines import end_engine, engine_processes, start_engine, wait_until_healthy

LONG = "Once upon a time there was a router that knew which worker had read which book. " * 8


@pytest.fixture(scope="module")
def fast() -> Iterator[str]:
    """An engine that does not wait. Tests that count cached tokens use prompts of their own."""
    with engine_processes(1, "--speed", "0") as (url,):
        yield url


@pytest.fixture(scope="module")
def slow() -> Iterator[str]:
    """An engine on which nothing ends by itself: 20 ms a token."""
    with engine_processes(1, "--decode-base-ms", "20", "--max-running-requests", "4") as (url,):
        yield url


@pytest.fixture
def client(fast: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=fast + "/v1", api_key="none", max_retries=0) as client:
        yield client


def call(url: str, path: str, body: object = None, method: str = "", **headers: str) -> tuple[int, bytes]:
    """One request on its own connection: status and body. `bytes` are sent as they are, the rest as JSON."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body)
        connection.request(method or ("GET" if body is None else "POST"), path, raw, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_case_5_an_upgrade_that_is_offered_is_ignored(fast: str) -> None:
    """Stock Java clients offer h2c with each request; the body was lost."""
    offer = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = b'{"prompt":"cut \\ud83d","max_tokens":1}'
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for rest in (b"Content-Length: %d\r\n\r\n%s" % (len(body), body), chunked):
        host, port = urlsplit(fast).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client, client.makefile("rb") as answers:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\n" + offer + rest)
            client.sendall(
                b"GET /health HTTP/1.1\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n" + b"Host: x\r\n\r\n"
            )
            answered = answers.read()
        assert answered.count(b"HTTP/1.1 200 OK") == 2, answered
    with socket.create_connection((host, int(port)), timeout=20) as client, client.makefile("rb") as answers:
        client.sendall(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answers.read().startswith(b"HTTP/1.1 400")


def post(url: str, path: str, body: object) -> Any:
    status, answer = call(url, path, body)
    assert status == 200, answer
    return json.loads(answer)


def events(url: str, path: str, body: object) -> list[tuple[str, Any]]:
    """A whole stream: (event name, decoded data)."""
    status, answer = call(url, path, body)
    assert status == 200, answer
    found = []
    for block in answer.decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append(
            (
                fields.get("event", ""),
                fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"]),
            )
        )
    return found


def eventually(what: Callable[[], bool], within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def load(url: str) -> Any:
    return json.loads(call(url, "/get_load")[1])[0]


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def endless(url: str, **more: object) -> socket.socket:
    """An endless stream whose first bytes have arrived."""
    body = {
        "text": LONG,
        "stream": True,
        "sampling_params": {"max_new_tokens": 50_000, "ignore_eos": True},
    } | more
    raw = json.dumps(body).encode()
    connection = socket.create_connection(address(url), timeout=20)
    connection.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
    assert connection.recv(15) == b"HTTP/1.1 200 OK"
    return connection


# -- SGLang's own protocol -----------------------------------------------------------------------------------


def test_generate_reports_what_it_found_in_the_cache(fast: str) -> None:
    body = {
        "text": "Report: " + LONG,
        "sampling_params": {"max_new_tokens": 5, "ignore_eos": True},
        "rid": "mine",
    }
    first, again = post(fast, "/generate", body), post(fast, "/generate", body)
    meta = first["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["completion_tokens"], len(first["output_ids"])) == (5, 5)
    assert again["text"] == first["text"]
    assert again["meta_info"]["cached_tokens"] == meta["prompt_tokens"] - 1


def test_ranks_have_caches_and_loads_of_their_own() -> None:
    def ask(text: str, **more: Any) -> int:
        body = {"text": text, "sampling_params": {"max_new_tokens": 1}} | more
        return int(post(url, "/generate", body)["meta_info"]["cached_tokens"])

    with engine_processes(1, "--speed", "0", "--dp-size", "3", "--capacity-tokens", "60000") as (url,):
        assert ask(LONG, data_parallel_rank=2) == 0
        assert ask(LONG, data_parallel_rank=1) == 0
        assert ask(LONG, data_parallel_rank=2) > 0
        assert [bool(ask(LONG + "x")) for _ in range(3)] == [False, True, True]  # in turn: rank 0 has nothing of it
        status, answer = call(url, "/generate", {"text": LONG, "data_parallel_rank": 3})[:2]
        assert (status, b"below 3" in answer) == (400, True)
        info = json.loads(call(url, "/server_info")[1])
        assert (info["dp_size"], info["max_total_num_tokens"], len(info["internal_states"])) == (3, 20000, 3)
        with endless(url, data_parallel_rank=1):
            rows = json.loads(call(url, "/v1/loads")[1])["loads"]
            assert [row["num_running_reqs"] for row in rows] == [0, 1, 0]
            assert [row["num_total_tokens"] > 0 for row in rows] == [False, True, False]
            assert [row["num_reqs"] for row in json.loads(call(url, "/get_load")[1])] == [0, 1, 0]


def test_a_generate_stream_repeats_the_text_so_far(fast: str) -> None:
    body = {"text": "Stream this", "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}}
    whole = post(fast, "/generate", body)
    *chunks, done = [data for _, data in events(fast, "/generate", body | {"stream": True})]
    texts = [chunk["text"] for chunk in chunks]
    assert done == "[DONE]"
    assert texts[-1] == whole["text"]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "length"


def test_lists_are_answered_with_lists(fast: str) -> None:
    ids = post(fast, "/tokenize", {"prompt": "The second"})["tokens"]
    sampling = {"max_new_tokens": 3, "ignore_eos": True}
    both = post(fast, "/generate", {"text": ["The first", "The second"], "sampling_params": sampling})
    by_ids = post(fast, "/generate", {"input_ids": [ids], "sampling_params": sampling})
    assert [len(one["output_ids"]) for one in both] == [3, 3]
    assert by_ids[0]["text"] == both[1]["text"]
    assert post(fast, "/generate", {"input_ids": ids, "sampling_params": sampling})["text"] == both[1]["text"]
    streamed = events(fast, "/generate", {"text": ["a", "b"], "sampling_params": sampling, "stream": True})
    assert {data["index"] for _, data in streamed[:-1]} == {0, 1}


def test_detokenize_undoes_tokenize(fast: str) -> None:
    tokens = post(fast, "/v1/tokenize", {"prompt": "Grüße, 世界!  x"})
    assert tokens["count"] == len(tokens["tokens"])
    assert post(fast, "/v1/detokenize", {"tokens": tokens["tokens"]}) == {"text": "Grüße, 世界!  x"}


def test_adapters_and_salts_have_caches_of_their_own(fast: str) -> None:
    def cached(**more: str) -> int:
        body = {"text": "Salted. " + LONG, "sampling_params": {"max_new_tokens": 1}} | more
        return int(post(fast, "/generate", body)["meta_info"]["cached_tokens"])

    assert [cached(), cached(lora_path="a"), cached(cache_salt="s"), cached(model="base:a")] == [
        0,
        0,
        0,
        cached(lora_path="a"),
    ]
    assert cached() > 0


# -- OpenAI's and Anthropic's --------------------------------------------------------------------------------


def test_chat_with_the_openai_client(client: OpenAI) -> None:
    ask: Any = [{"role": "user", "content": "Chat: " + LONG}]
    whole: Any = client.chat.completions.create(model="m", messages=ask)
    stream: Any = client.chat.completions.create(
        model="m", messages=ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_the_next_turn_of_a_conversation_finds_the_last_answer(client: OpenAI) -> None:
    ask: list[Any] = [{"role": "user", "content": "Turns: " + LONG}]
    first = client.chat.completions.create(model="m", messages=ask)
    assert first.usage
    ask += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    usage = client.chat.completions.create(model="m", messages=ask, max_tokens=1).usage
    assert usage
    assert usage.prompt_tokens_details
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached == first.usage.prompt_tokens + first.usage.completion_tokens - 1


def test_half_an_answer_is_continued(fast: str) -> None:
    ask = [{"role": "user", "content": "Go on and on"}]
    body = {"messages": ask, "max_tokens": 30, "ignore_eos": True}
    whole = post(fast, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    half = post(fast, "/v1/chat/completions", body | {"max_tokens": 12})["choices"][0]["message"]["content"]
    going_on = {
        "messages": [*ask, {"role": "assistant", "content": half}],
        "continue_final_message": True,
        "max_tokens": 18,
    }
    rest = post(fast, "/v1/chat/completions", body | going_on)["choices"][0]["message"]["content"]
    assert half + rest == whole


def test_completions_of_texts_and_tokens(client: OpenAI, fast: str) -> None:
    tokens = post(fast, "/tokenize", {"prompt": "The cat"})["tokens"]
    texts = client.completions.create(model="m", prompt=["The cat", "The dog"], max_tokens=4, n=2)
    one = client.completions.create(model="m", prompt=tokens, max_tokens=4)
    several = client.completions.create(model="m", prompt=[tokens], max_tokens=4)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in texts.choices}) == 4
    assert one.choices[0].text == several.choices[0].text == texts.choices[0].text
    assert texts.usage
    assert (texts.usage.prompt_tokens, texts.usage.completion_tokens) == (4, 16)


def test_a_streamed_completion_with_a_stop_string(client: OpenAI) -> None:
    free = client.completions.create(model="m", prompt="Stop me", max_tokens=20, extra_body={"ignore_eos": True})
    stop = free.choices[0].text[30:38]
    stream = client.completions.create(model="m", prompt="Stop me", max_tokens=20, stop=stop, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == free.choices[0].text.split(stop)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_responses_with_the_openai_client(client: OpenAI) -> None:
    whole = client.responses.create(model="m", input="Respond", instructions="Well", max_output_tokens=5)
    stream: Any = client.responses.create(
        model="m", input="Respond", instructions="Well", max_output_tokens=5, stream=True
    )
    told = list(stream)
    assert (whole.status, whole.usage and whole.usage.output_tokens) == ("incomplete", 5)
    assert [one.sequence_number for one in told] == list(range(len(told)))
    kinds = [one.type.removeprefix("response.") for one in told]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(one.delta for one in told[4:-4]) == whole.output_text == told[-1].response.output_text


def test_messages(fast: str) -> None:
    body = {"system": "Be kind.", "messages": [{"role": "user", "content": "Tell: " + LONG}], "max_tokens": 4}
    whole = post(fast, "/v1/messages", body)
    told = events(fast, "/v1/messages", body | {"stream": True})
    names = [name for name, _ in told]
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert names[:3] == ["message_start", "content_block_start", "ping"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert [name for name, data in told if data["type"] != name] == []
    assert "".join(data["delta"]["text"] for _, data in told[3:-3]) == whole["content"][0]["text"]
    usage, later = whole["usage"], told[0][1]["message"]["usage"]
    assert later["input_tokens"] == 1  # all but one token was read from the cache
    assert later["cache_read_input_tokens"] + 1 == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_vectors(client: OpenAI, fast: str) -> None:
    near, same, far = client.embeddings.create(model="m", input=["a b c", "a b c", "x y z"]).data
    assert near.embedding == same.embedding != far.embedding
    assert sum(part * part for part in near.embedding) == pytest.approx(1, abs=1e-5)
    ranked = post(fast, "/v1/rerank", {"query": "a red fox", "documents": ["blue sea", "one red fox"], "top_n": 1})
    assert [(one["index"], one["document"]) for one in ranked] == [(1, "one red fox")]
    scored = post(
        fast,
        "/v1/score",
        {"query": "q", "items": ["a", "b"], "label_token_ids": [1, 2], "apply_softmax": True},
    )
    assert [sum(row) for row in scored["scores"]] == pytest.approx([1, 1])
    labelled = post(fast, "/v1/classify", {"input": ["a", "b"]})
    assert [len(one["probs"]) for one in labelled["data"]] == [2, 2]


def test_transcriptions_of_equal_sounds_are_equal(client: OpenAI) -> None:
    def heard(sound: bytes) -> str:
        return client.audio.transcriptions.create(model="m", file=("a.wav", sound)).text

    sound = bytes(range(256)) * 40 + b"\r\n--"
    assert heard(sound) == heard(sound) != heard(sound + b"x")


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/generate", b"{", "JSON"),
        ("/generate", b"[1]", "object"),
        ("/generate", {}, "text"),
        ("/generate", {"text": ""}, "empty"),
        ("/generate", {"text": 5}, "text"),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ("/generate", {"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 200_000},
            "context",
        ),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, "temperature"),
        ("/v1/responses", {}, "input"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}]}, "max_tokens"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/rerank", {"query": "a", "documents": []}, "empty"),
        ("/abort_request", {}, "rid"),
        ("/pause_generation", {"mode": "nap"}, "mode"),
    ],
)
def test_mistakes_are_told_in_openais_shape(fast: str, path: str, body: object, says: str) -> None:
    status, answer = call(fast, path, body)
    assert status == 400
    error = json.loads(answer)["error"]
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]


def test_the_openai_client_knows_the_error(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="context"):
        client.completions.create(model="m", prompt="word " * 10, max_tokens=1_000_000)


def test_a_key_is_asked_for_but_not_for_health() -> None:
    with engine_processes(1, "--api-key", "secret", "--speed", "0") as (url,):
        body = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
        assert call(url, "/generate", body)[0] == 401
        assert call(url, "/generate", body, authorization="Bearer wrong")[0] == 401
        assert call(url, "/generate", body, authorization="Bearer secret")[0] == 200
        assert call(url, "/get_load")[0] == 401
        assert b"secret" not in call(url, "/server_info", authorization="Bearer secret")[1]


# -- control -------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_the_engine(slow: str) -> None:
    with endless(slow):
        eventually(lambda: load(slow)["num_reqs"] == 1)
    eventually(lambda: load(slow) == {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0})


def test_a_client_that_leaves_before_its_answer_frees_the_engine_too(slow: str) -> None:
    raw = json.dumps({"text": "x", "sampling_params": {"max_new_tokens": 50_000, "ignore_eos": True}}).encode()
    with socket.create_connection(address(slow), timeout=20) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
        eventually(lambda: load(slow)["num_reqs"] == 1)
    eventually(lambda: load(slow)["num_reqs"] == 0)


def test_abort_request_ends_a_stream_with_its_reason(slow: str) -> None:
    with endless(slow, rid="kill-me") as connection:
        assert call(slow, "/abort_request", {"rid": "kill-me"})[0] == 200
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            rest += connection.recv(65536)
    assert b'"type":"abort"' in rest
    assert b"data: [DONE]" in rest


def test_what_does_not_fit_into_the_batch_waits(slow: str) -> None:
    with contextlib.ExitStack() as streams:
        for _ in range(4):
            streams.enter_context(endless(slow))
        raw = json.dumps({"text": "fifth"}).encode()
        fifth = streams.enter_context(socket.create_connection(address(slow), timeout=20))
        fifth.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
        eventually(lambda: load(slow)["num_waiting_reqs"] == 1)
        metrics = call(slow, "/metrics")[1].decode()
        assert 'sglang:num_running_reqs{model_name="built-in"} 4.0' in metrics
        assert 'sglang:num_queue_reqs{model_name="built-in"} 1.0' in metrics
        assert json.loads(call(slow, "/v1/loads")[1])["loads"][0]["num_waiting_reqs"] == 1
        assert call(slow, "/flush_cache", {})[0] == 400
    eventually(lambda: load(slow)["num_reqs"] == 0)


def test_pause_and_continue(slow: str) -> None:
    with endless(slow) as connection:
        assert call(slow, "/pause_generation", {"mode": "in_place"})[0] == 200
        connection.settimeout(0.2)
        with contextlib.suppress(socket.timeout):
            while connection.recv(65536):  # what was on its way
                pass
        assert load(slow)["num_reqs"] == 1
        assert call(slow, "/continue_generation", {})[0] == 200
        connection.settimeout(20)
        assert connection.recv(10)
    eventually(lambda: load(slow)["num_reqs"] == 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/flush_cache", {}),
        ("/update_weights_from_disk", {"model_path": "x"}),
        ("/update_weights_from_tensor", {}),
        ("/update_weights_from_distributed", {}),
    ],
)
def test_the_cache_is_forgotten(fast: str, path: str, body: object) -> None:
    def cached() -> int:
        ask = {"text": f"{sum(path.encode())} forgets. " + LONG, "sampling_params": {"max_new_tokens": 1}}
        return int(post(fast, "/generate", ask)["meta_info"]["cached_tokens"])

    assert (cached(), cached() > 0) == (0, True)
    status, answer = call(fast, path, body)
    assert status == 200
    assert path == "/flush_cache" or json.loads(answer)["success"] is True
    assert cached() == 0


def test_information(fast: str) -> None:
    assert json.loads(call(fast, "/get_model_info")[1]) == json.loads(call(fast, "/model_info")[1])
    assert json.loads(call(fast, "/get_server_info")[1])["max_total_num_tokens"] == 524_288
    (model,) = json.loads(call(fast, "/v1/models")[1])["data"]
    assert (model["id"], model["max_model_len"]) == ("built-in", 131_072)
    assert call(fast, "/health_generate") == (200, b"")
    assert [call(fast, path, {})[0] for path in ("/start_profile", "/stop_profile")] == [200, 200]


def test_metrics_count_tokens() -> None:
    with engine_processes(1, "--speed", "0", "--model", "m") as (url,):
        for _ in range(2):
            post(
                url,
                "/generate",
                {"input_ids": list(range(100)), "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}},
            )
        metrics = call(url, "/metrics")[1].decode()
    for name, value in (
        ("prompt_tokens_total", 200),
        ("cached_tokens_total", 99),
        ("generation_tokens_total", 6),
        ("num_requests_total", 2),
        ("cache_hit_rate", 0.99),
        ("time_to_first_token_seconds_count", 2),
    ):
        assert f'sglang:{name}{{model_name="m"}} {float(value)}\n' in metrics


def test_engines_write_alike_unless_their_seeds_differ(fast: str) -> None:
    body = {"text": "Alike?", "sampling_params": {"max_new_tokens": 8}}
    with engine_processes(1, "--speed", "0", "--seed", "7") as (other,), engine_processes(1) as (same,):
        assert post(same, "/generate", body)["text"] == post(fast, "/generate", body)["text"]
        assert post(other, "/generate", body)["text"] != post(fast, "/generate", body)["text"]


def test_the_cost_model_is_kept_in_real_time() -> None:
    with engine_processes(1, "--decode-base-ms", "20", "--decode-ms-per-request", "0", "--speed", "2") as (url,):
        meta = post(url, "/generate", {"text": "time", "sampling_params": {"max_new_tokens": 51, "ignore_eos": True}})[
            "meta_info"
        ]
    assert 0.5 <= meta["e2e_latency"] < 1.0  # 51 passes of 20 ms at twice the speed


# -- the process ---------------------------------------------------------------------------------------------


def test_a_starting_engine_says_so() -> None:
    process, url = start_engine("--startup-delay", "0.4", "--speed", "0")
    try:
        assert call(url, "/health")[0] == 503
        assert call(url, "/generate", {"text": "a"})[0] == 503
        wait_until_healthy(url)
        assert call(url, "/generate", {"text": "a"})[0] == 200
    finally:
        assert end_engine(process) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_even_in_the_middle_of_a_stream(number: signal.Signals) -> None:
    process, url = start_engine()
    try:
        with endless(url), contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc)) as idle:
            idle.request("GET", "/health")
            idle.getresponse().read()
            os.kill(process.pid, number)
            assert process.wait(3) == 0
    finally:
        end_engine(process)


def test_a_taken_port_ends_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-m", "sglang_router.engine", "--port", port],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert port in ended.stderr


def test_bad_options_end_with_one_line() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sglang_router.engine", "--page-size", "0"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
