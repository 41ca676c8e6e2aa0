"""llama.cpp's real server as this package starts it: its answers, the cached tokens it reports, how it ends.

The last part tests how it treats kept-alive connections, because the router depends on that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import tiny_gguf
from engines import end_engine, start_engine, wait_until_healthy
from llama import llama_flags, llama_processes

END_OF_CHUNKS = b"\r\n0\r\n\r\n"
PROMPT = "the one prefix that all of these requests share " * 8


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with llama_processes(1) as urls:
        yield urls[0]


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.make(tmp_path_factory.mktemp("model") / "small.gguf")


def cached(usage: Any) -> int:
    return int(usage.prompt_tokens_details.cached_tokens)


# -- answers ---------------------------------------------------------------------------------------------


def test_a_repeated_prompt_is_reported_as_cached(client: OpenAI) -> None:
    def ask() -> Any:
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0)

    first, second = ask(), ask()

    assert cached(first.usage) == 0
    assert cached(second.usage) == second.usage.prompt_tokens - 1  # one token is always computed again
    assert first.choices[0].text == second.choices[0].text


def test_a_chat_streams_and_counts_cached_tokens_in_its_last_chunk(client: OpenAI) -> None:
    def ask(question: str) -> tuple[str, Any]:
        messages: Any = [{"role": "system", "content": PROMPT[::-1]}, {"role": "user", "content": question}]
        text, usage = "", None
        stream = client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        return text, usage

    (text, first), (_, second) = ask("what?"), ask("and why?")

    assert text.isprintable()
    assert len(text) >= 6
    assert first.completion_tokens == 6
    assert cached(first) < 50
    assert second.prompt_tokens - 30 < cached(second) < second.prompt_tokens  # all but the question


def test_the_model_is_named_after_its_file(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


# -- its end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_generates(model: Path, number: signal.Signals) -> None:
    process, url = start_engine(*llama_flags(model))
    try:
        wait_until_healthy(url)
        body = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with connect(url) as sock:
            sock.sendall(post("/v1/completions", body))
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")  # it is generating now
            began = time.monotonic()
            process.send_signal(number)
            assert process.wait(5) == 0
            assert time.monotonic() - began < 2
    finally:
        end_engine(process)


# -- mistakes of the user: one line, status 2 ------------------------------------------------------------


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_router.engine", "--backend", "llamacpp", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    done = run("--port", "0", "--model-path", str(tmp_path / "none.gguf"))

    assert done.returncode == 2
    assert done.stderr == f"error: cannot read the model {tmp_path}/none.gguf: No such file or directory\n"


def test_another_kind_of_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "note.gguf").write_text("Dear model, ...")

    done = run("--port", "0", "--model-path", str(tmp_path / "note.gguf"))

    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/note.gguf is not a GGUF file (it does not begin with 'GGUF')\n"


def test_a_truncated_model_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(model.read_bytes()[: model.stat().st_size // 2])

    done = run("--port", "0", "--model-path", str(tmp_path / "half.gguf"))

    assert done.returncode == 2
    assert done.stderr.startswith("error: llama.cpp could not load")
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_one_line(url: str, model: Path) -> None:
    port = url.rpartition(":")[2]

    done = run("--port", port, "--model-path", str(model))

    assert done.returncode == 2
    assert done.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_without_the_library_it_says_what_to_install(model: Path, tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ModuleNotFoundError('No module named xllamacpp')")
    command = [sys.executable, "-m", "sglang_router.engine", "--backend", "llamacpp"]

    done = subprocess.run(
        [*command, "--port", "0", "--model-path", str(model)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.returncode == 2
    assert done.stderr.endswith("pip install xllamacpp\n")
    assert done.stderr.count("\n") == 1


# -- its kept-alive connections --------------------------------------------------------------------------


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def streamed(sock: socket.socket) -> bytes:
    """Send a streamed request; return its answer up to the last chunk, and not a byte more."""
    sock.sendall(post("/v1/completions", {"prompt": "x", "max_tokens": 2, "stream": True}))
    answer = b""
    while not answer.endswith(END_OF_CHUNKS):
        answer += sock.recv(65536)
    return answer


def test_it_promises_keep_alive_after_a_stream_and_closes_at_once(url: str) -> None:
    """The head promises to keep the connection for 5 s and 100 requests, but the FIN follows the last chunk."""
    with connect(url) as sock:
        head = streamed(sock).partition(b"\r\n\r\n")[0].lower()
        assert b"keep-alive: timeout=5, max=100" in head
        assert b"connection: close" not in head
        sock.settimeout(0.5)  # far below the 5 s it promised
        assert sock.recv(1) == b""


def test_a_request_on_that_connection_is_accepted_by_the_system_and_never_answered(url: str) -> None:
    with connect(url) as sock:
        streamed(sock)
        sock.sendall(post("/v1/completions", {"prompt": "x", "max_tokens": 1}))  # no error here: half-closed
        with contextlib.suppress(ConnectionResetError):  # the same end, seen a moment later
            assert sock.recv(1) == b""


def test_after_a_plain_answer_the_connection_lives(url: str) -> None:
    with connect(url) as sock:
        for _ in range(3):
            sock.sendall(post("/v1/completions", {"prompt": "x", "max_tokens": 1}))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_idle_connections_do_not_hold_up_others(url: str) -> None:
    """A pool of idle connections must not use up its threads, or the router would see it as unhealthy."""
    pool = [connect(url) for _ in range(64)]
    try:
        wait_until_healthy(url, within=3.0)
    finally:
        for sock in pool:
            sock.close()
