"""The state file on a real disk: whole or not there, private, written beside other work, and never a reason to fail."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import uvloop

from fleets import by_model
from prefix_trees import check, put, shape
from sglang_router.errors import ConfigError
from sglang_router.restart.snapshot import MAGIC
from sglang_router.restart.state_file import Clocks, StateFile
from sglang_router.routing.events import Listener
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.rules import HealthRules, PolicySettings
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import UPDATING, Worker
from sglang_router.workers.sources import ConfiguredWorkers, WorkerDefaults, configured_specs

CLOCKS = Clocks(now=lambda: 100.0, today=lambda: 1e9)


def named(*urls: str, looking: tuple[Source, ...] = ()) -> ConfiguredWorkers:
    """What flags say at a start."""
    defaults = WorkerDefaults(None, False, HealthRules())
    return ConfiguredWorkers(defaults, configured_specs(urls, defaults, from_file=False), looking)


class Place:
    """A fleet with cache_aware, and the file beside it. `urls` are those that flags name."""

    def __init__(self, path: Path, *urls: str, looking: tuple[Source, ...] = (), **others: object) -> None:
        self.policy = CacheAware(PolicySettings(), random.Random(1))
        self.tree = self.policy.tree
        self.fleet = Fleet(Listener(), lambda: f"id{len(self.fleet)}", lambda: self.policy)
        self.path = path
        settings = {"clocks": CLOCKS, **others}
        configured = named(*urls, looking=looking)
        self.file = StateFile(str(path), self.fleet, lambda: self.policy.memory, configured, **settings)  # type: ignore[arg-type]

    def add(self, url: str, *texts: bytes, **said: object) -> Worker:
        worker = self.fleet.add(WorkerSpec(url=url, **said), 0.0)  # type: ignore[arg-type]
        for now, text in enumerate(texts):
            put(self.tree, worker.slot, text, float(now))
        return worker

    def urls(self) -> list[str]:
        return [worker.url for worker in self.fleet]


def run(*works: Callable[[], Awaitable[object]]) -> None:
    async def one_after_the_other() -> None:
        for work in works:
            await asyncio.wait_for(work(), 20.0)

    uvloop.run(one_after_the_other())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_what_was_saved_is_there_after_the_next_start(path: Path) -> None:
    before = Place(path)
    before.add("http://a:1", b"abc", b"abd", labels={"rack": "7"})
    before.fleet.set_draining(before.add("http://b:2", b"abx"), True)
    first = next(iter(before.fleet))
    before.fleet.set_paused(first, ("kv_cache", "weights", UPDATING))
    first.weights = "step-7"
    run(before.file.save)

    after = Place(path)
    after.fleet.add(WorkerSpec(url="http://taken:1"), 0.0)  # the slots are others now
    assert after.file.load() == 2
    _, one, two = after.fleet
    assert [(w.url, w.id, w.draining) for w in (one, two)] == [
        ("http://a:1", "id0", False),
        ("http://b:2", "id1", True),
    ]
    assert one.spec.labels == {"rack": "7"}
    assert [(w.paused, w.weights) for w in (one, two)] == [(("kv_cache", "weights"), "step-7"), ((), "")]
    check(after.tree)
    assert shape(after.tree) == [(b"ab", 0b110), (b"abc", 0b010), (b"abd", 0b010), (b"abx", 0b100)]


def test_the_prefixes_of_one_pool_are_not_given_to_a_worker_of_another(path: Path) -> None:
    """Slots are numbers within one tree, and the file has the tree of the default pool."""

    def started() -> tuple[Fleet, StateFile]:
        def policy() -> CacheAware:
            return CacheAware(PolicySettings(), random.Random(1))

        fleet = Fleet(Listener(), lambda: f"id{len(fleet)}", policy, assign=by_model)
        return fleet, StateFile(str(path), fleet, lambda: fleet.pools.default.policy.memory, named(), clocks=CLOCKS)

    fleet, file = started()
    plain = fleet.add(WorkerSpec(url="http://a:1"), 0.0)
    other = fleet.add(WorkerSpec(url="http://b:2", model_id="m"), 0.0)
    assert plain.slot == other.slot
    policy = fleet.pools.default.policy
    assert isinstance(policy, CacheAware)
    put(policy.tree, plain.slot, b"abc", 0.0)
    run(file.save)
    fleet, file = started()
    fleet.add(WorkerSpec(url="http://taken:1"), 0.0)  # the slots are others now
    assert file.load() == 2
    assert [fleet.pools.remembered(worker) for worker in fleet] == [0, 3, 0]


def test_a_worker_whose_first_check_fails_loses_its_prefixes(path: Path) -> None:
    before = Place(path)
    before.add("http://a:1", b"abc")
    before.add("http://b:2", b"abd")
    run(before.file.save)

    after = Place(path)
    after.file.load()
    well, other = after.fleet
    after.fleet.probed(well, None, 1.0)
    after.fleet.probed(other, "no answer", 1.0)
    after.fleet.probed(other, None, 2.0)
    assert after.tree.size(well.slot) == 3
    assert after.tree.size(other.slot) == 0


def test_without_checks_nobody_can_tell_whether_a_cache_is_there(path: Path) -> None:
    before = Place(path)
    before.add("http://a:1", b"abc", health=HealthRules(enabled=False))
    run(before.file.save)
    after = Place(path)
    assert after.file.load() == 1
    assert after.tree.nodes == 0


def test_who_is_run_by_this_process_is_not_kept(path: Path) -> None:
    before = Place(path)
    before.add("http://replica:1", b"abc", source=Source.REPLICAS)
    before.add("http://other:1")
    run(before.file.save)
    after = Place(path)
    after.file.load()
    assert after.urls() == ["http://other:1"]
    assert after.tree.nodes == 0


@pytest.mark.parametrize("source", [source for source in Source if source.looks])
def test_who_was_found_comes_back_with_what_it_has_cached_while_its_source_still_looks(
    path: Path, source: Source
) -> None:
    """The source says a moment later who is still there: the same instance keeps its prefixes."""
    before = Place(path)
    worker = before.add(
        "http://pod:1", b"abc", source=source, origin="llm/p1", instance="u1", model_id="m", worker_type="decode"
    )
    before.fleet.set_draining(worker, True)
    run(before.file.save)
    after = Place(path, looking=(source,))
    after.file.load()
    (found,) = after.fleet
    assert (found.spec, found.id, found.draining) == (worker.spec, worker.id, True)
    assert after.tree.nodes > 0
    for others in (Place(path), Place(path, looking=tuple(each for each in Source if each is not source))):
        others.file.load()
        assert others.urls() == []
    named_today = Place(path, "http://pod:1", looking=(source,))
    named_today.file.load()
    assert named_today.urls() == []  # flags add it, as their own


def test_who_is_named_by_an_option_no_more_does_not_come_back(path: Path) -> None:
    before = Place(path, "http://a:1", "http://b:2")
    for url in ("http://a:1", "http://b:2"):
        before.add(url, source=Source.FLAGS)
    before.add("http://added:3")
    run(before.file.save)
    after = Place(path, "http://b:2")
    after.file.load()
    assert after.urls() == ["http://b:2", "http://added:3"]


def test_what_was_changed_of_a_worker_that_an_option_names_is_there_again(path: Path) -> None:
    before = Place(path, "http://a:1")
    worker = before.add("http://a:1", b"abc", source=Source.FLAGS)
    before.fleet.amend(worker, msgspec.structs.replace(worker.spec, priority=7))
    before.fleet.set_draining(worker, True)
    run(before.file.save)
    after = Place(path, "http://a:1")
    after.file.load()
    (again,) = after.fleet
    assert (again.id, again.draining, again.spec) == (worker.id, True, worker.spec)
    assert after.tree.size(again.slot) == 3


# -- the file --------------------------------------------------------------------------------------------------------


def test_only_the_owner_may_read_it(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o644)
    place = Place(path)
    place.add("http://a:1", api_key="secret")
    run(place.file.save)
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"secret" in path.read_bytes()


def test_it_appears_whole_and_nothing_is_left_beside_it(path: Path) -> None:
    place = Place(path)
    place.add("http://a:1", b"abc")
    run(place.file.save, place.file.save)
    assert [file.name for file in path.parent.iterdir()] == ["state"]


def test_a_save_that_is_cut_off_leaves_the_old_file(path: Path) -> None:
    place = Place(path)
    place.add("http://a:1", bytes(1 << 20))
    run(place.file.save)
    old = path.read_bytes()
    place.add("http://b:2")

    async def cut_off() -> None:
        saving = asyncio.ensure_future(place.file.save())
        while not any(path.parent.glob("state.*.new")):  # noqa: ASYNC110
            await asyncio.sleep(0)
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)

    run(cut_off)
    assert path.read_bytes() == old
    assert [file.name for file in path.parent.iterdir()] == ["state"]


def test_others_have_their_turn_while_it_is_written(path: Path) -> None:
    """No step of the loop is a large part of the whole: what is written takes many turns."""
    place = Place(path)
    worker = place.add("http://a:1")
    for number in range(4000):
        put(place.tree, worker.slot, b"%05d" % number * 20, float(number))
    turns = 0

    async def save_and_count() -> None:
        nonlocal turns
        saving = asyncio.ensure_future(place.file.save(hurry=True))
        while not saving.done():
            turns += 1
            await asyncio.sleep(0)

    run(save_and_count)
    assert turns > 4000 / 64
    after = Place(path)
    after.file.load()
    assert shape(after.tree) == shape(place.tree)


def test_the_tree_may_change_while_it_is_written(path: Path) -> None:
    place = Place(path)
    worker = place.add("http://a:1")
    for number in range(2000):
        put(place.tree, worker.slot, b"%05d" % number * 20, float(number))

    async def save_and_work() -> None:
        saving = asyncio.ensure_future(place.file.save(hurry=True))
        number = 2000
        while not saving.done():
            put(place.tree, worker.slot, b"%05d" % number * 20, float(number))
            number += 1
            await asyncio.sleep(0)

    run(save_and_work)
    after = Place(path)
    assert after.file.load() == 1
    check(after.tree)
    assert after.tree.entries(0) >= 2000


def test_it_is_written_again_and_again_but_not_while_another_router_does(path: Path) -> None:
    asked = 0
    seen: list[bool] = []
    enough = asyncio.Event()

    def suspended() -> bool:
        """Asked each time it is about to write: the first three times another router does."""
        nonlocal asked
        asked += 1
        seen.append(path.exists())
        if asked == 6:
            enough.set()
        return asked <= 3

    async def saves() -> None:
        place = Place(path, suspended=suspended)
        place.file.start(0.001)
        await enough.wait()
        await place.file.close()

    run(saves)
    assert seen[:6] == [False, False, False, False, True, True]


def test_a_disk_that_is_full_is_told_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that is gone stands for it: nothing can be written there."""
    folder = path.parent / "away"
    folder.mkdir()
    place = Place(folder / "state")
    folder.rmdir()
    run(place.file.save, place.file.save)
    assert caplog.text.count("cannot be written") == 1
    folder.mkdir()
    run(place.file.save)
    assert (folder / "state").exists()


@pytest.mark.parametrize("name", ["no/such/folder/state", "."])
def test_a_place_where_no_file_can_be_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--state-file .*: it must name a file in a folder that exists"):
        Place(tmp_path / name)


# -- what is not believed --------------------------------------------------------------------------------------------


def refused(path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Starts a router with this file; what it warns of, once."""
    place = Place(path)
    place.file.load()
    assert place.tree.nodes == 0
    (line,) = [record.getMessage() for record in caplog.records]
    return line


def test_no_file_is_no_reason_to_warn(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Place(path).file.load() == 0
    assert caplog.records == []


def test_a_damaged_file_is_told_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Place(path)
    place.add("http://a:1", b"abc")
    run(place.file.save)
    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged" in refused(path, caplog)


def test_a_foreign_file_is_told_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"hello")
    path.chmod(0o600)
    assert f"the state file {path} was not written by this router" in refused(path, caplog)


def test_a_file_that_others_can_write_is_not_believed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Place(path)
    place.add("http://a:1")
    run(place.file.save)
    path.chmod(0o620)
    assert "can be written by others" in refused(path, caplog)


def test_f38_a_file_that_others_can_read_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Keys and prompts in a file with mode 0644 were read by everybody without a word."""
    place = Place(path)
    place.add("http://a:1")
    run(place.file.save)
    path.chmod(0o644)
    again = Place(path)
    assert again.file.load() == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{path} holds keys and prompts, and others may read it: run chmod 600 {path}"]
    run(again.file.save)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("head", [b"", MAGIC], ids=["zeros", "magic"])
def test_f38_a_huge_file_is_refused_by_its_head(head: bytes, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of zeros, far larger than the memory of any machine, was read whole before it was refused."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 40)
    path.chmod(0o600)
    assert f"the state file {path} " in refused(path, caplog)


def test_a_pipe_does_not_hold_up_the_start(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(path)
    assert "is not a plain file" in refused(path, caplog)


def test_f38_what_is_no_plain_file_is_not_replaced(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first save put a file in the place of a pipe or a device: `--state-file /dev/null` as root took /dev/null."""
    os.mkfifo(path)
    file = Place(path).file
    run(file.save, file.save)
    assert path.is_fifo()
    assert caplog.messages == [f"the state file {path} cannot be written: it is not a plain file"]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("there", [True, False])
def test_f38_a_symbolic_link_stays_one(there: bool, path: Path) -> None:
    """The first save put a file in the place of the link, and what it leads to stayed old."""
    target = path.with_name("target")
    if there:
        target.touch()
    path.symlink_to(target)
    before = Place(path)
    before.add("http://a:1")
    run(before.file.save)
    assert path.is_symlink()
    assert Place(target).file.load() == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"")
    path.chmod(0)
    assert "cannot be read" in refused(path, caplog)


def test_prefixes_are_as_old_as_they_are(path: Path) -> None:
    """Saved at 100 s of one clock, taken up an hour later at 5 s of another."""
    place = Place(path)
    place.add("http://a:1", b"abc")  # last used at 0
    run(place.file.save)
    after = Place(path, clocks=Clocks(now=lambda: 5.0, today=lambda: 1e9 + 3600))
    after.file.load()
    assert after.tree.expire(5.0 - 3700.0, 1) == 0
    assert after.tree.expire(5.1 - 3700.0, 1) == 1


def test_the_usual_clocks_are_those_of_the_system() -> None:
    assert Clocks().now is time.monotonic
    assert Clocks().today is time.time
