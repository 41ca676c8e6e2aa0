"""One run: a load, the production router (or several) and simulated engines, in virtual time.

    Load ── LoadRequest ──> Router.ask ── Plan ──> SimulatedEngine.submit
      ^               ^  '-- Wait: until the router delivers, or the time is up
      |               |
      '── answered ── began, ended <── the engine's passes

A run depends on its arguments alone: the same seed gives the same result, byte for byte. The relay is not simulated:
requests and answers take no time between router and engine, and a stream that breaks is not continued elsewhere.

The periodic jobs of the router run as they do in production: the queue is looked at every 0.25 s, outliers are judged
every second, and the memories are cleaned up after `--eviction-interval-secs`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from sglang_router.engine.kv import KVCache
from sglang_router.engine.scheduler import EngineRequest, TooLongError
from sglang_router.errors import RouterError
from sglang_router.replay.engine import PagedRequest, SimulatedEngine
from sglang_router.replay.load import UNIT, Load, LoadRequest
from sglang_router.replay.result import Result, Served
from sglang_router.replay.routers import SimulatedRouters
from sglang_router.replay.setup import Setup
from sglang_router.replay.timeline import Timeline
from sglang_router.replay.workers import SimulatedWorkers
from sglang_router.routing.decider import Delivered
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Route, Wait
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.router import Router
from sglang_router.routing.usage import Usage

_GENERATE = ENDPOINTS[b"/generate"]
_ROUTE = Route("POST", "/generate", "generate")
_SWEEP = 0.25
_JUDGE_EVERY = 4  # sweeps
_TIDY_STEPS = 512
_UNLIMITED = 1 << 60


class Flight:
    """A request in the simulation.

    ask      what the load said of it
    router   to which it came
    served   what becomes of it
    waits    the router's last answer when it is queued; None: it is not
    leg      where it goes; None: nowhere yet
    request  the engine's view of it
    """

    __slots__ = ("ask", "facts", "leg", "request", "router", "served", "tag", "waits")

    def __init__(self, ask: LoadRequest, router: Router, tag: RequestTag, facts: Facts, served: Served) -> None:
        self.ask = ask
        self.router = router
        self.tag = tag
        self.facts = facts
        self.served = served
        self.waits: Wait | None = None
        self.leg: PlannedLeg | None = None
        self.request: PagedRequest | None = None

    def __repr__(self) -> str:
        return f"<Flight {self.ask!r} {self.leg or self.waits}>"


class Simulation:
    """See the module.

    policy  the class of the router's policy
    seed    of all chance: that of the router; the load has its own generator
    watch   called now and then with the virtual time and the number of ended requests: may raise, to stop
    """

    def __init__(
        self,
        setup: Setup,
        load: Load,
        policy: type[Policy],
        seed: int = 0,
        watch: Callable[[float, int], None] = lambda now, ended: None,
    ) -> None:
        self.setup = setup
        self.load = load
        self.result = Result(policy.name, seed, setup)
        self.timeline = timeline = Timeline()
        self.routers = SimulatedRouters(setup, timeline, policy, seed)
        self.fleets = self.routers.fleets
        self.workers = SimulatedWorkers(setup, self.fleets, timeline, self.result.gaps)
        self.workers.died = self._died
        self.routers.attach(self.workers, self._deliver)
        self._tidy_every = max(1, round(setup.args.eviction_interval_secs / _SWEEP))
        self._most_text = setup.most_text
        self._watch = watch
        self._flights: dict[int, Flight] = {}  # by number of the request; those in progress
        self._of: dict[EngineRequest, Flight] = {}
        self._numbers = itertools.count(1)
        self._shared = KVCache(_UNLIMITED, setup.page, UNIT)  # what a cache that all engines share would hold
        self._sweeps = 0

    def __repr__(self) -> str:
        return f"<Simulation of {self.load.name}: {self.timeline!r}, {len(self._flights)} in flight, {self.routers!r}>"

    def run(self) -> Result:
        """Run until every request has ended; return what became of each. Call it once."""
        self.workers.start()
        self.routers.start()
        self.timeline.background(_SWEEP, self._sweep)
        self._next(self.load.arrivals())
        self.timeline.run()
        self.result.seconds = self.timeline.now
        self.result.engines = self.workers.runs()
        self.result.sharing = self.routers.sharing(self.timeline.now)
        return self.result

    # -- requests --------------------------------------------------------------------------------------------------

    def _next(self, arrivals: Iterator[LoadRequest]) -> None:
        """Plan the next of the requests that come whatever happens."""
        ask = next(arrivals, None)
        if ask is not None:
            self.timeline.plan(ask.at, self._arrive_and_plan, ask, arrivals)

    def _arrive_and_plan(self, ask: LoadRequest, arrivals: Iterator[LoadRequest]) -> None:
        self._next(arrivals)
        self._arrive(ask)

    def _arrive(self, ask: LoadRequest) -> None:
        now, number, page = self.timeline.now, next(self._numbers), self.setup.page
        served = Served(now, ask.prompt, ask.output, self._reusable(ask))
        self.result.served.append(served)
        tag = RequestTag(number, b"%d" % number, now, _ROUTE)
        text = ask.text(page, self._most_text)
        facts = Facts(_GENERATE, b"", text, 0, ask.stream, b"", ask.session, body=tag.raw_id)
        facts.session = ask.session
        router = self.routers.turn()
        flight = self._flights[number] = Flight(ask, router, tag, facts, served)
        try:
            answer: Delivered = router.ask(tag, facts, now)
        except RouterError as error:
            answer = error
        self._follow(flight, answer)

    def _reusable(self, ask: LoadRequest) -> int:
        """Return how many tokens of the prompt an unlimited cache shared by all engines would hold at best."""
        handle = self._shared.acquire(ask.pages[: (ask.prompt - 1) // self.setup.page * UNIT])
        known = handle.matched
        handle.grow(ask.prompt + ask.output - 1 - known)
        handle.commit(ask.pages[: (ask.prompt + ask.output - 1) // self.setup.page * UNIT])
        handle.close()
        return known

    def _deliver(self, number: int, answer: Delivered) -> None:
        self._follow(self._flights[number], answer)

    def _follow(self, flight: Flight, answer: Delivered) -> None:
        flight.waits = None
        if isinstance(answer, Plan):
            (flight.leg,) = answer.legs
            if answer.retries:  # it may find what came meanwhile, and what its first attempt left
                flight.served.reusable = (flight.ask.prompt - 1) // self.setup.page * self.setup.page
            if answer.delay:
                self.timeline.plan(self.timeline.now + answer.delay, self._send, flight)
            else:
                self._send(flight)
        elif isinstance(answer, Wait):
            flight.waits = answer
            self.timeline.plan(answer.until, self._expire, flight, answer)
        else:
            assert answer is not None  # the answer to a retry that is queued, which no retry is
            self._end(flight, answer.code)

    def _expire(self, flight: Flight, wait: Wait) -> None:
        if flight.waits is wait:
            self._follow(flight, flight.router.expired(flight.tag, self.timeline.now))

    def _send(self, flight: Flight) -> None:
        assert flight.leg is not None
        name = flight.leg.target.name
        engine = self.workers.listening(name)
        if engine is None:
            flight.router.suspect(flight.leg)
            self._failed(flight, Outcome.REFUSED)
            return
        request = PagedRequest(flight.ask, self.setup.page)
        due = engine.due
        try:
            engine.submit(request, self.timeline.now)
        except TooLongError:
            flight.router.ended(flight.tag, flight.leg, Outcome.REJECTED, self.timeline.now)
            self._end(flight, "too_long")
            return
        flight.request = request
        self._of[request] = flight
        flight.served.worker = name
        if engine.due != due:
            self.timeline.plan(engine.due, self._passed, engine, engine.due)

    def _passed(self, engine: SimulatedEngine, due: float) -> None:
        """An engine's pass or stretch has ended, unless its end was moved after this was planned."""
        if engine.due != due:
            return
        first, ended = engine.advance()
        if engine.due < math.inf:
            self.timeline.plan(engine.due, self._passed, engine, engine.due)
        for request in first:
            flight = self._of[request]
            flight.served.first = self.timeline.now
            assert flight.leg is not None
            flight.router.began(flight.leg, self.timeline.now)
        for request in ended:
            flight = self._of.pop(request)
            flight.served.cached = request.cached
            flight.served.output = request.output
            assert flight.leg is not None
            usage = Usage(request.prompt, request.cached, request.output)
            flight.router.ended(flight.tag, flight.leg, Outcome.SERVED, self.timeline.now, usage)
            self._end(flight)

    def _died(self, name: str) -> None:
        """A worker's process died: all that it computed is lost."""
        lost = [flight for flight in self._of.values() if flight.leg is not None and flight.leg.target.name == name]
        for flight in lost:
            assert flight.request is not None
            assert flight.leg is not None
            del self._of[flight.request]
            flight.router.suspect(flight.leg)
            if flight.served.first < 0.0:
                self._failed(flight, Outcome.BROKEN)
            else:
                flight.router.ended(flight.tag, flight.leg, Outcome.CUT, self.timeline.now)
                self._end(flight, Outcome.CUT.label)

    def _failed(self, flight: Flight, outcome: Outcome) -> None:
        """A leg failed: ask for a retry."""
        assert flight.leg is not None
        plan = flight.router.retry(flight.tag, flight.leg, flight.facts, outcome, self.timeline.now)
        if plan is not None:
            self._follow(flight, plan)
            return
        flight.router.ended(flight.tag, flight.leg, outcome, self.timeline.now)
        self._end(flight, outcome.label)

    def _end(self, flight: Flight, error: str = "") -> None:
        """A request has ended: `error` says why it was not answered."""
        del self._flights[flight.tag.number]
        flight.served.end = self.timeline.now
        flight.served.error = error
        following = self.load.answered(flight.ask, self.timeline.now)
        if following is not None:
            self.timeline.plan(following.at, self._arrive, following)

    # -- periodic jobs ---------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        self._sweeps += 1
        self.routers.look()
        if not self._sweeps % _JUDGE_EVERY:
            for fleet in self.fleets:
                fleet.judge(self.timeline.now)
            self.result.sample(self.timeline.now, self.fleets)
            self._watch(self.timeline.now, len(self.result.served) - len(self._flights))
        if not self._sweeps % self._tidy_every:
            for fleet in self.fleets:
                while fleet.pools.tidy(self.timeline.now, _TIDY_STEPS):
                    pass
        self.timeline.background(self.timeline.now + _SWEEP, self._sweep)
