"""Another worker continues a stream: wherever it breaks, the client gets what one worker would have sent."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.resume.continuation import GENERATIONS, REASONS, ResumeRules, go_on, refusal
from sglang_router.routing.endpoints import ENDPOINTS
from token_streams import STYLES, TOKENS, Style, answer, ask, seen

RULES = ResumeRules()
each_style = pytest.mark.parametrize("style", STYLES, ids=str)


def broken(style: Style, body: bytes, cuts: Sequence[int]) -> list[bytes]:
    """Return what the client gets when each leg but the last breaks after so many events."""
    generation = GENERATIONS[style.endpoint](1 << 20)
    present, client = body, list[bytes]()
    for leg, cut in enumerate([*cuts, 999]):
        events = answer(style, present, leg)[:cut]
        sent = [ours for event in events if (ours := generation.rewrite(event) if leg else event) is not None]
        generation.read(sent)
        client += sent
        if cut == 999:
            break
        following = go_on(style.row, body, generation)
        assert not following.refused
        client += following.events
        if not following.body:
            break
        present = following.body
        generation.follow()
    return client


def alike(style: Style, body: bytes, cuts: Sequence[int]) -> None:
    assert refusal(style.row, body, RULES) == ""
    whole = seen(style, answer(style, body, 0))
    ours = seen(style, broken(style, body, cuts))
    if 0 in cuts:  # the first events then come from another leg
        whole, ours = whole._replace(ids=set()), ours._replace(ids={*list(ours.ids)[1:]})
        if style.endpoint == "generate":
            assert whole.usage is not None
            assert ours.usage is not None
            whole, ours = whole._replace(usage=whole.usage[:2]), ours._replace(usage=ours.usage[:2])  # type: ignore[arg-type]
    assert ours == whole


@each_style
@pytest.mark.parametrize("limit", [1, 4, len(TOKENS), len(TOKENS) + 1, 50])
@pytest.mark.parametrize("usage", [True, False])
def test_a_break_behind_each_event(style: Style, limit: int, usage: bool) -> None:
    body = ask(style, limit, usage)
    for cut in range(len(answer(style, body, 0)) + 1):
        alike(style, body, [cut])


@given(st.sampled_from(STYLES), st.integers(1, 12), st.lists(st.integers(0, 8), max_size=5))
def test_several_breaks(style: Style, limit: int, cuts: list[int]) -> None:
    alike(style, ask(style, limit), cuts)


def test_a_chat_without_a_limit_stays_without() -> None:
    style = Style("chat")
    body = ask(style, None)
    alike(style, body, [4, 2])
    generation = GENERATIONS["chat"](99)
    generation.read(answer(style, body, 0)[:3])
    assert b"max_" not in go_on(style.row, body, generation).body


# -- the body --------------------------------------------------------------------------------------------------------


def test_what_is_not_concerned_stays_byte_for_byte() -> None:
    body = b'{"x" : [1.50,  1e3], "prompt":"h\\u00e9\\/", "max_tokens":9, "min_tokens":4, "temperature":0, "k":[]}'
    generation = GENERATIONS["completions"](99)
    generation.read([b'{"choices":[{"text":"\\" \xc3\xa4"}]}'])
    following = go_on(ENDPOINTS[b"/v1/completions"], body, generation)
    wanted = (
        b'{"x":[1.50,  1e3],"prompt":"h\\u00e9\\/\\" \xc3\xa4","max_tokens":8,"min_tokens":3,"temperature":0,"k":[]}'
    )
    assert following.body == wanted


def test_a_message_that_the_client_had_begun_is_gone_on_with() -> None:
    style = Style("chat")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "I"}]
    body = ask(style, messages=messages, continue_final_message=True, add_generation_prompt=False)
    generation = GENERATIONS["chat"](99)
    generation.read([b'{"choices":[{"delta":{"content":" am"}}]}'])
    sent = json.loads(go_on(style.row, body, generation).body)
    assert sent["messages"] == [*messages[:1], {"role": "assistant", "content": "I am"}]
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)


def test_generate_without_a_limit_has_sglang_s() -> None:
    generation = GENERATIONS["generate"](99)
    generation.read(
        [b'{"text":"%b","meta_info":{"id":"1","completion_tokens":%d}}' % one for one in ((b"a", 1), (b"ab", 28))]
    )
    sent = go_on(ENDPOINTS[b"/generate"], b'{"text":"x","sampling_params":{"temperature":0}}', generation).body
    assert json.loads(sent)["sampling_params"] == {"temperature": 0, "max_new_tokens": 100}


def test_what_an_engine_holds_back_is_written_again() -> None:
    """Half a character: the count increases, and the text does not."""
    generation = GENERATIONS["generate"](99)
    event = '{"text":"%s","output_ids":%s,"meta_info":{"id":"1","completion_tokens":%d}}'
    told = [("a", [7], 1), ("ab", [7, 8], 2), ("ab", [7, 8, 9], 3), ("ab", [7, 8, 9, 10], 4)]
    generation.read([(event % one).encode() for one in told[:3]])
    generation.read([(event % one).encode() for one in told[3:]])
    assert (generation.text, generation.tokens, generation.ids) == ("ab", 2, [7, 8])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "more", "reason"),
    [
        ("chat", {"n": 2}, "choices"),
        ("chat", {"n": 1}, ""),
        ("chat", {"temperature": 0.7}, "sampling"),
        ("chat", {"temperature": None}, "sampling"),
        ("chat", {"frequency_penalty": 0.5}, "sampling"),
        ("chat", {"frequency_penalty": 0, "repetition_penalty": 1.0}, ""),
        ("chat", {"logprobs": True}, "logprobs"),
        ("chat", {"logprobs": False}, ""),
        ("chat", {"response_format": {"type": "json_object"}}, "structured"),
        ("chat", {"response_format": {"type": "text"}}, ""),
        ("chat", {"guided_json": {"type": "object"}}, "structured"),
        ("chat", {"tools": [{"type": "function"}]}, ""),
        ("chat", {"tools": [{"type": "function"}], "tool_choice": "required"}, "structured"),
        ("chat", {"tools": [{"type": "function"}], "tool_choice": "none"}, ""),
        ("chat", {"add_generation_prompt": False}, "prompt"),
        ("completions", {"logprobs": 0}, "logprobs"),
        ("completions", {"echo": True}, "prompt"),
        ("completions", {"suffix": "x"}, "prompt"),
        ("completions", {"best_of": 3}, "choices"),
        ("completions", {"prompt": ["a", "b"]}, "choices"),
        ("completions", {"prompt": [[1], [2]]}, "choices"),
        ("completions", {"max_tokens": None}, "no_limit"),
        ("completions", {"max_tokens": "many"}, "unreadable"),
        ("generate", {"text": ["a", "b"]}, "choices"),
        ("generate", {"return_logprob": True}, "logprobs"),
        ("generate", {"input_embeds": [[0.5]]}, "prompt"),
        ("generate", {"text": None}, "prompt"),
        ("generate", {"sampling_params": {"temperature": 0, "regex": "a+"}}, "structured"),
        ("generate", {"sampling_params": {"temperature": 0, "n": 2}}, "choices"),
        ("generate", {"sampling_params": None}, "sampling"),
        ("generate", {"sampling_params": [{"temperature": 0}]}, "unreadable"),
    ],
)
def test_requests(endpoint: str, more: dict[str, Any], reason: str) -> None:
    style = Style(endpoint)
    assert refusal(style.row, ask(style, **more), RULES) == reason
    if reason == "sampling":
        assert refusal(style.row, ask(style, **more), ResumeRules(any_sampling=True)) == ""


def test_other_endpoints() -> None:
    assert refusal(ENDPOINTS[b"/v1/messages"], b"{}", RULES) == "endpoint"


def delta(**fields: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": fields}]}).encode()


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (delta(content="a", tool_calls=[{"index": 0}]), "tool_call"),
        (delta(reasoning_content="Hm"), "other_content"),
        (delta(content="a", tool_calls=None, refusal=None, reasoning_content=""), ""),
        (b'{"choices":[{"index":1,"delta":{"content":"a"}}]}', "choices"),
        (b'{"choices":[{"delta":{"content":"a"},"logprobs":{"content":[]}}]}', "logprobs"),
        (delta(content="x" * 100), "too_long"),
        (delta(content="more STO"), "stop_begun"),
        (b"<html>", "unreadable"),
        (b'{"choices":[{"delta":{"content":7}}]}', "unreadable"),
        (b'{"choices":[{"delta":{"content":"\xff"}}]}', "unreadable"),
    ],
)
def test_streams(event: bytes, reason: str) -> None:
    style = Style("chat")
    generation = GENERATIONS["chat"](99)
    generation.read([event])
    assert go_on(style.row, ask(style, stop=["STOP", "x"]), generation).refused == reason
    assert reason in {"", *REASONS}


def test_a_prompt_of_ids_needs_ids() -> None:
    style = Style("completions", ids=True)
    generation = GENERATIONS["completions"](99)
    generation.read([b'{"choices":[{"text":"a"}]}'])
    assert go_on(style.row, ask(style), generation).refused == "no_token_ids"


def test_who_ends_two_workers_without_a_token_gets_no_third() -> None:
    style = Style("chat")
    generation = GENERATIONS["chat"](99)
    assert [go_on(style.row, ask(style), generation, legs).refused for legs in range(3)] == ["", "", "no_progress"]


def test_the_page_tells_every_reason() -> None:
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| .* \|$", page, re.MULTILINE)
    assert sorted(told) == sorted(REASONS)
