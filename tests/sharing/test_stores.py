"""Stores of each kind, real ones: TLS, Sentinel with a failover, a cluster, a user with few rights, a lossy network."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import LOCAL, Authority
from routers import free_port
from sglang_router.access.tls import worker_files
from sglang_router.routing.shared.records import SharedTopic
from sglang_router.sharing.bounded_answers import LONGEST
from sglang_router.sharing.store import START, Appended, LeaderHold, StoreFailed, Trouble
from store_proxy import StoreProxy
from store_scenes import WITHIN, Sharer, play, sharers, until
from valkeys import ValkeyServer, binary, valkey_server

DOCS = Path(__file__).parents[2] / "docs" / "shared-state.md"


async def hears_itself(sharer: Sharer, payload: bytes) -> None:
    await sharer.connected()
    sharer.core.tells = [(SharedTopic.ORDERS, payload)]
    await sharer.hears(SharedTopic.ORDERS, payload)


def test_tls_with_certificates_of_both_sides_also_when_the_authority_is_another_one(tmp_path: Path) -> None:
    ca = Authority(tmp_path / "ca")
    ours, theirs = ca.issue("store", LOCAL), ca.issue("router", LOCAL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ours.cert, ours.key)
    context.load_verify_locations(ca.cert)
    context.verify_mode = ssl.CERT_REQUIRED
    trusted = tmp_path / "trusted.pem"
    shutil.copy(Authority(tmp_path / "other").cert, trusted)  # the authority before
    files = worker_files([str(trusted)], theirs.cert, theirs.key)

    async def scene() -> None:
        async with sharers(Sharer(proxy.url, context=lambda: files.context)) as (a,):
            await until(lambda: a.link.state == "unreachable")
            assert "certificate" in a.sharing.standing.problem
            shutil.copy(ca.cert, trusted)
            assert files.refresh(anyway=True)
            await hears_itself(a, b"through TLS")

    with valkey_server() as server, StoreProxy(server.port, context) as proxy:
        play(scene)


def test_a_certificate_of_a_stranger_is_refused_and_no_password_is_sent(tmp_path: Path) -> None:
    pair, trusted = Authority(tmp_path / "other").issue("store", LOCAL), Authority(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    files = worker_files([trusted.cert])

    async def scene() -> None:
        async with sharers(Sharer(proxy.url, context=lambda: files.context)) as (a,):
            await until(lambda: a.link.state == "unreachable")
            assert "certificate" in a.sharing.standing.problem

    with valkey_server() as server, StoreProxy(server.port, context) as proxy:
        play(scene)


@contextlib.contextmanager
def cluster_node(password: str = "") -> Iterator[ValkeyServer]:
    """Yield a node of a cluster without slots. Its second port would be 10,000 above the first: there may be none."""
    flags = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with valkey_server(*flags, password=password) as server:
        yield server


def test_a_cluster_also_with_a_password_that_comes_late() -> None:
    async def scene() -> None:
        async with sharers(Sharer(f"redis+cluster://:wrong@127.0.0.1:{server.port}"), lead=True) as (a,):
            await until(lambda: a.link.state == "denied", a.link)
            a.login.renew("secret")
            await hears_itself(a, b"in a slot")
            await until(lambda: a.sharing.leads)
            server.kill()
            await until(lambda: not a.link.connected)
            server.start()  # with its slots, but nothing else
            await hears_itself(a, b"after its restart")

    with cluster_node("secret") as server:
        server.cli("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        play(scene)


def test_a_plain_url_of_a_node_of_a_cluster_is_told() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url)) as (a,):
            await until(lambda: a.link.reading.failure is not None)
            assert a.link.state in ("unreachable", "refused")  # the cluster is down: it has no slots

    with cluster_node() as server:
        play(scene)


@contextlib.contextmanager
def sentinel(server: ValkeyServer, password: str = "") -> Iterator[int]:
    """Yield the port of a Sentinel that watches a server; both may want a password."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sentinel-") as folder:
        file = Path(folder) / "sentinel.conf"
        lines = [f"sentinel monitor mine 127.0.0.1 {server.port} 1", "sentinel down-after-milliseconds mine 300"]
        if password:
            lines += [f"sentinel auth-pass mine {password}", f"requirepass {password}"]
        file.write_text("\n".join([*lines, "sentinel failover-timeout mine 3000", ""]))
        words = [str(file), "--sentinel", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        log = ["--logfile", str(Path(folder) / "log")]
        process = subprocess.Popen([binary(), *words, *log], stdin=subprocess.DEVNULL)
        try:
            yield port
        finally:
            process.kill()
            process.wait(20)


def test_sentinel_and_a_failover() -> None:
    async def scene() -> None:
        copy.cli("REPLICAOF", "127.0.0.1", str(server.port))
        await until(lambda: b"master_link_status:up" in copy.cli("INFO", "replication"))
        with sentinel(server) as door:
            await until(lambda: knows_a_replica(ValkeyServer(Path(), port=door)))
            async with sharers(Sharer(f"redis+sentinel://127.0.0.1:{door}/mine")) as (a,):
                await hears_itself(a, b"at the first server")
                server.kill()
                await until(lambda: is_master(copy))
                a.core.tells = [(SharedTopic.ORDERS, b"at the second one")]
                await a.hears(SharedTopic.ORDERS, b"at the second one")
                await until(lambda: a.link.connected)

    with valkey_server() as server, valkey_server() as copy:
        play(scene)


def test_a_sentinel_that_wants_a_password_gets_that_of_the_server() -> None:
    async def scene() -> None:
        async with sharers(Sharer(f"redis+sentinel://:secret@127.0.0.1:{door}/mine")) as (a,):
            await hears_itself(a, b"both know it")
        async with sharers(Sharer(f"redis+sentinel://:wrong@127.0.0.1:{door}/mine")) as (b,):
            await until(lambda: b.link.state != "connecting")
            assert b.link.state in ("denied", "unreachable")

    with valkey_server(password="secret") as server, sentinel(server, "secret") as door:
        play(scene)


def test_a_password_that_was_changed_is_used_without_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url), lead=True) as (a,):
            await hears_itself(a, b"by the old one")
            server.cli("CONFIG", "SET", "requirepass", "new-secret")
            a.login.renew("wrong-secret")
            server.cli_as("new-secret", "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await until(lambda: a.link.state == "denied", a.link)
            a.core.tells = [(SharedTopic.ORDERS, b"meanwhile")]
            a.login.renew("new-secret")
            await a.hears(SharedTopic.ORDERS, b"meanwhile")
            await a.connected()
            await until(lambda: a.sharing.leads)

    caplog.set_level("INFO")
    with valkey_server(password="old-secret") as server:
        play(scene)
    assert caplog.text.count("denies access: check user, password and rights") == 1
    assert "-secret" not in caplog.text


def knows_a_replica(watcher: ValkeyServer) -> bool:
    """Whether a Sentinel runs and knows a replica of its server."""
    with contextlib.suppress(OSError):
        return watcher.cli("SENTINEL", "REPLICAS", "mine") == b"1"
    return False


def is_master(server: ValkeyServer) -> bool:
    """Whether a server is one by now; while it becomes one, it cuts connections."""
    with contextlib.suppress(OSError):
        return b"role:master" in server.cli("INFO", "replication")
    return False


def test_a_user_with_the_rights_that_the_page_names() -> None:
    line = re.search(r"^ACL SETUSER .*$", DOCS.read_text(), re.MULTILINE)
    assert line is not None

    async def scene() -> None:
        url = f"redis://router:secret@127.0.0.1:{server.port}"
        async with sharers(Sharer(url, "sglang-router"), lead=True) as (a,):
            await hears_itself(a, b"allowed")
            await until(lambda: a.sharing.leads)
        async with sharers(Sharer(url, "another")) as (b,):
            await until(lambda: b.link.state == "denied")

    with valkey_server() as server:
        server.cli(*line[0].replace(">PASSWORD", ">secret").split())
        play(scene)


def test_a_network_that_loses_everything_is_noticed_and_used_again() -> None:
    async def scene() -> None:
        async with sharers(Sharer(proxy.url)) as (a,):
            await hears_itself(a, b"before")
            proxy.cut(True)
            await until(lambda: a.link.state == "slow")
            a.core.tells = [(SharedTopic.ORDERS, b"meanwhile")]
            proxy.cut(False)
            await a.hears(SharedTopic.ORDERS, b"meanwhile")
            await a.connected()

    with valkey_server() as server, StoreProxy(server.port) as proxy:
        play(scene)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$99999999999\r\n", b"\x00" * 100])
def test_a_server_that_is_no_store_is_a_trouble_like_any_other(answer: bytes) -> None:
    async def strange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    async def scene() -> None:
        server = await asyncio.start_server(strange, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, sharers(Sharer(url)) as (a,):
            await until(lambda: a.link.state in ("unreachable", "refused"), a.link)
            assert a.sharing.learned

    play(scene)


@pytest.mark.parametrize(
    "answer", [b"+OK", b":1", b":-7", b"*0", b"*1\r\n:1", b"$1\r\nx", b"$-1", b"*-1", b"*1\r\n*1\r\n+x"]
)
def test_an_answer_without_sense_is_a_trouble_like_any_other(answer: bytes) -> None:
    """Whatever is asked for, nothing but `StoreFailed` comes of it."""

    async def strange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            line = await reader.readline()
            while line:
                words = []
                for _ in range(int(line[1:])):
                    size = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(size + 2))[:-2])
                if words[0] == b"CLIENT":  # how a connection begins
                    writer.write(b"+OK\r\n")
                else:
                    writer.write(answer + b"\r\n")
                line = await reader.readline()
        writer.close()

    async def scene() -> None:
        server = await asyncio.start_server(strange, "127.0.0.1", 0)
        store = Sharer(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}").store
        async with server:
            for ask in (
                lambda: store.append([Appended("loads", b"x", 9), Appended("loads", b"y", 9)]),
                lambda: store.follow({"loads": START}, 9, 0.001),
                lambda: store.older("loads", (1, 1), 9),
                lambda: store.ends(["loads"]),
                lambda: store.tidy({"placements": (1.0, 1.0)}),
                lambda: store.shared_key(b"k" * 32),
                lambda: store.hold("a", 1.0),
                lambda: store.resign("a"),
            ):
                with contextlib.suppress(StoreFailed):
                    await ask()
            await store.close()

    play(scene)


def test_entries_of_any_size_are_read_past_in_bounded_memory() -> None:
    async def scene() -> None:
        store = Sharer(server.url, within=WITHIN).store
        for size in (LONGEST, 5 * LONGEST, 1 << 24, 3):
            server.cli("XADD", "{test}:loads", "*", "b", bytes(size))
        for entries in (
            (await store.follow({"loads": START}, 9, 0.001))["loads"],
            (await store.older("loads", (1 << 63, 0), 9))[::-1],
        ):
            assert [each.payload for each in entries] == [bytes(LONGEST), b"", b"", bytes(3)]
        await store.close()

    with valkey_server() as server:
        play(scene)


def test_a_stream_whose_ids_are_used_up_takes_nothing_and_the_others_do() -> None:
    async def scene() -> None:
        store = Sharer(server.url).store
        server.cli("XADD", "{test}:loads", f"{2**64 - 1}-{2**64 - 1}", "b", b"last")
        order, load = await store.append([Appended("orders", b"x", 9), Appended("loads", b"y", 9)])
        assert isinstance(order, tuple)
        assert isinstance(load, StoreFailed)
        assert load.trouble is Trouble.REFUSED
        assert (await store.ends(["loads"]))["loads"] == (2**64 - 1, 2**64 - 1)
        await store.close()

    with valkey_server() as server:
        play(scene)


def test_the_leadership_passes_on_and_is_never_held_longer_than_agreed() -> None:
    async def scene() -> None:
        store = Sharer(server.url).store
        assert [await store.hold(each, 60.0) for each in "aab"] == [LeaderHold.NEW, LeaderHold.KEPT, LeaderHold.OTHER]
        await store.resign("b")
        assert await store.hold("b", 60.0) is LeaderHold.OTHER
        await store.resign("a")
        assert await store.hold("b", 60.0) is LeaderHold.PASSED_ON
        server.cli("FLUSHALL")
        assert await store.hold("b", 60.0) is LeaderHold.NEW
        for words in (["SET", "{test}:leader", "x"], ["SET", "{test}:leader", "x", "PX", "9999999"]):
            server.cli(*words)  # by somebody else; or the store's clock was set back
            assert await store.hold("b", 60.0) is LeaderHold.OTHER
            assert 0 < int(server.cli("PTTL", "{test}:leader")) <= 60_000
        server.cli("DEL", "{test}:leader")
        server.cli("LPUSH", "{test}:leader", "x")
        with pytest.raises(StoreFailed) as failed:
            await store.hold("b", 60.0)
        assert failed.value.trouble is Trouble.FOREIGN
        await store.close()

    with valkey_server() as server:
        play(scene)
