"""Decisions of a router that runs: headers, control plane and the command `explain`, in one process and in several."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import engine_processes
from routers import COMMAND, WITHIN, RouterProcess, environment, free_port, router_process

USER, ADMIN = "user-key-0123456789", "admin-key-0123456789"
LINE = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. "
PROMPT = {"text": LINE * 8, "sampling_params": {"max_new_tokens": 2}}
ASKS = {"x_sglang_router_explain": "1"}


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(2, "--speed", "0") as found:
        yield list(found)


def explained(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "sglang_router", "explain", *words]
    env = environment() | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env=env, check=False)


def ended(router: RouterProcess, request_id: str) -> dict[str, Any]:
    """Return the record of a request that the router has heard the end of."""

    def heard() -> bool:
        return bool(router.get(f"/decisions/{request_id}").json()["outcome"] != "running")

    router.until(heard)
    found: dict[str, Any] = router.get(f"/decisions/{request_id}").json()
    return found


@pytest.mark.parametrize("options", [(), ("--relay-processes", "2")], ids=["one process", "relay processes"])
def test_a_request_that_asks_is_explained(urls: list[str], options: tuple[str, ...]) -> None:
    with router_process(urls, *options) as router:
        assert router.post("/generate", PROMPT, x_request_id="first").status == 200
        answer = router.post("/generate", PROMPT, x_request_id="asked", **ASKS)
        stream = router.post("/generate", {**PROMPT, "stream": True}, x_request_id="stream", **ASKS)
        record = ended(router, "asked")
        assert ended(router, "first")["attempts"] == []
        assert answer.headers["x-sglang-router-worker"] == record["worker"] == ended(router, "first")["worker"]
        assert stream.headers["x-sglang-router-worker"] == record["worker"]
        (attempt,) = record["attempts"]
        told = f"{attempt['branch']}; matched={attempt['matched']}; total={attempt['total']}; attempt=1"
        assert answer.headers["x-sglang-router-decision"] == f'{told}; id="asked"'
        assert sorted(each["worker"] for each in attempt["considered"]) == sorted(urls)
        assert (record["branch"], attempt["outcome"], record["status"]) == ("hit", "served", 200)
        done = explained("asked", "--url", router.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"  ->  {record['worker']}" in done.stdout
        unknown = explained("nobody", SGLANG_ROUTER_URL=router.url)
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert "keeps no decision about nobody" in unknown.stderr


def test_who_may_read_decisions_and_what_clients_see(urls: list[str]) -> None:
    control = ("--control-plane-api-keys", f"dev:A Developer:user:{USER}", f"ops:On Call:admin:{ADMIN}")
    with router_process(urls, *control, key=ADMIN) as router:
        answer = router.post("/generate", PROMPT, x_request_id="asked", authorization="", **ASKS)
        record = ended(router, "asked")
        assert answer.headers["x-sglang-router-worker"] == router.worker(record["worker"])["id"]
        assert router.get("/decisions", authorization="Bearer wrong").status == 401
        for key, status in (("", 4), ("wrong", 4), (USER, 0), (ADMIN, 0)):
            done = explained("asked", "--url", router.url, SGLANG_ROUTER_API_KEY=key)
            assert done.returncode == status, done
            assert not key or key not in done.stdout + done.stderr


def test_options(urls: list[str], tmp_path: Path) -> None:
    with router_process(urls, "--decision-records", "2", "--decision-headers", "--decision-table-every", "1") as router:
        answers = [router.post("/generate", PROMPT, x_request_id=f"r-{number}") for number in range(3)]
        assert all("x-sglang-router-worker" in answer.headers for answer in answers)
        told = router.get("/decisions").json()
        assert [(record["id"], len(record["attempts"])) for record in told["decisions"]] == [("r-2", 1), ("r-1", 1)]
        assert explained("r-0", "--url", router.url).returncode == 1


def test_a_router_that_keeps_none(urls: list[str]) -> None:
    with router_process(urls, "--decision-records", "0") as router:
        answer = router.post("/generate", PROMPT, x_request_id="asked", **ASKS)
        assert answer.headers["x-sglang-router-worker"] in urls
        done = explained("asked", "--url", router.url)
        assert (done.returncode, "keeps no decisions" in done.stderr) == (1, True)


@pytest.mark.parametrize("options", [(), ("--relay-processes", "2")], ids=["one process", "relay processes"])
def test_a_shadow_policy_is_compared(urls: list[str], options: tuple[str, ...]) -> None:
    with router_process(urls, *options, "--policy", "round_robin", "--shadow-policy", "cache_aware") as router:
        for number in range(4):
            assert router.post("/generate", PROMPT, x_request_id=f"r-{number}").status == 200
        record = ended(router, "r-1")
        shadow = record["attempts"][0]["shadow"]
        assert (shadow["policy"], shadow["branch"], record["policy"]) == ("cache_aware", "hit", "round_robin")
        assert shadow["matched"] > shadow["actual_matched"] == 0
        done = explained("r-1", "--url", router.url)
        assert f"cache_aware would have chosen {shadow['worker']}: hit" in done.stdout
        samples = router.samples()
        decided = samples.by("sgl_router_shadow_decisions_total", "agrees", policy="cache_aware")
        assert sum(decided.values()) == 4
        matched = samples.by("sgl_router_shadow_matched_bytes_total", "choice", policy="cache_aware")
        assert matched["shadow"] > matched["actual"] > 0
        assert samples.total("sgl_router_shadow_failures_total") == 0
        assert samples.total("sgl_router_decision_records") == 4


@pytest.mark.parametrize("options", [(), ("--relay-processes", "2")], ids=["one process", "relay processes"])
def test_the_log_of_decisions(urls: list[str], options: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    with router_process(urls, *options, "--decision-log", str(path), "--decision-records", "0") as router:
        for number in range(2):
            sent = router.post("/generate", PROMPT, x_request_id=f"r-{number}", x_smg_routing_key="my-session")
            assert sent.status == 200
        other = {**PROMPT, "text": LINE * 4 + "another end " * 40, "stream": True}
        assert router.post("/generate", other, x_request_id="r-2").status == 200
    head, first, second, third = (json.loads(line) for line in path.read_text().splitlines())
    assert (head["format"], head["version"], head["block"]) == ("sglang-router-decisions", 1, 256)
    assert [each["id"] for each in (first, second, third)] == ["r-0", "r-1", "r-2"]
    size = len(LINE * 8) + 1
    assert (first["bytes"], len(first["chain"])) == (size, size // 256)
    assert first["chain"] == second["chain"]
    shared = (len(LINE * 4) + 1) // 256
    assert [mine == other for mine, other in zip(first["chain"], third["chain"], strict=False)][: shared + 1] == [
        *[True] * shared,
        False,
    ]
    assert (first["session"], third["session"]) == (second["session"], "")
    assert (second["worker"], second["branch"]) == (first["worker"], "hit")
    assert (second["attempts"], second["status"]) == (1, 200)
    assert 0 < third["ttft"] <= third["duration"]
    assert third["stream"]
    for word in ("summer", "another", "my-session"):
        assert word not in path.read_text()


def test_a_log_that_cannot_be_opened_ends_the_start(urls: list[str], tmp_path: Path) -> None:
    log = tmp_path / "nowhere" / "decisions"
    command = [*COMMAND, "--worker-urls", *urls, "--port", str(free_port()), "--decision-log", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env=environment(), check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --decision-log")
