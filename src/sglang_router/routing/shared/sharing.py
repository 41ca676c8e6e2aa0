"""What a router shares with others in front of the same workers: the one place where all of it meets.

    shared = SharedState(SharedRules(key, router))
    KVCaches(None, shared=shared.prefixes)  for the policies of the router (`PolicySettings.kv_caches`)
    shared.attach(router)                   and add it to the listeners of the fleet
    shared.outgoing(now)   -> messages      each flush: what is new, for the streams of its topics
    shared.missed(topic)                    what it returned last could not be written
    shared.receive(topic, payload)          what came from a stream, own messages too
    shared.apply(now, budget)               work on it in pieces, until it returns False
    shared.look(now)                        a few times a second: peers expire
    shared.leave()         -> messages      at the end
    shared.store_lost()                     the store was emptied, or knows less than it did

Nothing here waits for anything, and no request waits for this: it is decided from what this router knows at the moment.
Whatever comes from a stream is checked as if a stranger had written it: without the key it is not even opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.router import Router
from sglang_router.routing.shared.homes import SharedHomes
from sglang_router.routing.shared.inbox import Inbox, Received
from sglang_router.routing.shared.loads import MOST_STATES, SharedLoads
from sglang_router.routing.shared.members import Members
from sglang_router.routing.shared.opening import Opener
from sglang_router.routing.shared.orders import SharedOrders
from sglang_router.routing.shared.packing import numbers, packed
from sglang_router.routing.shared.peers import HIGHEST, Peer, Peers
from sglang_router.routing.shared.placements import Placements
from sglang_router.routing.shared.prefixes import SharedPrefixes
from sglang_router.routing.shared.records import (
    FORM,
    LoadsMessage,
    OrderMessage,
    PeerReading,
    PlacementsMessage,
    SharedReading,
    SharedRules,
    SharedTopic,
)
from sglang_router.routing.shared.repeating import Repeating
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.spending import MOST_METERS, SharedSpending
from sglang_router.routing.shared.workers import SharedWorkers, WorkerHands
from sglang_router.routing.worker import Worker

Message = tuple[SharedTopic, bytes]
FLUSH: Final = 0.025
"""Seconds between two calls of `outgoing`."""
_PEERS_A_FLUSH: Final = 8
"""With more peers it is called more rarely, so that the messages of all together do not grow with their square."""
_RECLAIM: Final = 4096
"""Entries that are freed at each look."""
_PIECE: Final = 64
"""Figures that are applied without looking at the budget."""
_MOST_HELD: Final = 1 << 20
_MESSAGE: Final = 16
"""What opening a message counts in figures."""


def _nothing() -> int:
    """Return 0."""
    return 0


class SharedState(Listener):
    """See the module.

    rules    how it shares
    workers  those that are added and removed for all; None: each router has its own
    holds    returns how many requests this router holds because no worker is ready: set it where others may start one
    """

    def __init__(self, rules: SharedRules) -> None:
        self.rules = rules
        self.secret = Secret(rules.key, rules.step, rules.place, rules.fleet)
        self.peers = Peers(rules.router, rules.expiry)
        self.inbox = Inbox(rules.waiting)
        self.prefixes = SharedPrefixes(self.secret, rules.blocks, int.from_bytes(rules.router[-2:], "big"))
        self.members = Members(self.secret, self.prefixes.forget)
        self.homes = SharedHomes(self.members, self.secret)
        self._loads: SharedLoads | None = None
        self._placements: Placements | None = None
        self._orders: SharedOrders | None = None
        self._spending: SharedSpending | None = None
        self._freed: Callable[[], None] | None = None
        self.holds: Callable[[], int] = _nothing
        self.workers: SharedWorkers | None = None
        self._now = 0.0
        self._repeating = Repeating(rules.router)
        self._task: Iterator[int] | None = None  # the message that is being applied
        self._number = 0
        self._whole_at = 0.0
        self._pack = msgspec.msgpack.Encoder().encode
        self._open = Opener(self.secret, self.inbox.dropped).open

    def __repr__(self) -> str:
        return f"<SharedState of {self.members!r}, {self.peers!r}, {self.inbox!r}>"

    def attach(self, router: Router, hands: WorkerHands | None = None) -> None:
        """Share what this router knows. Its fleet may have workers already. Call it once, before the first request.

        hands  add and remove workers for others' word; None: each router has its own
        """
        if hands is not None:
            self.workers = SharedWorkers(self.members, hands)
        self._loads = SharedLoads(self.members, self.peers, router.fleet, router.check_now)
        self._spending = SharedSpending(router.quotas, self.peers, self.secret)
        self._orders = SharedOrders(self.members, router.fleet, self.rules.router, self.workers)
        self._placements = Placements(self.members, self.prefixes, self.homes, router.fleet)
        if router.sessions.on:
            router.sessions.homes = self.homes
        self._freed = router.freed
        for worker in router.fleet:
            self._joined(worker)

    def use_key(self, key: bytes) -> None:
        """Name things by another key of the fleet: that was there first. What was heard by the old one is forgotten."""
        for peer in list(self.peers.by_name.values()):
            self._forget(peer, self._now)
        self.secret.use(key)
        names = self.members.rename()
        self.prefixes.rename(names)
        self.homes.forget()
        if self._orders is not None:
            self._orders.rename(names)
            self.store_lost()
        if self._spending is not None:
            self._spending.rename()
        self._whole_at = 0.0

    def store_lost(self) -> None:
        """Hear that the store has lost what it had: what newcomers must know is told again."""
        if self._orders is not None:
            self._orders.lost(self._repeating.after_loss(self._now))

    @property
    def connected(self) -> bool:
        """Whether the store can be reached: whoever talks to it says so. Without it, strangers go where all agree."""
        return self.prefixes.connected

    @connected.setter
    def connected(self, connected: bool) -> None:
        if connected and not self.prefixes.connected:
            self._repeating.reached(self._now)
        self.prefixes.connected = connected

    @property
    def held_elsewhere(self) -> int:
        """How many requests the others hold because no worker is ready, as they told within the last second."""
        return sum([peer.held for peer in self.peers.by_name.values()])

    @property
    def interval(self) -> float:
        """Seconds after which to call `outgoing` again."""
        return FLUSH * max(1.0, len(self.peers) / _PEERS_A_FLUSH)

    @property
    def reading(self) -> SharedReading:
        """What can be seen of it now."""
        crowded = self.prefixes.crowded + self.homes.crowded + (self.workers.crowded if self.workers else 0)
        peers = sorted(self.peers.by_name.values(), key=lambda peer: peer.name)
        return SharedReading(
            connected=self.connected,
            peers=tuple(
                PeerReading(peer.name.hex(), max(self._now - peer.heard, 0.0), sum(peer.running.values()))
                for peer in peers
            ),
            entries=len(self.prefixes),
            size=self.prefixes.size,
            homes=len(self.homes),
            agreed=self.prefixes.agreed,
            waiting=self.inbox.size,
            told=self.prefixes.told,
            heard=self.prefixes.heard,
            dropped=self.inbox.dropped | ({"crowded": crowded} if crowded else {}),
        )

    # -- what this router tells ----------------------------------------------------------------------------------------

    def outgoing(self, now: float) -> list[Message]:
        """Return what is new, each at most 64 KiB; [] when nothing is.

        It is not told again. Loads that are lost are mended by the next ones, and placements are a loss of some cached
        tokens; but orders have to be written some time, and of what else must not be lost `missed` hears.
        """
        self._now = now
        return [*self._of_orders(now), *self._of_placements(now), *self._of_loads(now)]

    def missed(self, topic: SharedTopic) -> None:
        """Take note that messages of a topic that `outgoing` returned last could not be written."""
        if topic is SharedTopic.PLACEMENTS and self._placements is not None:
            self._placements.missed()

    def leave(self) -> list[Message]:
        """Return what tells the others that this router ends: its requests in flight count no more."""
        orders = self._of_orders(math.inf)
        self._number += 1
        return [
            *orders,
            self._sealed(SharedTopic.LOADS, LoadsMessage(FORM, self.rules.router, self._number, left=True)),
        ]

    def _of_orders(self, now: float) -> list[Message]:
        found: list[Message] = []
        calm = self.connected and self._repeating.is_calm(now)
        if self._orders is not None:
            while (message := self._orders.gather(self.rules.router, self._number + 1, now, calm)) is not None:
                self._number += 1
                found.append(self._sealed(SharedTopic.ORDERS, message))
        return found

    def _of_placements(self, now: float) -> list[Message]:
        found: list[Message] = []
        if self._placements is not None:
            self._placements.look(now)
            while (message := self._placements.gather(self.rules.router, self._number + 1)) is not None:
                self._number += 1
                found.append(self._sealed(SharedTopic.PLACEMENTS, message))
        return found

    def _of_loads(self, now: float) -> list[Message]:
        if self._loads is None or self._spending is None:
            return []
        whole = now >= self._whole_at
        held = self.holds() if whole else 0
        if whole:
            self._whole_at = now + self.rules.whole
        names, states = self._loads.gather(now, whole)
        meters, spent, debts = self._spending.gather(now, whole)
        found: list[Message] = []
        parts = max(-(-len(names) // MOST_STATES), -(-len(meters) // MOST_METERS), int(whole))
        low = first = 0
        for number in range(parts):
            start, begin = number * MOST_STATES, number * MOST_METERS
            end, stop = start + MOST_STATES, begin + MOST_METERS
            high = names[end - 1] if end < len(names) else HIGHEST
            last = meters[stop - 1] if stop < len(meters) else HIGHEST
            is_whole, all_meters = whole and low <= high, whole and first <= last
            self._number += 1
            message = LoadsMessage(
                FORM,
                self.rules.router,
                self._number,
                whole=is_whole,
                names=packed(names[start:end]),
                states=packed(states[start:end]),
                meters=packed(meters[begin:stop]),
                spent=packed(spent[2 * begin : 2 * stop]),
                all_meters=all_meters,
                low=low if is_whole else 0,
                high=high if is_whole else 0,
                first=first if all_meters else 0,
                last=last if all_meters else 0,
                debts=packed(debts[begin:stop]),
                held=held,
            )
            low, first = high + 1, last + 1
            found.append(self._sealed(SharedTopic.LOADS, message))
        return found

    def _sealed(self, topic: SharedTopic, message: msgspec.Struct) -> Message:
        return topic, self.secret.seal(topic.value, self._pack(message))

    # -- what it hears -------------------------------------------------------------------------------------------------

    def receive(self, topic: SharedTopic, payload: bytes, old: bool = False) -> None:
        """Take a message from a stream, to be applied later.

        old  it is from the past, and those before it come after it: only what is not known yet is taken from it
        """
        self.inbox.put(topic, payload, old)

    def apply(self, now: float, budget: int) -> bool:
        """Apply what was received, about `budget` figures of it; return whether there is more."""
        self._now = now
        while budget > 0:
            if self._task is None:
                received = self.inbox.take()
                if received is None:
                    return False
                self._task = self._hear(received, now)
            try:
                done = next(self._task, 0)
            except ValueError:
                self.inbox.dropped["malformed"] += 1
                done = 0
            if not done:
                self._task = None
            budget -= done or _MESSAGE
        return self._task is not None or self.inbox.size > 0

    def _hear(self, received: Received, now: float) -> Iterator[int]:
        """Apply a message in pieces; yield the number of figures in each."""
        message = self._open(received)
        if message is None:
            return
        own = message.router == self.rules.router
        if isinstance(message, PlacementsMessage) and self._placements is not None:
            yield from self._placements.hear(message, received.old, own, now)
        elif isinstance(message, LoadsMessage) and not own:
            yield from self._hear_loads(message, received.old, now)
        elif isinstance(message, OrderMessage) and self._orders is not None and not received.old:
            self._orders.hear(message, now)

    def _hear_loads(self, message: LoadsMessage, old: bool, now: float) -> Iterator[int]:
        names, states = numbers(message.names), numbers(message.states)
        if len(names) != len(states):
            raise ValueError("there is no state for each name")
        meters, spent = numbers(message.meters), numbers(message.spent)
        if 2 * len(meters) != len(spent):
            raise ValueError("there are no two figures for each client")
        debts = numbers(message.debts) or [0] * len(meters)
        if len(meters) != len(debts):
            raise ValueError("there is no debt of each client")
        loads, spending = self._loads, self._spending
        peer = None if old else self.peers.hear(message.router, message.number, now)
        if loads is None or spending is None or peer is None:
            return
        if message.left:
            self._forget(peer, now)
            return
        fell = message.whole
        if message.whole:
            peer.held = min(max(message.held, 0), _MOST_HELD)
            loads.only(peer, set(names), now, message.low, message.high)
        if message.all_meters:
            spending.only(peer, set(meters), message.first, message.last)
        for place, name in enumerate(meters):
            spending.hear(peer, name, spent[2 * place], spent[2 * place + 1], debts[place], now)
            if not place % _PIECE:
                yield _PIECE
        for start in range(0, len(names), _PIECE):
            for name, state in zip(names[start : start + _PIECE], states[start : start + _PIECE], strict=True):
                fell |= loads.hear(peer, name, state, now)
            yield _PIECE
        if fell and self._freed is not None:
            self._freed()

    def _forget(self, peer: Peer, now: float) -> None:
        """Let nothing of a peer count any more."""
        self.peers.forget(peer)
        if self._loads is not None:
            self._loads.forget(peer, now)
        if self._spending is not None:
            self._spending.only(peer, set())
        if self._freed is not None:
            self._freed()

    # -- what time and the fleet do ------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Let silent peers count no more, and free what was dropped. Call it periodically."""
        self._now = now
        self.prefixes.reclaim(_RECLAIM)
        for peer in self.peers.silent(now):
            self._forget(peer, now)
        if self._loads is not None:
            self._loads.divide()
        if self._repeating.due(now) and self._orders is not None:
            self._orders.again(now)

    def worker_changed(self, event: WorkerChanged) -> None:
        """Follow which workers there are."""
        if event.what == "added":
            self._joined(event.worker)
        elif event.what == "removed":
            if self._orders is not None:
                self._orders.parted(event.worker)
            self.members.part(event.worker)
        elif event.what == "draining" and self._orders is not None:
            self._orders.said(event.worker)

    def _joined(self, worker: Worker) -> None:
        member = self.members.join(worker)
        if self._loads is not None and self._placements is not None and self._orders is not None:
            self._loads.joined(member, self._now)
            self._placements.joined(member)
            self._orders.joined(member)
