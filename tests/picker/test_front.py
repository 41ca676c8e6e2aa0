"""The command, the health services, TLS, and what a start refuses."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from certificates import Authority
from engines import engine_processes
from gateways import Asked, picker
from routers import environment, free_port, router_process
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.picker.certificates import CertificateFiles
from sglang_router.picker.front import serve
from stack import stack

COMMAND = (sys.executable, "-W", "error", "-m", "sglang_router", "epp")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
READINESS = ("readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "")


def health_of(channel: grpc.Channel, service: str) -> Any:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status


def test_health_follows_the_routers_own_readiness() -> None:
    with stack() as router, picker(router) as gateway:
        assert health_of(gateway.channel, "liveness") == SERVING
        assert [health_of(gateway.channel, service) for service in READINESS] == [NOT_SERVING] * 3
        router.fakes({})
        assert [health_of(gateway.channel, service) for service in READINESS] == [SERVING] * 3
        router.call(lambda: setattr(router.context, "ending", True))
        assert health_of(gateway.channel, "readiness") == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health_of(gateway.channel, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_who_watches_the_readiness_hears_of_a_change() -> None:
    with stack() as router, picker(router) as gateway:
        stub = health_pb2_grpc.HealthStub(gateway.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=20)
        heard = (each.status for each in watch)
        health_of(gateway.channel, "")
        assert next(heard) in (NOT_SERVING, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        router.fakes({})
        assert SERVING in heard
        watch.cancel()


def test_tls_with_a_certificate_that_is_read_again(tmp_path: Path) -> None:
    ca = Authority(tmp_path / "ca")
    pair, next_pair = ca.issue("first"), ca.issue("second")
    files = CertificateFiles(pair.cert, pair.key)
    assert files.renewed() is None
    pair.become(next_pair)
    assert files.renewed() is not None
    assert files.renewed() is None
    Path(pair.key).unlink()
    assert files.renewed() is None
    pair = ca.issue("third")
    options = {"epp_tls_cert_path": pair.cert, "epp_tls_key_path": pair.key}
    with stack(options=options) as router, picker(router) as gateway:
        authority = grpc.ssl_channel_credentials(Path(ca.cert).read_bytes())
        with grpc.secure_channel(f"localhost:{router.app.args.epp_port}", authority) as channel:
            assert health_of(channel, "liveness") == SERVING
        with pytest.raises(grpc.RpcError):
            health_of(gateway.channel, "liveness")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pd_disaggregation": True}, "pairs need two"),
        ({"relay_processes": 2}, "is one process"),
        ({"epp_tls_cert_path": "a"}, "belong together"),
    ],
)
def test_what_a_picker_cannot_do_is_refused_at_the_start(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        serve(RouterArgs(**options))


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


@contextlib.contextmanager
def running(*flags: str) -> Iterator[tuple[Any, grpc.Channel, int]]:
    port = free_port()
    with (
        engine_processes(1, "--speed", "0") as urls,
        router_process(urls, "--epp-port", str(port), *flags, command=COMMAND) as router,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield router, channel, port


def test_the_command_serves_gateways_and_its_own_port_and_finishes_what_is_in_flight() -> None:
    with running("--metrics-interval-secs", "0") as (router, channel, port):
        assert router.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status == 200
        used = command("--epp-port", str(port), "--port", str(free_port()), "--prometheus-port", str(free_port()))
        assert used.returncode == 2
        said = used.stderr.splitlines()[-1]
        assert said.startswith(f"error: cannot listen on --epp-host and --epp-port, 127.0.0.1:{port}")
        assert "Traceback" not in used.stderr
        asked = Asked(channel)
        asked.head("/v1/completions")
        asked.body(b'{"prompt":"hello"}')
        endpoint = asked.choice().endpoint
        assert f"http://{endpoint}" in router.workers()
        asked.given_back()
        assert router.samples().total("sgl_router_worker_load") == 1
        router.process.terminate()
        router.until(lambda: "finishing 1 running request" in router.log())
        asked.answer(200, b"{}")
        asked.close()
        assert router.exit_status(60.0) == 0
    assert "Traceback" not in router.log()


def test_a_missing_package_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "grpc_health").mkdir()
    (tmp_path / "grpc_health" / "__init__.py").write_text("raise ImportError('No module named grpc_health')")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    program = f"{path}; from sglang_router.cli import main; sys.exit(main(['epp']))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the endpoint picker needs packages for gRPC")
    assert "pip install 'sglang-router[epp]'" in done.stderr
