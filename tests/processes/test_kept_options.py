"""The options that processes which are started later begin with."""

from __future__ import annotations

import os

from sglang_router.config import RouterArgs
from sglang_router.processes.kept_options import KeptOptions


def test_the_last_ones_are_returned_and_the_memory_stays_small() -> None:
    kept, start = KeptOptions(), RouterArgs(policy="cost")
    assert kept.last(start) is start, "nothing was kept"
    sizes = set()
    for number in range(50):
        urls = [f"http://10.0.0.{each}:8000" for each in range(number % 7 * 10)]
        args = RouterArgs(worker_urls=urls, api_key=["alice secret"], port=1000 + number).checked()  # type: ignore[list-item]
        kept.keep(args)
        found = kept.last(start)
        assert (found, found.given) == (args, args.given)
        sizes.add(os.fstat(kept._fd).st_size)
    assert max(sizes) < 100_000, "records lie beside each other, not one after the other for ever"
    kept.close()


def test_a_record_that_was_not_finished_does_not_count() -> None:
    kept, first = KeptOptions(), RouterArgs(port=1)
    kept.keep(first)
    place = os.pread(kept._fd, 16, 0)
    kept.keep(RouterArgs(port=2))
    os.pwrite(kept._fd, place, 0)  # as if the decider had died before it wrote where the second one is
    assert kept.last(RouterArgs()).port == 1
    kept.close()
