"""Three routers to which operators and sources do anything, in any order, and of which each reads the others late, some
messages twice: once all is read, all have the same workers, the same of them drain, and so it is at one that starts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from joined import LARGE, Hands, Joined, spec_at
from sglang_router.routing.shared.orders import KEPT_AFTER
from sglang_router.routing.shared.records import SharedTopic
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec

ADDED = ("http://a:1", "http://b:1")
POD = "http://pod:1"
ROUTERS = 3
ALL = 1 << 20

any_router = st.integers(0, ROUTERS - 1)
steps = st.one_of(
    st.tuples(st.sampled_from(["add", "remove"]), any_router, st.sampled_from(ADDED)),
    st.tuples(st.sampled_from(["drain", "resume"]), any_router, st.sampled_from([*ADDED, POD])),
    st.tuples(st.just("replace"), any_router),
    st.tuples(st.just("tell"), any_router),
    st.tuples(st.just("read"), any_router, st.integers(1, 3)),
    st.tuples(st.just("repeat"), st.integers(0, 50)),
    st.tuples(st.just("passes"), st.sampled_from([0.03, 0.5, 6.0])),
    st.tuples(st.just("lose")),
)


class OrderStream:
    """Routers that write to one stream and read it, each at its own time. Each step is a method of its name."""

    def __init__(self) -> None:
        self.now = 0.0
        self.joined = Joined(0, 0)
        self.written: list[bytes] = []
        self.places = [0] * ROUTERS
        self.pods = [0] * ROUTERS  # the number of the pod that each has
        for router in range(ROUTERS):
            self.joined.add(0, hands=Hands)
            self.register(router, spec_at(POD, Source.KUBERNETES, "pod-0"))
            self.tell(router)

    def register(self, router: int, wanted: WorkerSpec) -> None:
        self.joined.benches[router].fleet.add(wanted, self.now)

    def said(self, router: int, url: str, described: bytes | None) -> None:
        workers = self.joined.states[router].workers
        assert workers is not None
        workers.said(url, described)

    def add(self, router: int, url: str) -> None:
        if not self.joined.benches[router].fleet.entries(url):
            self.register(router, spec_at(url))
            self.said(router, url, url.encode())

    def remove(self, router: int, url: str) -> None:
        fleet = self.joined.benches[router].fleet
        if there := fleet.entries(url):
            for worker in there:
                fleet.remove(worker)
            self.said(router, url, None)

    def drain(self, router: int, url: str, draining: bool = True) -> None:
        fleet = self.joined.benches[router].fleet
        for worker in fleet.entries(url):
            fleet.set_draining(worker, draining)

    def resume(self, router: int, url: str) -> None:
        self.drain(router, url, draining=False)

    def replace(self, router: int) -> None:
        """Let a router see that the next pod has the address of the one before."""
        fleet = self.joined.benches[router].fleet
        for worker in fleet.entries(POD):
            fleet.remove(worker)
        self.pods[router] += 1
        self.register(router, spec_at(POD, Source.KUBERNETES, f"pod-{self.pods[router]}"))

    def tell(self, router: int) -> None:
        for topic, payload in self.joined.states[router].outgoing(self.now):
            if topic is SharedTopic.ORDERS:
                self.written.append(payload)

    def read(self, router: int, most: int = ALL) -> None:
        place = self.places[router]
        new = self.written[place : place + most]
        self.places[router] += len(new)
        for payload in new:
            self.joined.states[router].receive(SharedTopic.ORDERS, payload)
        assert not self.joined.states[router].apply(self.now, LARGE)

    def repeat(self, number: int) -> None:
        """Let somebody write a message once more."""
        if self.written:
            self.written.append(self.written[number % len(self.written)])

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def lose(self) -> None:
        """Let all routers believe that the store has lost something."""
        for state in self.joined.states:
            state.store_lost()

    def settle(self) -> None:
        """Let all routers see the same pod, and read all that any of them says."""
        for router in range(ROUTERS):
            while self.pods[router] < max(self.pods):
                self.replace(router)
        for seconds in (0.1, 2.0, 8.0, KEPT_AFTER, 2.0):
            self.passes(seconds)
            for router in range(ROUTERS):
                self.tell(router)
                for reader in range(ROUTERS):
                    self.read(reader)

    def draining(self, router: int) -> dict[str, bool]:
        return {worker.url: worker.draining for worker in self.joined.benches[router].fleet}


@settings(max_examples=60)
@given(st.lists(steps, max_size=30))
def test_all_routers_end_with_the_same_workers_and_drains(done: list[tuple[str, int, str]]) -> None:
    fleet = OrderStream()
    for what, *how in done:
        getattr(fleet, what)(*how)
    fleet.settle()
    first = fleet.draining(0)
    assert [fleet.draining(router) for router in range(ROUTERS)] == [first] * ROUTERS
    _, newcomer = fleet.joined.add(0, hands=Hands)
    for payload in fleet.written:
        newcomer.receive(SharedTopic.ORDERS, payload)
    assert not newcomer.apply(fleet.now, LARGE)
    fleet.register(ROUTERS, spec_at(POD, Source.KUBERNETES, f"pod-{fleet.pods[0]}"))
    assert fleet.draining(ROUTERS) == first
