"""Workers that are added and removed at one router, and at all: whose word counts, and what a newcomer learns."""

from __future__ import annotations

import msgspec
import pytest

from fleets import Bench
from joined import KEY, LARGE, Hands, Joined, spec_at
from sglang_router.routing.shared.packing import packed
from sglang_router.routing.shared.records import FORM, OrderMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.sharing import SharedState
from sglang_router.routing.source import Source


def fleet_of(routers: int) -> Joined:
    joined = Joined(0, 0)
    for _ in range(routers):
        joined.add(0, hands=Hands)
    joined.flush(0.0)
    return joined


def add(joined: Joined, router: int, url: str) -> None:
    """Add a worker as an operator does."""
    joined.benches[router].fleet.add(spec_at(url), 0.0)
    said(joined, router, url, url.encode())


def remove(joined: Joined, router: int, url: str) -> None:
    fleet = joined.benches[router].fleet
    for worker in fleet.entries(url):
        fleet.remove(worker)
    said(joined, router, url, None)


def said(joined: Joined, router: int, url: str, described: bytes | None) -> None:
    workers = joined.states[router].workers
    assert workers is not None
    workers.said(url, described)


def urls(bench: Bench) -> list[str]:
    return sorted(worker.url for worker in bench.fleet)


def everywhere(joined: Joined) -> list[list[str]]:
    return [urls(bench) for bench in joined.benches]


def newcomer(joined: Joined) -> list[str]:
    """Return the workers of a router that reads all from the beginning."""
    return urls(reader(joined, 0))


def reader(joined: Joined, since: int) -> Bench:
    """Return a router that has read what was told since so many messages."""
    bench, state = joined.add(0, hands=Hands)
    for topic, payload in [each[1:] for each in joined.sent[since:]]:
        if topic is SharedTopic.ORDERS:
            state.receive(topic, payload)
    assert not state.apply(1.0, LARGE)
    del joined.states[-1], joined.benches[-1]
    return bench


A, B = "http://a:1", "http://b:1"


def test_what_is_added_and_removed_at_one_router_is_at_all_and_those_to_come() -> None:
    joined = fleet_of(3)
    add(joined, 0, A)
    add(joined, 1, B)
    joined.flush(0.1)
    assert everywhere(joined) == [[A, B]] * 3
    assert newcomer(joined) == [A, B]
    remove(joined, 2, A)
    joined.flush(0.2)
    assert everywhere(joined) == [[B]] * 3
    assert newcomer(joined) == [B]
    told = len(joined.sent)
    joined.flush(0.3)
    assert len(joined.sent) == told, "nobody repeats what he heard"


def test_the_stream_decides_between_two_words_at_once() -> None:
    joined = fleet_of(2)
    add(joined, 0, A)
    joined.flush(0.1)
    remove(joined, 0, A)
    remove(joined, 1, A)
    add(joined, 1, A)  # its message is the later one
    joined.flush(0.2)
    assert everywhere(joined) == [[A], [A]]
    remove(joined, 0, A)
    add(joined, 0, A)
    remove(joined, 1, A)
    joined.flush(0.3)
    assert everywhere(joined) == [[], []]


def test_an_own_word_that_comes_back_late_changes_nothing() -> None:
    joined = fleet_of(2)
    add(joined, 0, A)
    joined.flush(0.1)
    remove(joined, 0, A)
    joined.tell(0.2)  # on its way
    add(joined, 0, A)
    worker = joined.benches[0].fleet.by_url(A)
    joined.flush(0.3)
    joined.flush(0.4)
    assert everywhere(joined) == [[A], [A]]
    assert joined.benches[0].fleet.by_url(A) is worker


def test_workers_that_something_else_names_stay() -> None:
    joined = fleet_of(2)
    joined.benches[1].fleet.add(spec_at(A, Source.FLAGS), 0.0)
    worker = joined.benches[1].fleet.by_url(A)
    add(joined, 0, A)
    joined.flush(0.1)
    assert joined.benches[1].fleet.by_url(A) is worker
    remove(joined, 0, A)
    joined.flush(0.2)
    assert everywhere(joined) == [[], [A]]


def test_a_removal_takes_the_drain_along() -> None:
    joined = fleet_of(2)
    add(joined, 0, A)
    joined.flush(0.1)
    for worker in joined.benches[1].fleet:
        joined.benches[1].fleet.set_draining(worker, True)
    joined.flush(0.2)
    assert [worker.draining for bench in joined.benches for worker in bench.fleet] == [True, True]
    remove(joined, 0, A)
    joined.flush(0.3)
    joined.flush(0.4)
    add(joined, 0, A)
    joined.flush(0.5)
    assert [worker.draining for bench in joined.benches for worker in bench.fleet] == [False, False]


def test_a_worker_whose_addition_the_stream_has_forgotten_is_removed_too() -> None:
    joined = fleet_of(2)
    joined.benches[1].fleet.add(spec_at(A), 0.0)  # of its state file
    remove(joined, 0, A)
    joined.flush(0.1)
    assert everywhere(joined) == [[], []]


def test_what_the_store_has_lost_is_told_again_as_far_as_it_is_still_there() -> None:
    joined = fleet_of(2)
    for url in (A, B):
        add(joined, 0, url)
    joined.flush(10.0)
    for bench in joined.benches:  # here it ended otherwise, as by a restart without it
        Hands(bench).remove(B)
    joined.sent.clear()
    for state in joined.states:
        state.store_lost()
    for step in range(300):
        joined.flush(10.0 + step / 80)
    assert sum(topic is SharedTopic.ORDERS for _, topic, _ in joined.sent) == 1
    assert newcomer(joined) == [A]


@pytest.mark.parametrize("again", [False, True])
def test_what_an_operator_removes_before_it_is_told_again_does_not_come_back(again: bool) -> None:
    joined = fleet_of(2)
    add(joined, 0, A)
    joined.flush(10.0)
    for state in joined.states:
        state.store_lost()
    remove(joined, 0, A)
    joined.flush(10.1)
    if again:  # in its new description
        joined.benches[0].fleet.add(spec_at(A), 0.0)
        said(joined, 0, A, A.encode() + b" 2.5")
        joined.flush(10.2)
    told = len(joined.sent)
    for step in range(5):
        joined.flush(12.0 + step)
    assert urls(joined.benches[1]) == newcomer(joined) == ([A] if again else [])
    # Nobody tells the old description, which a router would take that starts after another loss.
    assert {worker.spec.cost for worker in reader(joined, told).fleet} <= {2.5}


def test_many_workers_are_told_in_several_messages() -> None:
    joined = fleet_of(2)
    many = [f"http://{'x' * 1000}{number}:1" for number in range(100)]
    for url in many:
        add(joined, 0, url)
    joined.flush(0.1)
    assert urls(joined.benches[1]) == sorted(many)
    for url in many:
        remove(joined, 0, url)
    joined.flush(0.2)
    assert everywhere(joined) == [[], []]
    sizes = [len(payload) for _, topic, payload in joined.sent if topic is SharedTopic.ORDERS]
    assert len(sizes) > 4
    assert max(sizes) < 1 << 16


def test_a_router_without_the_option_neither_hears_nor_forgets_a_drain() -> None:
    joined = fleet_of(1)
    other, state = joined.add(0)
    joined.flush(0.0)
    add(joined, 0, A)
    joined.flush(0.1)
    assert state.workers is None
    assert urls(other) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "http://0.0.0.0:1"])
def test_a_worker_of_one_machine_is_added_and_removed_at_its_routers_only(url: str) -> None:
    joined = Joined(0, 0)
    for place in (b"one", b"one", b"two"):
        joined.add(0, hands=Hands, place=place)
    joined.flush(0.0)
    add(joined, 0, url)
    add(joined, 0, A)
    joined.flush(0.1)
    assert everywhere(joined) == [sorted([url, A]), sorted([url, A]), [A]]
    add(joined, 2, url)  # another engine
    joined.flush(0.2)
    remove(joined, 1, url)
    joined.flush(0.3)
    assert everywhere(joined) == [[A], [A], sorted([url, A])]


def test_a_description_under_another_name_or_without_one_adds_nothing() -> None:
    joined = fleet_of(1)
    added = (A.encode(),)
    tell(joined.states[0], OrderMessage(FORM, b"stranger", 1, added=added, named=names_of((B.encode(),))))
    assert not joined.states[0].reading.dropped
    tell(joined.states[0], OrderMessage(FORM, b"stranger", 2, added=added))
    assert everywhere(joined) == [[]]
    assert joined.states[0].reading.dropped == {"malformed": 1}
    tell(joined.states[0], OrderMessage(FORM, b"stranger", 2, added=added, named=names_of(added)))
    assert everywhere(joined) == [[A]]


@pytest.mark.parametrize(
    ("added", "removed"),
    [
        ((b"ftp://x",), b""),
        ((A.encode(), b""), b""),
        ((), packed(range(65))),
        ((), b"1234567"),
        ((b"http://" + b"x" * 50_000,), b""),
    ],
)
def test_words_without_sense_change_nothing(added: tuple[bytes, ...], removed: bytes) -> None:
    joined = fleet_of(1)
    names = packed(range(len(added)))
    tell(joined.states[0], OrderMessage(FORM, b"stranger", 1, added=added, removed=removed, named=names))
    assert everywhere(joined) == [[]]
    assert joined.states[0].reading.dropped == {"malformed": 1}


def test_more_workers_than_a_fleet_has_are_not_added() -> None:
    joined = fleet_of(1)
    for number in range(45):
        added = tuple(b"http://w%d:1" % (100 * number + each) for each in range(100))
        tell(joined.states[0], OrderMessage(FORM, b"stranger", number, added=added, named=names_of(added)))
    assert len(joined.benches[0].fleet) == 4096
    assert joined.states[0].reading.dropped == {"crowded": 404}


def test_what_operators_do_while_the_store_is_away_is_bounded() -> None:
    joined = fleet_of(1)
    for number in range(5000):
        said(joined, 0, f"http://w{number}:1", None)
    assert joined.states[0].reading.dropped == {"crowded": 904}
    joined.flush(0.1)
    assert sum(topic is SharedTopic.ORDERS for _, topic, _ in joined.sent) == 64


def test_the_key_of_the_fleet_may_change() -> None:
    joined = fleet_of(2)
    add(joined, 0, A)
    joined.flush(0.1)
    add(joined, 0, B)  # not told yet
    for state in joined.states:
        state.use_key(bytes(reversed(range(32))))
    joined.flush(0.2)
    remove(joined, 1, A)
    joined.flush(0.3)
    assert everywhere(joined) == [[B], [B]]


def names_of(added: tuple[bytes, ...], place: bytes = b"") -> bytes:
    return packed([Secret(KEY, 512, place).worker(described.decode()) for described in added])


def tell(state: SharedState, message: OrderMessage) -> None:
    state.receive(SharedTopic.ORDERS, Secret(KEY, 512).seal("orders", msgspec.msgpack.encode(message)))
    assert not state.apply(1.0, LARGE)
