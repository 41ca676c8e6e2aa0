"""Who is let in, by the real command: keys of clients and of the control plane, changes from this machine only, pages
of other origins. And that a key which is given to the router is never shown again."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import openai
import pytest

from routers import (
    COMMAND,
    WITHIN,
    Answer,
    PlainWorker,
    RouterProcess,
    ask,
    environment,
    free_port,
    plain_worker,
    router_process,
)

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
JSON = {"content-type": "application/json"}
ALICE, BOB, WORKER, USER, ADMIN = "alice-5up3r", "bob,s:key", "w0rker-key", "us3r-key", "adm1n-key:x"
KEYS = (ALICE, BOB, WORKER, USER, ADMIN)
CLIENTS = ("--api-key", f"alice {ALICE}", "--api-key", BOB, "--worker-api-key", WORKER)
CONTROL = ("--control-plane-api-keys", f"dev:A Developer:user:{USER}", f"ops:On Call:admin:{ADMIN}")
EAGER = ("--health-check-interval-secs", "0.1", "--health-failure-threshold", "1")
WEB = "https://chat.example.com"


@pytest.fixture
def worker() -> Iterator[PlainWorker]:
    answers = {
        CHAT: (200, JSON, b'{"id": "c"}'),
        "/v1/models": (200, JSON, b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'),
    }
    with plain_worker(answers) as worker:
        yield worker


def told(answer: Answer) -> str:
    """Return the status and, for an error of the router, its code."""
    return f"{answer.status} {answer.headers.get('x-smg-error-code', '')}".strip()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def written(folder: Path, *lines: str) -> str:
    path = folder / "keys"
    path.touch(0o600)
    path.write_text("\n".join(lines))
    return str(path)


def seen_of(router: RouterProcess) -> str:
    """Return all that the router shows while it runs, except its command line as the operating system shows it."""
    pages = [router.get(path) for path in ("/metrics", "/workers", "/list_workers", "/get_loads", "/openapi.json")]
    return router.log() + "".join(page.body.decode() + str(page.headers) for page in pages)


def lines_of(router: RouterProcess, mark: str, count: int) -> list[str]:
    """Wait for so many lines of the log with a mark; return them."""

    def found() -> list[str]:
        return [line for line in router.log().splitlines() if mark in line]

    router.until(lambda: len(found()) >= count)
    assert len(found()) == count
    return found()


# -- clients -----------------------------------------------------------------------------------------------------------


def test_clients_need_a_key_and_workers_do_not_get_it(worker: PlainWorker) -> None:
    with router_process([worker.url], *CLIENTS, "--forward-headers", "all", key=ALICE) as router:
        for path, method in ((CHAT, "POST"), ("/v1/models", "GET"), ("/workers", "GET"), ("/metrics", "GET")):
            refused = ask(router.url, method, path, BODY if method == "POST" else None)
            assert told(refused) == "401 missing_api_key"
            assert refused.headers["www-authenticate"] == 'Bearer realm="sglang-router"'
            assert refused.json()["error"]["type"] == "invalid_request_error"
            assert told(router.ask(method, path, None, authorization="Bearer guess")) == "401 invalid_api_key"
            assert told(router.ask(method, path, None, authorization=f"Basic {ALICE}")) == "401 missing_api_key"
        for path in ("/health", "/liveness", "/readiness"):
            assert ask(router.url, "GET", path).status == 200
        assert ask(router.url, "GET", "/nothing").status == 404
        assert worker.asked[CHAT] == 0
        for sent in (bearer(ALICE), {"authorization": f"bearer {BOB}"}, {"x-api-key": BOB, "authorization": ""}):
            assert router.post(CHAT, BODY, **sent).status == 200
            got = worker.seen[CHAT]
            assert got["authorization"] == f"Bearer {WORKER}"
            assert not {ALICE, BOB} & set(got.values())
        assert router.get("/v1/models").status == 200
        for shown in (seen_of(router), str(worker.seen)):
            assert not [key for key in (ALICE, BOB) if key in shown]
        assert WORKER not in seen_of(router)
        lines = lines_of(router, f"POST {CHAT} 200", 3)
        clients = [[word for word in line.split() if word.startswith("client=")] for line in lines]
        assert clients == [["client=alice"], ["client=key-2"], ["client=key-2"]]


def test_without_a_key_of_its_own_a_worker_gets_none_of_the_routers(worker: PlainWorker) -> None:
    with router_process([worker.url], "--api-key", ALICE, key=ALICE) as router:
        assert router.post(CHAT, BODY).status == 200
        assert "authorization" not in worker.seen[CHAT]


def test_without_client_keys_the_clients_authorization_is_for_the_worker(worker: PlainWorker) -> None:
    with router_process([worker.url], *CONTROL, "--worker-api-key", WORKER, key=USER) as router:
        assert ask(router.url, "POST", CHAT, BODY, **bearer("the engine's")).status == 200
        assert worker.seen[CHAT]["authorization"] == "Bearer the engine's"


def test_keys_of_files_and_the_environment_do_not_show_in_ps(worker: PlainWorker, tmp_path: Path) -> None:
    path = written(tmp_path, "# the team", f"bob {BOB}")
    variables = {
        "SGLANG_ROUTER_API_KEY": f"alice {ALICE}",
        "SGLANG_ROUTER_CONTROL_PLANE_API_KEYS": f"o:O:admin:{ADMIN}",
    }
    with router_process([worker.url], "--api-key-file", path, key=ADMIN, variables=variables) as router:
        command = Path(f"/proc/{router.process.pid}/cmdline").read_bytes().decode()
        assert not [key for key in KEYS if key in command]
        assert [router.post(CHAT, BODY, **bearer(key)).status for key in (ALICE, BOB, "x")] == [200, 200, 401]


def test_the_openai_client_tells_a_wrong_key(worker: PlainWorker) -> None:
    with router_process([worker.url], "--api-key", ALICE, key=ALICE) as router:
        for key, error in ((ALICE, None), ("sk-guess", openai.AuthenticationError)):
            client = openai.OpenAI(base_url=router.url + "/v1", api_key=key, max_retries=0, timeout=WITHIN)
            with client, contextlib.nullcontext() if error is None else pytest.raises(error, match="not known here"):
                client.models.list()


def test_a_strangers_body_is_not_waited_for(worker: PlainWorker) -> None:
    """The answer and the close come without the body; a refused request after a good one is answered in its order."""
    good = f"POST {CHAT} HTTP/1.1\r\nhost: h\r\nx-api-key: {ALICE}\r\ncontent-length: 2\r\n\r\n{{}}"
    with router_process([worker.url], "--api-key", ALICE, key=ALICE) as router:
        host, _, port = urlsplit(router.url).netloc.rpartition(":")
        for path, status in {CHAT: 401, "/workers": 401, "/health": 405, "/nothing": 404}.items():
            for framing in ("content-length: 400000000", "transfer-encoding: chunked"):
                bad = f"POST {path} HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\n{framing}\r\n\r\nfirst"
                with socket.create_connection((host, int(port)), WITHIN) as client:
                    client.sendall((good + bad).encode())
                    with client.makefile("rb") as answers:
                        text = answers.read().decode()
                assert text.startswith("HTTP/1.1 200 ")
                last = text[text.rindex("HTTP/1.1 ") :]
                assert last.split()[1] == str(status), path
                assert "connection: close\r\n" in last
        assert worker.asked[CHAT] == 8
        assert router.get("/health").status == 200


def test_a_refused_client_without_a_body_keeps_its_connection(worker: PlainWorker) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n"
    with router_process([worker.url], "--api-key", ALICE, key=ALICE) as router:
        host, _, port = urlsplit(router.url).netloc.rpartition(":")
        with socket.create_connection((host, int(port)), WITHIN) as client, client.makefile("rb") as answers:
            for _ in range(2):
                client.sendall(head.encode())
                assert answers.readline().startswith(b"HTTP/1.1 401 ")
                size = 0
                while (line := answers.readline()) != b"\r\n":
                    assert not line.startswith(b"connection:")
                    if line.startswith(b"content-length: "):
                        size = int(line.split()[1])
                answers.read(size)


# -- the control plane -------------------------------------------------------------------------------------------------


def audit(router: RouterProcess) -> list[dict[str, Any]]:
    """Return the audit log, without the fields that every line has."""
    lines = [line for line in router.records() if line["logger"] == "sglang_router.audit"]
    return [{name: item for name, item in line.items() if name not in ("time", "logger")} for line in lines]


def test_roles_of_the_control_plane_and_its_audit_log(worker: PlainWorker) -> None:
    flags = (*CLIENTS, *CONTROL, "--log-format", "json")
    target = quote(worker.url, safe="")
    with plain_worker({}) as other, router_process([worker.url], *flags, key=USER) as router:
        assert told(ask(router.url, "GET", "/workers")) == "401 missing_api_key"
        assert told(router.get("/workers", **bearer(ALICE))) == "403 forbidden"
        assert told(router.post(CHAT, BODY)) == "403 forbidden"
        drain = f"/workers/{target}/drain"
        assert told(router.post(drain, authorization="")) == "401 missing_api_key"
        assert told(router.post(drain, authorization="Bearer guess")) == "401 invalid_api_key"
        assert told(router.post(drain, **bearer(ALICE))) == "403 forbidden"
        forbidden = router.post(drain)
        assert (told(forbidden), forbidden.json()["error"]["type"]) == ("403 forbidden", "permission_error")
        assert forbidden.headers["www-authenticate"] == 'Bearer realm="sglang-router"'
        assert told(router.get("/flush_cache")) == "403 forbidden"
        assert router.post(drain, **bearer(ADMIN)).status == 200
        added = router.post(f"/add_worker?url={quote(other.url)}&api_key=0ther-key", **bearer(ADMIN))
        assert added.status == 200
        assert other.seen["/health"]["authorization"] == "Bearer 0ther-key"
        assert worker.seen["/health"]["authorization"] == f"Bearer {WORKER}"
        assert told(router.ask("DELETE", "/workers/nobody", **bearer(ADMIN))) == "404 WORKER_NOT_FOUND"
        here: dict[str, Any] = {"peer": "127.0.0.1"}
        ops = {"by": "ops", "name": "On Call", "role": "admin", **here}
        bad = {"level": "warn", "message": f"POST {drain} 403", "code": "forbidden", **here}
        lines_of(router, "sglang_router.audit", 8)
        assert audit(router) == [
            bad | {"message": f"POST {drain} 401", "by": "anyone", "code": "missing_api_key"},
            bad | {"message": f"POST {drain} 401", "by": "anyone", "code": "invalid_api_key"},
            bad | {"by": "alice", "role": "client"},
            bad | {"by": "dev", "name": "A Developer", "role": "user"},
            bad | {"message": "GET /flush_cache 403", "by": "dev", "name": "A Developer", "role": "user"},
            {"level": "info", "message": f"POST {drain} 200", **ops},
            {"level": "info", "message": "POST /add_worker 200", "target": other.url, **ops},
            {"level": "warn", "message": "DELETE /workers/nobody 404", "code": "WORKER_NOT_FOUND", **ops},
        ]
        shown = seen_of(router)
        assert not [key for key in (*KEYS, "0ther-key") if key in shown]
        added_line = next(line for line in router.records() if line["message"] == "worker added")
        assert added_line["worker"] == worker.url


def elsewhere(router: RouterProcess) -> str | None:
    """Return the router's URL by an address of this machine that is not loopback, if there is one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        address = probe.getsockname()[0]
        return None if address.startswith("127.") else f"http://{address}:{urlsplit(router.url).port}"
    return None


@pytest.mark.parametrize("flags", [(), ("--control-plane-open",)], ids=["default", "open"])
def test_without_keys_changes_come_from_this_machine(worker: PlainWorker, flags: tuple[str, ...]) -> None:
    allowed = 200 if flags else 403
    with router_process([worker.url], *flags, host="0.0.0.0") as router:
        change = f"/workers/{quote(worker.url, safe='')}/resume"
        local = router.url.replace("0.0.0.0", "127.0.0.1")
        assert ask(local, "POST", change).status == 200
        passed_on = ask(local, "POST", change, x_forwarded_for="127.0.0.1")
        page = ask(local, "POST", change, origin=WEB)
        assert (passed_on.status, page.status) == (allowed, 403)
        own = ask(local, "POST", change, origin=local, x_sglang_router_page="1")
        assert own.status == 200
        assert ask(local, "GET", "/workers", origin=WEB).status == 200
        away = elsewhere(router)
        if away is not None:
            assert ask(away, "POST", change).status == allowed
            assert ask(away, "POST", "/flush_cache").status == allowed
            assert ask(away, "GET", "/workers").status == 200
            assert ask(away, "POST", CHAT, BODY).status == 200
        if not flags:
            assert "--control-plane-api-keys" in passed_on.json()["error"]["message"]
            lines_of(router, f"POST {change} 403 by=anyone", 3 if away else 2)
        lines_of(router, f"POST {change} 200 by=loopback peer=127.0.0.1", 2)


def test_urls_that_no_worker_may_have(worker: PlainWorker) -> None:
    urls = [
        "http://u:hunter2@h:1",
        "ftp://h:1",
        "file:///etc/passwd",
        "unix:/x",
        "http://h:1/#f",
        "http://h:1?k=v",
        "h:1",
    ]
    with router_process([worker.url]) as router:
        for url in urls:
            added = router.post(f"/add_worker?url={quote(url, safe='')}")
            created = router.post("/workers", {"url": url})
            assert (added.status, created.status) in ((400, 400), (400, 422)), url
            assert "hunter2" not in added.body.decode() + created.body.decode()
        assert router.get("/list_workers").json() == {"urls": [worker.url]}
        lines_of(router, "sglang_router.audit", 2 * len(urls))
        assert "hunter2" not in router.log()


def test_redirects_of_workers_are_passed_on_and_never_followed() -> None:
    with plain_worker({}) as trap:
        away = {"location": trap.url + "/stolen"}
        answers = dict.fromkeys((CHAT, "/get_model_info", "/v1/models", "/flush_cache"), (307, away, b""))
        with plain_worker(answers) as worker, router_process([worker.url], *EAGER) as router:
            answer = router.post(CHAT, BODY)
            assert (answer.status, answer.headers["location"]) == (307, away["location"])
            assert router.get("/get_model_info").status == 307
            router.get("/v1/models")
            assert router.post("/flush_cache").json()["failed"] == [{"worker": worker.url, "error": "HTTP 307"}]
            worker.answers = {"/health": (302, away, b"")}
            router.until(lambda: router.worker(worker.url)["is_healthy"] is False)
            assert router.worker(worker.url)["last_error"] == "GET /health answered 302"
            assert not trap.asked


# -- the second port ---------------------------------------------------------------------------------------------------


def test_the_metrics_port_needs_no_key_and_tells_none(worker: PlainWorker) -> None:
    with router_process([worker.url], *CLIENTS, *CONTROL, key=USER) as router:
        assert router.post(CHAT, BODY, **bearer(ALICE)).status == 200
        assert told(ask(router.url, "GET", "/metrics")) == "401 missing_api_key"
        url = router.metrics_url.removesuffix("/metrics")
        metrics = ask(url, "GET", "/metrics")
        assert metrics.status == 200
        assert not [key for key in KEYS if key in metrics.body.decode()]
        assert told(ask(url, "POST", "/metrics", b"x" * 5000)) == "413 payload_too_large"
        assert told(ask(url, "POST", "/add_worker?url=http://h:1")) == "405 method_not_allowed"


# -- pages of other origins --------------------------------------------------------------------------------------------


def cors_of(answer: Answer) -> dict[str, str]:
    return {
        name.removeprefix("access-control-"): value
        for name, value in answer.headers.items()
        if name.startswith("access-control-")
    }


def test_pages_of_listed_origins_may_read_answers(worker: PlainWorker) -> None:
    worker.answers = {CHAT: (200, {**JSON, "access-control-allow-origin": "*", "Vary": "accept"}, b"{}")}
    flags = ("--api-key", ALICE, "--cors-allowed-origins", WEB, "http://b:1")
    wanted = "authorization,x-stainless-os"
    with router_process([worker.url], *flags, key=ALICE) as router:
        asked = {"access_control_request_method": "POST", "access_control_request_headers": wanted}
        for path in (CHAT, "/v1/models", "/nothing"):
            allowed = ask(router.url, "OPTIONS", path, origin=WEB, **asked)
            assert allowed.status == 200
            assert cors_of(allowed) == {
                "allow-origin": WEB,
                "allow-methods": "GET, POST, OPTIONS",
                "allow-headers": wanted,
                "max-age": "3600",
            }
            other = ask(router.url, "OPTIONS", path, origin="https://evil.example", **asked)
            assert (other.status, cors_of(other)) == (200, {})
        assert router.ask("OPTIONS", CHAT, origin=WEB).status == 405  # not a preflight
        readable = "x-request-id, x-sglang-router-decision, x-sglang-router-worker"
        may_read = {"allow-origin": WEB, "expose-headers": readable}
        for answer in (
            router.post(CHAT, BODY, origin=WEB),
            router.post(CHAT, b"no JSON", origin=WEB),
            router.post(CHAT, BODY, origin=WEB, authorization=""),
            router.get("/v1/models", origin=WEB),
            router.get("/nothing", origin=WEB),
        ):
            assert cors_of(answer) == may_read, answer
            assert "origin" in answer.headers["vary"]
        assert cors_of(router.post(CHAT, BODY, origin="https://evil.example")) == {}
        assert cors_of(router.post(CHAT, BODY)) == {}


def test_all_origins_and_none(worker: PlainWorker) -> None:
    with router_process([worker.url], "--cors-allowed-origins", "*") as router:
        for answer in (router.post(CHAT, BODY, origin=WEB), router.get("/health", origin=WEB)):
            assert (answer.status, cors_of(answer)["allow-origin"]) == (200, "*")
            assert "vary" not in answer.headers
    worker.answers = {CHAT: (200, {**JSON, "access-control-allow-origin": "*"}, b"{}")}
    with router_process([worker.url]) as router:
        assert cors_of(router.post(CHAT, BODY, origin=WEB)) == {"allow-origin": "*"}  # the worker's own field
        assert cors_of(router.get("/health", origin=WEB)) == {}
        assert router.ask("OPTIONS", CHAT, origin=WEB, access_control_request_method="POST").status == 405


# -- launch_server -----------------------------------------------------------------------------------------------------


def test_launch_server_takes_the_same_options_by_the_prefix(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "sglang_router.launch_server", "--backend", "builtin", "--dp-size", "1"]
    command += ["--port", str(port), "--router-dp-worker-base-port", str(free_port()), "--router-prometheus-port", "0"]
    command += ["--router-api-key", f"alice {ALICE}", "--router-api-key", BOB, "--router-cors-allowed-origins", WEB]
    command += ["--router-control-plane-api-keys-file", written(tmp_path, f"ops:On Call:admin:{ADMIN}")]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    url = f"http://127.0.0.1:{port}"
    router = RouterProcess(process, url, url + "/metrics", log, key=ADMIN)
    try:
        router.until(lambda: answers(router) and len(router.workers()) == 1)
        router.until_healthy()
        assert router.post(CHAT, BODY | {"max_tokens": 1}, **bearer(BOB)).status == 200
        assert told(ask(url, "POST", CHAT, BODY)) == "401 missing_api_key"
        assert told(router.post("/restart_workers", **bearer(ALICE))) == "403 forbidden"
        assert cors_of(router.get("/health", origin=WEB))["allow-origin"] == WEB
        router.end()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def answers(router: RouterProcess) -> bool:
    with contextlib.suppress(OSError):
        return router.get("/liveness").status == 200
    return False


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_end_the_command_with_one_line_that_shows_no_key(tmp_path: Path) -> None:
    bad = written(tmp_path, f"alice {ALICE}", f"bob b0b {BOB}")
    found = {
        ("--api-key-file", str(tmp_path / "none")): f"error: {tmp_path / 'none'} cannot be read: No such file",
        ("--api-key-file", bad): f"error: {bad}:2: this is not KEY or 'NAME KEY'",
        (
            "--api-key",
            ALICE,
            "--api-key",
            f"a {ALICE}",
        ): "error: --api-key, entry 2: the same key as in --api-key,",
        ("--api-key", "alice", ALICE): "error: each key needs a flag of its own",
        (
            "--control-plane-api-keys",
            f"o:O:root:{ADMIN}",
        ): "error: --control-plane-api-keys: this is not ID:NAME:",
    }
    for flags, line in found.items():
        done = subprocess.run(
            [*COMMAND, *flags], env=environment(), capture_output=True, text=True, timeout=WITHIN, check=False
        )
        assert done.returncode == 2, done
        assert done.stderr.startswith(line), done
        assert done.stderr.count("\n") == 1
        assert not [key for key in KEYS if key in done.stderr]


def test_a_file_of_keys_that_others_may_read_is_told(worker: PlainWorker, tmp_path: Path) -> None:
    path = Path(written(tmp_path, ALICE))
    path.chmod(0o644)
    with router_process([worker.url], "--api-key-file", str(path), key=ALICE, healthy=False) as router:
        router.until(lambda: str(path) in router.log())
        assert ALICE not in router.log()
