"""Deciders and relays of one router without processes: what would be sockets between them are lists of bytes.

decider = Decider(1, Ends())                 # a desk with a real router: three workers, three places, a short queue
relay = Relay(0, clock)
relay.connect(decider)
relay.ask(1, b"text", streaming=False)
relay.up()                                   # the desk reads what the relay has sent, and answers
relay.down()                                 # the relay reads what the desk has sent
relay.legs[1]                                # where request 1 is now
"""

from __future__ import annotations

import asyncio
import mmap
from collections import Counter
from typing import Any, cast

from fleets import ROUTE, Bench, facts
from sglang_router.errors import RouterError
from sglang_router.processes import messages
from sglang_router.processes.desk import Desk
from sglang_router.processes.link import Link, decode_from_decider, decode_from_relay
from sglang_router.processes.ports import RelayPort
from sglang_router.processes.remote import RemoteDecider, Reporter
from sglang_router.processes.texts import SHARED, TextRing
from sglang_router.routing.decider import Delivered
from sglang_router.routing.events import Answered, Finished, Listener
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Wait
from sglang_router.routing.rules import QueueRules
from sglang_router.routing.usage import Usage


class Wire:
    """Stands for a socket: keeps what is written."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytearray) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return False


class Ends(Listener):
    """Counts the ends that the decider's listeners hear, by request id; keeps what engines told."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()
        self.usages: list[Usage] = []

    def finished(self, event: Finished) -> None:
        self.heard[event.tag.id] += 1
        if event.answer.usage is not None:
            self.usages.append(event.answer.usage)


class Decider:
    """One incarnation of the process that decides."""

    def __init__(self, count: int, ends: Ends, bench: Bench | None = None) -> None:
        queue = QueueRules(max_concurrent=3, queue_size=4, queue_timeout=5.0)
        self.bench = bench or Bench(3, "cache_aware", queue=queue)
        self.bench.fleet.number_leases(count << 40)
        self.places = {worker.id: place for place, worker in enumerate(self.bench.workers)}
        self.desk = Desk(self.bench.router, ends, lambda target: self.places[target.worker_id])
        self.hear: dict[type, Any] = {
            messages.Ask: self.desk.ask,
            messages.Retry: self.desk.retry,
            messages.Began: self.desk.began,
            messages.Ended: self.desk.ended,
            messages.Done: self.desk.done,
            messages.Unasked: self.desk.told,
            messages.Withdraw: self.desk.withdraw,
            messages.Hello: self.hello,
        }

    def hello(self, port: RelayPort, hello: messages.Hello) -> None:
        for request in hello.requests:
            self.desk.adopt(port, request, 0.0)


class DeskEnd:
    """The desk's end of the link to one relay; the owner of that link."""

    def __init__(self, decider: Decider, index: int, memory: mmap.mmap) -> None:
        self.decider = decider
        self.wire = Wire()
        self.link = Link(self, decode_from_relay, lambda _: None)
        self.link.transport = cast("asyncio.Transport", self.wire)
        self.port = RelayPort(index, self.link, memory)

    def heard(self, link: Link, heard: list[Any]) -> None:
        for each in heard:
            self.decider.hear[type(each)](self.port, each)
        link.send()

    def link_lost(self, link: Link) -> None: ...


class Relay:
    """A relay: exchanges that wait, or have a leg, or a leg that failed."""

    def __init__(self, index: int, clock: Any) -> None:
        self.memory = mmap.mmap(-1, 5 * SHARED)
        self.remote = RemoteDecider(index, TextRing(self.memory), 100.0, clock, b"key")
        self.remote.deliver = self.deliver
        self.reporter = Reporter(self.remote)
        self.clock = clock
        self.tags: dict[int, RequestTag] = {}  # of requests that have not ended
        self.waits: set[int] = set()
        self.legs: dict[int, PlannedLeg] = {}
        self.plans: dict[int, Plan] = {}  # the latest of each request

    def connect(self, decider: Decider) -> None:
        self.end = DeskEnd(decider, 0, self.memory)
        self.wire = Wire()
        self.link = Link(self, decode_from_decider, lambda _: None)
        self.link.transport = cast("asyncio.Transport", self.wire)
        self.remote.connected(self.link)
        for worker in decider.bench.workers:
            self.remote.targets[decider.places[worker.id]] = worker.target

    def link_lost(self, link: Link) -> None: ...

    def heard(self, link: Link, heard: list[Any]) -> None:
        hear: dict[type, Any] = {
            messages.Planned: self.remote.planned,
            messages.Waits: self.remote.waits,
            messages.Refused: self.remote.refused,
            messages.NoRetry: self.remote.no_retry,
        }
        for each in heard:
            hear[type(each)](each)

    def up(self) -> None:
        """Let the desk read what the relay has sent."""
        self.link.send()
        sent, self.wire.sent = self.wire.sent, []
        for data in sent:
            self.end.link.data_received(data)

    def down(self) -> None:
        """Let the relay read what the desk has sent."""
        self.end.link.send()
        sent, self.end.wire.sent = self.end.wire.sent, []
        for data in sent:
            self.link.data_received(data)

    # -- as exchanges do -----------------------------------------------------------------------------------------------

    def ask(self, number: int, text: bytes, streaming: bool) -> None:
        tag = self.tags[number] = RequestTag(number, b"%d-%d" % (id(self), number), self.clock(), ROUTE)
        tag.streaming = streaming
        self.waits.add(number)
        self.remote.ask(tag, facts(text, streaming=streaming), self.clock())

    def deliver(self, number: int, answer: Delivered) -> None:
        if number not in self.waits or isinstance(answer, Wait):
            return
        self.waits.discard(number)
        if isinstance(answer, Plan):
            self.legs[number] = answer.legs[-1]
            self.plans[number] = answer
        else:
            assert answer is None or isinstance(answer, RouterError)
            self.finish(number, Outcome.FAILED)

    def fail(self, number: int, outcome: Outcome) -> None:
        self.waits.add(number)
        asked = facts(b"the rest")
        self.remote.retry(self.tags[number], self.legs[number], asked, outcome, self.clock(), False, 500)

    def finish(self, number: int, outcome: Outcome) -> None:
        """End a request; its leg, too, if it has one."""
        tag, leg, plan = self.tags.pop(number), self.legs.pop(number, None), self.plans.pop(number, None)
        if number in self.waits:
            self.waits.discard(number)
            self.remote.withdraw(tag)
        if leg is not None and plan is not None:
            for each in plan.legs:
                self.remote.ended(tag, each, outcome, self.clock())
        self.reporter.finished(Finished(tag, leg, Answered(200, outcome=outcome)))
