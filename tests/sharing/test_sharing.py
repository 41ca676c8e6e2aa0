"""Several routers and a real Valkey: telling, hearing, first looks, and whatever happens to a store."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest

from routers import free_port
from sglang_router.routing.shared.records import SharedTopic
from store_scenes import Sharer, play, sharers, until
from valkeys import ValkeyServer, valkey_server


def entry(server: ValkeyServer, topic: SharedTopic, payload: bytes, prefix: str = "test") -> None:
    server.cli("XADD", f"{{{prefix}}}:{topic.value}", "*", "b", payload)


def test_what_one_tells_the_others_hear_and_it_hears_it_itself() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url), Sharer(server.url)) as (a, b):
            await asyncio.gather(a.connected(), b.connected())
            loads, placements, orders = SharedTopic.LOADS, SharedTopic.PLACEMENTS, SharedTopic.ORDERS
            a.core.tells = told = [(loads, b"loads"), (placements, b"placed"), (orders, b"drain")]
            for each in (a, b):
                for topic, payload in told:
                    await each.hears(topic, payload)
            await until(lambda: a.sharing.traffic.lag is not None)
            assert a.sharing.traffic.sent == {"loads": 1, "placements": 1, "orders": 1}
            assert a.sharing.traffic.sent_bytes["loads"] == 5
            assert b.sharing.traffic.received_bytes["placements"] == 6
            assert b.core.connected
            assert b.core.applied == len(b.core.heard)

    with valkey_server() as server:
        play(scene)


def test_a_newcomer_reads_all_orders_in_their_order_and_placements_from_the_newest_backwards() -> None:
    async def scene() -> None:
        for number in range(300):
            entry(server, SharedTopic.ORDERS, b"%d" % number)
        for number in range(100):
            entry(server, SharedTopic.PLACEMENTS, b"%d" % number)
            entry(server, SharedTopic.LOADS, b"%d" % number)
        newcomer = Sharer(server.url)
        assert not newcomer.sharing.learned
        async with sharers(newcomer) as (a,):
            await until(lambda: a.sharing.learned)
            assert a.core.payloads(SharedTopic.ORDERS) == [b"%d" % number for number in range(300)]
            placed = [(payload, old) for topic, payload, old in a.core.heard if topic is SharedTopic.PLACEMENTS]
            assert placed == [(b"%d" % number, True) for number in reversed(range(100))]
            assert a.core.payloads(SharedTopic.LOADS) == []
            entry(server, SharedTopic.PLACEMENTS, b"new")
            await a.hears(SharedTopic.PLACEMENTS, b"new")
            assert a.core.heard[-1] == (SharedTopic.PLACEMENTS, b"new", False)

    with valkey_server() as server:
        play(scene)


def test_without_a_store_a_router_starts_at_once_and_says_so_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with sharers(Sharer(f"redis://u:secret@127.0.0.1:{port}")) as (a,):
            await until(lambda: a.sharing.learned and a.link.state == "unreachable")
            tries = a.link.reading.failure
            await until(lambda: a.link.reading.failure is not tries)  # it tried again
            assert not a.core.connected
            assert "cannot be reached" in a.sharing.standing.problem
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "routed by what this router knows" in caplog.text
        assert "secret" not in caplog.text + a.sharing.standing.problem + a.sharing.standing.store

    port = free_port()
    caplog.set_level(logging.INFO)
    play(scene)


def test_a_store_that_is_there_again_is_used_again_with_what_was_missed() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url), Sharer(server.url)) as (a, b):
            await asyncio.gather(a.connected(), b.connected())
            server.kill()
            await until(lambda: not a.link.connected and not b.link.connected)
            a.core.tells = [(SharedTopic.PLACEMENTS, b"lost"), (SharedTopic.ORDERS, b"kept")]
            server.start()
            await asyncio.gather(a.connected(), b.connected())
            a.core.tells = [(SharedTopic.PLACEMENTS, b"again")]
            await b.hears(SharedTopic.PLACEMENTS, b"again")
            await b.hears(SharedTopic.ORDERS, b"kept")
            assert a.link.losses == 1

    with valkey_server() as server:
        play(scene)


def test_a_frozen_store_is_told_and_nothing_piles_up() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url)) as (a,):
            await a.connected()
            server.freeze()
            await until(lambda: a.link.state == "slow")
            flushes = a.core.flushes
            server.thaw()
            await a.connected()
            a.core.tells = [(SharedTopic.LOADS, b"now")]
            await a.hears(SharedTopic.LOADS, b"now")
            assert a.core.flushes > flushes

    with valkey_server() as server:
        play(scene)


def test_a_store_that_was_emptied_and_counts_from_an_earlier_time_is_followed_again() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url)) as (a,):
            await a.connected()
            server.cli("XADD", "{test}:placements", "9999999999999-0", "b", "of the future")
            await a.hears(SharedTopic.PLACEMENTS, b"of the future")
            server.cli("FLUSHALL")
            entry(server, SharedTopic.PLACEMENTS, b"of today")
            await a.hears(SharedTopic.PLACEMENTS, b"of today")

    with valkey_server() as server:
        play(scene)


def test_orders_are_written_when_the_store_has_room_again_and_the_rest_is_counted() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url)) as (a,):
            await a.connected()
            server.cli("CONFIG", "SET", "maxmemory", "1")
            a.core.tells = [(SharedTopic.LOADS, b"loads"), (SharedTopic.ORDERS, b"drain")]
            await until(lambda: a.link.state == "full")
            assert "give it more memory" in a.sharing.standing.problem
            assert a.sharing.traffic.lost == {"loads": 1}
            assert a.core.lost == [SharedTopic.LOADS]
            server.cli("CONFIG", "SET", "maxmemory", "0")
            await a.hears(SharedTopic.ORDERS, b"drain")
            await a.connected()
            assert a.core.payloads(SharedTopic.LOADS) == []

    with valkey_server() as server:
        play(scene)


def test_a_replica_is_read_and_not_written_to() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url)) as (a,):
            await a.connected()
            entry(server, SharedTopic.ORDERS, b"before")
            await a.hears(SharedTopic.ORDERS, b"before")
            server.cli("REPLICAOF", "127.0.0.1", str(free_port()))
            a.core.tells = [(SharedTopic.ORDERS, b"mine")]
            await until(lambda: a.link.state == "read_only")
            server.cli("REPLICAOF", "NO", "ONE")
            await a.hears(SharedTopic.ORDERS, b"mine")

    with valkey_server() as server:
        play(scene)


@pytest.mark.parametrize(
    ("password", "state"), [("wrong", "denied"), ("", "denied"), ("right", "connected")], ids=["wrong", "none", "right"]
)
def test_a_password(password: str, state: str) -> None:
    async def scene() -> None:
        login = f":{password}@" if password else ""
        async with sharers(Sharer(f"redis://{login}127.0.0.1:{server.port}")) as (a,):
            await until(lambda: a.link.state == state, a.link)
            assert not password or password not in a.sharing.standing.problem

    with valkey_server(password="right") as server:
        play(scene)


def test_a_key_that_holds_something_else_is_named() -> None:
    async def scene() -> None:
        server.cli("SET", "{test}:loads", "x")
        async with sharers(Sharer(server.url)) as (a,):
            await until(lambda: a.link.state == "foreign")
            assert "--shared-state-prefix" in a.sharing.standing.problem

    with valkey_server() as server:
        play(scene)


def test_what_others_put_into_the_streams_is_heard_as_it_is_and_ends_nothing() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url)) as (a,):
            await a.connected()
            server.cli("XADD", "{test}:placements", "*", "other", "field")
            server.cli("XADD", "{test}:loads", "*", "b", b"\x00\xff" * 100_000)
            entry(server, SharedTopic.LOADS, b"last")
            await a.hears(SharedTopic.LOADS, b"last")
            assert b"" in a.core.payloads(SharedTopic.PLACEMENTS)
            assert a.link.connected

    with valkey_server() as server:
        play(scene)


def test_two_fleets_on_one_store_do_not_hear_each_other() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url, "one"), Sharer(server.url, "two")) as (a, b):
            await asyncio.gather(a.connected(), b.connected())
            a.core.tells = [(SharedTopic.ORDERS, b"of one")]
            b.core.tells = [(SharedTopic.ORDERS, b"of two")]
            await a.hears(SharedTopic.ORDERS, b"of one")
            await b.hears(SharedTopic.ORDERS, b"of two")
            assert a.core.payloads(SharedTopic.ORDERS) == [b"of one"]
            assert b.core.payloads(SharedTopic.ORDERS) == [b"of two"]

    with valkey_server() as server:
        play(scene)


def test_the_first_router_s_key_is_that_of_all_and_comes_back_after_a_flush() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url, key=b"a" * 32)) as (a,):
            await a.connected()
            async with sharers(Sharer(server.url, key=b"b" * 32)) as (b,):
                await b.connected()
                assert b.core.keys == [b"a" * 32]
                assert a.core.keys == []
                server.kill()
                server.start()
                await until(lambda: server.cli("GET", "{test}:key") == (b"a" * 32).hex().encode())

    with valkey_server() as server:
        play(scene)


def test_with_a_key_of_a_file_the_store_has_none() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url, fixed=True)) as (a,):
            await a.connected()
            assert server.cli("EXISTS", "{test}:key") == b"0"

    with valkey_server() as server:
        play(scene)


def test_something_else_in_the_place_of_the_key_is_no_key() -> None:
    async def scene() -> None:
        server.cli("SET", "{test}:key", "abc")
        async with sharers(Sharer(server.url)) as (a,):
            await until(lambda: a.link.state == "foreign")
            assert a.core.flushes == 0  # nothing is written without a key

    with valkey_server() as server:
        play(scene)


def test_who_leaves_says_so_to_the_others_after_all_that_is_new() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url)) as (a,):
            await a.connected()
            async with sharers(Sharer(server.url)) as (b,):
                await b.connected()
                b.core.tells = [(SharedTopic.LOADS, b"now"), (SharedTopic.ORDERS, b"drain")]
            await a.hears(SharedTopic.LOADS, b"left")
            await a.hears(SharedTopic.ORDERS, b"drain")
            assert a.core.payloads(SharedTopic.LOADS) == [b"now", b"left"]

    with valkey_server() as server:
        play(scene)


def test_a_store_that_accepts_and_says_nothing_does_not_hold_up_the_end() -> None:
    async def scene() -> None:
        silent = socket.create_server(("127.0.0.1", 0))
        async with sharers(Sharer(f"redis://127.0.0.1:{silent.getsockname()[1]}")) as (a,):
            await asyncio.sleep(0.05)
        assert a.link.state == "connecting"
        silent.close()

    play(scene)


# -- who leads ---------------------------------------------------------------------------------------------------------


def test_one_leads_and_the_next_one_when_it_leaves() -> None:
    async def scene() -> None:
        async with sharers(Sharer(server.url), lead=True) as (a,):
            await until(lambda: a.sharing.leads)
            async with sharers(Sharer(server.url), lead=True) as (b,):
                await b.connected()
                assert not b.sharing.leads
        assert not a.sharing.leads
        async with sharers(Sharer(server.url), lead=True) as (c,):
            await until(lambda: c.sharing.leads)

    with valkey_server() as server:
        play(scene)
