"""What answers is no router, or one of another kind: one line that says so, and never a traceback."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from routers import plain_worker
from sglang_router import cli
from sglang_router.commands.asking import whole

BODIES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"total_workers":1,"a":' + b'{"a":' * 20000,
    b'{"workers":[1,null,"x"]}',
    b'{"workers":[{"url":1,"load":"x","registered_secs":"y","tree_size":"z","draining":true}]}',
    b'{"workers":[{"url":null,"load":null,"health":5,"replica":5,"paused":7}]}',
    b'{"total_workers":1,"options":5}',
    b'{"options":[1]}',
    b'{"total_workers":1,"options":[{"name":"policy"}]}',
    b'{"changed":5,"added":3}',
    b'{"changed":[1],"added":[{}],"needs_restart":{}}',
    b'{"id":5,"url":5,"load":[],"worker_id":5}',
    b'{"id":"\\u001b[31m","url":"\\u001b[31m\\n","worker_id":"\\u009b","load":0}',
    b'{"error":{"message":5}}',
]
COMMANDS = [
    ["status"],
    ["workers"],
    ["drain", "id"],
    ["drain", "http://a:1", "--wait", "--timeout", "0.01"],
    ["resume", "id"],
    ["add", "http://a:1"],
    ["add", "http://a:1", "--wait", "--timeout", "0.01"],
    ["remove", "http://a:1"],
    ["remove", "id", "--wait", "--timeout", "0.01"],
    ["restart", "id", "--wait", "--timeout", "0.01"],
    ["restart", "--all", "--wait", "--timeout", "0.01"],
    ["config", "--all"],
    ["reload"],
    ["explain", "id"],
    ["top", "--count", "1"],
]


class Everywhere(dict[str, Any]):
    """The same answer to any path."""

    def __init__(self, status: int, fields: Mapping[str, str]) -> None:
        self.status, self.fields, self.body = status, fields, b""

    def get(self, path: str, default: object = None) -> Any:
        return self.status, self.fields, self.body


@pytest.mark.parametrize(("status", "fields"), [(200, {}), (422, {"x-smg-error-code": "config_refused"})])
def test_no_command_fails_over_a_strange_answer(
    status: int, fields: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    answers = Everywhere(status, fields)
    with plain_worker(answers) as other:
        for body in BODIES:
            answers.body = body
            for words in COMMANDS:
                for form in ((), ("--json",)):
                    case = (words, form, body[:60])
                    done = cli.main([*words, *form, "--url", other.url])
                    out, err = capfd.readouterr()
                    assert "\x1b" not in out + err, case
                    assert "\x9b" not in out + err, case
                    assert done in ((0, 1, 3, 5) if status == 200 else (1, 3)), case
                    if body == b"{}" and status == 200:  # many programs answer that, and none is a router
                        assert done == 3, case
                    if done and words != ["status"]:
                        assert err.startswith("error: "), case
                        assert err.count("\n") == 1, case
                    if done == 0 and form:
                        json.loads(out)


class Slow:
    """An answer that comes byte by byte. length: how many are announced; comes: how many come."""

    def __init__(self, length: int | None, comes: int) -> None:
        self.length, self.left = length, comes

    def read1(self, n: int) -> bytes:
        if not self.left:
            return b""
        self.left -= 1
        if self.length is not None:
            self.length -= 1
        return b"x"


def test_an_answer_that_does_not_end_is_not_waited_for() -> None:
    moments = itertools.count()
    with pytest.raises(TimeoutError):
        whole(Slow(None, 10**9), 100.0, lambda: float(next(moments)))
    assert next(moments) < 110


def test_an_answer_that_is_cut_off_is_none() -> None:
    with pytest.raises(http.client.IncompleteRead):
        whole(Slow(10, 9), 1e9)
    assert whole(Slow(10, 10), 1e9) == b"x" * 10
    assert whole(Slow(None, 7), 1e9) == b"x" * 7


def test_the_wrong_scheme_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with plain_worker({}) as other:
        assert cli.main(["status", "--url", other.url.replace("http", "https")]) == 3
    assert capfd.readouterr().err.endswith("the router may want http://.\n")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        closing = threading.Thread(target=lambda: listening.accept()[0].close())  # as TLS does with what is none
        closing.start()
        assert cli.main(["status", "--url", f"http://127.0.0.1:{listening.getsockname()[1]}"]) == 3
        closing.join()
    assert capfd.readouterr().err.endswith("the router may want https://.\n")


def test_a_certificate_that_is_not_trusted_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pair = Authority(tmp_path / "ca").issue("router")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    with plain_worker({}) as other:
        other.socket = context.wrap_socket(other.socket, server_side=True)
        assert cli.main(["status", "--url", other.url.replace("http", "https")]) == 3
    told = capfd.readouterr().err
    assert "certificate is not accepted (" in told
    assert "--ca-cert" in told


@pytest.mark.parametrize(
    "url", ["http://x y/", "http://127.0.0.1:1/a b", "http://h:1/\x7f", "ftp://h", "h:1", "http://u:p@h"]
)
def test_what_is_no_url_is_a_wrong_option(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", url]) == 2
    assert capfd.readouterr().err == "error: --url is not a URL such as http://127.0.0.1:30000\n"


@pytest.mark.parametrize("words", [["drain", "x", "--timeout", "soon"], ["top", "--interval", "often"]])
def test_a_time_that_is_no_number_is_told_in_words(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    told = capfd.readouterr().err
    assert "seconds" in told
    assert "_seconds" not in told
