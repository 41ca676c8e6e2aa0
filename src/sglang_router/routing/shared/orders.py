"""What operators want of workers, said at one router and done by all: to drain, and to resume.

The order of the stream decides, for the router that was asked as well, whose own message comes back: so all routers end
up with the same. An order for a worker that is unknown here waits for it; a new router reads all of them at its start.

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
from sglang_router.routing.source import Source
from sglang_router.routing.worker import Worker

_MOST_ORDERS: Final = 1 << 13
MOST_TOLD: Final = 1024
"""Workers of one message: 8 kB."""


class SharedOrders:
    """See the module. began: whether what happens to workers is told: not before the orders of others were heard."""

    __slots__ = ("_fleet", "_members", "_numbers", "_obeying", "_orders", "_pending", "began")

    def __init__(self, members: Members, fleet: Fleet) -> None:
        self.began = False
        self._members = members
        self._fleet = fleet
        self._orders: OrderedDict[int, bool] = OrderedDict()  # whether a worker drains, by its name
        self._numbers = Numbers()
        self._pending: dict[int, bool] = {}
        self._obeying = False

    def __repr__(self) -> str:
        return f"<SharedOrders: {sum(self._orders.values())} workers drain>"

    def said(self, worker: Worker) -> None:
        """Take note that a worker of this router drains from now on, or does no longer."""
        member = self._members.of(worker)
        if self.began and not self._obeying and member is not None and _is_shared(worker):
            self._pending[member.name] = worker.draining

    def gather(self, router: bytes, number: int) -> OrderMessage | None:
        """Return the next message; None when there is nothing to tell."""
        self.began = True
        if not self._pending:
            return None
        told = list(self._pending.items())[:MOST_TOLD]
        for name, _ in told:
            del self._pending[name]
        draining, resumed = ([name for name, drains in told if drains is which] for which in (True, False))
        return OrderMessage(FORM, router, number, packed(draining), packed(resumed))

    def hear(self, message: OrderMessage) -> None:
        """Do what a message says, if it is later than all before of its router.

        Raises: ValueError, for one without sense.
        """
        draining, resumed = numbers(message.draining), numbers(message.resumed)
        if not self._numbers.is_next(message.router, message.number):
            return
        for names, drains in ((draining, True), (resumed, False)):
            for name in names:
                self._orders[name] = drains
                self._orders.move_to_end(name)
                member = self._members.known(name)
                if member is not None and name not in self._pending:  # else the own order is the later one
                    self._obey(member, drains)
        while len(self._orders) > _MOST_ORDERS:
            self._orders.popitem(last=False)

    def joined(self, member: Member) -> None:
        """Do what was ordered of a worker that is registered from now on."""
        drains = self._orders.get(member.name)
        if drains is not None:
            self._obey(member, drains)

    def rename(self, names: dict[int, int]) -> None:
        """Name the workers of this router by the key that the fleet has now; forget what was ordered of others.

        names  the new ones by the old ones
        """
        self._orders = OrderedDict((names[name], drains) for name, drains in self._orders.items() if name in names)
        self._pending = {names[name]: drains for name, drains in self._pending.items() if name in names}

    def _obey(self, member: Member, drains: bool) -> None:
        worker = member.worker
        if worker is not None and _is_shared(worker):
            self._obeying = True
            self._fleet.set_draining(worker, drains)
            self._obeying = False


def _is_shared(worker: Worker) -> bool:
    """Return whether other routers may have a worker as well, and it drains not just for a restart."""
    return worker.spec.source is not Source.REPLICAS and not worker.returning
