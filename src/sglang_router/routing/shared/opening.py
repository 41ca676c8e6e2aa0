"""Open what came from a stream: who wrote it, and what it says. What cannot be used is counted by its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec

from sglang_router.routing.shared.inbox import Received
from sglang_router.routing.shared.records import (
    FORM,
    AnyMessage,
    LoadsMessage,
    OrderMessage,
    PlacementsMessage,
    SharedTopic,
)
from sglang_router.routing.shared.secret import Secret

_MESSAGES: Final = {
    SharedTopic.LOADS: LoadsMessage,
    SharedTopic.PLACEMENTS: PlacementsMessage,
    SharedTopic.ORDERS: OrderMessage,
}


class Opener:
    """See the module. secret: of the fleet; dropped: where it counts."""

    __slots__ = ("_dropped", "_form", "_secret", "_unpack")

    def __init__(self, secret: Secret, dropped: Counter[str]) -> None:
        self._secret = secret
        self._dropped = dropped
        self._form = msgspec.msgpack.Decoder(AnyMessage).decode
        self._unpack: dict[SharedTopic, Callable[[bytes], Any]] = {
            topic: msgspec.msgpack.Decoder(kind).decode for topic, kind in _MESSAGES.items()
        }

    def __repr__(self) -> str:
        return f"<Opener of {self._secret!r}>"

    def open(self, received: Received) -> LoadsMessage | PlacementsMessage | OrderMessage | None:
        """Return what a payload says; None for what cannot be used."""
        if not self._secret.is_ours(received.payload):
            self._dropped["foreign"] += 1
            return None
        data = self._secret.open(received.topic.value, received.payload)
        if data is None:
            self._dropped["forged"] += 1
            return None
        try:
            if self._form(data).form != FORM:  # its other fields may be others
                self._dropped["form"] += 1
                return None
            message: LoadsMessage | PlacementsMessage | OrderMessage = self._unpack[received.topic](data)
        except msgspec.MsgspecError:
            self._dropped["malformed"] += 1
            return None
        return message
