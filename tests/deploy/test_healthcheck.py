"""The health check of the image, as the image runs it: a process of its own, which knows nothing but a port."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from certificates import Authority
from routers import WITHIN, free_port, router_process

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "docker" / "healthcheck.py"


def checked(port: int | None, *words: str) -> tuple[int, str]:
    """Run it; return status and what it said."""
    environ = os.environ | {"SGLANG_ROUTER_PORT": str(port)}
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("encrypted", [False, True])
def test_it_tells_alive_from_ready_with_keys_and_with_tls(encrypted: bool, tmp_path: Path) -> None:
    flags, tls = ["--api-key", "secret-key", "--control-plane-api-keys", "id:name:admin:other-key"], None
    if encrypted:
        authority = Authority(tmp_path / "ca")
        pair = authority.issue("router")
        flags += ["--tls-cert-path", pair.cert, "--tls-key-path", pair.key]
        tls = ssl.create_default_context(cafile=authority.cert)
    with router_process([], *flags, tls=tls) as router:
        port = urlsplit(router.url).port
        assert checked(port) == (0, "/liveness: 200")
        assert checked(port, "/readiness") == (1, "/readiness: 503")


def test_a_port_where_nobody_listens_is_a_line_and_no_traceback() -> None:
    status, said = checked(free_port())
    assert status == 1
    assert said.startswith("/liveness: ")
    assert "refused" in said
