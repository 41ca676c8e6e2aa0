"""What other routers sent to a worker, as this one hears of it: how much of that lies between two prompts of its own.

    sent here      A     B                     heard between the sending of A and that of B: 2 prompts
    others           1 2   3
    the engine     A 1 2 B 3                   so from the first byte of A to that of B it reads 3 prompts
                    '-----'

An engine reads prompts in order of arrival, and what is heard comes equally late in front of A and of B.
"""

from __future__ import annotations


class Heard:
    """See the module.

    any     something was heard: else nothing else needs to be asked
    items   requests of other routers so far; units: bytes of their prompts that were not cached
    """

    __slots__ = ("_last", "_since", "_when_sent", "any", "items", "units")

    def __init__(self) -> None:
        self.any = False
        self.items = 0
        self.units = 0
        self._when_sent: dict[object, tuple[int, int]] = {}  # items and units, by the streams that are awaited
        self._since = self._last = (0, 0)  # the same for what a busy time began with, and for the latest stream of it

    def __repr__(self) -> str:
        return f"<Heard {self.items} requests, {self.units} bytes>"

    def more(self, items: int, units: int) -> None:
        """Take what other routers have sent since the last call."""
        self.any = True
        self.items += items
        self.units += units

    def sent(self, key: object) -> None:
        """Take note that a stream is sent now."""
        self._when_sent[key] = self.items, self.units

    def gone(self, key: object) -> None:
        """Take note that a stream is awaited no more."""
        self._when_sent.pop(key, None)

    def began(self, key: object) -> bool:
        """Take the first byte of a stream; return whether something was heard since it was sent."""
        sent = self._when_sent.pop(key, (0, 0))
        if sent > self._last:  # streams that begin together do so in any order
            self._last = sent
        return sent != (self.items, self.units)

    def begin(self) -> None:
        """Count from now on: a stream is sent, and no other one is awaited."""
        self._since = self._last = self.items, self.units

    def go_on(self) -> None:
        """Count from the latest stream on that began."""
        self._since = self._last

    @property
    def between(self) -> tuple[int, int]:
        """Requests, and bytes of their prompts, between the beginning and the latest stream that began."""
        return self._last[0] - self._since[0], self._last[1] - self._since[1]
