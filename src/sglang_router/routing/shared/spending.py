"""What clients and models with limits have used at all routers together, see `routing.quotas`.

    gather(whole)              what was used since the last time, as names and figures
    hear(peer, ...)            what another router told: it is charged here, and its requests in flight count
    forget(peer)               it counts no more

Each router charges its own requests at once and those of the others after one flush. So as many requests more than a
limit allows may pass as come to the other routers within that time; the client waits longer then.

What was used is told once. A router that was not there, or did not hear it, learns how much each limit is used up when
it hears of the others for the first time, or again: of what several say the most counts. (Only then: told again and
again, each time a moment old, it would never end.)
"""

from __future__ import annotations

from typing import Final

from sglang_router.routing.quotas import Meter, Quotas
from sglang_router.routing.shared.peers import HIGHEST, MOST_NAMES, Peer, Peers
from sglang_router.routing.shared.secret import Secret

MOST_METERS: Final = 768
"""Clients and models in one message: 24 kB."""
_FIRST: Final = 2.0
"""Seconds after a router's first message in which it counts how much it says that limits are used up."""
_MOST: Final = (1 << 32) - 1


class SharedSpending:
    """See the module."""

    __slots__ = ("_meters", "_peers", "_quotas", "_secret", "_used")

    def __init__(self, quotas: Quotas, peers: Peers, secret: Secret) -> None:
        self._quotas = quotas
        self._peers = peers
        self._secret = secret
        self._meters: dict[int, Meter] = {}  # by code; some that are no more
        self._used: dict[Meter, None] = {}  # that may not be as if nothing was used
        quotas.touched = {}
        quotas.joined = self._joined
        self._look()

    def __repr__(self) -> str:
        return f"<SharedSpending of {len(self._meters)} clients and models>"

    def gather(self, now: float, whole: bool) -> tuple[list[int], list[int], list[int]]:
        """Return codes, and for each two figures: requests in flight and begun, and tokens; and with `whole` its debts.
        In the order of codes."""
        codes, spent, debts = [], [], []
        touched, self._quotas.touched = self._quotas.touched or {}, {}
        self._used |= touched
        if whole:
            self._look()
            touched |= {meter: None for meter in self._meters.values() if meter.running}
            known = self._meters
            self._used = {each: None for each in self._used if known.get(each.code) is each and each.debts(now)}
            touched |= self._used
        for meter in sorted(touched, key=lambda meter: meter.code):
            begun, tokens = meter.untold()
            codes.append(meter.code)
            spent += [min(meter.running, _MOST) | min(begun, _MOST) << 32, tokens]
            if whole:
                debts.append(meter.debts(now))
        return codes, spent, debts

    def hear(self, peer: Peer, code: int, spent: int, tokens: int, debts: int, now: float) -> None:
        """Take what a peer tells of one client or model."""
        running, meter = spent & _MOST, self._meters.get(code)
        if running:
            if len(peer.meters) < MOST_NAMES or code in peer.meters:
                peer.meters[code] = running
        else:
            peer.meters.pop(code, None)
        if meter is not None:
            meter.charge(spent >> 32, tokens, now)
            if debts and now - peer.since <= _FIRST:
                meter.owes(debts, now)
            self._used[meter] = None
            self._count(meter)

    def only(self, peer: Peer, codes: set[int], first: int = 0, last: int = HIGHEST) -> None:
        """Forget what a peer has in flight of all others than these, from one code to another."""
        for code in [code for code in peer.meters if first <= code <= last and code not in codes]:
            del peer.meters[code]
            meter = self._meters.get(code)
            if meter is not None:
                self._count(meter)

    def rename(self) -> None:
        """Name clients and models by the key that the fleet has now."""
        for meter in self._quotas.meters():
            meter.code = 0
        self._look()

    def _count(self, meter: Meter) -> None:
        meter.elsewhere = sum([peer.meters.get(meter.code, 0) for peer in self._peers.by_name.values()])

    def _joined(self, meter: Meter) -> None:
        meter.code = self._secret.name(b"meter", meter.name.encode())
        self._meters[meter.code] = meter
        self._count(meter)

    def _look(self) -> None:
        """Find the meters of now."""
        self._meters = {}
        for meter in self._quotas.meters():
            if meter.code:
                self._meters[meter.code] = meter
            else:
                self._joined(meter)
