"""What goes to the store and comes from it, in figures."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from sglang_router.sharing.store import Position

_OWN: Final = 1024
"""Own messages of which the way there and back is measured."""
_SMOOTHING: Final = 0.05


class Traffic:
    """Counts messages and bytes, by topic; `lag` says how old what is read is.

    sent, received            messages by topic
    sent_bytes, received_bytes
    lost                      messages that could not be written, by topic
    lag                       seconds from writing an own message until it was read again; None before the first.
                              It is measured by this router's own clock: those of routers are never compared.
    size                      mean bytes of an entry, by topic
    """

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.sent_bytes: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.received_bytes: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self.lag: float | None = None
        self.size: dict[str, float] = {}
        self._own: OrderedDict[Position, float] = OrderedDict()

    def wrote(self, topic: str, size: int, position: Position, began: float) -> None:
        """Count a message that was written. began: when writing it began."""
        _add(self.sent, topic, 1)
        _add(self.sent_bytes, topic, size)
        self._measure(topic, size)
        self._own[position] = began
        if len(self._own) > _OWN:
            self._own.popitem(last=False)

    def missed(self, topic: str) -> None:
        """Count a message that is lost."""
        _add(self.lost, topic, 1)

    def read(self, topic: str, size: int, position: Position, now: float) -> None:
        """Count a message that was read, also an own one."""
        _add(self.received, topic, 1)
        _add(self.received_bytes, topic, size)
        self._measure(topic, size)
        began = self._own.pop(position, None)
        if began is not None:
            self.lag = now - began

    def _measure(self, topic: str, size: int) -> None:
        known = self.size.get(topic)
        self.size[topic] = size if known is None else known + (size - known) * _SMOOTHING


def _add(counts: dict[str, int], topic: str, number: int) -> None:
    counts[topic] = counts.get(topic, 0) + number
