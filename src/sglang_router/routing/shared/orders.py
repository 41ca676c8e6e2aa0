"""What operators want of workers, said at one router and done by all: to drain, and to resume.

The order of the stream decides, for the router that was asked as well, whose own message comes back: so all routers end
up with the same. An order for a worker that is unknown here waits for it; a new router reads all of them at its start.

*An order ends with its worker.* An address may be given to another engine later, which nobody has drained:

    instance   an order names the instance that it was given for, where its source tells instances (the uid of a pod);
               it concerns no other one. Without one, on either side, the URL alone counts
    left       a router that removes a worker that drains says so, and nobody makes a worker drain any more that gets
               this URL later. What drains goes on to drain: another router may remove it later, or never
    kept       a router that still has such a worker after KEPT_AFTER gives the order again, for routers that start
               later; one that ends gives it at once

Not the end of an engine's process: whoever drains a URL to repair its engine finds it drained when it is back.

What the store may have lost (`again`), the routers tell again: the first one that does spares the others. Nothing is
told again while the link to the store is young (`calm`): what was said meanwhile would be taken back.

The same messages tell which workers are added and removed, if routers share that (`routing.shared.workers`).

Not every drain is an order: not one for the time of a restart, nor one of an engine that a router runs itself, which
the others need not know, nor what the state file says at a start.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from sglang_router.routing.fleet import Fleet
from sglang_router.routing.shared.members import Member, Members
from sglang_router.routing.shared.packing import numbers, packed
from sglang_router.routing.shared.peers import Numbers
from sglang_router.routing.shared.records import FORM, OrderMessage
from sglang_router.routing.shared.workers import SharedWorkers
from sglang_router.routing.source import Source
from sglang_router.routing.worker import Worker

_MOST_ORDERS: Final = 1 << 13
MOST_TOLD: Final = 1024
"""Workers of one message: 16 kB."""
KEPT_AFTER: Final = 60.0
"""Seconds after which a worker is kept that another router has removed: sources do not all look at the same time."""
DRAIN: Final = 0
RESUME: Final = 1
LEFT: Final = 2


class WorkerOrder:
    """What was said last of a worker. what: DRAIN, RESUME or LEFT; instance: of which one, by its name; 0: of any."""

    __slots__ = ("instance", "what")

    def __init__(self, what: int, instance: int) -> None:
        self.what = what
        self.instance = instance

    def concerns(self, instance: int) -> bool:
        """Return whether it may be about an instance. 0: nobody knows which one it is."""
        return not self.instance or not instance or self.instance == instance


class SharedOrders:
    """See the module.

    own      the name of this router
    workers  those that are added and removed for all; None: each router has its own
    began    whether what happens to workers is told: not before the orders of others were heard
    """

    __slots__ = (
        "_fleet",
        "_members",
        "_numbers",
        "_obeying",
        "_orders",
        "_own",
        "_pending",
        "_repeats",
        "began",
        "workers",
    )

    def __init__(self, members: Members, fleet: Fleet, own: bytes, workers: SharedWorkers | None = None) -> None:
        self.began = False
        self.workers = workers
        self._members = members
        self._fleet = fleet
        self._own = own
        self._orders: OrderedDict[int, WorkerOrder] = OrderedDict()  # DRAIN and RESUME, by the worker's name
        self._numbers = Numbers()
        self._pending: dict[int, WorkerOrder] = {}
        self._repeats: dict[int, float] = {}  # when the order for a worker is given again
        self._obeying = False

    def __repr__(self) -> str:
        return f"<SharedOrders: {sum(order.what == DRAIN for order in self._orders.values())} workers drain>"

    def said(self, worker: Worker) -> None:
        """Take note that a worker of this router drains from now on, or does no longer."""
        member = self._members.of(worker)
        if member is not None and not self._obeying:
            self._tell(member.name, worker, DRAIN if worker.draining else RESUME)

    def parted(self, worker: Worker) -> None:
        """Take note that a worker of this router is removed, which `Members` still have.

        An engine whose ranks become workers drains on; it has left with the last of them.
        """
        member = self._members.of(worker)
        if member is None or not worker.draining:
            return
        stays = bool(self._fleet.entries(worker.spec.url))
        if worker.dp_rank is not None or not stays:
            self._tell(member.name, worker, LEFT)
        if worker.dp_rank is not None and not stays:
            self._tell(self._members.name(worker.spec.url), worker, LEFT)

    def _tell(self, name: int, worker: Worker, what: int) -> None:
        if self.began and _is_shared(worker):
            said = self._pending[name] = WorkerOrder(what, self._members.instance(worker))
            self._repeats.pop(name, None)
            order = self._orders.get(name)
            if what == LEFT and order is not None and order.concerns(said.instance):
                del self._orders[name]  # at once: the next one at this URL may join before the message comes back

    def gather(self, router: bytes, number: int, now: float, calm: bool) -> OrderMessage | None:
        """Return the next message; None when there is nothing to tell.

        calm  the store has been reached for a while, so that what the others have said is known
        """
        self.began = True
        if self._repeats and calm:
            self._repeat(now)
        added: dict[int, bytes] = {}
        removed: list[int] = []
        if self.workers is not None:
            added, removed = self.workers.gather(number, now, calm)
        if not self._pending and not added and not removed:
            return None
        told = list(self._pending.items())[:MOST_TOLD]
        for name, _ in told:
            del self._pending[name]
        draining, resumed, left = ([each for each in told if each[1].what == what] for what in (DRAIN, RESUME, LEFT))
        return OrderMessage(
            FORM,
            router,
            number,
            packed([name for name, _ in draining]),
            packed([name for name, _ in resumed]),
            packed([name for name, _ in left]),
            packed([order.instance for _, order in (*draining, *left)]),
            tuple(added.values()),
            packed(removed),
            packed(list(added)),
        )

    def hear(self, message: OrderMessage, now: float) -> None:
        """Do what a message says, if it is later than all before of its router.

        Raises: ValueError, for one without sense.
        """
        draining, resumed, left = numbers(message.draining), numbers(message.resumed), numbers(message.left)
        count = len(draining)
        instances = numbers(message.instances) or [0] * (count + len(left))  # an older router tells none
        if len(instances) != count + len(left):
            raise ValueError("there is no instance for each worker")
        names, removed = numbers(message.named), numbers(message.removed)
        if len(names) != len(message.added):
            raise ValueError("there is no name for each description")
        added = dict(zip(names, message.added, strict=True))
        if self.workers is not None:
            self.workers.check(added, removed)
        if not self._numbers.is_next(message.router, message.number):
            return
        own = message.router == self._own
        if self.workers is not None:  # first: a worker that is removed takes its drain along
            self.workers.hear(own, message.number, added, removed)
        for name, instance in zip(draining, instances[:count], strict=True):
            self._ordered(name, WorkerOrder(DRAIN, instance))
        for name in resumed:
            self._ordered(name, WorkerOrder(RESUME, 0))
        for name, instance in zip(left, instances[count:], strict=True):
            self._ended(name, WorkerOrder(LEFT, instance), own, now)
        while len(self._orders) > _MOST_ORDERS:
            self._orders.popitem(last=False)

    def joined(self, member: Member) -> None:
        """Do what was ordered of a worker that is registered from now on."""
        order = self._orders.get(member.name)
        if order is not None:
            self._obey(member, order)

    def lost(self, at: float) -> None:
        """Hear that the store does not have any more what it had. at: see `again`."""
        if self.workers is not None:
            self.workers.lost()
        self.again(at)

    def again(self, at: float) -> None:
        """Tell again what holds for workers of this router, at a time, as far as no other router does before."""
        for name, order in self._orders.items():
            if self._holds(name, order):
                self._repeats[name] = at
        if self.workers is not None:
            self.workers.again(at)

    def rename(self, names: dict[int, int]) -> None:
        """Name the workers of this router by the key that the fleet has now; forget what was ordered of others.

        names  the new ones by the old ones
        """
        orders, pending = self._orders, self._pending
        if self.workers is not None:
            self.workers.rename()
        self._repeats.clear()
        self._orders = OrderedDict(
            (names[name], self._renamed(names[name], order)) for name, order in orders.items() if name in names
        )
        self._pending = {
            names[name]: self._renamed(names[name], order) for name, order in pending.items() if name in names
        }

    def _renamed(self, name: int, order: WorkerOrder) -> WorkerOrder:
        """Return an order for a worker of this router, whose name is a new one."""
        member = self._members.known(name)
        worker = None if member is None else member.worker
        return WorkerOrder(order.what, self._members.instance(worker) if order.instance and worker is not None else 0)

    def _repeat(self, now: float) -> None:
        """Give the orders again whose time has come."""
        for name in [name for name, at in self._repeats.items() if now >= at]:
            del self._repeats[name]
            member = self._members.known(name)
            if member is not None and member.worker is not None:
                self.said(member.worker)

    def _ordered(self, name: int, order: WorkerOrder) -> None:
        """Keep an order, and obey it."""
        self._orders[name] = order
        self._orders.move_to_end(name)
        self._repeats.pop(name, None)
        member = self._members.known(name)
        if member is not None and not self._is_pending(member):  # else the own order is the later one
            self._obey(member, order)

    def _ended(self, name: int, left: WorkerOrder, own: bool, now: float) -> None:
        """Forget the order for a worker that is removed at a router; if it drains on here, give it again later."""
        order = self._orders.get(name)
        if order is None or order.what != DRAIN or not left.concerns(order.instance):
            return
        del self._orders[name]
        if not own and name not in self._pending and self._holds(name, order):
            self._repeats[name] = now + KEPT_AFTER

    def _holds(self, name: int, order: WorkerOrder) -> bool:
        """Return whether an order is about a worker that is registered here, and is done."""
        member = self._members.known(name)
        worker = None if member is None else member.worker
        if worker is None or not _is_shared(worker) or worker.draining != (order.what == DRAIN):
            return False
        return order.concerns(self._members.instance(worker))

    def _is_pending(self, member: Member) -> bool:
        """Return whether an own order about a worker is not told yet; one about another instance does not count."""
        pending, worker = self._pending.get(member.name), member.worker
        return pending is not None and (worker is None or pending.concerns(self._members.instance(worker)))

    def _obey(self, member: Member, order: WorkerOrder) -> None:
        worker = member.worker
        if worker is not None and _is_shared(worker) and order.concerns(self._members.instance(worker)):
            self._obeying = True
            self._fleet.set_draining(worker, order.what == DRAIN)
            self._obeying = False


def _is_shared(worker: Worker) -> bool:
    """Return whether other routers may have a worker as well, and it drains not just for a restart."""
    return worker.spec.source is not Source.REPLICAS and not worker.returning
