"""Any order of questions, answers, ends and deaths leaves no lease, no place, no queued request, and one end for each.

Real router, desk, links, and deciders of relays; only the sockets between them are lists of bytes, delivered when the
model says so.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from desks import Decider, Ends, Relay
from sglang_router.processes.texts import SHARED
from sglang_router.routing.outcome import Outcome

RELAYS = 2
FAILURES = [outcome for outcome in Outcome if outcome.retryable]
TEXTS = [b"", b"a prompt", b"another prompt", b"x" * SHARED, b"y" * (3 * SHARED)]


class DeskBesideChaos(RuleBasedStateMachine):
    """See the module."""

    @initialize()
    def start(self) -> None:
        self.now = 1.0
        self.numbers = 0
        self.deciders = 1
        self.ends = Ends()
        self.decider = Decider(1, self.ends)
        self.relays = [Relay(index, lambda: self.now) for index in range(RELAYS)]
        for relay in self.relays:
            relay.connect(self.decider)

    def relay(self, which: int) -> Relay:
        return self.relays[which % RELAYS]

    def one(self, numbers: list[int], which: int) -> int | None:
        return sorted(numbers)[which % len(numbers)] if numbers else None

    @rule(which=st.integers(0, 1), text=st.sampled_from(TEXTS), streaming=st.booleans())
    def ask(self, which: int, text: bytes, streaming: bool) -> None:
        self.numbers += 1
        self.relay(which).ask(self.numbers, text, streaming)

    @rule(which=st.integers(0, 1))
    def up(self, which: int) -> None:
        self.relay(which).up()

    @rule(which=st.integers(0, 1))
    def down(self, which: int) -> None:
        self.relay(which).down()

    @rule(which=st.integers(0, 1), number=st.integers(0, 20), outcome=st.sampled_from([*Outcome]))
    def end(self, which: int, number: int, outcome: Outcome) -> None:
        relay = self.relay(which)
        found = self.one([*relay.tags], number)
        if found is not None:
            relay.finish(found, outcome)

    @rule(which=st.integers(0, 1), number=st.integers(0, 20), outcome=st.sampled_from(FAILURES))
    def fail(self, which: int, number: int, outcome: Outcome) -> None:
        relay = self.relay(which)
        found = self.one([each for each in relay.legs if each not in relay.waits], number)
        if found is not None:
            relay.fail(found, outcome)

    @rule(which=st.integers(0, 1), number=st.integers(0, 20))
    def began(self, which: int, number: int) -> None:
        relay = self.relay(which)
        found = self.one([each for each in relay.legs if relay.tags[each].streaming], number)
        if found is not None:
            relay.remote.began(relay.legs[found], self.now)

    @rule(seconds=st.sampled_from([0.01, 1.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.decider.desk.look(self.now)
        self.decider.bench.settle(self.now)

    @rule(which=st.integers(0, 1))
    def relay_dies(self, which: int) -> None:
        relay = self.relay(which)
        self.decider.desk.leave(relay.end.port, self.now)
        new = Relay(which, lambda: self.now)
        new.connect(self.decider)
        self.relays[which % RELAYS] = new

    @rule()
    def decider_dies(self) -> None:
        """What was on its way is lost; the next one has the workers from the state file."""
        self.deciders += 1
        self.ends.heard.clear()
        self.decider = Decider(self.deciders, self.ends)
        for relay in self.relays:
            relay.remote.lost()
            relay.connect(self.decider)

    @invariant()
    def loads_are_leases(self) -> None:
        bench = self.decider.bench
        assert sum(worker.load for worker in bench.workers) <= bench.router.leases
        assert bench.router.queue.running <= 3 + self.numbers * (self.deciders > 1)

    @invariant()
    def no_end_is_heard_twice(self) -> None:
        assert not [each for each, times in self.ends.heard.items() if times > 1]

    def teardown(self) -> None:
        """Serve whatever is left: then nothing is held."""
        if not hasattr(self, "relays"):
            return
        for _ in range(200):
            for relay in self.relays:
                relay.up()
                relay.down()
                for number in [*relay.legs]:
                    if number not in relay.waits:
                        relay.finish(number, Outcome.SERVED)
            self.now += 0.5
            self.decider.desk.look(self.now)
            self.decider.bench.settle(self.now)
            if not any(relay.tags for relay in self.relays):
                break
        for relay in self.relays:
            assert not relay.tags
            relay.up()
            assert not relay.remote._requests
            assert not relay.remote._unheard
        router = self.decider.bench.router
        assert router.leases == 0
        assert self.decider.desk.requests == 0
        assert len(router.queue) == 0
        assert router.queue.running == 0
        assert [worker.load for worker in self.decider.bench.workers] == [0, 0, 0]
        assert [worker.waiting for worker in self.decider.bench.workers] == [0, 0, 0]


TestDeskBesideChaos = DeskBesideChaos.TestCase
TestDeskBesideChaos.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
