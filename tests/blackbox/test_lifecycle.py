"""How the command starts and how it ends: signals, ports in use, errors, files with options, addresses."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from engines import end_engine, engine_processes, start_engine, wait_until_healthy
from routers import COMMAND, WITHIN, RouterProcess, ask, environment, free_port, plain_worker, router_process

ENDS_AT_ONCE = 5.0
"""Seconds; the router does not wait for anything, only the machine may be slow."""


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(1) as urls:
        yield urls


@contextlib.contextmanager
def running_stream(router: RouterProcess, tokens: int) -> Iterator[http.client.HTTPResponse]:
    """Yield a stream of so many events, 6.35 ms each, whose first event has arrived."""
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
    with contextlib.closing(connection):
        sampling = {"max_new_tokens": tokens, "ignore_eos": True}
        body = json.dumps({"text": "x", "stream": True, "sampling_params": sampling})
        connection.request("POST", "/generate", body, {"content-type": "application/json"})
        stream = connection.getresponse()
        assert stream.readline().startswith(b"data: {")
        yield stream


def refuses_connections(router: RouterProcess) -> bool:
    parts = urlsplit(router.url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=WITHIN).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # the last moment before that
        return False
    return False


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        [*COMMAND, *words], env=environment(), capture_output=True, text=True, timeout=WITHIN, check=False
    )


# -- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(urls: list[str], number: signal.Signals) -> None:
    with router_process(urls) as router, running_stream(router, 150) as stream:
        router.send_signal(number)
        router.until(lambda: refuses_connections(router))
        rest = stream.read()

        assert rest.count(b"data: {") == 149
        assert rest.endswith(b"data: [DONE]\n\n")
        assert router.exit_status() == 0
        assert "finishing 1 running request" in router.log()
        assert router.log().count("POST /generate 200") == 1  # the last access lines are not lost


def test_case_11_what_begins_after_sigterm_is_finished(urls: list[str]) -> None:
    """A stream that begins while load balancers have not noticed yet is in flight like any other."""
    with router_process(urls, variables={"SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "1.5"}) as router:
        router.send_signal(signal.SIGTERM)
        router.until(lambda: "served for another 1.5 s" in router.log())
        with running_stream(router, 250) as stream:
            router.until(lambda: refuses_connections(router))
            assert stream.read().count(b"data: {") == 249
        assert router.exit_status() == 0


def test_idle_connections_are_closed_and_hold_nothing_up(urls: list[str]) -> None:
    with router_process(urls) as router:
        parts = urlsplit(router.url)
        silent = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=WITHIN)
        kept = http.client.HTTPConnection(parts.netloc, timeout=WITHIN)
        with contextlib.closing(kept), silent:
            kept.request("GET", "/health")
            assert kept.getresponse().read() == b"OK"
            router.send_signal(signal.SIGTERM)
            assert silent.recv(1) == b""
            assert router.exit_status(ENDS_AT_ONCE) == 0


def test_the_last_answer_says_that_the_connection_ends(urls: list[str]) -> None:
    with router_process(urls) as router:
        answers = []
        body = {"text": "x", "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
        asking = threading.Thread(target=lambda: answers.append(router.post("/generate", body)))
        asking.start()
        router.until(lambda: router.worker(urls[0])["load"] == 1)
        router.send_signal(signal.SIGTERM)
        asking.join(WITHIN)

        assert answers[0].status == 200
        assert answers[0].headers["connection"] == "close"
        assert router.exit_status() == 0


def test_a_slow_reader_gets_the_whole_of_its_last_answer() -> None:
    """The worker is done with the request, and so is the router, except for bytes that the client has not read."""
    body = bytes(12 << 20)  # more than the system buffers for a connection
    with plain_worker({"/generate": (200, {}, body)}) as worker, router_process([worker.url]) as router:
        parts = urlsplit(router.url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(WITHIN)
            client.connect((parts.hostname, parts.port))
            client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
            answer = client.makefile("rb")
            while answer.readline() != b"\r\n":
                pass
            read = 0
            while router.worker(worker.url)["load"]:
                read += len(answer.read(65536))
            assert read < 11 << 20
            router.send_signal(signal.SIGTERM)
            router.until(lambda: refuses_connections(router))
            read += len(answer.read())
            assert read == 12 << 20
        assert router.exit_status(ENDS_AT_ONCE) == 0


def test_the_grace_period_is_the_most_it_waits(urls: list[str]) -> None:
    with (
        router_process(urls, "--shutdown-grace-period-secs", "0.3") as router,
        running_stream(router, 100_000) as stream,
    ):
        router.send_signal(signal.SIGTERM)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            stream.read()
        assert router.exit_status(ENDS_AT_ONCE) == 0
        assert "the grace period is over: cutting 1 request" in router.log()
        assert "outcome=gone" in router.log()  # it has its access line


def test_a_second_signal_ends_it_at_once(urls: list[str]) -> None:
    with router_process(urls) as router, running_stream(router, 100_000):
        router.send_signal(signal.SIGINT)
        router.until(lambda: "finishing 1 running request" in router.log())
        router.send_signal(signal.SIGINT)

        assert router.exit_status(ENDS_AT_ONCE) == 128 + signal.SIGINT
        assert "second signal: leaving at once" in router.log()


def test_ctrl_c_while_no_worker_is_there_yet() -> None:
    """A request that is queued for a worker is refused."""
    with plain_worker({"/health": (503, {}, b"")}) as loading, router_process([loading.url], healthy=False) as router:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(router.post("/generate", {"text": "x"})))
        asking.start()
        router.until(lambda: router.samples().total("sgl_router_active_requests") == 2)  # it, and the scrape
        router.send_signal(signal.SIGINT)
        asking.join(WITHIN)

        assert (answers[0].status, answers[0].json()["error"]["code"]) == (503, "shutting_down")
        assert router.exit_status(ENDS_AT_ONCE) == 0


def test_adding_a_worker_does_not_hold_up_the_end() -> None:
    with router_process([]) as router:
        answers = []
        nobody = f"http://127.0.0.1:{free_port()}"
        adding = threading.Thread(target=lambda: answers.append(router.post(f"/add_worker?url={nobody}")))
        adding.start()
        router.until(lambda: nobody in router.workers())
        router.send_signal(signal.SIGTERM)
        adding.join(WITHIN)

        assert (answers[0].status, answers[0].json()["error"]["code"]) == (503, "shutting_down")
        assert router.exit_status(ENDS_AT_ONCE) == 0


# -- the start ---------------------------------------------------------------------------------------------


def test_a_request_waits_for_the_first_worker() -> None:
    """The test decides when the worker is ready: however long the router takes to start, and the test to see that the
    request waits, it waits before."""
    flags = ("--worker-startup-check-interval", "0.1", "--startup-wait-secs", "600")
    starting: dict[str, tuple[int, Mapping[str, str], bytes]] = {
        "/health": (503, {}, b""),
        "/generate": (200, {"content-type": "application/json"}, b'{"text":"y"}'),
    }
    with (
        plain_worker(starting) as worker,
        router_process([worker.url], *flags, healthy=False) as router,
        concurrent.futures.ThreadPoolExecutor(1) as client,
    ):
        assert router.worker(worker.url)["health"] == "starting"
        assert router.get("/readiness").status == 503
        asked = client.submit(router.post, "/generate", {"text": "x"})
        router.until(lambda: router.samples().total("sgl_router_waiting_requests") == 1)
        assert not worker.asked["/generate"]
        starting["/health"] = (200, {}, b"")
        assert asked.result(WITHIN).status == 200
        assert router.worker(worker.url)["health"] == "healthy"
        assert router.samples().total("sgl_router_retries_total") == 0


def test_a_request_does_not_wait_for_ever() -> None:
    loading = plain_worker({"/health": (503, {}, b"")})
    with loading as worker, router_process([worker.url], "--startup-wait-secs", "0.3", healthy=False) as router:
        answer = router.post("/generate", {"text": "x"})
        assert (answer.status, answer.json()["error"]["code"]) == (503, "workers_starting")
        assert int(answer.headers["retry-after"]) > 0


def test_case_14_a_request_hears_at_once_why_no_worker_is_there() -> None:
    """It waited for ten seconds for workers that could not come."""
    nobody = f"http://127.0.0.1:{free_port()}"
    with (
        plain_worker({"/health": (404, {}, b"")}) as wrong,
        router_process([nobody, wrong.url], "--startup-wait-secs", "600", healthy=False) as router,
    ):
        router.until(lambda: router.log().count("worker fails its health checks") == 2)
        answer = router.post("/generate", {"text": "x"})
        error = answer.json()["error"]
        assert (answer.status, error["code"], answer.headers["retry-after"]) == (503, "no_available_workers", "5")
        assert "The worker refuses connections (1 of 2)" in error["message"]
        assert "GET /health answered 404 (1 of 2)" in error["message"]
        assert router.worker(nobody)["last_error"] == "The worker refuses connections."
        assert "no workers yet" not in router.log()


def test_case_13_no_workers_is_one_line_that_says_how_to_add_one(urls: list[str]) -> None:
    """A router without workers said nothing of it. The command that it names works."""
    with router_process([]) as router:
        router.until(lambda: "no workers yet" in router.log())
        (line,) = [line for line in router.log().splitlines() if "no workers yet" in line]
        assert "--worker-urls" in line
        assert f"curl -X POST '{router.url}/add_worker?url=http://HOST:PORT'" in line
        assert router.post(f"/add_worker?url={urls[0]}").status == 200


def test_case_13_the_command_has_a_key_where_one_is_needed() -> None:
    """With keys, the command that the router names was answered with 401."""
    with router_process([], "--api-key", "k", key="k") as router:
        said = f"curl -X POST -H 'Authorization: Bearer KEY' '{router.url}/add_worker?url=http"
        router.until(lambda: said in router.log())


def test_case_6_a_look_up_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """Threads of an executor are joined at the end of the process, whatever they wait for."""
    code = (
        "import socket, sys, time\n"
        "socket.getaddrinfo = lambda *_, **__: time.sleep(600)\n"
        "from sglang_router.launch_router import main\n"
        "sys.exit(main())"
    )
    port = free_port()
    words = ["--port", str(port), "--prometheus-port", "0", "--health-check-timeout-secs", "0.1"]
    with (tmp_path / "log").open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words, "--worker-urls", "http://hangs:1"],
            env=environment(),
            stdout=sink,
            stderr=sink,
        )
    router = RouterProcess(process, f"http://127.0.0.1:{port}", "", tmp_path / "log")
    try:
        router.until(lambda: "worker fails its health checks" in router.log())
        router.send_signal(signal.SIGTERM)
        assert router.exit_status(ENDS_AT_ONCE) == 0
        router.end()
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--port", port, "--prometheus-port", "0")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: 127.0.0.1:{port} is in use; choose another --port\n"


def test_a_metrics_port_that_was_asked_for_and_is_taken_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--port", str(free_port()), "--prometheus-port", port)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: 127.0.0.1:{port} is in use; choose another --prometheus-port\n"


def test_one_port_for_both_doors_is_one_line_and_status_2() -> None:
    port = str(free_port())
    done = run("--port", port, "--prometheus-port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: 127.0.0.1:{port} is in use; choose another --port\n"


def test_the_default_metrics_port_that_is_taken_is_a_warning(tmp_path: Path) -> None:
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # already in use: just as good
            held.enter_context(socket.create_server(("127.0.0.1", 29000)))
        port = free_port()
        with (tmp_path / "log").open("wb") as sink:
            process = subprocess.Popen([*COMMAND, "--port", str(port)], env=environment(), stdout=sink, stderr=sink)
        router = RouterProcess(process, f"http://127.0.0.1:{port}", "", tmp_path / "log")
        try:
            router.until(lambda: "listening on" in router.log())
            assert "WARN  sglang_router: 127.0.0.1:29000 is in use" in router.log()
            assert router.samples().total("sgl_router_active_requests") == 1
            router.end()
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--worker-urls", "localhost:8000"], "error: --worker-urls: "),
        (["--host", "no.such.host.invalid"], "error: cannot listen on no.such.host.invalid:30000: "),
        (
            ["--host", "192.0.2.1", "--port", "30000"],
            "error: cannot listen on 192.0.2.1:30000: ",
        ),  # an address of no host (RFC 5737)
        (["--log-dir", "/proc/nothing/here"], "error: "),
        (["--cache-threshold", "2"], "error: --cache-threshold: '2' is not a number from 0 to 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], line: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


# -- options and addresses ---------------------------------------------------------------------------------


def test_a_file_with_all_options(urls: list[str], tmp_path: Path) -> None:
    port, metrics_port = free_port(), free_port()
    config = tmp_path / "router.yaml"
    config.write_text(
        f"worker-urls: [{urls[0]}]\n"
        f"port: {port}\n"
        f"prometheus-port: {metrics_port}\n"
        "metrics-interval-secs: 0\n"
        "policy: round_robin\n"
        "log-format: json\n"
        f"log-dir: {tmp_path / 'logs'}\n"
    )
    with (tmp_path / "log").open("wb") as sink:
        process = subprocess.Popen([*COMMAND, "--config", str(config)], env=environment(), stdout=sink, stderr=sink)
    url = f"http://127.0.0.1:{port}"
    router = RouterProcess(process, url, f"http://127.0.0.1:{metrics_port}/metrics", tmp_path / "log")
    try:
        router.until(lambda: "listening on" in router.log())
        router.until_healthy(*urls)
        assert router.post("/generate", {"text": "x"}).status == 200
        decisions = router.samples(router.metrics_url).by("sgl_router_policy_decisions_total", "policy")
        assert decisions == {"round_robin": 1}
        router.end()
    finally:
        process.kill()
        process.wait()
    (written,) = (tmp_path / "logs").iterdir()
    assert written.read_text() == router.log()


def test_a_file_with_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    config = tmp_path / "router.yaml"
    config.write_text("polcy: random\n")
    done = run("--config", str(config))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "polcy" in done.stderr
    assert "policy" in done.stderr


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_ipv6_on_both_sides() -> None:
    process, url = start_engine("--host", "::1")
    try:
        assert url.startswith("http://[::1]:")
        wait_until_healthy(url)
        with router_process([url], host="::1") as router:
            answer = router.post("/generate", {"text": "x"})
            assert answer.status == 200
            router.until(lambda: router.url in router.log())  # the URL in the log works
            assert ask(router.url, "GET", "/list_workers").json() == {"urls": [url]}
            assert router.samples(router.metrics_url).by("sgl_router_processed_requests_total", "worker") == {url: 1}
    finally:
        end_engine(process)
