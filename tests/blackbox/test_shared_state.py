"""Several routers as one, as processes: a real Valkey between them, and what they say of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines import engine_processes
from routers import RouterProcess, router_process
from valkeys import ValkeyServer, valkey_server

PASSWORD = "a/secret"


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with valkey_server(password=PASSWORD) as found:
        yield found


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with engine_processes(1) as urls:
        yield urls[0]


def flags(server: ValkeyServer, prefix: str, password: Path) -> tuple[str, ...]:
    url = f"redis://127.0.0.1:{server.port}/1"
    return ("--shared-state", url, "--shared-state-password-file", str(password), "--shared-state-prefix", prefix)


@pytest.fixture
def password(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    return file


def shared(router: RouterProcess) -> dict[str, Any]:
    found: dict[str, Any] = router.get("/readiness").json()["shared_state"]
    return found


def sees(router: RouterProcess, peers: int) -> bool:
    return (shared(router)["state"], shared(router)["peers"]) == ("connected", peers)


def test_two_routers_know_of_each_other_what_is_in_flight_where_prompts_went_and_what_drains_until_one_ends(
    server: ValkeyServer, engine: str, password: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    words = (*flags(server, "two", password), "--shared-state-key", str(key), "--shared-state-workers")
    with router_process([engine], *words, "--relay-processes", "2") as a:
        with router_process([engine], *words) as b:
            a.until(lambda: sees(a, 1))
            b.until(lambda: sees(b, 1))
            slow = threading.Thread(target=a.post, args=("/generate", {"text": "x", "sampling_params": SLOW}))
            slow.start()
            b.until(lambda: b.worker(engine)["elsewhere"] == 1)
            assert b.worker(engine)["load"] == 0
            slow.join()
            b.until(lambda: b.worker(engine)["elsewhere"] == 0)
            a.post("/generate", {"text": "word " * 1000, "sampling_params": {"max_new_tokens": 1}})
            b.until(lambda: b.samples().total("sgl_router_shared_placements_total", direction="received") > 0)
            b.post("/generate", {"text": "word " * 1000, "sampling_params": {"max_new_tokens": 1}})
            assert b.samples().total("sgl_router_prefix_matched_bytes_total") > 4000
            a.post(f"/workers/{a.worker(engine)['id']}/drain")
            b.until(lambda: b.worker(engine)["draining"] is True)
            b.post(f"/workers/{b.worker(engine)['id']}/resume")
            a.until(lambda: a.worker(engine)["draining"] is False)
            samples = b.samples()
            assert samples.total("sgl_router_shared_state", state="connected") == 1
            assert samples.total("sgl_router_shared_peers") == 1
            assert samples.total("sgl_router_shared_messages_total", direction="sent", topic="loads") > 0
            assert samples.total("sgl_router_shared_bytes_total", direction="received", topic="loads") > 0
            status = subprocess.run(
                [sys.executable, "-m", "sglang_router.cli", "status", "--url", b.url], capture_output=True, text=True
            )
            assert f"fleet      1 other router through redis://127.0.0.1:{server.port}/1\n" in status.stdout
            config = b.get("/config").body.decode()
            assert PASSWORD not in config + status.stdout + samples_text(b)
            drain_ends_with_its_worker(a, b, engine)
        a.until(lambda: sees(a, 0))
        assert "sharing with the other routers" in a.log()
        assert PASSWORD not in a.log()


SLOW = {"max_new_tokens": 400, "ignore_eos": True}


def drain_ends_with_its_worker(a: RouterProcess, b: RouterProcess, engine: str) -> None:
    a.post(f"/workers/{a.worker(engine)['id']}/drain")
    b.until(lambda: b.worker(engine)["draining"] is True)
    a.post(f"/remove_worker?url={engine}")
    b.until(lambda: b.samples().total("sgl_router_shared_messages_total", direction="received", topic="orders") >= 4)
    assert b.worker(engine)["draining"] is True
    assert b.post(f"/remove_worker?url={engine}").body == f"Successfully removed worker: {engine}".encode()
    added = a.post(f"/add_worker?url={engine}")
    assert b"; the other routers of this machine add it too" in added.body
    b.until(lambda: engine in b.workers())
    assert [router.worker(engine)["draining"] for router in (a, b)] == [False, False]
    removed = b.post(f"/remove_worker?url={engine}")
    assert removed.body.endswith(b"; the other routers of this machine remove it too")
    a.until(lambda: engine not in a.workers())
    nobody = "http://127.0.0.1:9"
    assert a.post("/workers", {"url": nobody}).json()["message"].count("; the other routers of this machine add it too")
    b.until(lambda: nobody in b.workers())
    removed = b.ask("DELETE", f"/workers/{b.worker(nobody)['id']}")
    assert removed.json()["message"].endswith("; the other routers of this machine remove it too")
    a.until(lambda: nobody not in a.workers())


def samples_text(router: RouterProcess) -> str:
    return router.get("/metrics").body.decode()


def test_requests_go_on_without_the_store_and_with_it_again_under_another_password(engine: str, password: Path) -> None:
    words = ("--shared-state-password-file", str(password))
    with (
        valkey_server(password=PASSWORD) as server,
        router_process([engine], "--shared-state", f"redis://127.0.0.1:{server.port}", *words) as router,
    ):
        router.until(lambda: sees(router, 0))
        server.kill()
        router.until(lambda: shared(router)["state"] == "unreachable")
        assert router.post("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 1}}).status == 200
        answer = router.get("/readiness")
        assert answer.status == 200
        assert answer.json()["shared_state"] == {"state": "unreachable", "peers": 0}
        assert "cannot be reached" in router.get("/overview").json()["shared"]["problem"]
        assert router.samples().total("sgl_router_shared_losses_total") == 1
        password.write_text("another/secret\n")
        router.send_signal(signal.SIGHUP)
        router.until(lambda: f"--shared-state: loaded {password} anew" in router.log())
        server.start("--requirepass", "another/secret")
        router.until(lambda: sees(router, 0))
        assert router.log().count("cannot be reached") == 1
        assert router.log().count("sharing again") == 1
        assert "/secret" not in router.log()


def test_one_of_two_routers_scales_by_what_comes_to_the_other_one(
    server: ValkeyServer, engine: str, password: Path, tmp_path: Path
) -> None:
    heard = [tmp_path / "a", tmp_path / "b"]
    server.cli("SET", "{scaled}:leader", "")  # given back: the next one need not wait
    server.cli("MOVE", "{scaled}:leader", "1")
    words = (*flags(server, "scaled", password), "--autoscale", "0:3", "--autoscale-up-cooldown-secs", "0.1")

    def acting(file: Path) -> tuple[str, ...]:
        return (*words, "--scale-command", f"sh -c 'echo x >> {file}'")

    with router_process([], *acting(heard[0])) as a:
        a.until(lambda: a.get("/scale").json()["acts"] is True)
        with router_process([], *acting(heard[1])) as b:
            b.until(lambda: sees(b, 1))
            assert [router.get("/readiness").status for router in (a, b)] == [200, 200]
            statuses: list[int] = []
            held = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
            asked = threading.Thread(target=lambda: statuses.append(b.post("/generate", held).status))
            asked.start()
            b.until(lambda: b.get("/scale").json()["desired"] == 1)
            assert b.get("/scale").json()["acts"] is False
            assert a.samples().total("sgl_router_shared_leader") == 1
            assert b.samples().total("sgl_router_shared_leader") == 0
            a.until(heard[0].exists)
            assert not heard[1].exists()
            b.post(f"/add_worker?url={engine}")
            asked.join()
            assert statuses == [200]
