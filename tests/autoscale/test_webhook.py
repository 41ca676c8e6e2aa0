"""The webhook against a real HTTP server: what arrives, how it is signed, and what happens until it is taken."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from certificates import Authority
from scaling_decisions import RULES, WITHIN, decision, until
from sglang_router.autoscale.webhook import Patience, Webhook

PAGE = Path(__file__).parents[2] / "docs" / "autoscaling.md"
SECRET = "s3cret"
EAGER = Patience(timeout=5.0, first_pause=0.01, longest_pause=0.05)
AT = 1_790_000_000.25


class Got(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.body)
        return message


class Hook(http.server.ThreadingHTTPServer):
    """Receives; answers with `statuses` in turn, then 200. 0 closes without an answer, -1 waits for `release`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook/t0ken?team=a"
        self.statuses: list[int] = []
        self.release = threading.Event()
        self.secure: ssl.SSLContext | None = None
        self.refused = 0  # handshakes that came to nothing
        self.got: list[Got] = []
        self._news = threading.Condition()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.secure is None:
            return connection, address
        try:
            return self.secure.wrap_socket(connection, server_side=True), address
        except OSError:
            self.refused += 1
            connection.close()
            raise

    def take(self, got: Got) -> int:
        with self._news:
            self.got.append(got)
            self._news.notify_all()
            return self.statuses.pop(0) if self.statuses else 200

    async def received(self, count: int) -> Got:
        """Waits for so many in all; the last of them."""
        await asyncio.get_running_loop().run_in_executor(None, self._wait, count)
        return self.got[count - 1]

    def _wait(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.got) >= count, WITHIN), f"only {len(self.got)} came"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        status = self.server.take(Got(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        if status == -1:
            self.server.release.wait(WITHIN)
        if status <= 0:
            self.close_connection = True
            return
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("location", self.server.url)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:
        """Not to standard error."""


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join(WITHIN)


Scene = Callable[[Webhook], Awaitable[None]]


def play(
    scene: Scene,
    url: str,
    secret: str | None = SECRET,
    patience: Patience = EAGER,
    acts: Callable[[], bool] = lambda: True,
) -> None:
    """Runs a scene with a webhook to that URL, and ends both within a moment."""

    async def whole() -> None:
        loop = asyncio.get_running_loop()
        ids = iter(f"id{n}" for n in range(1000))
        webhook = Webhook(loop, url, secret, RULES, lambda: AT, lambda: next(ids), patience, acts)
        try:
            await scene(webhook)
        finally:
            await asyncio.wait_for(webhook.close(), 2.0)

    asyncio.run(whole())


def told(webhook: Webhook) -> bool:
    state = webhook.explain()
    return state["waiting"] is None and state["told"] is not None


def test_what_is_sent(hook: Hook) -> None:
    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(3, 1, reason="load: 90 requests in flight"))
        got = await hook.received(1)
        assert got.path == "/hook/t0ken?team=a"
        assert got.headers["content-type"] == "application/json"
        assert got.headers["host"] == hook.url.split("/")[2]
        message = got.json()
        figures = message.pop("figures")
        assert message == {
            "id": "id0",
            "at": "2026-09-21T14:13:20.250Z",
            "desired": 3,
            "current": 1,
            "reason": "load: 90 requests in flight",
            "min": 1,
            "max": 4,
        }
        assert (figures["load"], figures["ready"], figures["wants"]["load"]) == (40, 1, 2)
        await until(lambda: told(webhook))
        assert webhook.explain()["told"]["id"] == "id0"

    play(scene, hook.url)


def verifier() -> Callable[[str, dict[str, str], bytes], bool]:
    """The example of the documentation, as it stands there."""
    (example,) = re.findall(r"```python\n(.*?def verified.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    found: Callable[[str, dict[str, str], bytes], bool] = names["verified"]
    return found


def test_the_documented_check_takes_the_signature_and_nothing_else(hook: Hook) -> None:
    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await hook.received(1)

    play(scene, hook.url)
    verified, got = verifier(), hook.got[0]
    assert verified(SECRET, got.headers, got.body)
    assert not verified("other", got.headers, got.body)
    assert not verified(SECRET, got.headers, got.body.replace(b'"desired":2', b'"desired":9'))
    assert not verified(SECRET, {**got.headers, "x-sglang-router-timestamp": "1790000001"}, got.body)
    assert not verified(SECRET, {**got.headers, "x-sglang-router-signature": ""}, got.body)


def test_without_a_secret_there_is_no_signature(hook: Hook) -> None:
    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        got = await hook.received(1)
        assert "x-sglang-router-signature" not in got.headers
        assert got.headers["x-sglang-router-timestamp"] == str(int(AT))

    play(scene, hook.url, secret=None)


def test_what_changes_nothing_is_not_told(hook: Hook) -> None:
    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2, changed=False))
        webhook.scale(decision(3))
        webhook.scale(decision(3, changed=False))
        await until(lambda: told(webhook))
        webhook.scale(decision(4))
        await hook.received(2)

    play(scene, hook.url)
    assert [got.json()["desired"] for got in hook.got] == [3, 4]


@pytest.mark.parametrize("bad", [500, 404, 302, 307, 0])
def test_again_until_it_is_taken(hook: Hook, bad: int) -> None:
    hook.statuses = [bad] * 3

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await hook.received(2)
        state = webhook.explain()
        assert (state["waiting"]["id"], state["told"]) == ("id0", None)
        assert state["failures"] >= 1
        assert (str(bad) if bad else "broke off") in state["last_error"]
        await until(lambda: told(webhook))
        assert webhook.explain()["failures"] == 0

    play(scene, hook.url)
    assert [got.json()["id"] for got in hook.got] == ["id0"] * 4
    assert {got.path for got in hook.got} == {"/hook/t0ken?team=a"}


def test_the_newest_takes_the_place_of_one_that_waits_and_goes_at_once(hook: Hook) -> None:
    hook.statuses = [500]

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await hook.received(1)
        await until(lambda: webhook.explain()["failures"] == 1)
        webhook.scale(decision(3))
        webhook.scale(decision(4))
        got = await hook.received(2)
        assert got.json()["desired"] == 4
        await until(lambda: told(webhook))

    play(scene, hook.url, patience=Patience(first_pause=3600.0))
    assert len(hook.got) == 2


def test_a_decision_made_while_another_is_sent_follows(hook: Hook) -> None:
    hook.statuses = [-1]

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await hook.received(1)
        webhook.scale(decision(3))
        hook.release.set()  # the first breaks off without an answer
        await hook.received(2)
        await until(lambda: told(webhook))

    play(scene, hook.url)
    assert hook.got[-1].json()["desired"] == 3


def test_a_receiver_that_hangs_is_asked_again(hook: Hook) -> None:
    hook.statuses = [-1]

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await hook.received(2)
        await until(lambda: told(webhook))

    play(scene, hook.url, patience=Patience(timeout=0.2, first_pause=0.01))
    assert len(hook.got) == 2


def test_who_acts_no_more_drops_what_waits_and_who_acts_again_posts(hook: Hook) -> None:
    hook.statuses = [500]
    leads = [True]

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await until(lambda: webhook.explain()["failures"] == 1)
        leads[0] = False  # as it may happen while this process is stopped: the pause is over when it goes on
        await until(lambda: webhook.explain()["waiting"] is None)
        assert (webhook.explain()["failures"], webhook.explain()["last_error"]) == (0, "")
        leads[0] = True
        webhook.scale(decision(3))
        await until(lambda: told(webhook))

    play(scene, hook.url, patience=Patience(first_pause=0.2), acts=lambda: leads[0])
    assert [got.json()["desired"] for got in hook.got] == [2, 3]


def test_the_end_does_not_wait_for_a_receiver_that_hangs(hook: Hook) -> None:
    hook.statuses = [-1]

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await hook.received(1)

    play(scene, hook.url, patience=Patience(timeout=3600.0))


def test_the_end_does_not_wait_for_a_pause(hook: Hook) -> None:
    hook.statuses = [500]

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await until(lambda: webhook.explain()["failures"] == 1)

    play(scene, hook.url, patience=Patience(first_pause=3600.0))


def test_nobody_listens_and_then_somebody_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await until(lambda: webhook.explain()["failures"] >= 2)
        state = webhook.explain()
        assert state["last_error"] == "nobody listens there"
        assert state["to"] == f"http://127.0.0.1:{port}"  # without the path, which may be a password

    play(scene, f"http://127.0.0.1:{port}/t0ken")


def test_a_certificate_that_nobody_vouches_for_gets_no_message(hook: Hook, tmp_path: Path) -> None:
    pair = Authority(tmp_path / "unknown").issue("hook")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    hook.secure = context

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await until(lambda: webhook.explain()["failures"] >= 1)
        said = "it cannot be reached (its certificate is not accepted: unable to get local issuer certificate)"
        assert webhook.explain()["last_error"] == said
        await until(lambda: bool(hook.refused))

    play(scene, hook.url.replace("http:", "https:"))
    assert not hook.got


def test_pauses_double_up_to_the_longest(caplog: pytest.LogCaptureFixture, hook: Hook) -> None:
    hook.statuses = [500] * 5

    async def scene(webhook: Webhook) -> None:
        webhook.scale(decision(2))
        await until(lambda: told(webhook))

    with caplog.at_level("WARNING", "sglang_router.scaling"):
        play(scene, hook.url, patience=Patience(first_pause=0.01, longest_pause=0.04))
    assert re.findall(r"again in (\S+) s", caplog.text) == ["0.01", "0.02", "0.04", "0.04", "0.04"]
    assert "t0ken" not in caplog.text
