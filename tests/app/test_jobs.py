"""The periodic jobs: what each does when its time comes."""

from __future__ import annotations

import asyncio

from fleets import ROUTE, facts, spec
from sglang_router.app.build import Seams, build
from sglang_router.app.jobs import table
from sglang_router.config import RouterArgs
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, RequestTag, Wait


def test_the_sweep_lets_in_whoever_can_begin_because_time_has_passed() -> None:
    """The breaker of one worker becomes half-open while the other one is full."""
    now = 100.0

    async def play() -> None:
        nonlocal now
        args = RouterArgs(max_running_per_worker=1, cb_failure_threshold=1, cb_timeout_duration_secs=10)
        app = build(args, asyncio.get_running_loop(), seams=Seams(clock=lambda: now))
        router = app.router
        delivered: list[object] = []
        router.deliver = lambda number, answer: delivered.append(answer)
        first, _ = (app.fleet.add(spec(name), now) for name in ("a", "b"))
        app.fleet.lease(first).close(Outcome.FAILED, now)
        answers = [router.ask(RequestTag(n, b"r", now, ROUTE), facts(), now) for n in range(2)]
        assert [type(answer) for answer in answers] == [Plan, Wait]
        jobs = {job.name: job.run for job in table(app.clock, [app.clients], app.connections, router, (), 60.0)}
        jobs["sweep"]()
        assert not delivered
        now = 111.0
        jobs["sweep"]()
        (plan,) = delivered
        assert isinstance(plan, Plan)
        assert plan.legs[0].target == first.target
        await app.connections.close()

    asyncio.run(play())
