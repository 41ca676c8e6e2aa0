"""The tokens of a prompt: where they are known, what they say of the text, and that little of a long one is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.prompt_tokens import MOST_IDS, MOST_TEXT, MOST_TOKENS, Prompt, prompt_of


def letters(text: str) -> list[int]:
    """A tokenizer with one token for each character."""
    return [ord(letter) for letter in text]


def facts_of(path: str, **body: Any) -> Facts:
    return read(ENDPOINTS[path.encode()], json.dumps(body).encode(), most_text=1 << 30)


def known(facts: Facts, encode: Any = None) -> Prompt:
    prompt = prompt_of(facts, encode)
    assert prompt is not None
    return prompt


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", {"input_ids": [1, 15, 7]}), ("/v1/completions", {"model": "m", "prompt": [1, 15, 7]})],
)
def test_ids_are_read_as_they_are(path: str, body: dict[str, Any]) -> None:
    facts = facts_of(path, **body)
    prompt = known(facts)
    assert prompt.tokens == [1, 15, 7]
    assert (prompt.size, prompt.whole, prompt.model) == (len(facts.text), True, body.get("model", ""))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [[1, 2], [3]]}),
        ("/generate", {"input_ids": []}),
        ("/generate", {"input_ids": [1, 2], "image_data": ["http://x/a.png"]}),
        ("/generate", {"text": "a", "image_data": "http://x/a.png"}),
        ("/generate", {"text": ["a", "b"]}),
        ("/generate", {"text": ""}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": [1.5]}),
        ("/v1/completions", {"model": 7, "prompt": [1]}),
        ("/v1/completions", {"model": "m", "lora_path": ["a", "b"], "prompt": [1]}),
        ("/v1/completions", {"model": "m", "lora_id": "3", "prompt": [1]}),
        ("/v1/completions", {"model": "m", "cache_salt": "s" * 100, "prompt": [1]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/embeddings", {"input": [1, 2]}),
    ],
)
def test_where_tokens_are_not_known_there_are_none(path: str, body: dict[str, Any]) -> None:
    assert prompt_of(facts_of(path, **body), letters) is None


def test_a_text_needs_a_tokenizer() -> None:
    facts = facts_of("/generate", text='a"b\n')
    assert prompt_of(facts) is None
    prompt = known(facts, letters)
    assert prompt.tokens == letters('a"b\n')
    assert (prompt.size, prompt.whole) == (len(facts.text), True)


def test_names_come_from_the_namespace() -> None:
    prompt = known(facts_of("/generate", model="m", input_ids=[1], lora_path="lo\u00e9", cache_salt="s"))
    assert (prompt.model, prompt.adapter, prompt.salt) == ("m", "lo\u00e9", "s")


def test_of_many_ids_the_first_count() -> None:
    facts = facts_of("/generate", input_ids=[7] * (MOST_TOKENS + 5000))
    prompt = known(facts)
    assert len(prompt.tokens) == MOST_TOKENS
    assert not prompt.whole
    assert prompt.size == pytest.approx(MOST_TOKENS * 3, abs=3)


def test_of_a_long_list_the_beginning_is_read() -> None:
    facts = facts_of("/generate", input_ids=[10**17] * (MOST_IDS // 10))
    prompt = known(facts)
    assert prompt.tokens[-1] == 10**17
    assert not prompt.whole
    assert MOST_IDS - 30 < prompt.size <= MOST_IDS


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(0, 30), st.booleans())
def test_of_a_long_text_the_beginning_is_encoded_wherever_it_is_cut(piece: str, shift: int, ascii_only: bool) -> None:
    whole = "." * shift + piece * (MOST_TEXT // len(piece))
    body = json.dumps({"text": whole}, ensure_ascii=ascii_only).encode()
    facts = read(ENDPOINTS[b"/generate"], body)
    if len(facts.text) <= MOST_TEXT:
        assert known(facts, letters).tokens == letters(whole)
        return
    prompt = known(facts, letters)
    assert list(prompt.tokens) == letters(whole)[: len(prompt.tokens)]
    assert not prompt.whole
    assert MOST_TEXT * 0.9 < prompt.size <= MOST_TEXT
