"""`restart --wait` and `drain --wait` against a router that tells the states of a worker one after the other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from routers import plain_worker
from sglang_router import cli

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


def drained(*figures: tuple[int, int], timeout: str = "30") -> int:
    """Drain a worker that has so many requests at the router, and elsewhere, one look after the other."""
    looks = [worker(0, "healthy", id="w1", draining=True, load=load, elsewhere=other) for load, other in figures]
    answers = Script(workers__w1__drain=looks[:1], workers__w1=looks[1:] or looks)
    with plain_worker(answers) as router:
        return cli.main(["drain", "w1", "--wait", "--timeout", timeout, "--url", router.url])


def test_it_waits_for_the_requests_of_other_routers_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert drained((1, 2), (0, 2), (0, 1), timeout="0.6") == 5
    assert "it still has requests in flight" in capfd.readouterr().err
    assert drained((1, 2), (0, 2), (0, 0)) == 0
    assert capfd.readouterr().out == "http://a:1 gets no new requests; no request is in flight\n"


def test_it_looks_again_for_others_hear_of_the_drain_a_moment_later(capfd: pytest.CaptureFixture[str]) -> None:
    assert drained((0, 0), (0, 1), timeout="0.1") == 5
    assert drained((0, 0), (0, 1), (0, 0)) == 0
    assert "no request is in flight" in capfd.readouterr().out
