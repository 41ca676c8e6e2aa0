"""A router that reads its configuration again: all of it or nothing, and what needs a restart is told."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import engine_processes
from routers import RouterProcess, router_process

ONE_AND_TWO = pytest.mark.parametrize("processes", [(), ("--relay-processes", "2")], ids=["one", "two"])


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(2, "--speed", "0") as found:
        yield found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "router.yaml"


def generate(router: RouterProcess, **headers: str) -> Any:
    return router.post("/generate", {"text": "x" * 200, "sampling_params": {"max_new_tokens": 1}}, **headers)


def value(router: RouterProcess, name: str) -> Any:
    return next(each["value"] for each in router.get("/config").json()["options"] if each["name"] == name)


def policies(router: RouterProcess) -> list[str]:
    return [each["policy"] for each in router.get("/decisions").json()["decisions"]]


@ONE_AND_TWO
def test_policy_limits_workers_and_log_level_change(urls: list[str], config: Path, processes: tuple[str, ...]) -> None:
    config.write_text(f"worker-urls: [{urls[0]}]\npolicy: cache_aware\n")
    with router_process([], "--config", str(config), *processes) as router:
        router.until_healthy(urls[0])
        generate(router)
        config.write_text(
            f"worker-urls: [{', '.join(urls)}]\npolicy: round_robin\nmax-concurrent-requests: 2\n"
            "log-level: warning\nconnect-timeout-secs: 9\n"
        )
        answer = router.post("/reload")
        assert answer.status == 200
        assert answer.json() == {
            "changed": ["--worker-urls", "--policy", "--max-concurrent-requests", "--log-level"],
            "needs_restart": ["--connect-timeout-secs"],
            "added": [urls[1]],
            "removed": [],
            "file": str(config),
        }
        router.until_healthy(*urls)
        for _ in range(4):
            assert generate(router).status == 200
        router.until(lambda: policies(router) == ["round_robin"] * 4 + ["cache_aware"])
        assert {router.worker(url)["processed"] for url in urls} >= {2}
        found = value(router, "policy"), value(router, "max_concurrent_requests"), value(router, "connect_timeout_secs")
        assert found == ("round_robin", 2, 10), "what needs a restart is not in effect"
        assert router.post("/reload").json() == {
            "changed": [],
            "needs_restart": ["--connect-timeout-secs"],
            "added": [],
            "removed": [],
            "file": str(config),
        }


def test_thresholds_change_and_the_memory_stays(urls: list[str], config: Path) -> None:
    config.write_text("cache-threshold: 0.5\n")
    with router_process(urls, "--config", str(config)) as router:
        generate(router)
        router.until(lambda: sum(each["tree_size"] for each in router.workers().values()) > 0)
        known = sum(each["tree_size"] for each in router.workers().values())
        config.write_text("cache-threshold: 0.9\n")
        assert router.post("/reload").json()["changed"] == ["--cache-threshold"]
        assert sum(each["tree_size"] for each in router.workers().values()) == known
        config.write_text("cache-threshold: 0.9\npolicy: least_load\n")
        assert router.post("/reload").json()["changed"] == ["--policy"]
        assert sum(each["tree_size"] for each in router.workers().values()) == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("policy: round_robin\nqueue-size: -1\n", "queue-size"),
        ("policy: round_robin\nworker-urls: [ftp://x]\n", "worker-urls"),
        ("policy: round_robin\nnonsense: 1\n", "is not an option"),
        ("policy: [\n", "router.yaml"),
        ("", "holds no options"),
        ("policy: round_robin\n", "names no workers any more"),
    ],
)
def test_a_file_that_is_wrong_changes_nothing(urls: list[str], config: Path, text: str, why: str) -> None:
    config.write_text(f"policy: cost\nworker-urls: [{', '.join(urls)}]\n")
    with router_process([], "--config", str(config)) as router:
        before = router.get("/config").json()
        config.write_text(text)
        answer = router.post("/reload")
        assert (answer.status, answer.json()["error"]["code"]) == (422, "config_refused")
        assert why in answer.json()["error"]["message"]
        assert answer.json()["error"]["message"].endswith("everything stays as it was")
        router.send_signal(signal.SIGHUP)
        router.until(lambda: "everything stays as it was" in router.log())
        assert router.get("/config").json() == before
        assert set(router.workers()) == set(urls)


def test_keys_that_are_wrong_refuse_the_whole(urls: list[str], config: Path, tmp_path: Path) -> None:
    """A good file is not taken beside bad keys."""
    keys = tmp_path / "keys"
    keys.write_text("alice secret-a\n")
    config.write_text("policy: cost\n")
    with router_process(urls, "--config", str(config), "--api-key-file", str(keys), key="secret-a") as router:
        keys.write_text("alice\tsecret b c\n")
        config.write_text("policy: round_robin\n")
        answer = router.post("/reload")
        assert answer.status == 422
        assert "secret" not in answer.json()["error"]["message"]
        assert value(router, "policy") == "cost"
        assert generate(router).status == 200


@ONE_AND_TWO
def test_keys_of_the_file_change(urls: list[str], config: Path, processes: tuple[str, ...]) -> None:
    config.write_text("api-key: [alice secret-a]\n")
    with router_process(urls, "--config", str(config), *processes, key="secret-a") as router:
        assert generate(router).status == 200
        config.write_text("api-key: [bob secret-b]\n")
        assert router.post("/reload").json()["changed"] == ["--api-key"]
        router._key = "secret-b"
        for _ in range(8):  # whichever relay has it
            router.until(lambda: generate(router, authorization="Bearer secret-a").status == 401)
            router.until(lambda: generate(router).status == 200)
        assert "secret" not in router.log()
        config.write_text("policy: cost\n")  # without keys, everybody could come in
        found = router.post("/reload").json()
        assert (found["changed"], found["needs_restart"]) == (["--policy"], ["--api-key"])
        assert generate(router, authorization="Bearer secret-a").status == 401


@pytest.mark.parametrize("processes", [(), ("--relay-processes", "1")], ids=["one", "two"])
def test_keys_that_move_into_a_file_wait_for_a_restart(
    urls: list[str], config: Path, tmp_path: Path, processes: tuple[str, ...]
) -> None:
    """Half of such a move would leave the router without any key, open to everybody."""
    clients, operators = tmp_path / "clients", tmp_path / "operators"
    clients.write_text("alice secret-f\n")
    operators.write_text("root:Root:admin:secret-g\n")
    client, admin = "secret-o", "secret-p"
    config.write_text(f"api-key: [alice {client}]\ncontrol-plane-api-keys: ['root:Root:admin:{admin}']\n")
    with router_process(urls, "--config", str(config), *processes, key=admin) as router:
        config.write_text(f"api-key-file: {clients}\ncontrol-plane-api-keys-file: {operators}\n")
        found = router.post("/reload").json()
        moved = ["--api-key", "--api-key-file", "--control-plane-api-keys", "--control-plane-api-keys-file"]
        assert (found["changed"], sorted(found["needs_restart"])) == ([], moved)
        for key, status in ((client, 200), ("", 401), ("none", 401)):
            assert generate(router, authorization=f"Bearer {key}").status == status
        for key, status in ((admin, 200), ("", 401), ("none", 401)):
            assert router.get("/workers", authorization=f"Bearer {key}").status == status


def test_processes_that_are_started_again_have_the_configuration_of_now(urls: list[str], config: Path) -> None:
    """Also when the file cannot be read just then: they would have the keys of the router's start."""
    config.write_text("api-key: [alice secret-a]\n")
    with router_process(urls, "--config", str(config), "--relay-processes", "1", key="secret-a") as router:
        config.write_text("api-key: [bob secret-b]\npolicy: round_robin\n")
        assert router.post("/reload").status == 200
        router._key = "secret-b"
        router.until(lambda: generate(router).status == 200)
        config.write_text("policy: [\n")
        for name in (" decides for 1 relay", "relay 1 is process "):
            word = re.findall(r"process (\d+) decides for" if "decides" in name else name + r"(\d+)", router.log())[-1]
            os.kill(int(word), signal.SIGKILL)
            told = router.log().count(name)
            router.until(lambda name=name, told=told: router.log().count(name) > told)  # type: ignore[misc]
            router.until(lambda: "everything stays as it was" in router.log())
            router.until(lambda: router.get("/readiness").status == 200)
            assert value(router, "policy") == "round_robin"
            assert generate(router).status == 200
            for refused in (
                generate(router, authorization="Bearer secret-a"),
                router.get("/config", authorization="Bearer secret-a"),
            ):
                assert refused.status == 401


def test_roles_and_ports_of_pairs_change(urls: list[str], config: Path) -> None:
    """A worker with another role or port begins anew; from pairs to single workers only a restart leads."""
    one, two = urls[:2]

    def pairs(prefill: str, port: int, decode: str) -> str:
        return f"pd-disaggregation: true\nprefill:\n- [{prefill}, {port}]\ndecode: [{decode}]\n"

    def parts() -> dict[str, tuple[str, int | None]]:
        return {url: (each["worker_type"], each.get("bootstrap_port")) for url, each in router.workers().items()}

    config.write_text(pairs(one, 9000, two))
    with router_process([], "--config", str(config)) as router:
        router.until_healthy(one, two)
        kept = router.worker(two)["id"]
        config.write_text(pairs(one, 9001, two))
        found = router.post("/reload").json()
        assert (found["added"], found["removed"]) == ([one], [one])
        assert parts() == {one: ("prefill", 9001), two: ("decode", None)}
        assert router.worker(two)["id"] == kept
        config.write_text(pairs(two, 9001, one))
        assert sorted(router.post("/reload").json()["added"]) == sorted((one, two))
        assert parts() == {one: ("decode", None), two: ("prefill", 9001)}
        config.write_text(f"worker-urls: [{one}]\n")
        found = router.post("/reload").json()
        waiting = ["--decode", "--pd-disaggregation", "--prefill", "--worker-urls"]
        assert (found["changed"], sorted(found["needs_restart"])) == ([], waiting)
        assert parts() == {one: ("decode", None), two: ("prefill", 9001)}


def test_a_part_of_a_change_that_no_router_could_start_with_is_refused(urls: list[str], config: Path) -> None:
    one, two = urls[:2]
    config.write_text(f"pd-disaggregation: true\nprefill:\n- [{one}, 9000]\ndecode: [{two}]\n")
    with router_process([], "--config", str(config)) as router:
        config.write_text(
            f"pd-disaggregation: true\nprefill:\n- [{one}, 9000]\ndiscovery-dns: ['decode=localhost:1']\n"
        )
        answer = router.post("/reload")
        assert answer.status == 422
        message = answer.json()["error"]["message"]
        assert "--prefill needs --decode" in message
        assert "as long as --discovery-dns waits for a restart" in message
        assert len(router.workers()) == 2


def test_a_rate_limit_holds_at_once(urls: list[str], config: Path) -> None:
    config.write_text("log-level: info\n")
    with router_process(urls, "--config", str(config)) as router:
        assert {generate(router).status for _ in range(3)} == {200}
        config.write_text("rate-limit-tokens-per-second: 1\nmax-concurrent-requests: 3\n")
        assert router.post("/reload").status == 200
        router.until(lambda: generate(router).status == 429)
        config.write_text("log-level: info\n")
        assert router.post("/reload").status == 200
        assert {generate(router).status for _ in range(3)} == {200}


def test_without_a_file_keys_and_certificates_are_read(urls: list[str]) -> None:
    with router_process(urls) as router:
        found = router.post("/reload").json()
        assert found.pop("file") is None
        assert found == {name: [] for name in ("changed", "needs_restart", "added", "removed")}
        assert router.get("/reload").status == 405
