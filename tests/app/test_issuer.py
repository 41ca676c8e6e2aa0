"""The keys of an identity provider, over loopback: fetched, fetched anew, and kept while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import pytest

from routers import WITHIN, PlainWorker, free_port, plain_worker
from sglang_router.app import issuer as module
from sglang_router.app.issuer import IssuerKeys, tokens_of
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from tokens_made import DISCOVERY, JSON, KEYS, Issuer


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a fresh event loop."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(test(**arguments))

    return run


Answers = dict[str, tuple[int, Mapping[str, str], bytes]]


class Fetching:
    """IssuerKeys with a clock that the test moves, and what it has got.

    documents  that `use` took, or refused
    """

    def __init__(self, issuer: str, uri: str | None = None) -> None:
        self.now = 1000.0
        self.documents: list[bytes] = []
        self.error = ""
        self.keys = IssuerKeys(asyncio.get_running_loop(), issuer, uri, lambda: self.now)
        self.keys.use = self._use

    def _use(self, document: bytes) -> int:
        self.documents.append(document)
        if self.error:
            raise ValueError(self.error)
        return len(json.loads(document)["keys"])

    async def after(self, seconds: float) -> int:
        """Let so many seconds pass, and what is due happen; return how many documents came until now."""
        self.now += seconds
        assert self.keys.refresh() is False
        await settled()
        return len(self.documents)


async def settled() -> None:
    """Wait for all other tasks."""
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait_for(asyncio.gather(*tasks), WITHIN)


@contextlib.asynccontextmanager
async def fetching(issuer: str, uri: str | None = None) -> AsyncIterator[Fetching]:
    each = Fetching(issuer, uri)
    try:
        yield each
    finally:
        await each.keys.close()


@on_loop
async def test_keys_are_found_by_the_discovery_document_and_fetched_every_five_minutes() -> None:
    with plain_worker({}) as server:
        issuer = Issuer(server.url + "/realms/main")
        server.answers = {"/realms/main" + path: answer for path, answer in issuer.documents().items()}
        async with fetching(issuer.url) as each:
            assert [await each.after(seconds) for seconds in (0.0, 1.0, 298.0, 1.0)] == [1, 1, 1, 2]
            assert each.documents[0] == issuer.keys()
            assert server.asked["/realms/main" + DISCOVERY] == 2
            each.keys.refresh(anyway=True)
            await settled()
            assert len(each.documents) == 3
            assert repr(each.keys) == f"<IssuerKeys {issuer.url}: 1 keys>"


@on_loop
async def test_with_a_url_of_the_keys_nothing_is_discovered() -> None:
    with plain_worker({"/jwks?v=1": (200, JSON, b'{"keys": [1]}')}) as server:
        async with fetching("https://auth.example.com", server.url + "/jwks?v=1") as each:
            assert await each.after(0.0) == 1
            assert set(server.asked) == {"/jwks?v=1"}


@on_loop
async def test_an_unknown_key_fetches_at_once_but_a_stranger_cannot_make_that_often() -> None:
    with plain_worker({}) as server:
        issuer = Issuer(server.url)
        server.answers = issuer.documents()
        async with fetching(issuer.url) as each:
            assert each.keys.wanted(), "nothing was fetched yet"
            await settled()
            assert not each.keys.wanted()
            each.now += 9.9
            assert not each.keys.wanted()
            each.now += 0.2
            assert each.keys.wanted()
            assert each.keys.wanted(), "that is the same one"
            await settled()
            assert len(each.documents) == 2
            assert not each.keys.wanted()


def bad(server: PlainWorker, issuer: Issuer, case: str) -> Answers:
    """Documents with one fault."""
    answers: Answers = dict(issuer.documents())
    discovery = json.loads(answers[DISCOVERY][2])
    if case == "status":
        answers[KEYS] = (503, JSON, b"")
    elif case == "redirect":
        answers[KEYS] = (302, {"location": server.url + "/else"}, b"")
    elif case == "large":
        answers[KEYS] = (200, JSON, b" " * (1 << 21))
    elif case == "no discovery":
        answers[DISCOVERY] = (200, JSON, b"<html>")
    else:
        changed = {"other issuer": {"issuer": server.url + "/"}, "no uri": {"jwks_uri": ""}}
        changed["plain http"] = {"jwks_uri": "http://auth.example.com/keys"}
        answers[DISCOVERY] = (200, JSON, json.dumps(discovery | changed[case]).encode())
    return answers


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("status", "/keys answers 503; no token is accepted yet"),
        ("redirect", "/keys answers 302"),
        ("large", "Its answer is larger than 1048576 bytes"),
        ("no discovery", "is no discovery document"),
        ("other issuer", "is --jwt-issuer spelled as there?"),
        ("no uri", "jwks_uri of its discovery document: this is not a URL"),
        ("plain http", "begins with https://"),
    ],
)
@on_loop
async def test_what_is_wrong_is_one_warning_and_tried_again(
    case: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with plain_worker({}) as server:
        issuer = Issuer(server.url)
        server.answers = bad(server, issuer, case)
        async with fetching(issuer.url) as each:
            assert [await each.after(seconds) for seconds in (0.0, 4.9, 0.2, 9.9, 0.2)] == [0] * 5
            (warning,) = [line for line in caplog.messages if "cannot be fetched" in line]
            assert words in warning
            server.answers = issuer.documents()
            assert [await each.after(seconds) for seconds in (19.9, 0.2)] == [0, 1]


@on_loop
async def test_while_the_issuer_is_away_its_keys_stay(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    async with fetching(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/keys") as each:
        assert await each.after(0.0) == 0
        assert "no token is accepted yet" in caplog.messages[-1]
    with plain_worker({KEYS: (200, JSON, b'{"keys": [1, 2]}')}) as server:
        uri = server.url + KEYS
        each = Fetching(server.url, uri)
        assert await each.after(0.0) == 1
    try:
        assert await each.after(300.0) == 1
        assert "the 2 keys fetched before stay in use" in caplog.messages[-1]
        pauses = [await each.after(60.0) for _ in range(8)]
        assert pauses == [1] * 8
    finally:
        await each.keys.close()
    assert await each.after(600.0) == 1, "it is closed"


@on_loop
async def test_a_document_that_is_of_no_use_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with plain_worker({KEYS: (200, JSON, b"{}")}) as server:
        async with fetching(server.url, server.url + KEYS) as each:
            each.error = "the document holds no public key for signatures"
            await each.after(0.0)
    assert each.error in caplog.messages[-1]


# -- from the options --------------------------------------------------------------------------------------------------


@on_loop
async def test_without_the_options_there_is_nothing() -> None:
    assert tokens_of(RouterArgs().checked(), asyncio.get_running_loop(), time.monotonic) == (None, None)


@on_loop
async def test_the_tokens_get_the_keys() -> None:
    with plain_worker({}) as server:
        issuer = Issuer(server.url)
        server.answers = issuer.documents()
        args = RouterArgs(jwt_issuer=server.url, jwt_audience="router").checked()
        tokens, keys = tokens_of(args, asyncio.get_running_loop(), time.monotonic)
        assert tokens is not None
        assert keys is not None
        keys.refresh()
        await settled()
        found = tokens.identify(issuer.token(roles=["admin"]).encode(), b"digest")
        assert found is not None
        assert found.role.value == "admin", "without a mapping the issuer's own admin is one"
        await keys.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"jwt_issuer": "https://a"}, "belong together"),
        ({"jwt_audience": "a"}, "belong together"),
        ({"jwt_jwks_uri": "https://a/keys"}, "need --jwt-issuer"),
        ({"jwt_role_mapping": {"a": "admin"}}, "need --jwt-issuer"),
        ({"jwt_issuer": "http://auth.example.com", "jwt_audience": "a"}, "--jwt-issuer: this is not a URL"),
        ({"jwt_issuer": "https://u:p@h", "jwt_audience": "a"}, "--jwt-issuer: this is not a URL"),
        ({"jwt_issuer": "auth.example.com", "jwt_audience": "a"}, "--jwt-issuer: this is not a URL"),
        ({"jwt_issuer": "https://h:x", "jwt_audience": "a"}, "--jwt-issuer: this is not a URL"),
        ({"jwt_issuer": "https://h/#x", "jwt_audience": "a"}, "fragment"),
        ({"jwt_issuer": "https://h", "jwt_audience": "a", "jwt_jwks_uri": "ftp://h"}, "--jwt-jwks-uri"),
        ({"jwt_issuer": "https://h", "jwt_audience": "a", "jwt_role_mapping": {"x": "root"}}, "give admin or user"),
        ({"jwt_issuer": "https://h", "jwt_audience": "a", "control_plane_open": True}, "--control-plane-open"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RouterArgs(**options).checked()  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/a", "http://localhost", "http://[::1]:1", "https://h/realms/a"])
def test_plain_http_is_for_this_machine_only(url: str) -> None:
    assert RouterArgs(jwt_issuer=url, jwt_audience="a").checked().jwt_issuer == url


def test_the_module_names_the_package_to_install() -> None:
    assert module._INSTALL == "pip install 'sglang-router[jwt]'"
