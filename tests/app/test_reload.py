"""What a reload changes inside: limits of requests in flight, rules of models, budgets."""

from __future__ import annotations

import msgspec
import pytest

from sglang_router.config import OPTIONS, RouterArgs
from sglang_router.config.effective import HIDDEN, effective
from sglang_router.config.live import LIVE, TOGETHER, taken_over
from sglang_router.routing.queue import Queue
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.rules import QueueRules, RetryBudgetRules


def test_requests_in_flight_count_for_a_limit_that_is_new() -> None:
    queue = Queue[str](QueueRules())
    queue.use(QueueRules(max_concurrent=2), running=(1, 2, 3))
    assert (queue.idle, queue.has_place, queue.running) == (False, False, 3)
    queue.leave(1, 1.0)
    assert queue.running == 2, "two are left, and two may run"
    queue.leave(2, 2.0)
    assert queue.running == 1
    queue.use(QueueRules(), running=(3,))
    assert (queue.idle, queue.running) == (True, 0)


def test_what_is_queued_stays_when_the_queue_becomes_shorter() -> None:
    queue = Queue[str](QueueRules(max_concurrent=1))
    queue.begin(1, 0.0)
    for number in (2, 3):
        queue.wait(number, "x", "line", "place", 0.0)
    queue.use(QueueRules(max_concurrent=1, queue_size=1), running=(1,))
    assert len(queue) == 2
    assert not queue.idle


def test_a_rate_that_stays_keeps_its_bucket() -> None:
    queue = Queue[str](QueueRules(rate=1.0))
    queue.take_token(0.0)
    queue.use(QueueRules(rate=1.0, queue_size=7), running=())
    with pytest.raises(Exception, match="rate"):
        queue.take_token(0.0)
    queue.use(QueueRules(rate=2.0, queue_size=7), running=())
    queue.take_token(0.0)


def test_a_budget_follows_other_rules() -> None:
    budget = RetryBudget(RetryBudgetRules(ratio=0.0, floor=0.0))
    assert not budget.take(0.0)
    budget.use(RetryBudgetRules(ratio=0.0, floor=1.0))
    assert budget.take(0.0)


def test_only_options_that_exist_and_have_an_effect_are_live() -> None:
    assert {OPTIONS[name].status for name in LIVE} == {"implemented"}


def test_options_that_belong_together_wait_for_a_restart_together() -> None:
    for first, others in TOGETHER.items():
        assert first not in LIVE
        assert LIVE.issuperset(others)
        assert taken_over([*others, "policy"]) == [*others, "policy"]
        assert taken_over([*others, first, "policy"]) == ["policy"]


def test_effective_options_hide_every_secret() -> None:
    secrets = {name for name, option in OPTIONS.items() if option.secret}
    args = RouterArgs(
        api_key=["alice hush-1"],  # type: ignore[list-item]
        control_plane_api_keys=["a:b:admin:hush-2"],  # type: ignore[list-item]
        worker_api_key="hush-3",
        autoscale="1:2",
        scale_webhook="http://127.0.0.1:9/services/hush-6",
        scale_command="scale --token hush-7",
        scale_webhook_secret="hush-4",
        shared_state="redis://:hush-5@store",
    ).checked()
    found = {each.name: each for each in effective(args)}
    assert {found[name].value for name in secrets & found.keys()} == {HIDDEN}, "give each secret a value here"
    assert b"hush" not in msgspec.json.encode(list(found.values()))
    assert (found["worker_api_key"].origin, found["port"].origin) == ("flag", "default")


def test_the_origin_of_values_that_compat_sets() -> None:
    found = {each.name: each for each in effective(RouterArgs(compat="0.3.2").checked())}
    assert (found["host"].origin, found["host"].where) == ("compat", "0.3.2")
