"""The tokenizer keeps prefixes, and the writer is a function of the tokens before it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.engine.kv import pack
from sglang_router.engine.text import AnswerWriter, Tokenizer, content_text, render_chat, token_id

prompts = st.text(max_size=80) | st.lists(st.sampled_from(["The tree", ".", ", ", "\n", " ", "<|im_end|>"])).map(
    "".join
)


def written(prompt: str, limit: int = 60, **how: object) -> AnswerWriter:
    tokens = Tokenizer().encode(prompt)
    writer = AnswerWriter(pack(tokens), tokens[-2:], limit, **how)  # type: ignore[arg-type]
    while writer.reason is None:
        writer.next()
    return writer


@given(prompts)
def test_tokens_turn_back_into_their_text(text: str) -> None:
    tokenizer = Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(prompts, prompts)
def test_more_text_changes_at_most_the_last_tokens(text: str, more: str) -> None:
    tokenizer = Tokenizer()
    before, after = tokenizer.encode(text), tokenizer.encode(text + more)
    kept = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    assert kept >= len(before) - 6  # the last piece is split anew: a word, some blanks, at most a <|special|> one


@settings(max_examples=50)
@given(prompts.filter(bool), st.integers(1, 40))
def test_half_an_answer_is_continued_with_the_other_half(prompt: str, half: int) -> None:
    whole = written(prompt, 50, ignore_eos=True)
    first = written(prompt, half, ignore_eos=True)
    assert Tokenizer().encode(prompt + first.text) == Tokenizer().encode(prompt) + first.tokens
    rest = written(prompt + first.text, 50 - half, ignore_eos=True)
    assert first.text + rest.text == whole.text


def test_equal_prompts_have_equal_answers_and_other_seeds_other_ones() -> None:
    assert written("Tell me").text == written("Tell me").text
    assert written("Tell me").text != written("Tell us").text
    assert written("Tell me").text != written("Tell me", seed=1).text


def test_answers_end_by_themselves_at_different_lengths() -> None:
    answers = [written(f"question {number}\n", 2000) for number in range(200)]
    lengths = [len(answer.tokens) for answer in answers]
    assert {answer.reason for answer in answers} == {"stop"}
    assert {answer.matched for answer in answers} == {token_id("<|im_end|>")}
    assert 50 < sum(lengths) / len(lengths) < 100
    assert len(set(lengths)) > 60
    assert all(answer.text[0].isupper() and answer.text.endswith(".") for answer in answers)


def test_ignore_eos_writes_on() -> None:
    assert len(written("question\n", 2000, ignore_eos=True).tokens) == 2000


def test_a_stop_string_ends_the_text_before_it() -> None:
    free = written("Tell me", 60, ignore_eos=True).text
    stop = free[40:47]
    held = written("Tell me", 60, ignore_eos=True, stop=[stop])
    assert held.text == free[: free.index(stop)]
    assert (held.reason, held.matched) == ("stop", stop)


def test_nothing_is_settled_that_a_stop_string_takes_back() -> None:
    stop = written("Tell me", 60, ignore_eos=True).text[40:52]
    tokens = Tokenizer().encode("Tell me")
    writer = AnswerWriter(pack(tokens), tokens[-2:], 60, stop=[stop], ignore_eos=True)
    shown = ""
    while writer.reason is None:
        writer.next()
        assert writer.text.startswith(shown)
        shown = writer.text[: writer.settled]
    assert shown == writer.text


def test_stop_tokens() -> None:
    free = written("Tell me", 20, ignore_eos=True)
    held = written("Tell me", 20, ignore_eos=True, stop_tokens=[free.tokens[5]])
    assert held.tokens == free.tokens[:6]
    assert held.matched == free.tokens[5]


def test_a_conversation_has_tools_first_and_ends_in_the_assistants_turn() -> None:
    text = render_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], [{"name": "f"}])
    assert text == (
        "<|im_start|>tools\n[{name: f}]<|im_end|>\n"
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_open_turn_is_continued() -> None:
    text = render_chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}], go_on=True)
    assert text.endswith("<|im_start|>assistant\nWell")


def test_images_are_told_apart_by_their_urls() -> None:
    def image(url: str) -> object:
        return [{"type": "text", "text": "What is this? "}, {"type": "image_url", "image_url": {"url": url}}]

    assert content_text(image("a")) == content_text(image("a"))
    assert content_text(image("a")) != content_text(image("b"))
    assert content_text(image("a")).startswith("What is this? <|media|>")
