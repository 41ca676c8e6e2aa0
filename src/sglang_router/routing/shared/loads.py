"""What is in flight at workers: told when it changes, heard of other routers, and counted with this router's own.

    gather(now, whole)          what changed since the last time, or all, as names and states; None: nothing did
    hear(peer, ...)             what another router told: `Worker.load` and `Work.backlog` hold it from now on
    forget(peer)                it counts no more

*Doubt.* A state says, too, that its router has taken the worker out: its breaker is open, or it is ejected. Nobody else
takes it out for that, because a router that is cut off from all workers would take them from all. But it is checked at
once, and its next failure opens the breaker here, without the usual count (`Fleet.doubt`). A router that says so again
and again is not listened to: four times at first, then every ten seconds for one worker, whoever says it.

A state holds absolute figures, so that one that is lost, or comes twice, is mended by the next one; and all of them are
told once a second. A lease counts at its own router at once, and at the others after one flush.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sglang_router.routing.fleet import Fleet
from sglang_router.routing.shared.members import Member, Members
from sglang_router.routing.shared.peers import HIGHEST, MOST_NAMES, Peer, Peers
from sglang_router.routing.states import Breaker
from sglang_router.routing.worker import Worker

MOST_STATES: Final = 2048
"""Workers in one message: 32 kB."""
_SOON: Final = 0.02
"""Seconds by which it must change until when a worker is busy, to be told before all is told."""
_OUT: Final = 1 << 24
"""The flag of a worker that its router has taken out."""
_MOST_RUNNING: Final = (1 << 16) - 1
_SENT_AT: Final = 16
_SENT: Final = 255
_MOST_MS: Final = 600_000


class SharedLoads:
    """See the module."""

    __slots__ = ("_check_now", "_fleet", "_members", "_peers")

    def __init__(self, members: Members, peers: Peers, fleet: Fleet, check_now: Callable[[Worker], None]) -> None:
        self._members = members
        self._peers = peers
        self._fleet = fleet
        self._check_now = check_now

    def __repr__(self) -> str:
        return f"<SharedLoads of {self._members!r}>"

    def gather(self, now: float, whole: bool) -> tuple[list[int], list[int]]:
        """Return names and states of the workers to tell of: those whose figures changed, or all that are not zero.

        In the order of names.
        """
        found: list[tuple[int, int]] = []
        for member in self._members.here:
            worker = member.worker
            if worker is None:
                continue
            running = worker.own_load
            backlog = worker.work.own_backlog(now) if worker.work.active else 0.0
            until = now + backlog
            out = worker.ejected != "" or worker.circuit.state is Breaker.OPEN
            known = running == member.running and out == member.out and abs(until - max(member.until, now)) < _SOON
            member.running, member.until, member.out = running, until, out
            if whole:
                worker.work.settle()
            if (running or backlog > 0.0 or out) if whole else not known:
                sent = member.sent + worker.work.requests
                flags = (sent & _SENT) << _SENT_AT | (_OUT if out else 0)
                state = min(running, _MOST_RUNNING) | flags | min(int(backlog * 1000.0), _MOST_MS) << 32
                found.append((member.name, state))
        found.sort()
        return [name for name, _ in found], [state for _, state in found]

    def hear(self, peer: Peer, name: int, state: int, now: float) -> bool:
        """Take what a peer tells of one worker; return whether its load fell. Far too many workers are ignored."""
        if len(peer.sent) >= MOST_NAMES and name not in peer.sent:
            return False
        member = self._members.find(name)
        running = state & _MOST_RUNNING
        backlog = min(state >> 32, _MOST_MS) / 1000.0
        if backlog > 0.0:
            peer.until[name] = now + backlog
        else:
            peer.until.pop(name, None)
        before = peer.running.get(name, 0)
        if running:
            peer.running[name] = running
        else:
            peer.running.pop(name, None)
        self._count(member, now)
        sent = state >> _SENT_AT & _SENT
        more = (sent - peer.sent.get(name, sent)) & _SENT
        peer.sent[name] = sent
        worker = member.worker
        if more and worker is not None:
            worker.work.passed(more, now)
        if not state & _OUT:
            peer.out.discard(name)
        elif name not in peer.out:
            peer.out.add(name)
            if worker is not None and not member.doubts.take(now):
                self._fleet.doubt(worker, now)
                self._check_now(worker)
        return running < before

    def only(self, peer: Peer, names: set[int], now: float, low: int = 0, high: int = HIGHEST) -> None:
        """Forget what a peer has at all other workers than these, from one name to another."""
        for name in {*peer.running, *peer.until, *peer.out}:
            if low <= name <= high and name not in names:
                peer.out.discard(name)
                peer.running.pop(name, None)
                peer.until.pop(name, None)
                member = self._members.known(name)
                if member is not None:
                    self._count(member, now)
        peer.tidy()

    def forget(self, peer: Peer, now: float) -> None:
        """Let nothing of a peer count any more."""
        self.only(peer, set(), now)

    def joined(self, member: Member, now: float) -> None:
        """Let what the peers told of a worker count, which is registered from now on."""
        self._count(member, now)

    def divide(self) -> None:
        """Let full workers be divided between the routers that there are now."""
        self._fleet.pools.divide(len(self._peers) + 1)

    def _count(self, member: Member, now: float) -> None:
        """Sum up what the peers have at a worker."""
        worker = member.worker
        if worker is None:
            return
        elsewhere, until = 0, 0.0
        for peer in self._peers.by_name.values():
            elsewhere += peer.running.get(member.name, 0)
            until = max(until, peer.until.get(member.name, 0.0))
        if elsewhere != worker.elsewhere:
            self._fleet.share(worker, elsewhere)
        worker.work.elsewhere_until = until
