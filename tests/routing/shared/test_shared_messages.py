"""Messages: what a router takes from a stream, where anybody may have written."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joined import KEY, Joined, rules
from sglang_router.routing.shared.packing import numbers, packed
from sglang_router.routing.shared.records import FORM, LoadsMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret, boundaries_of
from sglang_router.routing.shared.sharing import SharedState

TOPICS = st.sampled_from(list(SharedTopic))


def receive(state: SharedState, payload: bytes, topic: SharedTopic = SharedTopic.LOADS) -> dict[str, int]:
    """Return what was dropped of a message, by reason."""
    state.receive(topic, payload)
    while state.apply(0.0, 1000):
        pass
    return state.reading.dropped


def loads(**more: object) -> bytes:
    message = LoadsMessage(**{"form": FORM, "router": b"stranger", "number": 1, **more})  # type: ignore[arg-type]
    return Secret(KEY, 512).seal("loads", msgspec.msgpack.encode(message))


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "foreign"),
        (b"garbage", "foreign"),
        (Secret(b"another key" + bytes(21), 512).seal("loads", b""), "foreign"),
        (Secret(KEY, 1024).seal("loads", b"other boundaries"), "foreign"),
        (Secret(KEY, 512).mark + b"0123456789abcdef" + b"forged", "forged"),
        (Secret(KEY, 512).seal("orders", b"of another topic"), "forged"),
        (Secret(KEY, 512).seal("loads", b"\x93\x01"), "malformed"),
        (loads(names=b"1234567"), "malformed"),
        (loads(names=packed([1, 2]), states=packed([1])), "malformed"),
        (loads(meters=packed([1]), spent=packed([1, 2]), debts=packed([1, 2])), "malformed"),
        (loads(form=FORM + 1), "form"),
        (loads(form=FORM + 1, names={"of": "another kind"}), "form"),
        (loads(form="two"), "malformed"),
        (bytes(1 << 17), "too_long"),
    ],
)
def test_what_cannot_be_used_is_dropped_and_counted(payload: bytes, why: str) -> None:
    joined = Joined(1, 1)
    assert receive(joined.states[0], payload) == {why: 1}
    assert joined.loads(0) == [0]


@given(TOPICS, st.binary(max_size=200), st.booleans())
def test_nothing_that_is_sealed_by_mistake_does_harm(topic: SharedTopic, data: bytes, old: bool) -> None:
    joined = Joined(1, 1)
    joined.states[0].receive(topic, Secret(KEY, 512).seal(topic.value, data), old)
    while joined.states[0].apply(0.0, 1000):
        pass
    assert joined.loads(0) == [0]


ODD = st.one_of(st.binary(max_size=40), st.lists(st.integers(0, 2**64 - 1), max_size=4).map(packed))


@given(st.integers(-(2**63), 2**64 - 1), st.booleans(), st.booleans(), ODD, ODD, ODD, ODD)
def test_fields_of_any_form_do_no_harm(
    number: int, whole: bool, left: bool, names: bytes, states: bytes, meters: bytes, spent: bytes
) -> None:
    joined = Joined(1, 2)
    receive(
        joined.states[0],
        loads(number=number, whole=whole, left=left, names=names, states=states, meters=meters, spent=spent),
    )
    assert joined.loads(0) == [0, 0]
    assert joined.benches[0].route().worker in joined.benches[0].workers


def test_what_waits_is_bounded_and_loads_are_dropped_first() -> None:
    state = SharedState(rules(0, waiting=1000))
    state.receive(SharedTopic.LOADS, bytes(600))
    state.receive(SharedTopic.PLACEMENTS, bytes(600))
    assert (state.reading.waiting, state.reading.dropped) == (600, {"late": 1})
    state.receive(SharedTopic.ORDERS, bytes(600))
    assert (state.reading.waiting, state.reading.dropped) == (600, {"late": 2})


def test_own_messages_that_come_back_are_no_peer() -> None:
    joined = Joined(1, 1)
    joined.benches[0].route()
    joined.flush(0.0)
    assert joined.loads(0) == [1]
    assert not joined.states[0].reading.peers


def test_a_reading_shows_who_is_there() -> None:
    joined = Joined(3, 2)
    joined.benches[1].load(2, 1)
    joined.flush(0.0)
    joined.states[0].look(1.5)
    one, two = joined.states[0].reading.peers
    assert (one.router, one.age, one.running) == (b"router01".hex(), 1.5, 3)
    assert (two.router, two.running) == (b"router02".hex(), 0)


# -- names and chains --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_numbers_are_packed_and_unpacked(values: list[int]) -> None:
    assert numbers(packed(values)) == values
    assert packed([1]) == b"\x01" + bytes(7)


def test_boundaries_are_dense_at_first_and_few_in_the_end() -> None:
    found = boundaries_of(512)
    assert found[:64] == [512 * n for n in range(1, 65)]
    assert (len(found), found[-1]) == (384, 1 << 20)
    steps = [(end - start) / start for start, end in itertools.pairwise(found[64:])]
    assert max(steps) <= 1 / 64


@pytest.mark.parametrize(
    ("url", "local"),
    [
        *[("http://127.0.0.1:8000", True), ("http://127.9.9.9", True), ("http://[::1]:8000@3", True)],
        *[("https://localhost:8000/v1", True), ("http://engine.localhost", True), ("http://127.0.0.1:8000@12", True)],
        *[("http://10.0.0.1:8000", False), ("http://gpu-1:8000@0", False), ("http://[fd00::1]:1", False)],
        *[("http://127.example.com", False), ("http://localhost.example.com:1", False)],
        *[("http://0.0.0.0:8000", True), ("http://[::]:1", True), ("http://[::ffff:127.0.0.1]:1", True)],
        *[("http://127.1:8000", True), ("http://0x7f000001", True), ("http://2130706433:1", True)],
        *[("http://localhost.:1", True), ("http://localhost.localdomain", True), ("http://[fe80::1%25eth0]:1", True)],
        *[("http://169.254.20.10:1", True), ("http://gpu-0:1", False), ("http://10.0.0.1.:1", False)],
    ],
)
def test_a_worker_at_a_loopback_address_is_another_one_at_each_machine(url: str, local: bool) -> None:
    here, there = Secret(KEY, 512, b"here"), Secret(KEY, 512, b"there")
    assert (here.worker(url) != there.worker(url)) is local
    assert here.worker(url) == Secret(KEY, 512, b"here").worker(url)


def test_what_another_fleet_wrote_with_the_same_key_is_foreign() -> None:
    here, there = Secret(KEY, 512, fleet=b"production"), Secret(KEY, 512, fleet=b"staging")
    sealed = there.seal("orders", b"add this worker")
    assert not here.is_ours(sealed)
    assert here.open("orders", here.mark + sealed[len(here.mark) :]) is None
    assert here.worker("http://gpu-1:8000") != there.worker("http://gpu-1:8000")
    assert Secret(KEY, 512, fleet=b"staging").open("orders", sealed) == b"add this worker"
    here.use(bytes(32))
    assert here.mark != Secret(bytes(32), 512, fleet=b"staging").mark
    assert here.mark == Secret(bytes(32), 512, fleet=b"production").mark


@given(st.binary(max_size=3000), st.binary(max_size=600), st.binary(max_size=600))
def test_texts_have_the_same_chain_as_far_as_they_are_the_same(same: bytes, one: bytes, other: bytes) -> None:
    secret = Secret(KEY, 512)
    here, there = secret.chain(b"m", same + one), secret.chain(b"m", same + other)
    common = 0
    for a, b in zip(same + one, same + other, strict=False):
        if a != b:
            break
        common += 1
    assert len(here) == len(same + one) // 512
    assert here[: common // 512] == there[: common // 512]
    assert not set(here[common // 512 :]) & set(there[common // 512 :])


def test_a_chain_depends_on_key_and_namespace() -> None:
    text = bytes(600)
    secret = Secret(KEY, 512)
    chains = [secret.chain(b"", text), secret.chain(b"a", text), Secret(bytes(32), 512).chain(b"", text)]
    assert len({each[0] for each in chains}) == 3
    assert secret.name(b"worker", b"x") != secret.name(b"session", b"x") != Secret(bytes(32), 512).name(b"worker", b"x")
