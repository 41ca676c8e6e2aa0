"""State as bytes: what goes out comes in again, and nothing else comes in."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleets import Bench
from prefix_trees import BIG, check, put, shape
from sglang_router.core import snapshot
from sglang_router.core.report import NOTHING
from sglang_router.core.snapshot import HEADER_SIZE, Defaults, Head, Seal, Unreadable
from sglang_router.core.tree import Tree
from sglang_router.core.worker import HealthRules, Worker, WorkerSpec

DEFAULTS = Defaults(worker_urls=("http://a:1",), api_key="everyone")


def worker(url: str = "http://a:1", **said: object) -> Worker:
    made = Worker(WorkerSpec(url=url, **{"api_key": "everyone", **said}), f"id of {url}", 1, 0.0)  # type: ignore[arg-type]
    made.slot = 0
    return made


def written(workers: list[Worker], tree: Tree | None = None, now: float = 50.0, at: float = 1e9) -> bytes:
    return sealed(*snapshot.frames(snapshot.head_of(workers, DEFAULTS, now, at), tree))


def sealed(*frames: bytes) -> bytes:
    seal = Seal()
    for frame in frames:
        seal.add(frame)
    return seal.header() + b"".join(frames)


def framed(value: object) -> bytes:
    content = msgspec.msgpack.encode(value)
    return struct.pack("<I", len(content)) + content


def tree_of(*texts: bytes) -> Tree:
    tree = Tree(BIG)
    tree.add_slot()
    for now, text in enumerate(texts):
        put(tree, 0, text, float(now))
    return tree


SMALL = written([worker(), worker("http://b:2", api_key="own", labels={"rack": "7"})], tree_of(b"abc", b"abd"))


def test_a_worker_comes_back_as_it_was() -> None:
    there = worker("http://b:2", priority=7, cost=0.5, labels={"rack": "7"}, model_id="qwen", runtime="vllm")
    there.draining = True
    (saved,) = snapshot.read(written([there])).head.workers
    assert saved.spec_now(DEFAULTS) == there.spec
    assert (saved.id, saved.draining, saved.slot, saved.given) == ("id of http://b:2", True, 0, False)


def test_keys_and_checks_of_the_options_are_those_of_the_next_start() -> None:
    data = written([worker(), worker("http://b:2", api_key="own", health=HealthRules(interval=3.0))])
    assert b"everyone" not in data
    tomorrow = Defaults(api_key="new", health=HealthRules(timeout=1.0))
    common, own = (saved.spec_now(tomorrow) for saved in snapshot.read(data).head.workers)
    assert (common.api_key, common.health) == ("new", tomorrow.health)
    assert (own.api_key, own.health) == ("own", HealthRules(interval=3.0))


def test_no_key_of_its_own_is_not_the_key_of_the_options() -> None:
    (saved,) = snapshot.read(written([worker(api_key=None)])).head.workers
    assert saved.spec_now(DEFAULTS).api_key is None


@pytest.mark.parametrize(
    ("url", "defaults", "wanted"),
    [
        ("http://a:1", DEFAULTS, True),
        ("http://a:1", Defaults(worker_urls=("http://c:3",)), False),  # given then, not given now
        ("http://a:1", Defaults(worker_urls=("http://a:1",), dp_aware=True), False),
        ("http://b:2", Defaults(), True),  # added while the router served
    ],
)
def test_who_was_given_by_an_option_must_be_given_again(url: str, defaults: Defaults, wanted: bool) -> None:
    (saved,) = snapshot.read(written([worker(url)])).head.workers
    assert saved.wanted(defaults) is wanted


def test_a_name_that_the_engine_told_is_not_kept() -> None:
    there = worker(model_id="llama")
    there.report = NOTHING.told({"model": "llama"})
    (saved,) = snapshot.read(written([there])).head.workers
    assert saved.spec.model_id is None


def test_ranks_are_workers_of_their_own() -> None:
    data = written([worker("http://b:2", dp_rank=0, dp_aware=True, labels={}), _rank(1)])
    assert [saved.spec.dp_rank for saved in snapshot.read(data).head.workers] == [0, 1]


def _rank(number: int) -> Worker:
    made = worker("http://b:2", dp_rank=number, dp_aware=True)
    made.id = f"rank {number}"
    return made


def test_the_tree_comes_back_with_the_age_of_its_texts() -> None:
    """Written 50 s after the text's last use, read 30 s later by a router whose clock stands at 7."""
    state = snapshot.read(written([worker()], tree_of(b"abc")))
    tree = Tree(BIG)
    state.fill(tree, {0: tree.add_slot()}, now=7.0, today=1e9 + 30)
    check(tree)
    assert shape(tree) == [(b"abc", 1)]
    assert tree.expire(-73.0, BIG) == 0
    assert tree.expire(-72.9, BIG) == 1


def test_a_wall_clock_that_went_back_makes_nothing_younger_than_now() -> None:
    tree = Tree(BIG)
    snapshot.read(written([worker()], tree_of(b"abc"))).fill(tree, {0: tree.add_slot()}, now=7.0, today=0.0)
    assert tree.expire(-43.0, BIG) == 0
    assert tree.expire(-42.9, BIG) == 1


def test_a_policy_without_a_tree() -> None:
    assert len(snapshot.read(written([worker()])).head.workers) == 1


def test_a_fleet_can_be_written() -> None:
    bench = Bench(3)
    head = snapshot.head_of(bench.fleet, Defaults(), 0.0, 0.0)
    assert [saved.spec.url for saved in head.workers] == [worker.url for worker in bench.fleet]


# -- what is refused -----------------------------------------------------------------------------------------------


@given(st.data())
def test_changed_bytes_are_refused(data: st.DataObject) -> None:
    """A byte changed, put in, or taken out; cut off; or continued."""
    at = data.draw(st.integers(0, len(SMALL)))
    gone = data.draw(st.integers(0, len(SMALL) - at))
    changed = SMALL[:at] + data.draw(st.binary(max_size=3)) + SMALL[at + gone :]
    if changed == SMALL:
        snapshot.read(changed)
    else:
        with pytest.raises(Unreadable):
            snapshot.read(changed)


@given(st.lists(st.binary(max_size=40), max_size=3))
def test_a_right_checksum_is_not_enough(contents: list[bytes]) -> None:
    with pytest.raises(Unreadable):
        snapshot.read(sealed(*(struct.pack("<I", len(content)) + content for content in contents)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not written by this router"),
        (b"PK\x03\x04" * 100, "not written by this router"),
        (SMALL[: HEADER_SIZE - 1], "not written by this router"),
        (SMALL[:16] + struct.pack("<I", 2) + SMALL[20:], "is of version 2, this router's is 1"),
        (SMALL[:-1], "bytes of content in place of"),
        (SMALL[:-1] + bytes([SMALL[-1] ^ 1]), "checksum"),
    ],
)
def test_why_it_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        snapshot.read(data)


def head(*workers: Worker, **changed: object) -> Head:
    made = snapshot.head_of(workers, DEFAULTS, 0.0, 0.0)
    return msgspec.structs.replace(made, **changed)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (head(worker(), worker()), "twice"),
        (head(worker("ftp://a:1")), "damaged"),
        (head(worker("http://a:1/")), "normal form"),
        (head(worker(api_key="two words")), "key"),
        (head(worker(health=HealthRules(interval=0.0))), "health checks"),
        (head(worker(health=HealthRules(timeout=float("nan")))), "health checks"),
        (head(worker(health=HealthRules(failure_threshold=0))), "too small"),
        (head(worker(dp_rank=-1)), "too small"),
        (head(now=float("inf")), "time"),
    ],
)
def test_nonsense_is_refused(wrong: Head, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        snapshot.read(sealed(framed(wrong)))


@pytest.mark.parametrize("frame", [framed([[0, b"a", []]]), framed({"no": "records"}), framed([[1]])])
def test_a_tree_that_is_none_leaves_the_tree_empty(frame: bytes) -> None:
    state = snapshot.read(sealed(framed(head(worker())), frame))
    tree = Tree(BIG)
    with pytest.raises(Unreadable, match="is damaged"):
        state.fill(tree, {0: tree.add_slot()}, 0.0, 0.0)
    check(tree)
    assert put(tree, 0, b"abc") == 3


VERSION_1 = bytes.fromhex(
    "73676c616e672d726f757465720073740100000099010000000000002e99d009bb780c23fddf5836c720b8316101000083a3"
    "6e6f77cb4049000000000000aa7772697474656e5f6174cb41cdcd6500000000a7776f726b6572739187a4737065638ba375"
    "726caa687474703a2f2f623a32a764705f72616e6bc0a864705f6177617265c2a76170695f6b6579a36f776ea86d6f64656c"
    "5f6964c0a87072696f7269747932a4636f7374cb3ff0000000000000ab776f726b65725f74797065a7726567756c6172a772"
    "756e74696d65c0a66c6162656c7381a47261636ba137a66865616c746886b16661696c7572655f7468726573686f6c6403b1"
    "737563636573735f7468726573686f6c6402a8696e74657276616ccb4024000000000000a774696d656f7574cb4014000000"
    "000000a8656e64706f696e74a72f6865616c7468a7656e61626c6564c3a26964b06964206f6620687474703a2f2f623a32a4"
    "736c6f7400a8647261696e696e67c3a5676976656ec2ab64656661756c745f6b6579c2ae64656661756c745f6865616c7468"
    "c3300000009493ffc4016d909300c4026162909302c40163919200cb00000000000000009302c40164919200cb3ff0000000"
    "000000"
)


def test_a_file_of_version_1_can_be_read() -> None:
    """Should this fail, the format needs another version: files like this one are out there."""
    state = snapshot.read(VERSION_1)
    (saved,) = state.head.workers
    assert (saved.id, saved.draining, saved.spec.api_key) == ("id of http://b:2", True, "own")
    assert saved.spec.labels == {"rack": "7"}
    tree = Tree(BIG)
    state.fill(tree, {0: tree.add_slot()}, 0.0, 0.0)
    assert shape(tree) == [(b"ab", 1), (b"abc", 1), (b"abd", 1)]
