"""Sessions of unchanged clients, through a real router: each stays at one worker, however it tells its session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from routers import PlainWorker, RouterProcess, plain_worker, router_process

CHAT = "/v1/chat/completions"
ANSWER = (200, {"content-type": "application/json"}, b'{"choices":[]}')
FLAGS = ("--policy", "round_robin", "--session-affinity", "--slow-start-secs", "0", "--metrics-interval-secs", "0")
LARGE = "x" * 600_000

Turn = Callable[[RouterProcess, str, int], int]
"""Sends a turn of a session; returns the status."""


@contextlib.contextmanager
def workers(count: int) -> Iterator[list[PlainWorker]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(plain_worker({CHAT: ANSWER, "/v1/messages": ANSWER})) for _ in range(count)]


def chat(turn: int, session: str = "") -> dict[str, Any]:
    """A conversation that has gone on for some turns; without a session, the same for all."""
    said = [{"role": "system", "content": "You are a coding agent."}, {"role": "user", "content": f"Hello. {session}"}]
    for number in range(turn):
        said += [{"role": "assistant", "content": f"answer {number}"}, {"role": "user", "content": f"more {number}"}]
    return {"model": "m", "messages": said}


def by_header(router: RouterProcess, session: str, turn: int) -> int:
    return router.post(CHAT, chat(0), x_claude_code_session_id=session, x_request_id=f"{session}{turn}").status


def by_field(router: RouterProcess, session: str, turn: int) -> int:
    return router.post("/v1/messages", {**chat(0), "metadata": {"user_id": session}}).status


def by_field_of_a_large_body(router: RouterProcess, session: str, turn: int) -> int:
    return router.post(CHAT, {**chat(0), "pad": LARGE, "prompt_cache_key": session}).status


def by_request_id(router: RouterProcess, session: str, turn: int) -> int:
    return router.post(CHAT, chat(0), x_request_id=f"{session}_t{turn}_r0").status


def by_messages(router: RouterProcess, session: str, turn: int) -> int:
    return router.post(CHAT, chat(turn, session)).status


TURNS = [by_header, by_field, by_field_of_a_large_body, by_request_id, by_messages]


@pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "two relays"])
def test_each_session_stays_at_one_worker(more: tuple[str, ...]) -> None:
    with workers(3) as found, router_process([worker.url for worker in found], *FLAGS, *more) as router:
        for turn_of in TURNS:
            before = router.samples()
            for session in ("a", "b", "c", "d", "e"):
                for turn in range(4):
                    assert turn_of(router, f"{turn_of.__name__}-{session}", turn) == 200
            counted = router.samples()
            legs = {
                kind: counted.total("sgl_router_session_legs_total", place=kind)
                - before.total("sgl_router_session_legs_total", place=kind)
                for kind in ("new", "home", "free", "leave", "visit")
            }
            assert legs == {"new": 5, "home": 15, "free": 0, "leave": 0, "visit": 0}, turn_of.__name__
        live = counted.by("sgl_router_live_sessions", "worker")
        assert sum(live.values()) == 5 * len(TURNS)
        assert min(live.values()) >= 5, "new sessions went to all workers in turn"
        assert counted.by("sgl_router_policy_decisions_total", "branch") == {
            "turn": 5 * len(TURNS),
            "session": 15 * len(TURNS),
        }


@pytest.mark.parametrize("more", [(), ("--relay-processes", "1")], ids=["one process", "a relay"])
def test_a_new_session_waits_for_room_and_is_told_when_to_try_again(more: tuple[str, ...]) -> None:
    flags = ("--session-admission", "--session-capacity-tokens", "60000", "--session-wait-secs", "0.2")
    with workers(2) as found, router_process([worker.url for worker in found], *FLAGS, *flags, *more) as router:
        assert [by_header(router, session, 0) for session in ("a", "b")] == [200, 200]
        refused = router.post(CHAT, chat(0), x_session_id="c")
        assert (refused.status, refused.json()["error"]["code"]) == (429, "sessions_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert [by_header(router, session, 1) for session in ("a", "b")] == [200, 200], "live ones go on"
        counted = router.samples()
        reserved = counted.by("sgl_router_session_reserved_tokens", "worker")
        assert all(40_000 < tokens < 41_000 for tokens in reserved.values())
        assert counted.by("sgl_router_live_sessions", "worker") == dict.fromkeys(reserved, 1)
        assert counted.total("sgl_router_waiting_sessions") == 0
        assert sum(worker.asked[CHAT] for worker in found) == 4
