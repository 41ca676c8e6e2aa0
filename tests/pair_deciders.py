"""A decider of prefill/decode pairs that follows a script, and a play with one.

    async with Pairs(prefills=1, decodes=2, retries=1) as (play, decider):
        prefill, decode = await decider.legs(play)       the two legs of the next plan, by role

Each plan is a pair with a room and names of its own. At the end every leg must have ended exactly once.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from played import Client, Leg, Play, post, run
from sglang_router.errors import QueueTimeout, RouterError
from sglang_router.routing.decider import Deliver
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Target, Wait
from sglang_router.routing.usage import Usage

NIXL = b'"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false},"stream":false,"max_tokens":1'
CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}'
OK = b'{"usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'
ERROR = b'{"error":{"message":"no room for it.","type":"x","code":500}}'
both_kinds = pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def wrapper(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return functools.wraps(test)(wrapper)


async def ask(play: Play, body: bytes = BODY, *headers: str) -> Client:
    client = await play.client()
    await client.send(post(CHAT, body, *headers))
    return client


async def finish(leg: Leg, body: bytes, status: int = 200) -> None:
    await leg.answer(status, body, "connection: close")
    leg.close()


async def streamed(leg: Leg, *events: bytes) -> None:
    await leg.start_stream()
    for event in events:
        await leg.chunk(b"data: %b\n\n" % event)


class PairDecider:
    """See the module.

    handoff   plans as for vLLM: one after the other, no names
    retries   how many retries there are
    late      retries are answered by `deliver`
    marked    the legs of each attempt have a mark
    alone     a failed decode leg of a handoff is followed by a decode leg alone
    alone_only  each plan is a decode leg alone
    told      what it heard: ("ended", role, outcome), ("retry", role, outcome) or ("began", role), in order
    usages    of ended legs, by role
    """

    deliver: Deliver

    def __init__(self, *, handoff: bool = False, retries: int = 0, late: bool = False, alone: bool = True) -> None:
        self.prefills: list[Target] = []
        self.decodes: list[Target] = []
        self.handoff = handoff
        self.retries = retries
        self.late = late
        self.alone = alone
        self.alone_only = False
        self.named = not handoff
        self.marked = False
        self.delay = 0.0
        self.told: list[tuple[Any, ...]] = []
        self.usages: dict[str, Usage | None] = {}
        self.open: dict[int, str] = {}
        self.rids: list[str] = []
        self.statuses: list[int] = []
        self.waiting: list[tuple[int, Plan | None]] = []
        self.suspects: list[str] = []
        self._leases = itertools.count(1)
        self._turn = itertools.count()
        self._tried: dict[int, int] = {}

    def _leg(self, role: str, targets: list[Target], turn: int, room: int) -> PlannedLeg:
        lease = next(self._leases)
        self.open[lease] = role
        rid = f"r{room}-{role}"
        splice = b""
        if self.handoff and role == "prefill":
            splice = NIXL
        elif not self.handoff:
            splice = b'"bootstrap_room":%d,"rid":"%s"' % (room, rid.encode())
        named = rid.encode() if self.named else b""
        leg = PlannedLeg(lease, targets[turn % len(targets)], "pair", splice=splice, rid=named)
        leg.mark = b"-mark%d" % room if self.marked else b""
        return leg

    def _plan(self, retries: int, alone: bool = False) -> Plan:
        turn = next(self._turn)
        legs = [self._leg("decode", self.decodes, turn, turn)]
        if not alone:
            legs.insert(0, self._leg("prefill", self.prefills, turn, turn))
        return Plan(tuple(legs), self.delay if retries else 0.0, retries, self.handoff)

    # -- routing.decider.Decider ---------------------------------------------------------------------------------------

    def ask(self, tag: RequestTag, facts: Facts, now: float) -> Plan | Wait:
        return self._plan(0, self.alone_only)

    def retry(
        self,
        tag: RequestTag,
        leg: PlannedLeg,
        facts: Facts,
        outcome: Outcome,
        now: float,
        continued: bool = False,
        status: int = 0,
    ) -> Plan | Wait | None:
        role = self.open[leg.lease]
        assert list(self.open) == [leg.lease], "the other leg was given up before"
        self.told.append(("retry", role, outcome))
        self.statuses.append(status)
        tried = self._tried[tag.number] = self._tried.get(tag.number, 0) + 1
        plan = None
        if tried <= self.retries:
            del self.open[leg.lease]
            plan = self._plan(tried, self.handoff and self.alone and role == "decode")
        if not self.late:
            return plan
        self.waiting.append((tag.number, plan))
        return Wait(now + 30.0, "decider")

    def began(self, leg: PlannedLeg, now: float) -> None:
        self.told.append(("began", self.open[leg.lease]))

    def ended(self, tag: RequestTag, leg: PlannedLeg, outcome: Outcome, now: float, usage: Usage | None = None) -> None:
        role = self.open.pop(leg.lease)  # a leg that ended before fails here
        self.told.append(("ended", role, outcome))
        self.usages[role] = usage

    def holds(self, leg: PlannedLeg, response: bytes) -> None: ...

    def expired(self, tag: RequestTag, now: float) -> RouterError:
        return QueueTimeout(retry_after=1.0)

    def withdraw(self, tag: RequestTag) -> None:
        self.waiting.clear()

    def suspect(self, leg: PlannedLeg) -> None:
        self.suspects.append(leg.target.name)

    # -- for tests -----------------------------------------------------------------------------------------------------

    @property
    def ends(self) -> list[tuple[str, Outcome]]:
        return [(role, outcome) for what, role, *rest in self.told if what == "ended" for outcome in rest]

    async def legs(self, play: Play, count: int = 2) -> list[Leg]:
        """Return the next requests that reach workers: the one to a prefill worker first. Aborts are answered."""
        found: list[Leg] = []
        while len(found) < count:
            leg = await play.leg()
            if not await self.abort(leg):
                found.append(leg)
        prefills = {target.url for target in self.prefills}
        return sorted(found, key=lambda leg: leg.worker.url not in prefills)

    async def abort(self, leg: Leg) -> bool:
        """Answer a request to abort a leg and keep its name; return False for any other request."""
        if leg.start != "POST /abort_request HTTP/1.1":
            return False
        self.rids.append(json.loads(leg.body)["rid"])
        await leg.answer(200, b"", "connection: close")
        leg.close()
        return True

    async def aborted(self, play: Play, *rids: str) -> None:
        """Return when exactly these legs were aborted, and nothing else was asked of workers."""
        while len(self.rids) < len(rids):
            assert await self.abort(await play.leg())
        await play.until(lambda: not play.app.relay.aborts.in_flight)
        assert play.legs.empty()
        assert sorted(self.rids) == sorted(rids)


class Pairs:
    """See the module. options: of the router; `script`: of the decider."""

    def __init__(self, prefills: int = 1, decodes: int = 1, *, script: dict[str, Any] | None = None, **options: Any):
        self.decider = PairDecider(**(script or {}))
        self._prefills = prefills
        self.play = Play(prefills + decodes, decider=lambda _: self.decider, **options)

    async def __aenter__(self) -> tuple[Play, PairDecider]:
        await self.play.__aenter__()
        targets = [worker.target for worker in self.play.workers]
        self.decider.prefills, self.decider.decodes = targets[: self._prefills], targets[self._prefills :]
        return self.play, self.decider

    async def __aexit__(self, *failure: Any) -> None:
        if failure[0] is None:
            self.play.clients.cut()
            await self._answer_aborts()
        await self.play.__aexit__(*failure)
        if failure[0] is None:
            assert not self.decider.open, "every leg has ended"
            assert not self.play.app.relay.aborts.in_flight

    async def _answer_aborts(self) -> None:
        """Answer the aborts that the test did not wait for; their workers may refuse connections by now."""
        play = self.play
        while play.app.relay.aborts.in_flight or not play.legs.empty():
            await play.until(lambda: not play.app.relay.aborts.in_flight or not play.legs.empty())
            if not play.legs.empty():
                assert await self.decider.abort(await play.leg())
