"""The figures of one live run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scripts.routing_suite.answers import Answer

from sglang_router.replay.result import quantile


class Sent(NamedTuple):
    """One request. Times of the monotonic clock, in seconds.

    moment  when it was to be sent
    at      when it was sent
    begun   when its first token came; negative: never
    end     when the answer had ended
    """

    moment: float
    at: float
    begun: float
    end: float
    answer: Answer


class Costs(NamedTuple):
    """What a run took of the processors, in seconds of CPU time; wall: seconds that it lasted.

    machine  of all programs of the machine
    cores    of the machine
    """

    wall: float
    router: float
    engines: float
    client: float
    machine: float
    cores: int


def figures(sent: Sequence[Sent], work: Sequence[float], costs: Costs) -> dict[str, float]:
    """Return the figures by name. work: tokens that each engine computed, divided by its speed."""
    answered = [one for one in sent if not one.answer.error]
    ttft = sorted(one.begun - one.moment for one in answered)
    whole = sorted(one.end - one.moment for one in answered)
    late = sorted(one.at - one.moment for one in sent)
    prompts = sum(one.answer.prompt for one in answered)
    wall = costs.wall or 1.0
    return {
        "requests": len(sent),
        "failed": len(sent) - len(answered),
        "hit": sum(one.answer.cached for one in answered) / (prompts or 1),
        "ttft_mean": sum(ttft) / (len(ttft) or 1),
        "ttft_p50": quantile(ttft, 0.5),
        "ttft_p90": quantile(ttft, 0.9),
        "ttft_p99": quantile(ttft, 0.99),
        "e2e_p90": quantile(whole, 0.9),
        "balance": max(work) * len(work) / (sum(work) or 1.0),
        "late_p99": quantile(late, 0.99),
        "cpu_router": costs.router / wall,
        "cpu_engines": costs.engines / wall,
        "cpu_client": costs.client / wall,
        "cpu_machine": costs.machine / wall / costs.cores,
        "wall": costs.wall,
    }


def reasons(sent: Sequence[Sent]) -> dict[str, int]:
    """Return why requests failed, and how many each."""
    found: dict[str, int] = {}
    for one in sent:
        if one.answer.error:
            found[one.answer.error] = found.get(one.answer.error, 0) + 1
    return found
