"""State as bytes: what goes out comes in again, and nothing else comes in."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleets import Bench
from prefix_trees import BIG, check, put, shape
from sglang_router.restart import snapshot
from sglang_router.restart.saved_worker import SavedWorker, SpecChanges
from sglang_router.restart.snapshot import HEADER_SIZE, Head, HeaderBuilder, Unreadable
from sglang_router.restart.version_1 import HeadV1, SavedWorkerV1, WorkerSpecV1
from sglang_router.routing.model_names import Names
from sglang_router.routing.prefix_tree.memory import TreeMemory
from sglang_router.routing.roles import ROLES
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker
from sglang_router.workers.sources import ConfiguredWorkers, WorkerDefaults, configured_specs

A = "http://a:1"


def options(
    *urls: str,
    key: str | None = None,
    dp_aware: bool = False,
    health: HealthRules | None = None,
    from_file: bool = False,
) -> ConfiguredWorkers:
    """What flags say at a start, or a file."""
    defaults = WorkerDefaults(key, dp_aware, health or HealthRules())
    return ConfiguredWorkers(defaults, configured_specs(urls, defaults, from_file=from_file))


TODAY = options(A, key="everyone")


def worker(url: str = A, **said: object) -> Worker:
    """One that flags name if it is A, else one that the API added; with the key of the options."""
    source = Source.FLAGS if url == A else Source.API
    spec = WorkerSpec(url=url, **{"api_key": "everyone", "source": source, **said})  # type: ignore[arg-type]
    made = Worker(spec, f"id of {url}", 1, 0.0)
    made.slot = 0
    return made


def written(workers: list[Worker], memory: TreeMemory | None = None, now: float = 50.0, at: float = 1e9) -> bytes:
    return sealed(*snapshot.frames(snapshot.head_of(workers, TODAY, now, at), memory))


def sealed(*frames: bytes) -> bytes:
    header = HeaderBuilder()
    for frame in frames:
        header.add(frame)
    return header.build() + b"".join(frames)


def framed(value: object) -> bytes:
    content = msgspec.msgpack.encode(value)
    return struct.pack("<I", len(content)) + content


def memory_of(*texts: bytes) -> TreeMemory:
    """What is remembered of one worker."""
    memory = TreeMemory(BIG)
    memory.tree.add_slot()
    for now, text in enumerate(texts):
        put(memory.tree, 0, text, float(now))
    return memory


SMALL = written([worker(), worker("http://b:2", api_key="own", labels={"rack": "7"})], memory_of(b"abc", b"abd"))


def test_a_worker_comes_back_as_it_was() -> None:
    there = worker("http://b:2", priority=7, cost=0.5, labels={"rack": "7"}, model_id="qwen", runtime="vllm")
    there.draining = True
    (saved,) = snapshot.read(written([there])).head.workers
    assert saved.spec_today(TODAY) == there.spec
    assert (saved.id, saved.draining, saved.slot, saved.source) == ("id of http://b:2", True, 0, Source.API)


def test_keys_and_checks_of_the_options_are_those_of_the_next_start() -> None:
    data = written([worker(), worker("http://b:2", api_key="own", health=HealthRules(interval=3.0))])
    assert b"everyone" not in data
    tomorrow = options(A, key="new", health=HealthRules(timeout=1.0))
    common, own = (saved.spec_today(tomorrow) for saved in snapshot.read(data).head.workers)
    assert common is not None
    assert (common.api_key, common.health) == ("new", HealthRules(timeout=1.0))
    assert own is not None
    assert (own.api_key, own.health) == ("own", HealthRules(interval=3.0))


def test_no_key_of_its_own_is_not_the_key_of_the_options() -> None:
    for url in (A, "http://b:2"):
        (saved,) = snapshot.read(written([worker(url, api_key=None)])).head.workers
        spec = saved.spec_today(TODAY)
        assert spec is not None
        assert spec.api_key is None


@pytest.mark.parametrize(
    ("url", "today", "wanted"),
    [
        (A, TODAY, True),
        (A, options(A, from_file=True), True),  # named by a flag then, by a file now
        (A, options("http://c:3"), False),  # named then, not named now
        (A, options(A, dp_aware=True), False),
        ("http://b:2", options(), True),  # added while the router served
        ("http://b:2", options(dp_aware=True), True),
    ],
)
def test_who_was_named_by_an_option_must_be_named_again(url: str, today: ConfiguredWorkers, wanted: bool) -> None:
    (saved,) = snapshot.read(written([worker(url)])).head.workers
    assert (saved.spec_today(today) is not None) is wanted


@pytest.mark.parametrize("source", [Source.FLAGS, Source.FILE])
def test_of_a_worker_that_is_named_again_only_the_changes_are_kept(source: Source) -> None:
    there = worker(source=source, priority=7, labels={"rack": "7"})
    (saved,) = snapshot.read(written([there])).head.workers
    assert saved.changes == SpecChanges(priority=7, labels={"rack": "7"})
    spec = saved.spec_today(options(A, key="new", from_file=source is Source.FILE))
    assert spec is not None
    assert (spec.api_key, spec.priority, spec.labels, spec.source) == ("new", 7, {"rack": "7"}, source)


def test_an_unchanged_worker_is_its_id_and_whether_it_drains() -> None:
    (saved,) = snapshot.read(written([worker()])).head.workers
    assert saved.changes.known() == {}


def test_nothing_is_kept_of_a_replica() -> None:
    data = written([worker("http://replica:1", source=Source.REPLICAS), worker()])
    assert [saved.url for saved in snapshot.read(data).head.workers] == [A]
    assert b"replica" not in data


def test_an_added_worker_that_an_option_names_today_belongs_to_the_option() -> None:
    (saved,) = snapshot.read(written([worker("http://b:2", priority=7)])).head.workers
    spec = saved.spec_today(options("http://b:2", key="new"))
    assert spec is not None
    assert (spec.source, spec.priority, spec.api_key) == (Source.FLAGS, 7, "new")


def test_a_name_that_the_engine_told_is_not_kept() -> None:
    there = worker()
    there.announce(Names(("llama",)))
    assert there.model == "llama"
    (saved,) = snapshot.read(written([there])).head.workers
    assert saved.changes.known() == {}


def test_ranks_are_workers_of_their_own() -> None:
    data = written([worker("http://b:2", dp_rank=0, dp_aware=True, labels={}), _rank(1)])
    assert [saved.dp_rank for saved in snapshot.read(data).head.workers] == [0, 1]


def _rank(number: int) -> Worker:
    made = worker("http://b:2", dp_rank=number, dp_aware=True)
    made.id = f"rank {number}"
    return made


def test_the_tree_comes_back_with_the_age_of_its_texts() -> None:
    """Written 50 s after the text's last use, read 30 s later by a router whose clock stands at 7."""
    state = snapshot.read(written([worker()], memory_of(b"abc")))
    memory = TreeMemory(BIG)
    tree = memory.tree
    state.fill(memory, {0: tree.add_slot()}, now=7.0, today=1e9 + 30)
    check(tree)
    assert shape(tree) == [(b"abc", 1)]
    assert tree.expire(-73.0, BIG) == 0
    assert tree.expire(-72.9, BIG) == 1


def test_a_wall_clock_that_went_back_makes_nothing_younger_than_now() -> None:
    memory = TreeMemory(BIG)
    tree = memory.tree
    snapshot.read(written([worker()], memory_of(b"abc"))).fill(memory, {0: tree.add_slot()}, now=7.0, today=0.0)
    assert tree.expire(-43.0, BIG) == 0
    assert tree.expire(-42.9, BIG) == 1


def test_a_policy_without_a_tree() -> None:
    assert len(snapshot.read(written([worker()])).head.workers) == 1


def test_a_fleet_can_be_written() -> None:
    bench = Bench(3)
    head = snapshot.head_of(bench.fleet, options(), 0.0, 0.0)
    assert [saved.url for saved in head.workers] == [worker.url for worker in bench.fleet]


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "api_key": st.sampled_from([None, "everyone", "own"]),
        "model_id": st.none() | st.text(),
        "priority": st.integers(-(2**31), 2**31 - 1),
        "cost": st.floats(allow_nan=False),
        "worker_type": st.sampled_from(ROLES),
        "bootstrap_port": st.none() | st.integers(1, 65535),
        "runtime": st.none() | st.text(),
        "origin": st.text(),
        "instance": st.text(),
        "labels": st.dictionaries(st.text(), st.text(), max_size=2),
        "health": st.builds(HealthRules, interval=st.floats(1.0, 9.0), enabled=st.booleans()),
    },
)


@given(st.sampled_from([A, "http://b:2"]), CHANGES)
def test_whatever_was_changed_comes_back(url: str, changes: dict[str, object]) -> None:
    there = worker(url, **changes)
    (saved,) = snapshot.read(written([there])).head.workers
    assert saved.spec_today(TODAY) == there.spec


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
        (SMALL[:16] + struct.pack("<I", 3) + SMALL[20:], "is of version 3, this router's is 2"),
        (SMALL[:-1], "bytes of content in place of"),
        (SMALL[:-1] + bytes([SMALL[-1] ^ 1]), "checksum"),
    ],
)
def test_why_it_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        snapshot.read(data)


def head(*workers: Worker, **changed: object) -> Head:
    made = snapshot.head_of(workers, TODAY, 0.0, 0.0)
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
        (head(worker(worker_type="encode")), "role"),
        (head(worker(worker_type="prefill", bootstrap_port=0)), "port"),
        (head(now=float("inf")), "time"),
    ],
)
def test_nonsense_is_refused(wrong: Head, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        snapshot.read(sealed(framed(wrong)))


@pytest.mark.parametrize("frame", [framed([[0, b"a", []]]), framed({"no": "records"}), framed([[1]])])
def test_a_tree_that_is_none_leaves_the_tree_empty(frame: bytes) -> None:
    state = snapshot.read(sealed(framed(head(worker())), frame))
    memory = TreeMemory(BIG)
    tree = memory.tree
    with pytest.raises(Unreadable, match="is damaged"):
        state.fill(memory, {0: tree.add_slot()}, 0.0, 0.0)
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
    """Files like this one are out there: earlier routers wrote it."""
    state = snapshot.read(VERSION_1)
    (saved,) = state.head.workers
    assert (saved.id, saved.draining, saved.source) == ("id of http://b:2", True, Source.API)
    assert saved.changes == SpecChanges(api_key="own", labels={"rack": "7"})
    memory = TreeMemory(BIG)
    tree = memory.tree
    state.fill(memory, {0: tree.add_slot()}, 0.0, 0.0)
    assert shape(tree) == [(b"ab", 1), (b"abc", 1), (b"abd", 1)]


VERSION_2 = bytes.fromhex(
    "73676c616e672d726f7574657200737402000000d900000000000000bb7fed1d8d1e6af96dd5fc664c3021b8a100000083a3"
    "6e6f77cb4049000000000000aa7772697474656e5f6174cb41cdcd6500000000a7776f726b6572739188a375726caa687474"
    "703a2f2f623a32a6736f75726365a3617069a26964b06964206f6620687474703a2f2f623a32a4736c6f7400a8647261696e"
    "696e67c3a764705f72616e6bc0a864705f6177617265c2a76368616e67657382a76170695f6b6579a36f776ea66c6162656c"
    "7381a47261636ba137300000009493ffc4016d909300c4026162909302c40163919200cb00000000000000009302c4016491"
    "9200cb3ff0000000000000"
)


def version_1(spec: WorkerSpecV1, **said: object) -> SavedWorker:
    """A worker as version 1 wrote it, read today."""
    fields = {"id": "id", "slot": -1, "draining": False, "given": True, "default_key": True, "default_health": True}
    saved = SavedWorkerV1(spec=spec, **{**fields, **said})  # type: ignore[arg-type]
    data = sealed(framed(HeadV1(now=0.0, written_at=0.0, workers=[saved])))
    (read,) = snapshot.read(data[:16] + struct.pack("<I", 1) + data[20:]).head.workers
    return read


def test_what_version_1_said_of_workers_that_options_named() -> None:
    saved = version_1(WorkerSpecV1(url=A, priority=7), draining=True)
    assert (saved.url, saved.source, saved.draining) == (A, Source.FLAGS, True)
    assert saved.changes == SpecChanges(priority=7)
    assert saved.spec_today(options("http://c:3")) is None


def test_what_version_1_said_of_keys_and_checks() -> None:
    plain = WorkerSpecV1(url=A)
    assert version_1(plain).changes == SpecChanges()
    assert version_1(plain, default_key=False).changes == SpecChanges(api_key=None)
    assert version_1(WorkerSpecV1(url=A, api_key="own"), default_key=False).changes == SpecChanges(api_key="own")
    assert version_1(plain, default_health=False).changes == SpecChanges(health=HealthRules())


def test_ranks_of_version_1() -> None:
    saved = version_1(WorkerSpecV1(url=A, dp_rank=1, dp_aware=True, model_id="m"), given=False)
    assert (saved.source, saved.dp_rank, saved.dp_aware) == (Source.API, 1, True)
    assert saved.spec_today(options()) == WorkerSpec(url=A, dp_rank=1, dp_aware=True, model_id="m")


def test_the_layout_of_version_2() -> None:
    """Should this fail, the format needs another version: files like this one are out there."""
    state = snapshot.read(VERSION_2)
    assert state.head.workers == [
        SavedWorker(
            url="http://b:2",
            source=Source.API,
            id="id of http://b:2",
            slot=0,
            draining=True,
            dp_rank=None,
            dp_aware=False,
            changes=SpecChanges(api_key="own", labels={"rack": "7"}),
        )
    ]
    memory = TreeMemory(BIG)
    tree = memory.tree
    state.fill(memory, {0: tree.add_slot()}, 0.0, 0.0)
    assert shape(tree) == [(b"ab", 1), (b"abc", 1), (b"abd", 1)]
