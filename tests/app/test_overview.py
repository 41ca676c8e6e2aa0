"""What the page reads of the metrics: counters of all requests, and requests that wait and run now."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from fake_worker import Gate, answer
from sglang_router.admin.figures import Totals
from sglang_router.admin.live import Frame
from stack import Stack, stack

USAGE = {"prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 3}
SERVED = {"POST /generate": answer(200, {"text": "x", "meta_info": USAGE})}
REFUSED = {"POST /generate": answer(400, {"error": "no"})}
TEXT = {"text": "hello, " * 10}


def totals_of(router: Stack) -> Totals:
    def read() -> Any:
        router.app.deferred.flush()
        *_, totals = router.context.live._counters.totals()
        return totals

    found: Totals = router.call(read)
    return found


def test_counters_are_of_relayed_requests_also_of_removed_workers() -> None:
    with stack() as router:
        (fake,) = router.fakes(SERVED)
        for _ in range(3):
            assert router.post("/generate", TEXT).status == 200
        router.get("/health")
        before = totals_of(router)
        assert (before.requests, before.failed, sum(before.first_byte)) == (3, 0, 3)
        assert (before.prompt, before.cached, before.completion) == (30, 12, 9)
        assert 0 < before.matched < before.total
        worker = router.worker(fake.url)
        router.call(lambda: router.fleet.remove(worker))
        assert totals_of(router) == before
        router.fakes(REFUSED)
        assert router.post("/generate", TEXT).status == 400
        after = totals_of(router)
        assert (after.requests, after.failed, after.completion) == (4, 1, 9)


def test_what_waits_and_what_runs() -> None:
    gate = Gate(SERVED["POST /generate"])
    with stack(options={"max_concurrent_requests": 1, "queue_size": 5}) as router:
        (fake,) = router.fakes({"POST /generate": gate})
        with ThreadPoolExecutor(2) as clients:
            asked = [clients.submit(router.post, "/generate", TEXT) for _ in range(2)]
            router.run(fake.asked("POST /generate"))
            looks = itertools.takewhile(lambda _: router.call(lambda: not len(router.app.router.queue)), range(100_000))
            assert len([*looks]) < 100_000  # each look is a turn of the loop
            now = msgspec.json.decode(router.get("/overview").body, type=Frame).now
            router.call(gate.open.set)
            assert [each.result().status for each in asked] == [200, 200]
    assert (now.queued, now.running) == (1, 1)


def test_what_the_shadow_policy_would_have_done() -> None:
    with stack(options={"shadow_policy": "random"}) as router:
        shadows = router.app.metrics.counts.sources.shadows
        assert shadows is not None
        shadows.agreed, shadows.differed, shadows.matched, shadows.actual_matched = 1, 2, 3, 4
        shadow = msgspec.json.decode(router.get("/overview").body, type=Frame).shadow
    assert shadow is not None
    assert msgspec.structs.astuple(shadow) == ("random", 1, 2, 3, 4)
