"""One line of the queue: the requests that wait for the same workers, in the order in which they begin.

    rank = since - priority * aging        the smallest rank begins first, then the smallest number

A priority is a head start: a point of it is worth `aging` seconds of waiting. So requests of one priority begin in the
order of their arrival, and one that waits is overtaken only by those that come within (their priority - its own) *
aging seconds after it: nobody waits for ever, whatever others send. A rank never changes, so nothing is sorted anew.

    priority   10  | h1 h2         head h1
                0  | n1 n2 n3      head n1      the first of the line is the head with the smallest rank
              -10  | l1            head l1

Adding one and taking one out costs the same however many wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Final, Generic, TypeVar

T = TypeVar("T")

MIXED: Final = "mixed"
"""The requests of a line wait for different things."""


class Queued(Generic[T]):
    """A request in the queue.

    number    of the request
    item      what its owner needs to start it later
    line      requests of one line begin in order; those of other lines may overtake them
    why       PLACE, ROOM, START, SESSION or PAUSED, see `routing.queue`
    since     when it was queued; seconds of the router's clock
    until     when it has waited too long
    priority  higher is sooner
    rank      see the module
    """

    __slots__ = ("item", "line", "number", "priority", "rank", "since", "until", "why")

    def __init__(
        self,
        number: int,
        item: T,
        line: Hashable,
        why: str,
        since: float,
        until: float,
        priority: int = 0,
        rank: float = 0.0,
    ) -> None:
        self.number = number
        self.item = item
        self.line = line
        self.why = why
        self.since = since
        self.until = until
        self.priority = priority
        self.rank = rank

    def __repr__(self) -> str:
        priority = f" priority {self.priority}" if self.priority else ""
        return f"<Queued {self.number} for {self.why}{priority} since {self.since:.3f} until {self.until:.3f}>"


def order_of(queued: Queued[T]) -> tuple[float, int]:
    """Return what orders requests: the smallest begins first."""
    return queued.rank, queued.number


class Line(Generic[T]):
    """See the module.

    why  what all of its requests wait for; MIXED when they wait for different things
    """

    # A dict keeps the order too, but to find its first key it skips all keys deleted before it: with 100,000
    # requests queued, removing one and adding one costs 17 us with a dict, 3 us with an OrderedDict.

    __slots__ = ("_classes", "why")

    def __init__(self, members: Iterable[Queued[T]] = ()) -> None:
        self._classes: dict[int, OrderedDict[int, Queued[T]]] = {}  # by priority; none is empty
        self.why = MIXED
        for queued in members:
            self.add(queued)

    def __repr__(self) -> str:
        return f"<Line of {len(self)} for {self.why}>"

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    def __iter__(self) -> Iterator[Queued[T]]:
        """Iterate over a copy, in the order in which they begin. O(n log n)"""
        return iter(sorted((queued for each in self._classes.values() for queued in each.values()), key=order_of))

    def add(self, queued: Queued[T]) -> None:
        """Add a request. Those of one priority are added in their order."""
        if not self._classes:
            self.why = queued.why
        elif queued.why != self.why:
            self.why = MIXED
        self._classes.setdefault(queued.priority, OrderedDict())[queued.number] = queued

    def remove(self, queued: Queued[T]) -> None:
        """Take a request out."""
        each = self._classes[queued.priority]
        del each[queued.number]
        if not each:
            del self._classes[queued.priority]

    def first(self) -> Queued[T]:
        """Return the one that begins next. Call it while there is one."""
        heads = [each[next(iter(each))] for each in self._classes.values()]
        return heads[0] if len(heads) == 1 else min(heads, key=order_of)

    def before(self, rank: float) -> Queued[T] | None:
        """Return one of those that begin before a newcomer of this rank; None when it would be the first.

        It is the newest of them, unless the newcomer overtakes some of its priority.
        """
        found: Queued[T] | None = None
        for each in self._classes.values():
            last = each[next(reversed(each))]
            if last.rank > rank:  # the newcomer overtakes those of this priority, or some of them
                last = each[next(iter(each))]
            if last.rank <= rank and (found is None or order_of(last) > order_of(found)):
                found = last
        return found

    def lowest(self) -> Queued[T]:
        """Return the newest of the lowest priority. Call it while there is one."""
        each = self._classes[min(self._classes)]
        return each[next(reversed(each))]
