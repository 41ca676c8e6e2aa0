"""What no placement can beat: the clairvoyant bounds that regret is measured against.

*Cached tokens.* One unlimited cache that all engines share and that holds a prompt and its answer as soon as the
request arrives (`Served.reusable`); of a request that is sent again, all but its last page. Real engines evict, compute
before they hold, and do not share.

*Time to first token.* With that cache, each request has to compute what is not in it. It takes at least what the
fastest engine needs for that alone, when it is idle: this bounds each request, and so each quantile. And it has to
share the engines with the others. No schedule of any number of engines has a smaller mean than one engine with the
speed of all of them together that always computes the prompt with the least left (shortest remaining time first): this
bounds the mean, because work is conserved. Decoding is left out of both, so the true optimum is higher.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from sglang_router.engine.scheduler import BatchLimits, CostModel


def alone(uncached: int, cost: CostModel, limits: BatchLimits, speed: float) -> float:
    """Return the seconds in which an idle engine computes so many tokens of a prompt, and with them the first token."""
    passes = -(-uncached // limits.chunk)
    return (passes * cost.decode_base + uncached / cost.prefill_tokens_per_s) / speed


def least_mean(jobs: Sequence[tuple[float, float]]) -> float:
    """Return the mean time from arrival to end when one server takes the job with the least left, and 0.0 for no jobs.

    jobs  (arrival, seconds of work), in the order of arrival
    """
    queue: list[tuple[float, float]] = []  # (seconds left, arrival)
    now = total = 0.0
    for arrival, work in [*jobs, (float("inf"), 0.0)]:
        while queue and now + queue[0][0] <= arrival:
            left, came = heapq.heappop(queue)
            now += left
            total += now - came
        if queue and arrival > now:
            left, came = heapq.heappop(queue)
            heapq.heappush(queue, (left - (arrival - now), came))
        now = max(now, arrival)
        heapq.heappush(queue, (work, arrival))
    return total / len(jobs) if jobs else 0.0
