"""How the router ends a stream of a gateway by itself: with a gRPC status, and a sentence for the gateway's log."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import grpc

from sglang_router.relay.deadlines import Due

Ended = tuple[grpc.StatusCode, str]

OK: Final = grpc.StatusCode.OK
OVER: Final = (OK, "")
"""No fault: all has been said."""
_LATE: Final = grpc.StatusCode.DEADLINE_EXCEEDED
TOO_LONG: Final = (_LATE, "--request-timeout-secs is over")
_SILENT: Final = (_LATE, "no request_headers came in time")
_UNREAD: Final = (_LATE, "--send-timeout-secs is over: the gateway does not read")
TOO_MANY: Final = (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests at once")
BY_DEADLINE: Final[Mapping[Due, Ended]] = MappingProxyType({Due.HEAD: _SILENT, Due.LINGER: OVER, Due.SEND: _UNREAD})
"""How a stream ends whose deadline of this kind has passed; with any other kind, the request gets an error."""


def not_the_protocol(why: str) -> Ended:
    """Return how a stream ends on which something came that cannot be read, or that does not belong there."""
    return grpc.StatusCode.INVALID_ARGUMENT, why


class BrokenOff(Exception):
    """The router ends the stream. how: with which status."""

    def __init__(self, how: Ended) -> None:
        super().__init__(how[1])
        self.how = how
