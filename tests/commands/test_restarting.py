"""`restart --wait` and `drain --wait` against a router that tells the states of a worker one after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from routers import plain_worker
from sglang_router import cli
from sglang_router.commands.asking import Failed, Reply
from sglang_router.commands.other_routers import OtherRouters

WORKER = "/workers/w1"


class Script(dict[str, Any]):
    """The answers to each path in their order; the last one is given for ever."""

    def __init__(self, **answers: list[dict[str, Any]]) -> None:
        self.answers = {f"/{name.replace('__', '/')}": list(found) for name, found in answers.items()}

    def get(self, path: str, default: object = None) -> Any:
        found = self.answers[path]
        return 200, {}, json.dumps(found.pop(0) if len(found) > 1 else found[0]).encode()


def worker(restarts: int, health: str, **more: Any) -> dict[str, Any]:
    replica = {"restarts": restarts, "state": health, "reason": more.pop("reason", "")}
    return {"url": "http://a:1", "health": health, "circuit_breaker": "closed", "replica": replica} | more


def restarted(*states: dict[str, Any], timeout: str = "30") -> int:
    begun = {"status": "accepted", "worker_id": "w1", "message": "it drains"}
    answers = Script(workers__w1=[worker(0, "healthy"), *states], workers__w1__restart=[begun])
    with plain_worker(answers) as router:
        return cli.main(["restart", "w1", "--wait", "--timeout", timeout, "--url", router.url])


def test_it_waits_until_the_new_process_takes_requests(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker that is healthy because its old process still runs is not back."""
    states = (
        worker(0, "healthy", draining=True, load=1),
        worker(0, "healthy"),
        worker(1, "starting"),
        worker(1, "healthy", draining=True),
        worker(1, "healthy"),
    )
    assert restarted(*states) == 0
    assert capfd.readouterr().out == "w1 is restarted and takes requests\n"


def test_an_engine_that_is_given_up_is_not_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert restarted(worker(1, "starting"), worker(3, "down", reason="exit status 1")) == 1
    assert capfd.readouterr().err == "error: w1 is down and is not started again: exit status 1\n"


def test_it_does_not_wait_longer_than_it_was_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert restarted(worker(1, "starting"), timeout="0.01") == 5
    assert capfd.readouterr().err == "error: after 0.01 s it still restarts.\n"


@pytest.mark.parametrize(("end", "status"), [("done", 0), ("stopped", 1)])
def test_all_are_waited_for(end: str, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [
        {"state": "running", "done": 0, "total": 2, "current": 0, "reason": ""},
        {"state": "running", "done": 1, "total": 2, "current": 1, "reason": ""},
        {"state": end, "done": 1 + (end == "done"), "total": 2, "current": None, "reason": "why" * (end != "done")},
    ]
    with plain_worker(Script(restart_workers=steps)) as router:
        assert cli.main(["restart", "--all", "--wait", "--url", router.url]) == status
    told = capfd.readouterr().out
    assert told.startswith(f"{end}: ")
    assert told.endswith("engines are restarted; why\n" if status else "2 of 2 engines are restarted\n")


def drained(*figures: tuple[int, int], timeout: str = "30", shared: Sequence[dict[str, Any]] = ()) -> int:
    """Drain a worker that has so many requests at the router, and elsewhere, one look after the other.

    shared  what the router tells of those that it shares with, one look after the other; (): it shares with nobody
    """
    looks = [worker(0, "healthy", id="w1", draining=True, load=load, elsewhere=other) for load, other in figures]
    readiness = [{"status": "ready", "total_workers": 1, "shared_state": each} for each in shared]
    answers = Script(
        workers__w1__drain=looks[:1],
        workers__w1=looks[1:] or looks,
        readiness=readiness or [{"status": "not ready", "total_workers": 1}],
    )
    with plain_worker(answers) as router:
        return cli.main(["drain", "w1", "--wait", "--timeout", timeout, "--url", router.url])


CONNECTED = {"state": "connected", "peers": 1}
AWAY = {"state": "unreachable", "peers": 0}


def test_it_waits_for_the_requests_of_other_routers_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert drained((1, 2), (0, 2), (0, 1), timeout="0.6", shared=[CONNECTED]) == 5
    assert "it still has requests in flight" in capfd.readouterr().err
    assert drained((1, 2), (0, 2), (0, 0)) == 0
    assert capfd.readouterr().out == "http://a:1 gets no new requests; no request is in flight\n"


def test_a_router_that_shares_with_nobody_knows_it_at_once() -> None:
    assert drained((0, 0), timeout="0.001") == 0


def test_others_hear_of_the_drain_a_moment_later(capfd: pytest.CaptureFixture[str]) -> None:
    assert drained((0, 0), timeout="0.1", shared=[CONNECTED]) == 5
    assert "it still waits for the figures of the other routers" in capfd.readouterr().err


def test_it_is_not_done_while_the_others_cannot_be_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert drained((0, 0), timeout="0.6", shared=[AWAY]) == 5
    why = "may get requests of other routers: they cannot be told (store of --shared-state: unreachable)"
    assert capfd.readouterr().err == f"waiting: w1 {why}\nerror: after 0.6 s it still {why}.\n"
    assert drained((0, 0), (0, 1), (0, 0), shared=[AWAY, CONNECTED]) == 0
    assert capfd.readouterr().err == f"waiting: w1 {why}\n"


class PlayedRouter:
    """A router that says of those that it shares with what the test lets it say."""

    shown = "http://r:1"

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {}

    def ask(self, method: str, path: str) -> Reply:
        assert (method, path) == ("GET", "/readiness")
        return Reply(503, "", json.dumps(self.answer).encode())


def test_figures_of_others_count_when_all_had_the_time_to_tell_them_since_the_store_is_reached() -> None:
    router = PlayedRouter()
    others = OtherRouters(router)

    def looks(state: str, peers: int, *times: float) -> list[bool]:
        router.answer = {"total_workers": 0, "shared_state": {"state": state, "peers": peers}}
        return [not others.missing(now) for now in times]

    assert looks("connected", 1, 0.0, 1.0, 1.6) == [False, False, True]
    assert looks("slow", 1, 2.0) == [False]
    assert looks("connected", 1, 3.0, 4.0, 5.0) == [False, False, True]
    assert looks("connected", 0, 5.1, 6.0, 7.0) == [False, False, True]  # one was silent: so may the store be
    others = OtherRouters(router)
    assert looks("connected", 200, 0.0, 3.0, 4.0) == [False, False, True]


@pytest.mark.parametrize("content", [{}, {"total_workers": 1, "shared_state": {"peers": 1}}])
def test_what_tells_no_readiness_is_no_router(content: dict[str, Any]) -> None:
    router = PlayedRouter()
    router.answer = content
    with pytest.raises(Failed, match="is no router"):
        OtherRouters(router).missing(0.0)
