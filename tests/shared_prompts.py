"""Prompts for tests of routers that tell each other where these went: sending one to a worker, and what is known."""

from __future__ import annotations

import random

import pytest

from fleets import facts
from joined import Joined
from sglang_router.routing.candidates import candidates_of

POLICIES = pytest.mark.parametrize("policy", ["cache_aware", "cost"])


def text(seed: int, size: int = 4096) -> bytes:
    return random.Random(seed).randbytes(size)


def place(joined: Joined, router: int, prompt: bytes, number: int) -> None:
    """Let a router send a prompt to one worker."""
    bench = joined.benches[router]
    request = facts(prompt)
    candidates = candidates_of([bench.workers[number]])
    bench.policy.chosen(bench.policy.choose(request, candidates, 0.0), request, 0.0)


def matched(joined: Joined, router: int, prompt: bytes) -> list[int]:
    """Return how many bytes of a prompt each worker is believed to have."""
    bench = joined.benches[router]
    return [each.matched for each in bench.policy.consider(facts(prompt), candidates_of(bench.workers), 0.0)]
