"""What clients use, by the names of their keys: requests, tokens and refusals. A listener, and how a scrape reads it.

    Finished --> ClientCounts.finished_all --> ClientTally of the label --> the metrics sgl_router_client_*

A label is the name of a key that the router knows, `jwt` for all tokens of the identity provider, and `other` for names
that it does not know any more. So clients cannot make labels, and at most `_MOST` are ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.readings import Reader, Sample
from sglang_router.observe.tallies import OTHER, ClientTally
from sglang_router.routing.events import Finished, Listener

_MOST: Final = 1000
_TOKEN: Final = "jwt"  # noqa: S105 - a label


class ClientCounts(Listener):
    """See the module.

    names    returns the names of the keys that the router knows now
    tallies  by label
    """

    def __init__(self, names: Callable[[], Collection[str]], tallies: dict[str, ClientTally]) -> None:
        self._names = names
        self.tallies = tallies

    def __repr__(self) -> str:
        return f"<ClientCounts of {len(self.tallies)} clients>"

    def finished(self, event: Finished) -> None:
        """Count a request."""
        self.finished_all((event,))

    def finished_all(self, events: Sequence[Finished]) -> None:
        """Count the requests of clients with a key."""
        for event in events:
            client = event.tag.client
            if client:
                self._tally(client).add(event.answer)

    def _tally(self, client: str) -> ClientTally:
        tally = self.tallies.get(client)
        if tally is None:
            label = _TOKEN if client.startswith(f"{_TOKEN}:") else client
            if label != _TOKEN and (label not in self._names() or len(self.tallies) >= _MOST):
                label = OTHER
            tally = self.tallies.setdefault(label, ClientTally())
        return tally


def per_client(items: Callable[[ClientTally], Iterable[Sample]]) -> Reader:
    """Read samples of each client; the label values of `items` follow its name."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        for label, tally in list(counts.clients.items()):
            for values, number in items(tally):
                yield (label, *values), number

    return read
