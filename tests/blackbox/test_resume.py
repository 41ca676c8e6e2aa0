"""Engines are killed during streams: without --resume-streams these break, with it no client notices.

Thirty clients read at once, ten of each endpoint. Whenever all of them have read a little more, the next of four
engines gets SIGKILL, until one is left. What each client has read is compared with the same request at an engine that
was not disturbed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from openai import OpenAI

from engines import end_engine, engine_processes, start_engine, wait_until_healthy
from llama import llama_processes
from routers import WITHIN, RouterProcess, router_process

STREAMS = 30
ENGINES = 4
FLAGS = ("--policy", "round_robin", "--retry-budget-min-per-second", "20", "--health-check-interval-secs", "0.5")
Body = dict[str, Any]


class Heard(NamedTuple):
    """What a client has read. `whole`: to a clean end, with no error."""

    text: str
    usage: tuple[int, int, int]
    ids: frozenset[str]
    reason: str
    whole: bool


def request(number: int) -> tuple[str, Body]:
    """Return path and body of one client; every other answer ends by itself, the rest at its limit."""
    prompt = f"Client {number} asks for a long story."
    limits: Body = {"temperature": 0, "ignore_eos": bool(number % 2)}
    stream: Body = {"stream": True, "stream_options": {"include_usage": True}}
    limit = 90 + number
    if number % 3 == 0:
        return "/generate", {"text": prompt, "sampling_params": limits | {"max_new_tokens": limit}, "stream": True}
    if number % 3 == 1:
        return "/v1/completions", {"prompt": prompt, "max_tokens": limit} | limits | stream
    messages = [{"role": "user", "content": prompt}]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": limit} | limits | stream


class Course:
    """How many events each client has read; `everybody_is_at(events)` waits for the slowest."""

    def __init__(self, clients: int) -> None:
        self._events = [0] * clients
        self._done = [False] * clients
        self._moved = threading.Condition()

    def heard(self, client: int, done: bool = False) -> None:
        with self._moved:
            self._events[client] += 1
            self._done[client] = done
            self._moved.notify_all()

    def everybody_is_at(self, events: int) -> None:
        with self._moved:
            assert self._moved.wait_for(
                lambda: all(done or got >= events for got, done in zip(self._events, self._done, strict=True)), WITHIN
            )


def hear(url: str, number: int, course: Course | None = None) -> Heard:
    """Send one client's request, and read the answer to its end."""
    path, body = request(number)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WITHIN)
    events: list[Any] = []
    clean = False
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            for line in answer:
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
                    if course is not None:
                        course.heard(number)
                clean = line == b"data: [DONE]\n" or (clean and line == b"\n")
    if course is not None:
        course.heard(number, done=True)
    return understood(events, clean)


def understood(events: list[Any], clean: bool) -> Heard:
    told = [event for event in events if "error" not in event]
    whole = clean and len(told) == len(events)
    if "meta_info" in told[0]:
        last = told[-1]
        meta = last["meta_info"]
        ids = frozenset(event["meta_info"]["id"] for event in told)
        assert len(last["output_ids"]) == meta["completion_tokens"]
        counts = (meta["prompt_tokens"], meta["completion_tokens"], meta["prompt_tokens"] + meta["completion_tokens"])
        return Heard(last["text"], counts, ids, (meta["finish_reason"] or {}).get("type", ""), whole)
    choices = [choice for event in told for choice in event["choices"]]
    usage = told[-1].get("usage") or dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), -1)
    return Heard(
        "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices),
        (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]),
        frozenset(event["id"] for event in told),
        "".join(choice["finish_reason"] or "" for choice in choices),
        whole,
    )


@pytest.fixture(scope="module")
def undisturbed() -> list[Heard]:
    with engine_processes(1, "--speed", "0") as (url,):
        return [hear(url, number) for number in range(STREAMS)]


@contextlib.contextmanager
def doomed(count: int) -> Iterator[tuple[list[str], list[Any]]]:
    """Yield engines that may be killed: their URLs and processes."""
    started = [start_engine() for _ in range(count)]
    try:
        for _, url in started:
            wait_until_healthy(url)
        yield [url for _, url in started], [process for process, _ in started]
    finally:
        for process, _ in started:
            end_engine(process)


def all_are_written(router: RouterProcess, dead: list[str]) -> bool:
    """Return whether a worker that lives writes each stream.

    A stream that loses a second worker before that one has written anything is not given to a third.
    """
    rows = router.workers()
    return not any(row["waiting"] for row in rows.values()) and not any(rows[url]["load"] for url in dead)


def disturbed(router: RouterProcess, urls: list[str], processes: list[Any], kills: int) -> list[Heard]:
    """Run all clients at once, while engines are killed one after the other."""
    course = Course(STREAMS)
    with ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(hear, router.url, number, course) for number in range(STREAMS)]
        for kill in range(kills):
            course.everybody_is_at(4 + 6 * kill)  # of about a hundred: on a busy machine some clients are far ahead
            router.until(partial(all_are_written, router, urls[:kill]))
            processes[kill].kill()
        return [client.result() for client in clients]


def test_without_the_option_streams_break(undisturbed: list[Heard]) -> None:
    with doomed(ENGINES) as (urls, processes), router_process(urls, *FLAGS) as router:
        heard = disturbed(router, urls, processes, 1)
        broken = [one for one in heard if not one.whole]
        counted = router.samples()
    assert broken
    assert counted.total("sgl_router_request_errors_total", error_type="stream_broken") == len(broken)
    assert counted.total("sgl_router_resumed_streams_total") == 0


def test_with_it_every_stream_is_what_one_worker_would_have_written(undisturbed: list[Heard]) -> None:
    with doomed(ENGINES) as (urls, processes), router_process(urls, *FLAGS, "--resume-streams") as router:
        heard = disturbed(router, urls, processes, ENGINES - 1)
        counted = router.samples()
    assert [one.whole for one in heard] == [True] * STREAMS, router.log()
    assert all(len(one.ids) == 1 for one in heard)
    assert [one._replace(ids=frozenset()) for one in heard] == [one._replace(ids=frozenset()) for one in undisturbed]
    resumed = counted.total("sgl_router_resumed_streams_total")
    assert resumed >= 10
    assert len(counted.by("sgl_router_resumed_streams_total", "route")) == 3
    assert counted.total("sgl_router_resume_refused_total") == 0
    assert counted.total("sgl_router_request_errors_total") == 0
    lines = [line for line in router.log().splitlines() if " resumed=" in line]
    assert len(lines) == resumed


def test_what_must_not_be_continued_ends_with_an_error_event() -> None:
    with doomed(2) as (urls, processes), router_process(urls, *FLAGS, "--resume-streams") as router:
        body = {"messages": [{"role": "user", "content": "?"}], "stream": True, "ignore_eos": True, "max_tokens": 2000}
        connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: {")
            for process in processes:
                process.kill()
            with pytest.raises(http.client.IncompleteRead) as cut:
                answer.read()
        *_, last = cut.value.partial.strip().splitlines()
        assert json.loads(last[6:])["error"]["code"] == "stream_broken"
        router.until(lambda: router.samples().total("sgl_router_resume_refused_total") == 1)
        assert router.samples().by("sgl_router_resume_refused_total", "reason") == {"sampling": 1}


def test_llama_cpp_goes_on_with_a_chat() -> None:
    """The test asks, as the router would, for the second half of an answer: the engine is too fast to be killed."""
    with llama_processes(1) as (url,), OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:

        def ask(more: list[dict[str, str]], limit: int, **extra: Any) -> tuple[str, int]:
            messages: Any = [{"role": "user", "content": "the rain in the"}, *more]
            stream = client.chat.completions.create(
                model="tiny",
                messages=messages,
                max_tokens=limit,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            )
            chunks = list(stream)
            assert chunks[-1].usage is not None
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            return text, chunks[-1].usage.total_tokens

        whole, total = ask([], 24)
        first, _ = ask([], 11)
        said = [{"role": "assistant", "content": first}]
        rest, same = ask(said, 13, continue_final_message=True, add_generation_prompt=False)
    assert first + rest == whole
    assert same == total
