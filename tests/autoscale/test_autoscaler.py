"""The loop: reading, decision, word to those who act; what GET /scale answers; what options make of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fleets import Bench
from scaling_decisions import until
from sglang_router.autoscale.autoscaler import Autoscaler, autoscaler, rules_of
from sglang_router.autoscale.observer import Observer
from sglang_router.autoscale.scaler import Decision, ScalingRules
from sglang_router.config import RouterArgs
from sglang_router.relay.clients import Unanswered
from sglang_router.routing.rules import HealthRules
from stack import stack

QUICK = ScalingRules(fewest=1, most=4, up_cooldown=0.0, down_cooldown=30.0, patience=0.0, step=1)


class Heard:
    """An actuator that listens."""

    def __init__(self, error: Exception | None = None) -> None:
        self.decisions: list[Decision] = []
        self.error = error
        self.closed = 0

    def scale(self, decision: Decision) -> None:
        self.decisions.append(decision)
        if self.error is not None:
            raise self.error

    def explain(self) -> dict[str, Any]:
        return {"kind": "heard"}

    async def close(self) -> None:
        self.closed += 1


class Scene:
    """A fleet of one, a queue set by hand, and a clock that goes on by a second with each look at it."""

    def __init__(self, rules: ScalingRules = QUICK) -> None:
        self.now = 0.0
        self.queue = 0
        self.bench = Bench(1)
        observer = Observer(self.bench.fleet, self.waiting, self.clock)
        self.heard = Heard()
        self.scaler = Autoscaler(
            asyncio.get_running_loop(), rules, observer, self.clock, wall=lambda: 1_790_000_000.0, interval=0.001
        )
        self.scaler.add(self.heard)

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def waiting(self) -> Unanswered:
        return Unanswered(requests=self.queue, held=0, size=0, oldest=0.0)


def play(scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def whole() -> None:
        stage = Scene()
        try:
            await scene(stage)
        finally:
            await stage.scaler.close()

    asyncio.run(whole())


class Leading:
    leads = False


def test_of_several_routers_only_the_one_that_leads_acts() -> None:
    async def scene(stage: Scene) -> None:
        stage.scaler.leader = leader = Leading()
        stage.queue = 50
        stage.scaler.start()
        await until(lambda: stage.scaler.desired == 4)
        assert stage.heard.decisions == []
        assert stage.scaler.explain()["acts"] is False
        leader.leads = True
        await until(lambda: bool(stage.heard.decisions))
        assert stage.heard.decisions[0].desired == stage.scaler.desired
        assert stage.heard.decisions[0].changed  # so that a command is run
        await until(lambda: len(stage.heard.decisions) > 1)
        assert not stage.heard.decisions[1].changed
        assert stage.scaler.explain()["acts"] is True

    play(scene)


def test_what_was_dropped_for_want_of_the_lead_is_told_again_also_if_the_lead_was_lost_between_two_decisions() -> None:
    async def scene(stage: Scene) -> None:
        stage.scaler.leader = leader = Leading()
        leader.leads = True
        stage.queue = 50
        stage.scaler.start()
        await until(lambda: any(decision.desired == 4 for decision in stage.heard.decisions))
        known = len(stage.heard.decisions)
        leader.leads = False
        assert not stage.scaler.still_acts()
        leader.leads = True
        assert stage.scaler.still_acts()
        await until(lambda: len(stage.heard.decisions) > known + 1)
        assert [decision.changed for decision in stage.heard.decisions[known : known + 2]] == [True, False]

    play(scene)


def test_it_decides_again_and_again_until_the_end() -> None:
    async def scene(stage: Scene) -> None:
        stage.scaler.start()
        assert len(stage.heard.decisions) == 1  # the first at once
        await until(lambda: len(stage.heard.decisions) > 5)
        stage.queue = 12
        await until(lambda: stage.scaler.desired == 3)
        assert [decision.desired for decision in stage.heard.decisions if decision.changed] == [2, 3]
        await stage.scaler.close()
        known = len(stage.heard.decisions)
        await asyncio.sleep(0.02)
        assert len(stage.heard.decisions) == known

    play(scene)


def test_a_fault_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(stage: Scene) -> None:
        stage.heard.error = RuntimeError("no")
        stage.scaler.start()
        await until(lambda: len(stage.heard.decisions) > 3)

    play(scene)
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_the_explanation() -> None:
    async def scene(stage: Scene) -> None:
        before = json.loads(json.dumps(stage.scaler.explain()))
        assert (before["desired"], before["current"], before["decisions"]) == (1, None, [])
        stage.scaler.start()
        stage.queue = 16
        await until(lambda: stage.scaler.desired == 4)
        await until(lambda: not stage.heard.decisions[-1].changed)
        told = json.loads(json.dumps(stage.scaler.explain()))
        assert (told["desired"], told["current"], told["at"]) == (4, 1, "2026-09-21T14:13:20.000Z")
        assert told["reason"] == "queue: 16 queued, target 4 per worker, wants 4"
        assert told["figures"]["wants"] == {"load": 0, "queue": 4, "tokens": 0}
        assert (told["figures"]["ready"], told["figures"]["queue"]) == (1, 16)
        assert told["next"] == {"up_in_seconds": None, "down_in_seconds": None}
        assert (told["rules"]["fewest"], told["rules"]["most"]) == (1, 4)
        assert told["actuators"] == [{"kind": "heard"}]
        assert [decision["desired"] for decision in told["decisions"]] == [4, 3, 2]  # the newest first
        assert all(decision["reason"].startswith("queue: ") for decision in told["decisions"])

    play(scene)


def test_a_hundred_changes_are_kept() -> None:
    async def scene(stage: Scene) -> None:
        worker = stage.bench.workers[0]

        async def one_more() -> None:
            seen = len(stage.heard.decisions)
            await until(lambda: len(stage.heard.decisions) > seen)

        stage.scaler.start()
        for _ in range(130):  # it fails again and again
            stage.bench.fleet.down(worker, "x")
            await one_more()
            stage.bench.fleet.lost(worker, 0.0)
            await one_more()
        assert sum(decision.changed for decision in stage.heard.decisions) >= 130
        assert len(stage.scaler.explain()["decisions"]) == 100

    play(scene)


def test_over_http() -> None:
    with stack(health=HealthRules(enabled=False)) as router:
        nothing = router.get("/scale")
        assert nothing.status == 409
        assert "--autoscale" in nothing.json()["error"]["message"]
        router.add("http://127.0.0.1:9")

        def begin() -> Autoscaler:
            observer = Observer(router.fleet, router.clients.unanswered, router.loop.time)
            scaler = Autoscaler(router.loop, QUICK, observer, router.loop.time)
            scaler.start()
            router.context.autoscaler = scaler
            return scaler

        scaler = router.call(begin)
        answer = router.get("/scale")
        router.run(scaler.close())
    assert answer.status == 200
    assert (answer.json()["desired"], answer.json()["current"]) == (1, 1)
    assert answer.json()["reason"] == "load: 0 requests in flight, target 32 per worker, wants 0; MIN is 1"


# -- from options ------------------------------------------------------------------------------------------


def made(**options: Any) -> Autoscaler | None:
    async def make() -> Autoscaler | None:
        loop = asyncio.get_running_loop()
        args = RouterArgs(**options).checked()
        quiet = Unanswered(requests=0, held=0, size=0, oldest=0.0)
        scaler = autoscaler(args, loop, Bench(1).fleet, lambda: quiet, loop.time)
        if scaler is not None:
            await scaler.close()
            await scaler.close()
        return scaler

    return asyncio.run(make())


def test_without_the_option_there_is_none() -> None:
    assert made() is None


def test_each_option_has_its_place() -> None:
    rules = rules_of(
        RouterArgs(
            autoscale="2:9",
            autoscale_target_load=3,
            autoscale_target_queue=5,
            autoscale_target_tokens=7,
            autoscale_ttft_goal_secs=1.5,
            autoscale_step=4,
            autoscale_up_cooldown_secs=1,
            autoscale_down_cooldown_secs=11,
        ).checked()
    )
    assert rules == ScalingRules(
        fewest=2,
        most=9,
        target_load=3,
        target_queue=5,
        target_tokens=7,
        ttft_goal=1.5,
        step=4,
        up_cooldown=1,
        down_cooldown=11,
        patience=1,
    )


def test_the_defaults_are_those_of_the_options() -> None:
    assert rules_of(RouterArgs(autoscale="1:8").checked()) == ScalingRules()


def test_who_is_told() -> None:
    scaler = made(autoscale="0:2")
    assert scaler is not None
    assert (scaler.desired, scaler.explain()["actuators"]) == (0, [])
    scaler = made(
        autoscale="1:2", scale_webhook="http://127.0.0.1:9/x", scale_webhook_secret="s", scale_command="scale-it -n"
    )
    assert scaler is not None
    kinds = [(each["kind"], each["to"]) for each in scaler.explain()["actuators"]]
    assert kinds == [("webhook", "http://127.0.0.1:9"), ("command", "scale-it")]
