"""Which engines lack what, while orders that take something from them, or give it back, are carried out.

    claim = pausing.begin(url, takes, gives)     before the engine is asked: from now on it lacks `takes`
    pausing.end(claim, done)                     done: it has answered, see `end`

A worker gets no new requests while its engine lacks anything (`Worker.paused`). Orders to one engine can overlap: a
trainer repeats one whose answer takes long, or two programs order at the same time. So each order in flight has a claim
of its own, with a number in the order of sending, and an engine lacks what one of its claims takes, or what an order
has surely taken:

    order fails     only its own claim ends: what another order took stays taken
    order gives     ends what was taken before it was sent, not what is taken after it
    resume, or another process (`Fleet.set_paused` by others)      ends all, but what is then still done

Nothing is kept of an engine without an order in flight: its workers say what it lacks.
"""

from __future__ import annotations

from sglang_router.routing.fleet import Fleet


class Claim:
    """An order in flight.

    url     of its engine
    number  rises with each order
    takes   what the engine lacks if it does what the order says
    gives   what it has back then
    holds   what it lacks because of this order, as far as nobody has given it back meanwhile
    """

    __slots__ = ("gives", "holds", "number", "takes", "url")

    def __init__(self, url: str, number: int, takes: frozenset[str], gives: frozenset[str]) -> None:
        self.url = url
        self.number = number
        self.takes = takes
        self.gives = gives
        self.holds = takes

    def __repr__(self) -> str:
        return f"<Claim {self.number} on {self.url}: {', '.join(sorted(self.holds)) or 'nothing'}>"


class _Engine:
    """An engine with orders in flight. sure: what it lacks for sure, and the number of the order that took it."""

    __slots__ = ("claims", "sure")

    def __init__(self, lacks: set[str]) -> None:
        self.claims: list[Claim] = []
        self.sure = dict.fromkeys(lacks, 0)


class Pausing:
    """See the module."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._engines: dict[str, _Engine] = {}
        self._number = 0

    def __repr__(self) -> str:
        return f"<Pausing {sum(len(engine.claims) for engine in self._engines.values())} orders in flight>"

    def begin(self, url: str, takes: tuple[str, ...], gives: tuple[str, ...]) -> Claim:
        """Begin an order: the engine with this base URL lacks what it takes from now on."""
        engine = self._engines.get(url)
        if engine is None:
            engine = self._engines[url] = _Engine(self._lacks(url))
        else:
            self._look(url, engine)
        self._number += 1
        claim = Claim(url, self._number, frozenset(takes), frozenset(gives))
        engine.claims.append(claim)
        self._say(url, engine)
        return claim

    def end(self, claim: Claim, done: bool | None, passes: bool = False) -> None:
        """End an order.

        done    True: the engine has done it; False: it has not; None: nobody knows, so what it took stays taken, and
                what it gave is not believed to be back
        passes  the engine lacked it only while it carried the order out
        """
        url = claim.url
        engine = self._engines[url]
        self._look(url, engine)
        engine.claims.remove(claim)
        if done and claim.gives:
            engine.sure = {name: at for name, at in engine.sure.items() if name not in claim.gives or at > claim.number}
            for other in engine.claims:
                if other.number < claim.number:
                    other.takes -= claim.gives
                    other.holds -= claim.gives
        if done is not False and not passes:
            for name in claim.takes if done else claim.holds:
                engine.sure[name] = max(claim.number, engine.sure.get(name, 0))
        self._say(url, engine)
        if not engine.claims:
            del self._engines[url]

    def _lacks(self, url: str) -> set[str]:
        """Return what the workers say: all of them, for a new process is found rank by rank."""
        said = [set(worker.paused) for worker in self._fleet.entries(url)]
        return set.intersection(*said) if said else set()

    def _look(self, url: str, engine: _Engine) -> None:
        """Take note of what others than orders have ended meanwhile."""
        lacks = self._lacks(url)
        engine.sure = {name: at for name, at in engine.sure.items() if name in lacks}
        for claim in engine.claims:
            claim.holds &= lacks

    def _say(self, url: str, engine: _Engine) -> None:
        """Tell all ranks of the engine what it lacks."""
        lacks = tuple(sorted(engine.sure.keys() | {name for claim in engine.claims for name in claim.holds}))
        for worker in self._fleet.entries(url):
            if worker.paused != lacks:
                self._fleet.set_paused(worker, lacks)
