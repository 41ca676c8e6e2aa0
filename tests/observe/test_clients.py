"""What clients use is counted by the names of their keys, and clients cannot make labels."""

from __future__ import annotations

from event_makers import finished
from sglang_router.observe.clients import ClientCounts
from sglang_router.observe.tallies import ClientTally
from sglang_router.routing.usage import Usage


class Names:
    """The names of the keys that the router knows now."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)

    def __call__(self) -> set[str]:
        return self.names


def test_requests_tokens_and_errors_are_counted_by_client() -> None:
    tallies: dict[str, ClientTally] = {}
    counts = ClientCounts(Names("alice", "bob"), tallies)
    for usage in (Usage(10, 4, 2), Usage(5), None):
        counts.finished(finished(client="alice", usage=usage))
    counts.finished_all([finished(client="bob", status=429, code="requests_limited"), finished()])
    alice, bob = tallies["alice"], tallies["bob"]
    assert (alice.requests, alice.prompt, alice.cached, alice.completion, alice.refused) == (3, 15, 4, 2, {})
    assert (bob.requests, bob.prompt, bob.refused) == (1, 0, {"requests_limited": 1})
    assert (set(tallies), repr(counts)) == ({"alice", "bob"}, "<ClientCounts of 2 clients>")


def test_subjects_of_tokens_and_names_that_are_gone_make_no_labels() -> None:
    tallies: dict[str, ClientTally] = {}
    names = Names("alice")
    counts = ClientCounts(names, tallies)
    for client in ("jwt:one", "jwt:two", "gone", "alice"):
        counts.finished(finished(client=client))
    names.names = set()
    counts.finished(finished(client="alice"))
    assert {label: tally.requests for label, tally in tallies.items()} == {"jwt": 2, "other": 1, "alice": 2}


def test_the_number_of_labels_is_bounded() -> None:
    tallies: dict[str, ClientTally] = {}
    many = [f"client-{n}" for n in range(1100)]
    counts = ClientCounts(Names(*many), tallies)
    counts.finished_all([finished(client=client) for client in many])
    assert len(tallies) == 1001
    assert tallies["other"].requests == 100
