"""Where the control plane reads decisions: those about requests in flight, and about the last ones that ended."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from sglang_router.routing.decision_record import DecisionRecord
from sglang_router.routing.lease import Lease
from sglang_router.routing.recorder import Recorder


class DecisionBook:
    """See the module.

    recorder  keeps those of ended requests
    leases    returns those that are open
    flush     lets the recorder hear of the requests that have just ended
    """

    def __init__(
        self,
        recorder: Recorder,
        leases: Callable[[], Iterable[Lease]],
        flush: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._recorder = recorder
        self._leases = leases
        self._flush = flush
        self._clock = clock

    def __repr__(self) -> str:
        return f"<DecisionBook of {self._recorder!r}>"

    def read(self, ids: Container[str] = ()) -> list[DecisionRecord]:
        """Return the decisions about requests in flight, and then the last ended ones, each the newest first.

        ids  of requests: those in flight that have none of them are left out
        """
        self._flush()
        return [*self._recorder.running(self._leases(), self._clock(), ids), *self._recorder.ended()]

    def latest(self, most: int) -> list[DecisionRecord]:
        """Return the decisions about the last so many requests that ended, the newest first."""
        self._flush()
        return self._recorder.latest(most)
