"""A process that behaves: signals, closed descriptors, a closed terminal, files that change, all addresses."""

from __future__ import annotations

import contextlib
import http.client
import os
import pty
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from routers import COMMAND, WITHIN, RouterProcess, ask, environment, free_port, plain_worker, router_process

PATIENT = {"SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "1.5"}


def write_anew(path: Path, text: str) -> None:
    """Replace a file at once, as tools that renew it do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    new.rename(path)


@contextlib.contextmanager
def command(*flags: str, redirect: str = "", **how: object) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Yield the router's process, started in any way, and its URL, once it answers. redirect: for a shell."""
    port = free_port()
    words = [*COMMAND, "--port", str(port), "--prometheus-port", "0", *flags]
    if redirect:
        words = ["/bin/sh", "-c", f"exec {' '.join(words)} {redirect}"]
    process = subprocess.Popen(words, env=environment(), **how)  # type: ignore[call-overload]
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + WITHIN
        while not answers(url):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process, url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return ask(url, "GET", "/health").status == 200
    return False


# -- the end -----------------------------------------------------------------------------------------------------------


def test_case_11_after_sigterm_it_serves_until_load_balancers_have_noticed() -> None:
    """Connections were refused at the moment of SIGTERM, seconds before a load balancer could know."""
    body = b'{"text": "x"}'
    with plain_worker({}) as worker, router_process([worker.url], variables=PATIENT) as router:
        kept = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
        with contextlib.closing(kept):
            kept.request("GET", "/readiness")
            assert kept.getresponse().read().startswith(b'{"status":"ready"')
            began = time.monotonic()
            router.send_signal(signal.SIGTERM)
            router.until(lambda: router.get("/readiness").status == 503)

            assert router.get("/readiness").json()["reason"] == "shutting down"
            assert router.get("/health").status == 200
            kept.request("POST", "/generate", body, {"content-type": "application/json"})
            assert kept.getresponse().status == 200
            answer = router.post("/generate", {"text": "x"})
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert router.exit_status() == 0
            assert time.monotonic() - began >= 1.5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_case_11_ctrl_c_and_a_second_signal_do_not_wait(number: signal.Signals) -> None:
    """Nobody at a terminal wants to wait for a load balancer."""
    with router_process([], variables={"SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "600"}) as router:
        router.send_signal(number)
        if number == signal.SIGTERM:
            router.until(lambda: "served for another 600 s" in router.log())
            router.send_signal(number)
        assert router.exit_status() == (0 if number == signal.SIGINT else 128 + number)


def test_case_12_a_closed_terminal_ends_it_in_order() -> None:
    """A router on a terminal that is closed finishes its requests and ends, with status 0."""
    outer, inner = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which ignores it
        os.setsid()
        os.close(os.open(os.ttyname(inner), os.O_RDWR))  # becomes the controlling terminal of the new session

    with command(stdin=inner, stdout=inner, stderr=inner, preexec_fn=take_terminal) as (process, url):
        os.close(inner)
        process.send_signal(signal.SIGHUP)  # from elsewhere, while the terminal is there: this means to read again
        said = b""
        while b"SIGHUP: reading" not in said:
            readable, _, _ = select.select([outer], [], [], WITHIN)
            assert readable
            said += os.read(outer, 65536)
        assert answers(url)
        os.close(outer)
        assert process.wait(WITHIN) == 0


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_f18_closed_descriptors(closed: str) -> None:
    """Without stderr, descriptor 2 became the event loop's own, and SIGTERM ended in SIGABRT."""
    with command(redirect=closed) as (process, _):
        assert os.readlink(f"/proc/{process.pid}/fd/2") == "/dev/null"
        process.terminate()
        assert process.wait(WITHIN) == 0


# -- signals and files that change -------------------------------------------------------------------------------------


def test_case_12_21_22_signals_keys_logs_and_config(tmp_path: Path) -> None:
    """One router through all that may change while it serves: keys, config file, log files; no signal kills it."""
    keys, logs, config = tmp_path / "keys", tmp_path / "logs", tmp_path / "router.yaml"
    write_anew(keys, "alice secret-a\n")
    with plain_worker({}) as one, plain_worker({}) as two:
        config.write_text(f"worker-urls: [{one.url}]\nqueue-size: 7\n")
        flags = ("--api-key-file", str(keys), "--log-dir", str(logs), "--config", str(config), "--log-format", "json")
        with router_process([], *flags, key="secret-a") as router:
            router.until_healthy(one.url)
            # F28: the default action of these ends a process
            for number in (signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGPIPE):
                router.send_signal(number)

            # case 21: within 5 s, without a signal; a file without keys changes nothing
            def allowed(key: str) -> bool:
                return router.get("/get_loads", authorization=f"Bearer {key}").status == 200

            write_anew(keys, "# nobody\n")
            router.until(lambda: "contains no keys" in router.log())
            assert allowed("secret-a")
            write_anew(keys, "alice secret-a\nbob secret-b\n")
            began = time.monotonic()
            router.until(lambda: allowed("secret-b"))
            assert time.monotonic() - began < 5.0

            # case 22: logrotate moves the file away
            (log,) = logs.iterdir()
            log.rename(logs / "moved")
            router.send_signal(signal.SIGUSR1)
            router.until(lambda: log.exists() and "log files are opened again" in log.read_text())

            # case 12: SIGHUP reads everything again, at once
            write_anew(keys, "bob secret-b\n")
            config.write_text(f"worker-urls: [{two.url}]\nqueue-size: 8\nconnect-timeout-secs: 8\n")
            router.send_signal(signal.SIGHUP)
            router.until(lambda: not allowed("secret-a"))
            router._key = "secret-b"
            router.until(lambda: set(router.workers()) == {two.url})
            router.until(lambda: "these changes need a restart: --connect-timeout-secs" in router.log())


def test_case_22_probes_are_not_logged_and_ports_are_told(tmp_path: Path) -> None:
    """Probes and scrapes filled the access log; the port that `--prometheus-port 0` had found was told nowhere."""
    with router_process([], "--prometheus-port", "0") as router:
        for path in ("/health", "/readiness", "/liveness", "/metrics", "/workers"):
            router.get(path)
        router.until(lambda: "GET /workers 200" in router.log())
        log = router.log()
        assert not [path for path in ("/health", "/readiness", "/liveness", "/metrics") if f"GET {path} " in log]
        assert ", 0 workers\n" in log
        url = log.partition("metrics are served on ")[2].split()[0]
        parts = urlsplit(url)
        assert ask(f"{parts.scheme}://{parts.netloc}", "GET", parts.path).status == 200


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_case_15_f39_all_addresses_of_both_families() -> None:
    """`--host ::` listened on IPv6 alone. That everybody may use the engines then, is said once."""
    with router_process([], host="::") as router:
        port = urlsplit(router.url).port
        for host in ("127.0.0.1", "[::1]"):
            assert ask(f"http://{host}:{port}", "GET", "/workers").status == 200
        router.until(lambda: router.log().count("GET /workers 200") == 2)
        router.until(lambda: " peer=127.0.0.1 " in router.log())
        assert router.log().count(f"inference is open to everybody who can reach port {port} of ::") == 1


def test_one_family_in_use_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [*COMMAND, "--host", "::", "--port", port, "--prometheus-port", "0"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=WITHIN, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: [::]:{port} is in use; choose another --port\n")


def test_case_26_the_command_may_be_left_out() -> None:
    """`sglang-router --port 8000` was an unknown flag. What is odd is said, and the router starts."""
    port = free_port()
    words = [*COMMAND[:-1], "sglang_router", "--port", str(port), "--prometheus-port", "0", "--compat", "0.3.2"]
    variables = environment() | {"SGLANG_ROUTER_POLCY": "random"}
    process = subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, text=True)
    router = RouterProcess(process, f"http://127.0.0.1:{port}", "", Path(os.devnull))  # type: ignore[arg-type]
    try:
        router.until(lambda: answers(router.url))
        router.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WITHIN)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert said.startswith("warning: SGLANG_ROUTER_POLCY is not a variable of this router; did you mean")
    assert f"listening on http://0.0.0.0:{port}, policy cache_aware, 0 workers\n" in said
    assert "defaults of 0.3.2 are in effect: --host 0.0.0.0 " in said
    assert " --control-plane-open --cors-allowed-origins '*' --cache-threshold 0.3 " in said
