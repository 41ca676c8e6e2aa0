"""The answers that only a router with its own engines gives have the formats that GET /openapi.json describes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from routers import RouterProcess, environment, free_port
from sglang_router.admin import shapes

WORDS = (
    "--backend",
    "builtin",
    "--speed",
    "0",
    "--dp-size",
    "1",
    "--router-autoscale",
    "1:2",
    "--router-disable-access-log",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """Yield launch_server with one healthy engine."""
    log = tmp_path_factory.mktemp("server") / "log"
    port, metrics, engine = free_port(), free_port(), free_port()
    ports = ("--port", port, "--router-prometheus-port", metrics, "--router-dp-worker-base-port", engine)
    command = (sys.executable, "-W", "error", "-m", "sglang_router.launch_server", *WORDS, *map(str, ports))
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    router = RouterProcess(process, f"http://127.0.0.1:{port}", "", log)
    try:
        router.until(lambda: ready(router))
        yield router
        router.end()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ready(router: RouterProcess) -> bool:
    try:
        return router.get("/readiness").status == 200
    except OSError:
        return False


def test_a_worker_with_its_replica(server: RouterProcess) -> None:
    (worker,) = msgspec.json.decode(server.get("/workers").body, type=shapes.WorkerList).workers
    assert isinstance(worker.replica, shapes.ReplicaInfo)
    assert (worker.replica.rank, worker.replica.last_exit) == (0, None)


def test_scaling(server: RouterProcess) -> None:
    scale = msgspec.json.decode(server.get("/scale").body, type=shapes.Scale)
    assert (scale.desired, scale.rules.fewest, scale.rules.most) == (1, 1, 2)


def test_restarts(server: RouterProcess) -> None:
    begun = server.post("/restart_workers")
    assert begun.status == 202
    assert msgspec.json.decode(begun.body, type=shapes.RollingAccepted).total == 1
    assert begun.headers["location"] == "/restart_workers"

    def rolling() -> shapes.RestartProgress:
        return msgspec.json.decode(server.get("/restart_workers").body, type=shapes.RestartProgress)

    server.until(lambda: rolling().state == "done")
    (name,) = (worker["id"] for worker in server.workers().values())
    one = server.post(f"/workers/{name}/restart")
    assert one.status == 202
    assert msgspec.json.decode(one.body, type=shapes.Accepted).worker_id == name
    server.until(lambda: [each["replica"]["restarts"] for each in server.workers().values()] == [2])
    server.until(lambda: ready(server))
    (worker,) = msgspec.json.decode(server.get("/workers").body, type=shapes.WorkerList).workers
    assert isinstance(worker.replica, shapes.ReplicaInfo)
    assert worker.replica.last_exit is not None
