"""TLS over real sockets on uvloop: what is served and to whom, files that change, workers that are verified."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from certificates import Authority, Pair, openssl, replace
from sglang_router.access.tls import TLSFiles, explain, listening_context, server_files, worker_files
from sglang_router.errors import ConfigError

YEAR = 365 * 86400.0
PATIENCE = 10.0


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "stranger")


@pytest.fixture(scope="module")
def first(ca: Authority) -> Pair:
    return ca.issue("first")


@pytest.fixture(scope="module")
def second(ca: Authority) -> Pair:
    return ca.issue("second")


@pytest.fixture
def pair(ca: Authority, first: Pair, tmp_path: Path) -> Pair:
    """Files of the test's own that hold `first`."""
    copy = Pair(str(tmp_path / "tls.pem"), str(tmp_path / "tls.key"))
    copy.become(first)
    return copy


# -- a server and a client ---------------------------------------------------------------------------------------------


class Echo(asyncio.Protocol):
    """Sends back what comes; to TLS where none is spoken, it says what web servers say."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" if data.startswith(b"\x16\x03") else data)


@dataclass
class Server:
    """A listening echo, and what the event loop had to complain of."""

    port: int
    faults: list[dict[str, Any]] = field(default_factory=list)

    async def connect(self, context: ssl.SSLContext, name: str | None = "localhost") -> Client:
        """A connection after its handshake; `name` is the one that is asked for and verified."""
        opening = asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name or "")
        return Client(*await asyncio.wait_for(opening, PATIENCE))

    async def name(self, context: ssl.SSLContext) -> str:
        """The common name of the certificate that a new connection is shown."""
        async with await self.connect(context) as client:
            return client.shown


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.tls: ssl.SSLObject = writer.get_extra_info("ssl_object")

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await hang_up(self.writer)

    @property
    def shown(self) -> str:
        subject: Any = (self.tls.getpeercert() or {}).get("subject", ())
        return next((value for ((name, value),) in subject if name == "commonName"), "")

    async def echo(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await self.read()

    async def read(self) -> bytes:
        """What comes. Raises: OSError when the connection broke."""
        return await asyncio.wait_for(self.reader.read(100), PATIENCE)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def run(
    scene: Callable[[Server], Awaitable[None]], context: ssl.SSLContext | None, handshake: float = PATIENCE
) -> None:
    """Runs a test against a server on a loop of its own; the loop must have nothing to complain of."""

    async def all_of_it() -> None:
        loop = asyncio.get_running_loop()
        timeout = handshake if context else None
        listening = await loop.create_server(Echo, "127.0.0.1", 0, ssl=context, ssl_handshake_timeout=timeout)
        server = Server(listening.sockets[0].getsockname()[1])
        loop.set_exception_handler(lambda _, fault: server.faults.append(fault))
        try:
            await scene(server)
        finally:
            gone = loop.create_task(listening.wait_closed())  # uvloop: waits only if it is called before close()
            loop.call_soon(listening.close)
            await asyncio.wait_for(gone, PATIENCE)
        assert server.faults == []

    with contextlib.closing(uvloop.new_event_loop()) as loop:
        loop.run_until_complete(all_of_it())


def serving(pair: Pair) -> ssl.SSLContext:
    return listening_context(server_files(*pair))


def trusting(ca: Authority, client: Pair | None = None) -> ssl.SSLContext:
    """What the router verifies workers with."""
    return worker_files([ca.cert], *(client or ())).context


# -- towards clients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_serves_tls_and_speaks_http_1_1_only(ca: Authority, first: Pair, version: ssl.TLSVersion) -> None:
    async def scene(server: Server) -> None:
        context = trusting(ca)
        context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        async with await server.connect(context) as client:
            assert client.tls.version() == version.name.replace("_", ".")
            assert client.tls.selected_alpn_protocol() == "http/1.1"
            assert await client.echo(b"hello") == b"hello"

    run(scene, serving(first))


def old_fashioned(protocol: int, pair: Pair | None = None) -> ssl.SSLContext:
    """A context for TLS 1.1 and nothing newer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    if pair is not None:
        context.load_cert_chain(*pair)
    return context


def test_tls_1_1_is_refused(first: Pair) -> None:
    client = old_fashioned(ssl.PROTOCOL_TLS_CLIENT)

    async def refused(server: Server) -> None:
        with pytest.raises(OSError):
            await server.connect(client)

    async def served(server: Server) -> None:
        async with await server.connect(client) as connection:
            assert connection.tls.version() == "TLSv1.1"

    run(refused, serving(first))
    run(served, old_fashioned(ssl.PROTOCOL_TLS_SERVER, first))


def test_suites_without_authenticated_encryption_are_refused(ca: Authority, first: Pair) -> None:
    client = trusting(ca)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("ECDHE-ECDSA-AES128-SHA256")

    async def refused(server: Server) -> None:
        with pytest.raises(OSError):
            await server.connect(client)

    async def served(server: Server) -> None:
        assert await server.name(client) == "first"

    run(refused, serving(first))
    lenient = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    lenient.load_cert_chain(*first)
    run(served, lenient)


def test_plain_http_is_closed_on_quietly(ca: Authority, first: Pair) -> None:
    async def scene(server: Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        assert b"HTTP" not in answer
        await hang_up(writer)
        assert await server.name(trusting(ca)) == "first"

    run(scene, serving(first))


def test_a_handshake_that_stalls_is_given_up(ca: Authority, first: Pair) -> None:
    async def scene(server: Server) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        silent[1][1].write(b"\x16\x03\x01\x00\xc8")  # the begin of a record, and no more
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
            await hang_up(writer)

    run(scene, serving(first), handshake=0.1)


# -- files that change -------------------------------------------------------------------------------------------------


def test_new_files_serve_new_connections_and_leave_old_ones_alone(
    ca: Authority, pair: Pair, second: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    files = server_files(*pair)

    async def scene(server: Server) -> None:
        async with await server.connect(trusting(ca)) as old:
            assert not files.refresh()
            pair.become(second)
            with caplog.at_level(logging.INFO):
                assert files.refresh()
            assert not files.refresh()
            assert caplog.messages == [f"TLS: loaded {pair.cert}, {pair.key} anew"]
            assert await server.name(trusting(ca)) == "second"
            assert (await old.echo(b"still here"), old.shown) == (b"still here", "first")

    run(scene, listening_context(files))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_clients_that_name_no_server_get_the_new_certificate(
    ca: Authority, pair: Pair, second: Pair, version: ssl.TLSVersion
) -> None:
    files = server_files(*pair)

    async def scene(server: Server) -> None:
        pair.become(second)
        assert files.refresh()
        context = trusting(ca)
        context.check_hostname = False
        context.maximum_version = version
        async with await server.connect(context, name=None) as client:
            assert client.shown == "second"
            assert client.tls.selected_alpn_protocol() == "http/1.1"

    run(scene, listening_context(files))


def test_in_the_middle_of_a_renewal_the_old_pair_serves(
    ca: Authority, pair: Pair, second: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    files = server_files(*pair)
    new_cert, new_key = (Path(path).read_text() for path in second)

    async def scene(server: Server) -> None:
        replace(pair.cert, new_cert)
        assert not files.refresh()
        assert not files.refresh()
        assert await server.name(trusting(ca)) == "first"
        fault = f"the key {pair.key} does not belong to the certificate {pair.cert}"
        assert caplog.messages == [f"TLS: {fault}; the files loaded before stay in use"]
        replace(pair.key, new_key)
        assert files.refresh()
        assert await server.name(trusting(ca)) == "second"

    run(scene, listening_context(files))


def test_each_trouble_is_told_once_and_does_not_last(
    pair: Pair, first: Pair, second: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "sglang_router")
    files = server_files(*pair)
    whole = Path(second.cert).read_text()
    context = files.context
    Path(pair.cert).unlink()
    assert not files.refresh()
    replace(pair.cert, whole + whole[:200])
    assert not files.refresh()
    assert not files.refresh()
    pair.become(first)
    assert files.refresh(), "other files, even with the same content"
    assert files.context is not context
    Path(pair.cert).unlink()
    assert not files.refresh()
    assert caplog.messages == [
        f"TLS: {pair.cert} cannot be read: No such file or directory; the files loaded before stay in use",
        f"TLS: {pair.cert} holds a certificate that is damaged or cut off; the files loaded before stay in use",
        f"TLS: {pair.cert} cannot be read: No such file or directory; the files loaded before stay in use",
    ]


def test_files_behind_a_link_that_is_swapped(pair: Pair, second: Pair, tmp_path: Path) -> None:
    """As Kubernetes does it for secrets."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    for kind, mine, other in zip(("cert", "key"), pair, second, strict=True):
        Path(mine).rename(tmp_path / "old" / kind)
        (tmp_path / "new" / kind).write_text(Path(other).read_text())
    link = tmp_path / "data"
    link.symlink_to("old")
    files = server_files(str(link / "cert"), str(link / "key"))
    assert not files.refresh()
    (tmp_path / "data.new").symlink_to("new")
    (tmp_path / "data.new").rename(link)
    assert files.refresh()


# -- files that cannot be used -----------------------------------------------------------------------------------------


def refused(cert: str | Path, key: str | Path) -> str:
    with pytest.raises(ConfigError) as error:
        server_files(str(cert), str(key))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_file_is_told_by_name_with_what_is_wrong(ca: Authority, pair: Pair, second: Pair, tmp_path: Path) -> None:
    gone, text = tmp_path / "gone", tmp_path / "text"
    text.write_text("hello")
    assert refused(gone, pair.key) == f"{gone} cannot be read: No such file or directory"
    assert refused(pair.cert, gone) == f"{gone} cannot be read: No such file or directory"
    assert refused(tmp_path, pair.key) == f"{tmp_path} cannot be read: Is a directory"
    assert refused(text, pair.key) == f"{text} holds no certificate in PEM form"
    assert refused(pair.cert, text) == f"{text} holds no private key in PEM form"
    assert refused(pair.key, pair.cert) == f"{pair.key} holds no certificate in PEM form"
    assert refused(pair.cert, second.key) == f"the key {second.key} does not belong to the certificate {pair.cert}"
    text.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert refused(text, pair.key) == f"{text} holds a certificate that is damaged or cut off"
    text.write_text(Path(pair.key).read_text()[:60])
    assert refused(pair.cert, text).startswith(f"{text} holds no private key that can be read")


def test_keys_of_another_kind_or_too_weak_or_with_a_password(ca: Authority, first: Pair, tmp_path: Path) -> None:
    weak = ca.issue("weak", algorithm=("-newkey", "rsa:1024"))
    assert refused(*weak) == f"{weak.cert} is too weak: ee key too small"
    assert refused(first.cert, weak.key) == f"the key {weak.key} does not belong to the certificate {first.cert}"
    locked = str(tmp_path / "locked.key")
    for form in (("pkey",), ("ec",)):
        openssl(*form, "-in", first.key, "-aes256", "-passout", "pass:hush", "-out", locked)
        assert "needs a password" in refused(first.cert, locked)
        assert locked in refused(first.cert, locked)


def test_dates_and_open_keys_are_warned_of(ca: Authority, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    now = server_files(*pair).expires_at
    assert now is not None
    assert caplog.messages == []
    server_files(*pair, clock=lambda: now)
    server_files(*pair, clock=lambda: now - YEAR)
    Path(pair.key).chmod(0o644)
    server_files(*pair)
    expired, early, exposed = caplog.messages
    assert f"the certificate {pair.cert} expired on 20" in expired
    assert f"the certificate {pair.cert} is not valid before 20" in early
    assert exposed.startswith(f"{pair.key} holds secrets and is open to everybody")


def test_dates_are_those_openssl_tells(ca: Authority, first: Pair) -> None:
    async def scene(server: Server) -> None:
        async with await server.connect(trusting(ca)) as client:
            told: Any = (client.tls.getpeercert() or {})["notAfter"]
            assert server_files(*first).expires_at == ssl.cert_time_to_seconds(told)

    run(scene, serving(first))


def test_a_long_lived_certificate_has_its_dates_in_the_longer_form(ca: Authority) -> None:
    pair = ca.issue("for ever", days=40 * 365)
    ends = server_files(*pair).expires_at
    assert ends is not None
    assert ends > ssl.cert_time_to_seconds("Jan  1 00:00:00 2050 GMT")


# -- towards workers ---------------------------------------------------------------------------------------------------


def test_a_worker_is_verified_by_the_named_authorities(ca: Authority, stranger: Authority, first: Pair) -> None:
    async def scene(server: Server) -> None:
        both = worker_files([stranger.cert, ca.cert]).context
        async with await server.connect(both) as client:
            assert await client.echo(b"hello") == b"hello"
        async with await server.connect(both, "127.0.0.1") as client:
            assert client.shown == "first"
        for wrong in (trusting(stranger), worker_files().context):
            with pytest.raises(ssl.SSLCertVerificationError) as error:
                await server.connect(wrong)
            told = explain(error.value)
            assert told.startswith("the worker's certificate is not accepted: ")
            assert told.endswith("; name its CA in --ca-cert-paths")

    run(scene, serving(first))


def test_a_worker_of_another_name_is_refused(ca: Authority) -> None:
    async def scene(server: Server) -> None:
        for name in ("localhost", "127.0.0.1"):
            with pytest.raises(ssl.SSLCertVerificationError) as error:
                await server.connect(trusting(ca), name)
            assert f"certificate is not valid for '{name}'" in explain(error.value)

    run(scene, serving(ca.issue("other", "DNS:gpu-1.internal,IP:10.0.0.7")))


class Asking(threading.Thread):
    """A worker that wants to see a certificate of this authority, and tells by an alert what it does not like.

    (The event loops hang up without one.) It says hello to `guests` connections.
    """

    def __init__(self, ca: Authority, pair: Pair, version: ssl.TLSVersion, guests: int) -> None:
        super().__init__()
        self._guests = guests
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*pair)
        self._context.load_verify_locations(ca.cert)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.maximum_version = version
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.server = Server(self._listening.getsockname()[1])

    def run(self) -> None:
        with self._listening:
            for _ in range(self._guests):
                plain, _ = self._listening.accept()
                with plain, contextlib.suppress(OSError), self._context.wrap_socket(plain, server_side=True) as tls:
                    tls.sendall(b"hello")
                    tls.recv(1)  # until the guest leaves

    def visit(self, scene: Callable[[Server], Awaitable[None]]) -> None:
        """Runs a test that makes `guests` connections."""

        async def there() -> None:
            await scene(self.server)

        self.start()
        with contextlib.closing(uvloop.new_event_loop()) as loop:
            loop.run_until_complete(there())
        self.join(PATIENCE)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_worker_that_wants_a_certificate_gets_it(
    ca: Authority, stranger: Authority, first: Pair, second: Pair, version: ssl.TLSVersion
) -> None:
    async def scene(server: Server) -> None:
        async with await server.connect(trusting(ca, second)) as client:
            assert await client.read() == b"hello"
        for shown in (None, stranger.issue("router")):
            with pytest.raises(ssl.SSLError) as error:
                async with await server.connect(trusting(ca, shown)) as client:
                    await client.read()  # TLS 1.3: the refusal comes after the client's handshake
            assert "--client-cert-path" in explain(error.value)

    Asking(ca, first, version, 3).visit(scene)


def test_a_new_client_certificate_is_used_for_new_connections(
    ca: Authority, stranger: Authority, first: Pair, second: Pair, pair: Pair
) -> None:
    pair.become(stranger.issue("not yet"))
    files = worker_files([ca.cert], *pair)

    async def scene(server: Server) -> None:
        with pytest.raises(ssl.SSLError):
            await server.connect(files.context)
        pair.become(second)
        assert files.refresh()
        async with await server.connect(files.context) as client:
            assert await client.read() == b"hello"

    Asking(ca, first, ssl.TLSVersion.TLSv1_2, 2).visit(scene)


def test_a_worker_without_tls_is_told(ca: Authority) -> None:
    async def scene(server: Server) -> None:
        with pytest.raises(ssl.SSLError) as error:
            await server.connect(trusting(ca))
        assert "http://" in explain(error.value)

    run(scene, None)


def test_a_worker_that_breaks_the_handshake_off_is_told(ca: Authority, first: Pair) -> None:
    async def scene(server: Server) -> None:
        with pytest.raises(OSError) as error:
            await server.connect(old_fashioned(ssl.PROTOCOL_TLS_CLIENT))
        assert "broke off the handshake" in explain(error.value)

    run(scene, serving(first))
    assert explain(ConnectionRefusedError()) == ""


def test_authorities_that_cannot_be_used_are_named(first: Pair, tmp_path: Path) -> None:
    text = tmp_path / "ca.pem"
    text.write_text("hello")
    for path, why in ((text, "holds no certificate"), (tmp_path / "gone", "cannot be read"), (tmp_path, "directory")):
        with pytest.raises(ConfigError, match=why) as error:
            worker_files([first.cert, str(path)])
        assert str(path) in str(error.value)


def test_a_bundle_with_remarks_in_any_language_is_read(ca: Authority, first: Pair, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(f"# Főtanúsítvány\n{Path(ca.cert).read_text()}\n# Ende\n{Path(first.cert).read_text()}")
    assert len(worker_files([str(bundle)]).context.get_ca_certs()) == 1
    assert isinstance(worker_files([str(bundle)]), TLSFiles)
