"""Each command that asks a router, as users run it, against a router with built-in engines."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import engine_processes
from routers import WITHIN, RouterProcess, environment, free_port, plain_worker, router_process

CONSOLE = (sys.executable, "-W", "error", "-m", "sglang_router")
ADMIN, USER = "root:Root:admin:secret-a", "eye:Eye:user:secret-u"


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(3, "--speed", "0") as found:
        yield found


@pytest.fixture
def router(urls: list[str]) -> Iterator[RouterProcess]:
    with router_process(urls[:2]) as found:
        yield found


class Ran:
    """What a command did."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        assert "Traceback" not in self.err, self.err


def run(router: RouterProcess | str, *words: str, **variables: str) -> Ran:
    """Run a command that asks this router, or this URL."""
    url = router if isinstance(router, str) else router.url
    env = environment() | {"SGLANG_ROUTER_URL": url} | variables
    return Ran(
        subprocess.run([*CONSOLE, *words], env=env, capture_output=True, text=True, timeout=WITHIN * 2, check=False)
    )


def test_status_and_workers(router: RouterProcess, urls: list[str]) -> None:
    status = run(router, "status")
    assert (status.status, status.err) == (0, "")
    assert re.search(r"^ready +yes$", status.out, re.M)
    assert "policy     cache_aware\nworkers    2: 2 healthy\nin flight  0 requests\n" in status.out
    workers = run(router, "workers")
    assert workers.status == 0
    assert [line.split()[0] for line in workers.out.splitlines()] == ["worker", *urls[:2]]
    found = json.loads(run(router, "workers", "--json").out)
    assert [each["url"] for each in found] == urls[:2]
    assert json.loads(run(router, "status", "--json").out)["status"] == "ready"


def test_drain_resume_add_and_remove(router: RouterProcess, urls: list[str]) -> None:
    one, third = urls[0], urls[2]
    drained = run(router, "drain", one, "--wait")
    assert (drained.status, drained.out) == (0, f"{one} gets no new requests; no request is in flight\n")
    assert router.worker(one)["draining"]
    assert f"  {one} is draining: 0 requests in flight" in run(router, "status").out
    assert run(router, "resume", router.worker(one)["id"]).out == f"{one} takes requests again\n"
    assert not router.worker(one)["draining"]

    added = run(router, "add", third, "--wait")
    assert (added.status, added.out) == (0, f"{third} is healthy and takes requests\n")
    again = run(router, "add", third)
    assert (again.status, again.err) == (1, f"error: Worker {third} already exists\n")
    assert run(router, "remove", third, "--wait").out == f"{third} is removed\n"
    assert set(router.workers()) == set(urls[:2])
    unknown = run(router, "drain", "http://127.0.0.1:9")
    assert (unknown.status, unknown.out) == (1, "")
    assert "http://127.0.0.1:9" in unknown.err
    restart = run(router, "restart", one)
    assert restart.status == 1
    assert restart.err.startswith("error: ")
    assert run(router, "restart").status == run(router, "restart", one, "--all").status == 2


def test_drain_waits_for_requests_in_flight(tmp_path: Path) -> None:
    with engine_processes(1, "--speed", "1", "--decode-base-ms", "200") as urls, router_process(urls) as router:
        slow = {"text": "x", "sampling_params": {"max_new_tokens": 4000}, "stream": True}
        client = subprocess.Popen(
            [sys.executable, "-c", _STREAM, router.url, json.dumps(slow)], stdout=subprocess.DEVNULL
        )
        router.until(lambda: router.worker(urls[0])["load"] == 1)
        late = run(router, "drain", urls[0], "--wait", "--timeout", "0.5")
        assert (late.status, late.out) == (5, "")
        assert late.err == "error: after 0.5 s it still has requests in flight.\n"
        waits = subprocess.Popen(
            [*CONSOLE, "drain", urls[0], "--wait", "--url", router.url], stdout=subprocess.PIPE, env=environment()
        )
        client.kill()
        client.wait()
        out, _ = waits.communicate(timeout=WITHIN)
        assert (waits.returncode, out) == (0, f"{urls[0]} gets no new requests; no request is in flight\n".encode())


_STREAM = """
import sys, urllib.request
r = urllib.request.Request(sys.argv[1] + "/generate", sys.argv[2].encode(), {"content-type": "application/json"})
urllib.request.urlopen(r).read()
"""


def test_keys_and_what_is_no_router(urls: list[str], tmp_path: Path) -> None:
    with router_process(urls[:1], "--control-plane-api-keys", ADMIN, USER, key="secret-a") as router:
        for words in (("workers",), ("drain", urls[0]), ("config",), ("reload",), ("top", "--count", "1")):
            refused = run(router, *words)
            assert (refused.status, refused.out) == (4, ""), words
            assert (
                "does not let anybody without a key (--api-key, or the variable SGLANG_ROUTER_API_KEY)" in refused.err
            )
        for words in (("drain", urls[0]), ("reload",)):
            denied = run(router, *words, SGLANG_ROUTER_API_KEY="secret-u")
            assert denied.status == 4
            assert "does not let this key do that. It says: A change needs a key" in denied.err
            assert "secret-u" not in denied.err
        assert run(router, "workers", SGLANG_ROUTER_API_KEY="secret-u").status == 0
        assert run(router, "drain", urls[0], "--api-key", "secret-a").status == 0
        config = run(router, "config", "--all", "--api-key", "secret-u")
        assert config.status == 0
        assert "secret-" not in config.out
        assert re.search(r"^--control-plane-api-keys +\*\*\* +flag ", config.out, re.M)
    nobody = f"http://127.0.0.1:{free_port()}"
    for words in (("status",), ("workers",), ("top",), ("reload",)):
        gone = run(nobody, *words)
        assert (gone.status, gone.out) == (3, "")
        assert gone.err.startswith(f"error: no router answers at {nobody}: ")
    with plain_worker({}) as other:
        for words in (("status",), ("workers",), ("add", urls[0]), ("config",), ("top",)):
            strange = run(other.url, *words)
            assert (strange.status, strange.out) == (3, ""), words
            assert strange.err.startswith(f"error: what answers at {other.url} is no router")
    assert run("ftp://x", "status").err == "error: --url is not a URL such as http://127.0.0.1:30000\n"
    assert run(nobody, "status", "--qqqqqqq").err == "error: unknown flag --qqqqqqq; see --help\n"


def test_config_says_where_each_value_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("policy: cost\nqueue-size: 7\nlog-level: debug\n")
    variables = {"SGLANG_ROUTER_LOG_LEVEL": "error"}
    with router_process([], "--config", str(file), "--queue-size", "9", variables=variables) as router:
        told = run(router, "config").out
        assert re.search(rf"^--policy +cost +file {re.escape(str(file))} +reload$", told, re.M)
        assert re.search(r"^--queue-size +9 +flag +reload$", told, re.M)
        assert re.search(r"^--log-level +error +environment SGLANG_ROUTER_LOG_LEVEL +reload$", told, re.M)
        assert "--cache-threshold" not in told
        options = {each["name"]: each for each in json.loads(run(router, "config", "--json").out)["options"]}
        assert options["cache_threshold"] == {
            "name": "cache_threshold",
            "flag": "--cache-threshold",
            "group": "Routing policy",
            "value": 0.5,
            "origin": "default",
            "where": "",
            "reload": True,
        }
        assert not options["port"]["reload"]


def test_top_prints_lines_where_there_is_no_terminal(router: RouterProcess) -> None:
    router.post("/generate", {"text": "x" * 100, "sampling_params": {"max_new_tokens": 1}})
    done = run(router, "top", "--count", "2", "--interval", "0.1")
    assert (done.status, done.err) == (0, "")
    assert len(done.out.splitlines()) == 2
    assert re.match(r"\d\d:\d\d:\d\d  workers 2/2  in flight 0  0\.0 req/s", done.out)
    found = [json.loads(line) for line in run(router, "top", "--count", "1", "--json").out.splitlines()]
    assert len(found) == 1


@pytest.mark.parametrize(("key", "status"), [(b"q", 0), (b"\x03", 0), (b"", 128 + signal.SIGTERM)])
def test_top_on_a_terminal_is_a_table_and_leaves_it_as_it_was(
    router: RouterProcess, urls: list[str], key: bytes, status: int
) -> None:
    """It ends by a key, by Ctrl-C, or by SIGTERM."""
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [*CONSOLE, "top", "--url", router.url],
        env=environment() | {"COLUMNS": "120", "LINES": "30", "TERM": "xterm"},
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal
    )
    os.close(inner)
    said = b""
    deadline = time.monotonic() + WITHIN
    try:
        while said.count(urls[1].encode()) < 2:  # two frames
            said += read(outer, deadline)
        if key:
            os.write(outer, key)
        else:
            process.terminate()
        while b"\x1b[?1049l" not in said:
            said += read(outer, deadline)
        assert process.wait(WITHIN) == status
    finally:
        process.kill()
        process.wait()
        os.close(outer)
    assert said.index(b"\x1b[?1049h") < said.index(b"in flight")
    assert b"Traceback" not in said


def test_top_on_a_terminal_that_cannot_draw_prints_lines(router: RouterProcess) -> None:
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [*CONSOLE, "top", "--url", router.url],
        env=environment() | {"TERM": "dumb"},
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    said = b""
    deadline = time.monotonic() + WITHIN
    try:
        while said.count(b"workers 2/2") < 2:
            said += read(outer, deadline)
    finally:
        process.kill()
        process.wait()
        os.close(outer)
    assert b"\x1b" not in said


def test_names_that_the_encoding_of_the_output_lacks_are_escaped(router: RouterProcess) -> None:
    assert router.post("/workers", {"url": "http://127.0.0.1:9", "model_id": "modèle-中"}).status < 300
    assert "modèle-中" in run(router, "workers", PYTHONIOENCODING="utf-8").out
    plain = run(router, "workers", PYTHONIOENCODING="ascii")
    assert (plain.status, plain.err) == (0, "")
    assert "mod\\xe8le-\\u4e2d" in plain.out


def read(descriptor: int, deadline: float) -> bytes:
    """Return what a terminal got; fail when nothing comes."""
    readable, _, _ = select.select([descriptor], [], [], deadline - time.monotonic())
    assert readable, "nothing was written in time"
    return os.read(descriptor, 65536)


def test_docs_is_a_page_without_anything_from_elsewhere(router: RouterProcess) -> None:
    page = router.get("/docs")
    assert page.status == 200
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    text = page.body.decode()
    assert "<code>/v1/chat/completions</code>" in text
    assert not re.search(r"<script|<link|<img|<iframe|<[^>]* (?:style=|on[a-z]+=|(?:src|href)=.?https?:)", text)
