"""The `openai` client library against the commands: router and engines are processes, nothing is stubbed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from engines import end_engine, engine_processes, start_engine, wait_until_healthy
from routers import RouterProcess, ask, router_process

QUESTION: Any = [{"role": "user", "content": "Who keeps the keys of the harbour?"}]
ENDLESS: Any = {"ignore_eos": True}
"""How to ask the built-in engine, and SGLang, for exactly max_tokens tokens."""


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    # Room for the prefixes of four groups of GROUPS, not for all seven.
    with engine_processes(2, "--speed", "0", "--capacity-tokens", "2000", "--context-length", "1500") as urls:
        yield urls


@pytest.fixture(scope="module")
def router(urls: list[str]) -> Iterator[RouterProcess]:
    with router_process(urls, "--max-payload-size", "100000") as router:
        yield router


@pytest.fixture(scope="module")
def client(router: RouterProcess) -> Iterator[OpenAI]:
    with client_of(router.url) as client:
        yield client


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30)


# -- the same answers as without the router ----------------------------------------------------------------


def test_chat_is_the_engines_own_streaming_or_not(client: OpenAI, urls: list[str]) -> None:
    def whole(one: OpenAI) -> Any:
        return one.chat.completions.create(model="m", messages=QUESTION, max_tokens=40, extra_body=ENDLESS)

    stream = client.chat.completions.create(
        model="m",
        messages=QUESTION,
        max_tokens=40,
        extra_body=ENDLESS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    with client_of(urls[0]) as direct:
        expected = whole(direct)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert text == whole(client).choices[0].message.content == expected.choices[0].message.content
    assert len(chunks) > 40  # one chunk per token, not one for all
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.usage.completion_tokens == 40


def test_completions_streaming_or_not(client: OpenAI) -> None:
    whole = client.completions.create(model="m", prompt="Once upon", max_tokens=20, extra_body=ENDLESS)
    stream = client.completions.create(model="m", prompt="Once upon", max_tokens=20, extra_body=ENDLESS, stream=True)

    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20


def test_responses_streaming_or_not(client: OpenAI) -> None:
    whole = client.responses.create(model="m", input="Once upon", max_output_tokens=20, extra_body=ENDLESS)
    events = list(
        client.responses.create(model="m", input="Once upon", max_output_tokens=20, extra_body=ENDLESS, stream=True)
    )

    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text != ""
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")  # the limit was 20 tokens


def test_embeddings_and_models(client: OpenAI) -> None:
    answer = client.embeddings.create(model="m", input=["red sky", "red sky", "blue sea"])
    red, again, blue = (item.embedding for item in answer.data)

    assert red == again != blue
    assert len(red) == 64
    assert [model.id for model in client.models.list()] == ["built-in"]


def test_many_streams_at_once(router: RouterProcess, urls: list[str]) -> None:
    """Each gets its own complete answer; no load remains."""

    async def one(client: AsyncOpenAI, n: int) -> tuple[str, int]:
        messages: Any = [{"role": "user", "content": f"{n} times the same"}]
        stream = await client.chat.completions.create(
            model="m", messages=messages, max_tokens=10 + n, extra_body=ENDLESS, stream=True
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, len(chunks)

    async def run(url: str) -> list[tuple[str, int]]:
        async with AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30) as client:
            return await asyncio.gather(*(one(client, n) for n in range(48)))

    through, direct = asyncio.run(run(router.url)), asyncio.run(run(urls[0]))

    assert [text for text, _ in through] == [text for text, _ in direct]
    assert [count for _, count in through] == [10 + n + 2 for n in range(48)]  # role, tokens, end
    router.until(lambda: all(worker["load"] == 0 for worker in router.workers().values()))


# -- what the engines report as cached ---------------------------------------------------------------------

GROUPS = [f"{place} " * 5 + "The rules of this place: " + f"ask the {place} keeper first. " * 70 for place in (
    "harbour", "bakery", "library", "museum", "railway", "theatre", "airport",
)]  # fmt: skip
ROUNDS = 6


def chats(url: str) -> tuple[float, list[str]]:
    """Send chats with shared prefixes; return the share of prompt tokens that were cached, and the requests' ids."""
    prompt, cached, ids = 0, 0, []
    with client_of(url) as client:
        for n, beginning in itertools.product(range(ROUNDS), GROUPS):
            messages: Any = [
                {"role": "system", "content": beginning},
                {"role": "user", "content": f"{n}?"},
            ]
            raw = client.chat.completions.with_raw_response.create(model="m", messages=messages, max_tokens=1)
            ids.append(raw.headers["x-request-id"])
            usage = raw.parse().usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            prompt += usage.prompt_tokens
            cached += usage.prompt_tokens_details.cached_tokens or 0
    return cached / prompt, ids


def workers_of_groups(router: RouterProcess, ids: list[str]) -> list[set[str]]:
    """Return the workers that served each group, by the access log."""
    router.until(lambda: ids[-1] in router.log())
    worker = {line["id"]: line["worker"] for line in router.records() if line.get("message") == "request"}
    return [{worker[one] for one in ids[group :: len(GROUPS)]} for group in range(len(GROUPS))]


def test_cache_aware_keeps_groups_together_and_the_engines_say_so(urls: list[str]) -> None:
    share, places = {}, {}
    for policy in ("round_robin", "cache_aware"):
        with router_process(urls, "--policy", policy, "--log-format", "json") as router:
            assert router.post("/flush_cache").status == 200
            share[policy], ids = chats(router.url)
            places[policy] = workers_of_groups(router, ids)

    told = f"cached share as the engines report it: {share}"
    assert share["cache_aware"] > 0.75, told
    assert share["round_robin"] < 0.25, told
    assert [len(place) for place in places["cache_aware"]] == [1] * len(GROUPS)
    assert [len(place) for place in places["round_robin"]] == [2] * len(GROUPS)
    assert set.union(*places["cache_aware"]) == set(urls)  # not all on one worker


def test_a_repeated_prefix_is_cached_more_with_each_turn(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "You keep the log of the lighthouse. " * 8}]
    cached = []
    for turn in range(4):
        messages.append({"role": "user", "content": f"What happened in night {turn}?"})
        answer = client.chat.completions.create(model="m", messages=messages, max_tokens=12, extra_body=ENDLESS)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)

    assert cached == sorted(set(cached)), cached
    assert cached[1] > 50


# -- what goes wrong ---------------------------------------------------------------------------------------


def test_errors_become_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad_json:
        client.post("/chat/completions", cast_to=object, body=["no", "object"])
    with pytest.raises(openai.NotFoundError) as nowhere:
        client.post("/no/such/thing", cast_to=object, body={})
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="m", prompt="x" * 100_001)
    with pytest.raises(openai.BadRequestError) as engines_own:
        client.completions.create(model="m", prompt="many words " * 2000, max_tokens=5)

    assert (bad_json.value.code, bad_json.value.type) == ("json_parse_error", "invalid_request_error")
    assert nowhere.value.code == "not_found"
    assert (large.value.status_code, large.value.code) == (413, "payload_too_large")
    assert "x-smg-error-code" not in engines_own.value.response.headers  # passed on, not the router's
    assert "context" in engines_own.value.message
    for error in (bad_json, nowhere, large, engines_own):
        assert error.value.request_id  # from x-request-id: the id to search for in the log


def test_no_workers_is_a_status_error_with_retry_after() -> None:
    with router_process([]) as router, client_of(router.url) as client:
        with pytest.raises(openai.InternalServerError) as none:
            client.chat.completions.create(model="m", messages=QUESTION)
        assert (none.value.status_code, none.value.code) == (503, "no_workers")
        assert int(none.value.response.headers["retry-after"]) > 0


def test_the_clients_id_comes_back_and_reaches_the_log(client: OpenAI, router: RouterProcess) -> None:
    headers = {"x-request-id": "ticket-4711"}
    raw = client.completions.with_raw_response.create(model="m", prompt="x", extra_headers=headers)

    assert raw.headers["x-request-id"] == "ticket-4711"
    router.until(lambda: " id=ticket-4711 " in router.log())


def test_a_killed_engine_is_an_error_in_the_stream_and_not_its_end() -> None:
    process, url = start_engine()
    try:
        wait_until_healthy(url)
        with router_process([url]) as router, client_of(router.url) as client:
            stream = client.chat.completions.create(
                model="m", messages=QUESTION, max_tokens=5000, extra_body=ENDLESS, stream=True
            )
            for _ in range(5):
                assert next(stream).choices
            process.kill()
            with pytest.raises(openai.APIError) as cut:
                list(stream)
            assert "stream_broken" in (cut.value.code or "")
            router.until(lambda: router.worker(url)["load"] == 0)
            assert router.samples().total("sgl_router_worker_outcomes_total", worker=url, outcome="cut") == 1
    finally:
        end_engine(process)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_worker(streaming: bool) -> None:
    """The request would take ten minutes; the engine notices that the client left, too."""
    with engine_processes(1) as (url,), router_process([url]) as router:

        def running() -> tuple[int, int]:
            ranks = ask(url, "GET", "/get_load").json()
            return router.worker(url)["load"], ranks[0]["num_reqs"]

        with client_of(router.url) as client:
            if streaming:
                stream = client.chat.completions.create(
                    model="m", messages=QUESTION, max_tokens=100_000, extra_body=ENDLESS, stream=True
                )
                next(stream)
                assert running() == (1, 1)
                stream.close()
            else:
                with pytest.raises(openai.APITimeoutError):  # the library closes the connection then
                    client.with_options(timeout=0.5).completions.create(
                        model="m", prompt="x", max_tokens=100_000, extra_body=ENDLESS
                    )
        router.until(lambda: running() == (0, 0), within=5.0)
        assert router.samples().total("sgl_router_client_disconnects_total") == 1
