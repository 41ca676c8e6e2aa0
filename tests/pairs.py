"""Fleets of prefill and decode workers without sockets and clocks, as `fleets.Bench`."""

from __future__ import annotations

import json
from typing import Any

from fleets import Asked, Bench
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg
from sglang_router.routing.rules import BreakerRules, FleetRules, HealthRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

UNCHECKED = HealthRules(enabled=False)
NEVER = FleetRules(breaker=BreakerRules(threshold=1 << 30), slow_start=0.0)


class Pairs(Bench):
    """A fleet of prefill and decode workers, named p0, p1 ... and d0, d1 ...; regular ones are r0 ..."""

    def __init__(self, prefill: int = 1, decode: int = 1, regular: int = 0, runtime: str = "", **more: Any) -> None:
        policy = more.pop("policy", "round_robin")
        super().__init__(0, policy, assign=None, rules=more.pop("rules", NEVER), **more)
        self.runtime = runtime or None
        self.faults: list[Exception] = []
        for kind, count in (("prefill", prefill), ("decode", decode), ("regular", regular)):
            for number in range(count):
                self.add(f"{kind[0]}{number}", kind)

    def add(self, name: str, role: str = "regular", **more: Any) -> Worker:
        spec = WorkerSpec(url=f"http://{name}:1", worker_type=role, runtime=self.runtime, health=UNCHECKED, **more)
        worker = self.fleet.add(spec, 0.0)
        self.workers.append(worker)
        return worker

    def named(self, name: str) -> Worker:
        worker = self.fleet.by_url(f"http://{name}:1")
        assert worker is not None
        return worker

    def windows(self, most: int) -> None:
        for worker in self.fleet:
            if worker.role == "decode":
                self.fleet.reported(worker, EngineReport(window=most))

    def plan(self, request: Facts, now: float = 0.0) -> tuple[Asked, Plan]:
        asked = self.ask(request, now)
        return asked, asked.plan

    def end(self, asked: Asked, leg: PlannedLeg, outcome: Outcome = Outcome.SERVED, now: float = 0.0) -> None:
        self.router.ended(asked.tag, leg, outcome, now)

    def retry(self, asked: Asked, leg: PlannedLeg, outcome: Outcome, now: float = 0.0) -> Plan | None:
        """Fail a leg as the relay does: give up the others, ask, and end the failed one if there is no retry."""
        for other in asked.plan.legs:
            if other is not leg:
                self.end(asked, other, Outcome.ABANDONED, now)
        answer = self.router.retry(asked.tag, leg, asked.facts, outcome, now)
        if answer is None:
            self.end(asked, leg, outcome, now)
            return None
        asked.answers.append(answer)
        return asked.plan

    @property
    def is_idle(self) -> bool:
        """Whether no request left anything behind."""
        counts = [(worker.load, worker.waiting, worker.unread, worker.work.awaited) for worker in self.workers]
        return not (any(map(any, counts)) or self.router.leases or self.router._pairing.open or self.router._trails)


def chat(path: bytes = b"/v1/chat/completions", **fields: Any) -> Facts:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello there"}], **fields}
    return read(ENDPOINTS[path], json.dumps(body).encode())


def names(plan: Plan) -> list[str]:
    return [leg.target.name.removeprefix("http://").removesuffix(":1") for leg in plan.legs]


def spliced(leg: PlannedLeg) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(b"{%b}" % leg.splice)
    return found
