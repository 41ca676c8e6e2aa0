"""Where engines say that they publish, and where an option says so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fake_worker import FakeWorker, answer
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker
from sglang_router.workers.kv_sources import Published, Templates, sources_of

INFO, SOURCES = "GET /server_info", "GET /kv_event_sources"
NOTHING = Templates()
SGLANG = {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "kv", "block_size": 16}


def found(script: dict[str, Any], templates: Templates = NOTHING, rank: int | None = None) -> dict[int, Published]:
    async def main() -> dict[int, Published]:
        loop = asyncio.get_running_loop()
        pool = ConnectionPool(loop, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None)
        fake = FakeWorker({route: answer(200, body) for route, body in script.items()})
        await fake.start()
        worker = Worker(WorkerSpec(url=fake.url, dp_rank=rank), "id", 0, 0.0)
        pool.know(worker.target)
        try:
            return await sources_of(pool, worker, templates)
        finally:
            await pool.close()
            await fake.stop()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("said", "sources"),
    [
        (SGLANG, {0: Published("tcp://127.0.0.1:5557", "", "kv")}),
        (
            {**SGLANG, "dp_size": 2, "replay_endpoint_port_base": 6000},
            {
                0: Published("tcp://127.0.0.1:5557", "tcp://127.0.0.1:6000", "kv"),
                1: Published("tcp://127.0.0.1:5558", "tcp://127.0.0.1:6001", "kv"),
            },
        ),
        ({**SGLANG, "endpoint_host": "10.0.0.7", "topic": None}, {0: Published("tcp://10.0.0.7:5557")}),
        ({**SGLANG, "endpoint_host": "fd00::7"}, {0: Published("tcp://[fd00::7]:5557", "", "kv")}),
        ({**SGLANG, "endpoint_host": "::"}, {0: Published("tcp://127.0.0.1:5557", "", "kv")}),
        ({**SGLANG, "publisher": "null"}, {}),
        ({**SGLANG, "endpoint_port_base": None}, {}),
        (None, {}),
        ("zmq", {}),
    ],
)
def test_sglang_says_it_in_its_server_info(said: Any, sources: dict[int, Published]) -> None:
    assert found({INFO: {"version": "0.5.23", "kv_events": said}}) == sources


def test_vllm_has_an_endpoint_for_it() -> None:
    said: list[Any] = [
        {"data_parallel_rank": 0, "endpoint": "tcp://*:5557", "replay_endpoint": None, "topic": ""},
        {"data_parallel_rank": 1, "endpoint": "tcp://10.0.0.1:5558", "replay_endpoint": "tcp://*:6001", "topic": "t"},
        {"data_parallel_rank": 2, "endpoint": "http://10.0.0.1/"},
        {"endpoint": 7},
        "nonsense",
    ]
    assert found({SOURCES: said}) == {
        0: Published("tcp://127.0.0.1:5557"),
        1: Published("tcp://10.0.0.1:5558", "tcp://127.0.0.1:6001", "t"),
    }
    assert found({SOURCES: {"detail": "no"}}) == {}
    by_rank = {"0": {**said[0], "enable_kv_cache_events": True, "publisher": "zmq"}, "1": said[1], "2": None}
    assert found({SOURCES: by_rank}) == found({SOURCES: said})


def test_an_option_says_it_for_engines_that_do_not() -> None:
    templates = Templates("tcp://{host}:5557", "tcp://{host}:6557")
    assert found({}, templates) == {0: Published("tcp://127.0.0.1:5557", "tcp://127.0.0.1:6557")}
    assert found({}, templates, rank=2) == {2: Published("tcp://127.0.0.1:5559", "tcp://127.0.0.1:6559")}
    assert found({}, Templates("ipc:///run/kv.sock")) == {0: Published("ipc:///run/kv.sock")}
    assert found({INFO: {"kv_events": SGLANG}}, templates) == {0: Published("tcp://127.0.0.1:5557", "", "kv")}
