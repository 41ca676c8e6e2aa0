"""Which policy a model has: what the file says, what a label says, and what happens when that changes."""

from __future__ import annotations

import logging
import random
from typing import Any

import msgspec
import pytest

from fleets import Attempt, Bench, spec
from sglang_router.app.models import ModelPolicies, policy_of, use_models, worker_policy
from sglang_router.config import RouterArgs
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import read
from sglang_router.routing.model_names import Names
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

PROMPT = b"a prompt that is long enough to count"


def as_it_is(policy: Policy) -> Policy:
    return policy


class Policies:
    """A fleet whose models have policies of their own."""

    def __init__(self, policy: str = "cache_aware", **options: Any) -> None:
        self.bench = Bench(0, policy, assign=None)
        self.fleet = self.bench.fleet
        self.pools = self.fleet.pools
        self.policies = ModelPolicies(random.Random(1), None, as_it_is)
        self.policy = policy
        self.use(**options)

    def use(self, **options: Any) -> None:
        use_models(RouterArgs(policy=self.policy, **options).checked(), self.bench.router, self.policies)

    def add(self, name: str, *bases: str, hint: str | None = None) -> Worker:
        said = spec(name)
        labels = {"policy": hint} if hint is not None else {}
        worker = self.fleet.add(WorkerSpec(url=said.url, health=said.health, labels=labels), 0.0)
        if bases:
            self.fleet.announced(worker, Names(bases))
        return worker

    def of(self, worker: Worker) -> str:
        return self.pools.of(worker).policy.label

    def route(self, model: str) -> Attempt:
        body = b'{"model":"%b","text":"%b"}' % (model.encode(), PROMPT)
        return self.bench.ask(read(ENDPOINTS[b"/generate"], body)).attempt


def test_a_model_has_the_policy_and_the_options_that_the_file_says() -> None:
    p = Policies(models={"A": {"policy": "least_load"}, "B": {"cache_threshold": 0.9, "max_idle_secs": 7}})
    a, b, c = p.add("a", "A"), p.add("b", "B"), p.add("c", "C")
    assert (p.of(a), p.of(b), p.of(c)) == ("least_load", "cache_aware", "cache_aware")
    settings = p.pools.of(b).policy.settings
    assert (settings.cache_threshold, settings.max_idle) == (0.9, 7)
    assert p.pools.of(c).policy.settings.cache_threshold == RouterArgs().cache_threshold
    told = policy_of(p.pools)
    assert [told(name) for name in "ABC"] == ["least_load", "cache_aware", "cache_aware"]
    assert worker_policy(p.fleet)(a.url) == "least_load"


def test_without_settings_nothing_is_looked_at() -> None:
    p = Policies()
    worker = p.add("a", "A")
    assert p.pools.tailor is None
    assert p.pools.only is p.pools.default
    assert (policy_of(p.pools)("A"), worker_policy(p.fleet)(worker.url)) == ("", "")


def test_the_first_model_has_its_own_policy_as_well() -> None:
    """Its pool is made before anybody knows its name."""
    p = Policies(models={"A": {"policy": "least_load"}})
    worker = p.add("a", "A")
    assert p.pools.of(worker) is p.pools.default
    assert p.of(worker) == "least_load"
    other = p.add("a2", "A")
    assert {p.route("A").worker for _ in range(2)} == {worker, other}


def test_requests_in_flight_survive_a_change_of_policy() -> None:
    p = Policies(models={"A": {"policy": "cost"}})
    first, second = p.add("a", "A"), p.add("a2", "A")
    under_way = [p.route("A") for _ in range(4)]
    held = p.pools.default.policy.memory
    assert held is not None
    for policy in ("round_robin", "cache_aware", "manual", "cost", "least_load"):
        p.use(models={"A": {"policy": policy}})
        assert p.of(first) == policy
        under_way.pop(0).end() if len(under_way) > 2 else p.route("A").end()
        p.route("A").end()
    for attempt, outcome in zip(under_way, (Outcome.GONE, Outcome.SERVED), strict=True):
        attempt.end(outcome)
    assert (first.load, second.load) == (0, 0)
    while p.pools.tidy(1.0, 1000):
        pass
    assert held.nodes == 0, "what the first policy remembered is freed"
    p.use()
    assert p.of(first) == "cache_aware"


def test_a_setting_that_stays_keeps_what_the_policy_remembers() -> None:
    p = Policies(models={"A": {"cache_threshold": 0.3}})
    worker = p.add("a", "A")
    p.route("A").end()
    p.use(models={"A": {"cache_threshold": 0.3}, "B": {"policy": "cost"}}, model_alias={"x": "A"})
    assert p.pools.remembered(worker) == len(PROMPT) + 1, "with its quote"
    assert p.route("x").branch == "hit"


def test_any_name_of_a_model_can_have_the_settings() -> None:
    p = Policies(models={"short": {"policy": "random"}})
    assert p.of(p.add("a", "org/long", "short")) == "random"


# -- labels ------------------------------------------------------------------------------------------------------------


def test_the_label_of_the_first_worker_sets_the_policy_of_its_model() -> None:
    p = Policies(enable_igw=True)
    first, second, other = p.add("a", "A", hint="Round-Robin"), p.add("a2", "A", hint="random"), p.add("b", "B")
    assert (p.of(first), p.of(second), p.of(other)) == ("round_robin", "round_robin", "cache_aware")
    p.fleet.remove(first)
    assert p.of(second) == "round_robin", "its word counts until the last worker is removed"
    p.fleet.remove(second)
    assert p.of(p.add("a3", "A")) == "cache_aware"


def test_a_label_that_an_operator_adds_later_counts_at_once() -> None:
    p = Policies(enable_igw=True)
    worker, other = p.add("a", "A"), p.add("b", "B")
    p.fleet.amend(worker, msgspec.structs.replace(worker.spec, labels={"policy": "random"}))
    assert (p.of(worker), p.of(other)) == ("random", "cache_aware")


def test_the_file_comes_before_labels_and_labels_count_only_with_igw() -> None:
    p = Policies(enable_igw=True, models={"A": {"policy": "random"}})
    assert p.of(p.add("a", "A", hint="round_robin")) == "random"
    p = Policies()
    assert p.of(p.add("a", "A", hint="round_robin")) == "cache_aware"


def test_a_label_that_names_no_policy_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    p = Policies(enable_igw=True)
    with caplog.at_level(logging.WARNING):
        workers = [p.add(f"a{n}", "A", hint="fastest") for n in range(3)]
    assert {p.of(worker) for worker in workers} == {"cache_aware"}
    assert len(caplog.records) == 1
    assert "'fastest'" in caplog.text
