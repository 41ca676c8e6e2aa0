"""What routers tell each other of workers that operators add: what a description holds, and what it may do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fleets import Bench
from sglang_router.app.fleet_workers import FleetWorkers
from sglang_router.app.settings import worker_defaults
from sglang_router.app.shared import workers_of
from sglang_router.config import RouterArgs, parse
from sglang_router.errors import ConfigError
from sglang_router.restart.saved_worker import SavedWorker, SpecChanges
from sglang_router.routing.shared.members import Members
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.workers import LONGEST, SharedWorkers
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

URL = "http://gpu:8000"


class Place:
    """A router with workers of its own, and what it would tell the others."""

    def __init__(self, **options: Any) -> None:
        self.defaults = worker_defaults(RouterArgs(**options).checked())
        self.fleet = Bench(0, "round_robin").fleet
        self.hands = FleetWorkers(self.fleet, self.defaults, lambda: 1.0)
        self.shared = self.hands.shared = SharedWorkers(Members(Secret(bytes(32), 512), lambda name: None), self.hands)

    def add(self, source: Source = Source.API, **said: Any) -> Worker:
        spec = msgspec.structs.replace(self.defaults.spec(URL, source), **said)
        return self.fleet.add(spec, 0.0)

    def told(self) -> tuple[dict[int, bytes], list[int]]:
        return self.shared.gather(1, 0.0, True)

    @property
    def specs(self) -> list[WorkerSpec]:
        return [worker.spec for worker in self.fleet]


def described(**said: Any) -> bytes:
    changes = SpecChanges(**said.pop("changes", {}))
    fields: dict[str, Any] = {"url": URL, "source": Source.API, "id": "", "slot": -1, "draining": False}
    return msgspec.msgpack.encode(
        SavedWorker(**fields | {"dp_rank": None, "dp_aware": False, "changes": changes} | said)
    )


def test_another_router_adds_what_was_said_with_its_own_key_and_options() -> None:
    here, there = Place(worker_api_key="here"), Place(worker_api_key="there", health_check_interval_secs=77)
    worker = here.add(model_id="m", priority=9, worker_type="decode", labels={"zone": "a"}, runtime="vllm")
    assert here.hands.added(worker) == "the other routers of the fleet add it too"
    told, removed = here.told()
    assert removed == []
    (description,) = told.values()
    assert b"here" not in description
    there.hands.add(description)
    (spec,) = there.specs
    assert (spec.url, spec.model_id, spec.priority, spec.worker_type) == (URL, "m", 9, "decode")
    assert (spec.labels, spec.runtime, spec.source) == ({"zone": "a"}, "vllm", Source.API)
    assert (spec.api_key, spec.health.interval) == ("there", 77)
    there.hands.add(description)
    assert len(there.specs) == 1


def test_a_worker_with_a_key_of_its_own_and_a_single_rank_stay_at_their_router() -> None:
    place = Place(worker_api_key="usual")
    worker = place.add(api_key="own")
    assert "its own API key" in place.hands.added(worker)
    place.hands.remove(URL)
    assert not worker.removed
    place.fleet.remove(worker)
    assert place.hands.removed([worker]) == ""
    assert "this rank" in place.hands.added(place.add(dp_rank=1))
    assert "too long" in place.hands.added(place.add(labels={"x": "y" * LONGEST}))
    assert place.told() == ({}, [])


def test_a_worker_of_this_machine_alone_is_one_for_its_routers_only_and_the_answer_says_so() -> None:
    place = Place()
    worker = place.add(url="http://127.0.0.1:8000")
    assert (
        place.hands.added(worker) == "the other routers of this machine add it too: for others its address is their own"
    )
    place.fleet.remove(worker)
    assert place.hands.removed([worker]) == "the other routers of this machine remove it too"


def test_a_removal_is_told_when_all_of_the_engine_is_removed_and_only_of_what_operators_added() -> None:
    place = Place()
    first, second = place.add(dp_rank=0), place.add(dp_rank=1)
    place.fleet.remove(first)
    assert place.hands.removed([first]) == ""
    place.fleet.remove(second)
    assert place.hands.removed([second]) == "the other routers of the fleet remove it too"
    assert len(place.told()[1]) == 1
    for source in set(Source) - {Source.API}:
        worker = place.add(source)
        place.hands.remove(URL)
        assert place.specs == [worker.spec]
        place.fleet.remove(worker)
        assert place.hands.removed([worker]) == ""


@pytest.mark.parametrize(
    "said",
    [
        {"url": "http://GPU:8000/"},
        {"url": "ftp://gpu"},
        {"dp_rank": 0},
        {"source": Source.FLAGS},
        {"changes": {"api_key": "stolen"}},
        {"changes": {"api_key": None}},
        {"changes": {"instance": "uid"}},
        {"changes": {"worker_type": "strange"}},
        {"changes": {"bootstrap_port": 1 << 20}},
        {"changes": {"labels": {"x": "y" * LONGEST}}},
    ],
)
def test_a_description_that_says_more_than_an_operator_may_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Place().hands.url(described(**said))
    assert Place().hands.url(described()) == URL
    with pytest.raises(ValueError, match=r"\w"):
        Place().hands.url(b"\xff")


def test_the_option_needs_a_key_that_the_store_does_not_have() -> None:
    words = ("--shared-state", "redis://h", "--shared-state-workers")
    with pytest.raises(ConfigError, match="needs --shared-state-key"):
        parse(words, {}).checked()
    fleet = Bench(0, "round_robin").fleet
    assert workers_of(parse((*words, "--shared-state-key", "f"), {}).checked(), fleet, lambda: 0.0) is not None
    assert workers_of(parse(words[2:], {}).checked(), fleet, lambda: 0.0) is None
    assert workers_of(parse(words[:2], {}).checked(), fleet, lambda: 0.0) is None
