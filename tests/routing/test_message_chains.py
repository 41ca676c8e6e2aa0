"""Conversations recognised by their messages: what joins two requests, what does not, and what it costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.message_chains import MessageChains, boundaries

CHAT = ENDPOINTS[b"/v1/chat/completions"]
RESPONSES = ENDPOINTS[b"/v1/responses"]


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


SYSTEM = say("system", "You are a coding agent. " * 50)


def chat(*messages: dict[str, Any], model: str = "m", comma: str = ", ", **fields: Any) -> Facts:
    body = json.dumps({"model": model, **fields, "messages": list(messages)}, separators=(comma, ": ")).encode()
    return read(CHAT, body)


def test_a_conversation_that_goes_on_is_one_session() -> None:
    chains = MessageChains()
    said = [SYSTEM, say("user", "a")]
    first = chains.session(chat(*said))
    assert first
    for turn in range(5):
        said += [say("assistant", f"answer {turn}"), say("user", f"more {turn}")]
        assert chains.session(chat(*said)) == first


def test_a_system_prompt_that_all_share_joins_nobody() -> None:
    chains = MessageChains()
    sessions = {chains.session(chat(SYSTEM, say("user", f"question {n}"))) for n in range(20)}
    assert len(sessions) == 20


def test_equal_requests_are_no_conversation_before_one_went_on() -> None:
    chains = MessageChains()
    question = (SYSTEM, say("user", "hi"))
    first = chains.session(chat(*question))
    assert first
    assert chains.session(chat(*question)) == b""
    longer = (*question, say("assistant", "hello"), say("user", "what is new?"))
    assert chains.session(chat(*longer)) == first
    assert chains.session(chat(*longer)) == first, "the same turn again, as after an error"


def test_branches_of_a_conversation_belong_to_it() -> None:
    chains = MessageChains()
    start = (SYSTEM, say("user", "a"))
    first = chains.session(chat(*start))
    for answer in ("x", "y"):
        assert chains.session(chat(*start, say("assistant", answer), say("user", answer))) == first


def test_another_model_is_another_conversation() -> None:
    chains = MessageChains()
    start = (SYSTEM, say("user", "a"))
    first = chains.session(chat(*start))
    assert chains.session(chat(*start, say("assistant", "x"), say("user", "y"), model="other")) not in (b"", first)


def test_calls_of_tools_and_their_results_are_parts_of_a_turn() -> None:
    chains = MessageChains()
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": {"type": "object"}}} for n in range(40)]
    said = [SYSTEM, say("user", "a")]
    first = chains.session(chat(*said, tools=tools))
    calls = [{"id": f"c{n}", "function": {"name": "f1", "arguments": json.dumps({"path": "},{"})}} for n in range(8)]
    said += [{"role": "assistant", "tool_calls": calls}]
    said += [{"role": "tool", "tool_call_id": f"c{n}", "content": '},{"role": "user"'} for n in range(8)]
    assert chains.session(chat(*said, tools=tools)) == first


@pytest.mark.parametrize("comma", [",", ", ", " ,\n  "])
def test_white_space_between_messages_does_not_matter_as_long_as_it_stays(comma: str) -> None:
    chains = MessageChains()
    start = (SYSTEM, say("user", "a"))
    first = chains.session(chat(*start, comma=comma))
    assert first
    assert chains.session(chat(*start, say("assistant", "x"), say("user", "y"), comma=comma)) == first


def test_items_of_responses_are_messages_and_a_plain_prompt_is_none() -> None:
    chains = MessageChains()
    items = [{"type": "message", **say("user", "a")}]
    first = chains.session(read(RESPONSES, json.dumps({"input": items}).encode()))
    items += [{"type": "reasoning", "summary": []}, {"type": "message", **say("user", "b")}]
    assert chains.session(read(RESPONSES, json.dumps({"input": items}).encode())) == first != b""
    assert chains.session(read(RESPONSES, b'{"input":"hello"}')) == b""
    assert chains.session(read(ENDPOINTS[b"/v1/completions"], b'{"prompt":"hello"}')) == b""
    assert chains.session(read(CHAT, b'{"messages":[]}')) == b""


def test_what_is_remembered_is_bounded_and_the_least_used_goes_first() -> None:
    chains = MessageChains(most=3)
    starts = [(SYSTEM, say("user", f"q{n}")) for n in range(4)]
    firsts = [chains.session(chat(*start)) for start in starts]
    assert repr(chains) == "<MessageChains 3 ends>"
    more = (say("assistant", "x"), say("user", "y"))
    assert chains.session(chat(*starts[3], *more)) == firsts[3]
    assert chains.session(chat(*starts[0], *more)) != firsts[0], "forgotten"


def test_the_work_is_bounded() -> None:
    text = b"[" + b",".join(b'{"role":"user","content":[{"a":"b"},{"c":"d"}]}' for _ in range(20_000))
    assert len(boundaries(text)[0]) == 64
    assert boundaries(b'[{"a":' + b'{"x":1};' * 2_000 + b"}") == ([6 + 16_000 + 1], True)


def test_a_conversation_that_is_longer_than_what_counts_of_a_text_stays_what_it_is() -> None:
    chains = MessageChains()
    said = [SYSTEM, say("user", "a"), say("user", "b")]
    first = chains.session(chat(*said))
    for turn in range(3):
        said += [say("assistant", "x" * 3000), say("user", f"more {turn}")]
        body = json.dumps({"model": "m", "messages": said}).encode()
        assert chains.session(read(CHAT, body, most_text=4000)) == first
    assert chains.session(read(CHAT, b'{"messages":[{"content":"%b"}]}' % (b"y" * 9000), most_text=4000)) == b""


@given(st.lists(st.text(max_size=40), min_size=1, max_size=12), st.integers(1, 12))
def test_whatever_is_said_a_longer_conversation_continues_the_shorter(texts: list[str], length: int) -> None:
    messages = [say(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    chains = MessageChains()
    shorter = chains.session(chat(*messages[:length]))
    assert shorter
    if length < len(messages):
        assert chains.session(chat(*messages)) == shorter
