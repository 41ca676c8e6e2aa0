"""A generated load as texts: pages become tokens, equal pages equal words, and sessions are written down before."""

from __future__ import annotations

from scripts.routing_suite.scripted import WORDS, script

from sglang_router.engine.text import Tokenizer


def test_a_word_is_a_token() -> None:
    assert len(set(WORDS)) == 256
    assert all(len(Tokenizer().encode(word)) == 1 for word in WORDS)


def test_a_prompt_has_as_many_tokens_as_its_load_says() -> None:
    for chain in script("groups,requests=8,groups=2,prefix=128,tail=64", 1):
        (turn,) = chain.turns
        assert len(Tokenizer().encode(turn.text)) == turn.prompt


def test_requests_of_a_group_begin_with_the_same_text_and_others_do_not() -> None:
    texts = [chain.turns[0].text for chain in script("groups,requests=30,groups=2,prefix=128,tail=64", 1)]
    prefix = len("".join(WORDS[:128]))
    heads = {text[:prefix] for text in texts}
    assert len(heads) == 2
    assert len(set(texts)) == 30
    assert len({head[: prefix // 8] for head in heads}) == 2, "they differ from the first page on"


def test_a_session_goes_on_where_its_answer_ended() -> None:
    chains = script("sessions,requests=30,turns=4,prefix=128,tail=64,output=32", 3)
    assert sum(len(chain.turns) for chain in chains) == 30
    assert len({chain.session for chain in chains}) == len(chains) > 1
    for chain in chains:
        known = 0
        for turn in chain.turns:
            assert known + len(Tokenizer().encode(turn.text)) == turn.prompt
            known = turn.prompt + turn.output
        assert all(turn.pause > 0 for turn in chain.turns)


def test_the_seed_decides_everything() -> None:
    assert script("bursts,requests=40", 1) == script("bursts,requests=40", 1) != script("bursts,requests=40", 2)
