"""A generated load as texts and moments: what the client of a live run sends. Pure.

A page of the load becomes sixteen words, each of which is one token for the built-in engine; equal pages become equal
words. Each router gets the same script: the requests of a session are written down before the run, with the pauses
between them, and their answers are those that the engines really give.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

from sglang_router.replay.generator import PAGE, generated
from sglang_router.replay.load import UNIT, LoadRequest

_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu", "ha")
WORDS = tuple(f" {first}{second}" for first in _SYLLABLES for second in _SYLLABLES)
"""One for each value of a byte."""


class Turn(NamedTuple):
    """One request of a chain.

    pause   seconds after the answer before; of the first: after the start of the run
    text    what is added to the prompt and the answer before
    prompt  tokens of the whole prompt
    output  tokens of the answer
    """

    pause: float
    text: str
    prompt: int
    output: int


class Chain(NamedTuple):
    """Requests of which each waits for the answer before. session: "" when it is none."""

    session: str
    turns: tuple[Turn, ...]


@lru_cache(maxsize=50_000)
def page_text(unit: bytes) -> str:
    """Return the words of one page."""
    return "".join(WORDS[byte] for byte in hashlib.blake2b(unit, digest_size=PAGE).digest())


def _text(ask: LoadRequest, known: int) -> str:
    """Return the text of a prompt from a token on."""
    pages = ask.pages[known // PAGE * UNIT : ask.prompt // PAGE * UNIT]
    return "".join(page_text(pages[at : at + UNIT]) for at in range(0, len(pages), UNIT))


def script(trace: str, seed: int) -> list[Chain]:
    """Return the chains of a generated load, in the order of their start. Raises: ConfigError."""
    load = generated(trace, seed)
    chains = []
    for first in load.arrivals():
        turns = [Turn(first.at, _text(first, 0), first.prompt, first.output)]
        before, following = first, load.answered(first, 0.0) if first.session else None
        while following is not None:
            known = before.prompt + before.output
            turns.append(Turn(following.at, _text(following, known), following.prompt, following.output))
            before, following = following, load.answered(following, 0.0)
        chains.append(Chain(first.session.decode(), tuple(turns)))
    return chains
