"""How the metric families of KV events are read; see `observe.readings`.

per_holder(value)             what each worker says of its KV cache; no samples of those that are not asked
per_holder_items(value)       the same, several samples
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.readings import Reader, Sample
from sglang_router.routing.kv_blocks import Holder


def per_holder(value: Callable[[Holder], int]) -> Reader:
    """Read a value of each worker's KV cache. No samples without KV events."""
    return per_holder_items(lambda holder: [((), value(holder))])


def per_holder_items(items: Callable[[Holder], Iterable[Sample]]) -> Reader:
    """Several samples per worker; the label values of `items` follow the worker's name."""

    def read(counts: MetricCounts) -> Iterator[Sample]:
        index = counts.sources.kv_index
        if index is not None:
            for worker in list(counts.fleet):
                holder = index.holders.get(worker.id)
                if holder is not None:
                    for values, number in items(holder):
                        yield (worker.url, *values), number

    return read
