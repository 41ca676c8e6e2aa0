"""One connection to the API server: TLS, and every way in which an answer can be none."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from discovery_scenes import kubeconfig
from fake_kube import FakeKube
from sglang_router.discovery import kube_api
from sglang_router.discovery.kube_api import KubeError, KubeLink
from sglang_router.discovery.kube_config import KubeAccess, KubeFiles, find
from sglang_router.relay.addresses import Addresses

OK = b"HTTP/1.1 200 OK\r\n"
PODS = "/api/v1/pods"


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 20))


class Says:
    """A server that answers each request with the next of these bytes, and closes after the last."""

    def __init__(self, *answers: bytes, stays: bool = False) -> None:
        self.answers = answers
        self._stays = stays
        self.heads: list[bytes] = []
        self.connections = 0

    async def __aenter__(self) -> KubeAccess:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return KubeAccess(
            "127.0.0.1", self._server.sockets[0].getsockname()[1], "127.0.0.1", "/base", None, "t0ken", "f"
        )

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        for answer in self.answers[len(self.heads) :]:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
        if self._stays:
            await reader.read()
        writer.close()


def got(*answers: bytes, paths: int = 1) -> tuple[list[bytes], Says]:
    """Return the answers to some requests on one link."""
    server = Says(*answers)

    async def work() -> list[bytes]:
        async with server as access, link(access) as one:
            return [await one.get(PODS) for _ in range(paths)]

    return run(work), server


def link(access: KubeAccess) -> KubeLink:
    return KubeLink(access, Addresses(asyncio.get_running_loop()))


def test_a_connection_that_the_server_has_closed_is_not_used_again() -> None:
    page = OK + b"content-length: 2\r\n\r\n{}"

    async def work() -> tuple[bytes, Says]:
        server = Says(page)
        async with server as access, link(access) as one:
            await one.get(PODS)
            while not one.closing:  # noqa: ASYNC110 - nothing else tells it
                await asyncio.sleep(0.001)
            server.answers += (page,)
            return await one.get(PODS), server

    body, server = run(work)
    assert (body, server.connections) == (b"{}", 2)


def failed(*answers: bytes) -> KubeError:
    with pytest.raises(KubeError) as caught:
        got(*answers)
    return caught.value


def test_a_request_says_who_asks() -> None:
    bodies, server = got(OK + b"content-length: 2\r\n\r\n{}")
    assert bodies == [b"{}"]
    lines = server.heads[0].decode().split("\r\n")
    assert lines[0] == "GET /base/api/v1/pods HTTP/1.1"
    assert "authorization: Bearer t0ken" in lines
    assert "accept: application/json" in lines


def test_pages_come_over_one_connection_unless_it_is_closed() -> None:
    page = OK + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert got(b"HTTP/1.1 103 Early\r\n\r\n" + page, page, paths=2)[1].connections == 1
    closing = OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}"
    bodies, server = got(closing, OK + b"\r\nto the end", paths=2)
    assert bodies == [b"{}", b"to the end"]
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (b"", "broken", "closed the connection without an answer"),
        (b"HTTP/1.1 200", "broken", "closed the connection without an answer"),
        (b"SSH-2.0\r\n\r\n", "invalid", "does not answer in HTTP/1.1"),
        (OK + b"transfer-encoding: chunked\r\n\r\nx\r\n", "invalid", "does not answer in HTTP/1.1"),
        (OK + b"content-length: 9\r\n\r\n{}", "broken", "in the middle of an answer"),
        (b"HTTP/1.1 500 X\r\ncontent-length: 3\r\n\r\na\nb", "500", "answers 500: a b"),
        (b"HTTP/1.1 503 X\r\ncontent-length: 9\r\n\r\n", "503", "answers 503: it does not say why"),
        (b'HTTP/1.1 403 X\r\ncontent-length: 15\r\n\r\n{"message":"no"', "403", "answers 403: "),
    ],
)
def test_what_is_no_answer(answer: bytes, kind: str, text: str) -> None:
    error = failed(answer)
    assert error.kind == kind
    assert text in str(error)
    assert "t0ken" not in str(error)


def test_401_names_where_the_token_comes_from_but_not_the_token() -> None:
    error = failed(b'HTTP/1.1 401 X\r\ncontent-length: 24\r\n\r\n{"message":"Unauthoriz"}')
    assert (error.kind, error.status) == ("401", 401)
    assert str(error).endswith("does not accept the token of f: Unauthoriz")


def test_retry_after_is_heard() -> None:
    assert failed(b"HTTP/1.1 429 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n").pause == 7.0
    assert failed(b"HTTP/1.1 429 X\r\nretry-after: soon\r\ncontent-length: 0\r\n\r\n").pause == 0.0


def test_an_answer_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "_LARGEST_ANSWER", 10)
    assert failed(OK + b"content-length: 11\r\n\r\n" + b"x" * 11).kind == "invalid"


def test_silence_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "_SILENT_FOR", 0.05)
    for answer in (b"", OK + b"content-length: 2\r\n\r\n{"):

        async def work(answer: bytes = answer) -> None:
            async with Says(answer, stays=True) as access, link(access) as one:
                await one.get(PODS)

        with pytest.raises(KubeError, match="says nothing for") as caught:
            run(work)
        assert caught.value.kind == "silent"


class Drips:
    """A server that sends the rest of an answer byte by byte, and never its end. sent: bytes of it."""

    def __init__(self, at_once: bytes, rest: bytes) -> None:
        self._at_once = at_once
        self._rest = rest
        self.sent = 0
        self._left = asyncio.Event()

    async def __aenter__(self) -> KubeAccess:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return KubeAccess("127.0.0.1", self._server.sockets[0].getsockname()[1], "127.0.0.1", "", None, "", "")

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._left.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self._at_once)
            for byte in self._rest:
                writer.write(bytes([byte]))
                await writer.drain()
                self.sent += 1
                await asyncio.sleep(0.002)
            await reader.read()
        writer.transport.abort()
        self._left.set()


@pytest.mark.parametrize(
    ("at_once", "rest", "kind"),
    [
        (OK, b"x-more: " + b"x" * 5000, "silent"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 200, "silent"),
        (OK + b"content-length: 9999\r\n\r\n", b"x" * 5000, "silent"),
        (b"HTTP/1.1 500 X\r\ncontent-length: 9999\r\n\r\n", b"x" * 5000, "500"),
    ],
    ids=["a head", "interim answers", "a body", "an error"],
)
def test_an_answer_that_comes_byte_by_byte_has_an_end(
    at_once: bytes, rest: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some bytes came all the time, so the router waited for as long as the server liked."""
    monkeypatch.setattr(kube_api, "_SILENT_FOR", 0.5)
    monkeypatch.setattr(kube_api, "_WHOLE_WITHIN", 0.5)
    drips = Drips(at_once, rest)

    async def work() -> None:
        async with drips as access, link(access) as one:
            await one.get(PODS)

    with pytest.raises(KubeError) as caught:
        run(work)
    assert caught.value.kind == kind
    assert drips.sent < len(rest)


# -- streams -----------------------------------------------------------------------------------------------------------


def lines_of(answer: bytes, within: float = 10.0, stays: bool = False) -> list[bytes]:
    found: list[bytes] = []

    async def work() -> None:
        async with Says(answer, stays=stays) as access, link(access) as one:
            async for line in await one.stream(PODS, within):
                found.append(line)  # noqa: PERF401 - what came before the failure counts

    try:
        run(work)
    except KubeError as error:
        found.append(error.kind.encode())
    return found


def chunks(*parts: bytes) -> bytes:
    return OK + b"transfer-encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def test_lines_come_whole_however_they_were_cut() -> None:
    assert lines_of(chunks(b"a\nb", b"b\n", b"\n", b"c\n") + b"0\r\n\r\n") == [b"a", b"bb", b"c"]
    assert lines_of(chunks(b"a\n")) == [b"a", b"broken"]
    assert lines_of(chunks(b"a\n"), within=0.05, stays=True) == [b"a", b"silent"]


def test_a_line_has_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "_LONGEST_LINE", 10)
    assert lines_of(chunks(b"x" * 11)) == [b"invalid"]


# -- connections -------------------------------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    async def work() -> None:
        async with Says() as access:
            pass
        async with link(access) as one:
            await one.get(PODS)

    with pytest.raises(KubeError, match="cannot be reached: nobody listens there") as caught:
        run(work)
    assert caught.value.kind == "unreachable"


def test_a_name_that_nobody_knows() -> None:
    async def work() -> None:
        access = KubeAccess("kube.invalid", 1, "kube.invalid", "", None)
        async with KubeLink(access, Addresses(asyncio.get_running_loop(), lambda name: ())) as one:
            await one.get(PODS)

    with pytest.raises(KubeError, match=r"kube.invalid:1 cannot be reached: the look-up of its name failed"):
        run(work)


def test_tls_both_ways(tmp_path: Path) -> None:
    """The server is verified by the CA of the kubeconfig, and shown the client's certificate."""
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    server, client = authority.issue("server"), authority.issue("client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*server)
    context.load_verify_locations(authority.cert)
    context.verify_mode = ssl.CERT_REQUIRED

    async def ask(ca: str, user: dict[str, str]) -> bytes:
        api = FakeKube()
        await api.start(context)
        config = kubeconfig(tmp_path / "config", {"server": api.url, "certificate-authority": ca}, user)
        try:
            async with link(KubeFiles(find(config, {})).access()) as one:
                return await one.get(PODS)
        finally:
            await api.stop()

    mine = {"client-certificate": client.cert, "client-key": client.key}
    assert b'"PodList"' in run(lambda: ask(authority.cert, mine))
    with pytest.raises(KubeError, match="its certificate is not accepted"):
        run(lambda: ask(stranger.cert, mine))
    with pytest.raises(KubeError, match=r"certificate required|was reset|without an answer"):
        run(lambda: ask(authority.cert, {"token": "t"}))


def test_a_plain_server_behind_https_is_said(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(plain, "127.0.0.1", 0)
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        config = kubeconfig(tmp_path / "config", {"server": url, "certificate-authority": authority.cert}, {})
        async with server, link(KubeFiles(find(config, {})).access()) as one:
            await one.get(PODS)

    with pytest.raises(KubeError, match="cannot be reached: TLS failed: wrong version number"):
        run(work)
