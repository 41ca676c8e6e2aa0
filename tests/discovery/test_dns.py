"""Workers from DNS: addresses by the system's resolver, SRV records by dnspython, and what DNS cannot say."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import cast

import dns.asyncresolver
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from discovery_scenes import Scene, scene
from sglang_router.config.dns_names import DNSName, parse_dns_name
from sglang_router.discovery.dns import AddressLookUp, DNSSource, resolver
from sglang_router.discovery.looked_up import LookedUp, LookUpFailed
from sglang_router.discovery.srv import SRVLookUp
from sglang_router.errors import ConfigError
from sglang_router.routing.source import Source

A, B = "http://10.0.0.1:8000", "http://10.0.0.2:8000"
NAME = parse_dns_name("engines:8000")


class Zone:
    """What each name resolves to; an exception is raised."""

    def __init__(self, **names: Sequence[str] | LookUpFailed) -> None:
        self.names: dict[str, Sequence[str] | LookUpFailed] = dict(names)
        self.asked = 0

    async def __call__(self, name: DNSName) -> LookedUp:
        self.asked += 1
        found = self.names[name.name]
        if isinstance(found, LookUpFailed):
            raise found
        return LookedUp(tuple(f"{name.scheme}://{host}:{name.port}" for host in found))


def started(made: Scene, zone: Zone, *names: str, away: float = 3600.0) -> None:
    parsed = [parse_dns_name(name) for name in names]
    clock = made.router.loop.time
    made.begin(lambda: DNSSource(made.owner(Source.DNS), parsed, zone, clock, random.Random(1), every=0.005, away=away))


def withheld(made: Scene, url: str) -> str:
    worker = made.fleet.by_url(url)
    return "not there" if worker is None else worker.withheld


def test_each_address_is_a_worker() -> None:
    with scene() as made:
        zone = Zone(engines=["10.0.0.1"])
        started(made, zone, "engines:8000")
        made.until_urls(A)
        zone.names["engines"] = ["10.0.0.2", "10.0.0.1"]
        made.until_urls(A, B)
        spec = made.worker(A).spec
        assert (spec.source, spec.origin) == (Source.DNS, "engines:8000")


def test_an_address_that_is_away_gets_no_requests_and_is_removed_when_it_stays_away() -> None:
    with scene() as made:
        zone = Zone(engines=["10.0.0.1", "10.0.0.2"])
        started(made, zone, "engines:8000")
        made.until_urls(A, B)
        worker = made.worker(A)
        zone.names["engines"] = ["10.0.0.2"]
        made.until(lambda: withheld(made, A) == "DNS does not name it now")
        zone.names["engines"] = ["10.0.0.2", "10.0.0.1"]
        made.until(lambda: withheld(made, A) == "")
        assert made.worker(A) is worker
    with scene() as made:
        zone = Zone(engines=["10.0.0.1", "10.0.0.2"])
        started(made, zone, "engines:8000", away=0.05)
        made.until_urls(A, B)
        zone.names["engines"] = ["10.0.0.2"]
        made.until_urls(B)


def test_a_look_up_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with scene() as made:
        zone = Zone(engines=["10.0.0.1"])
        started(made, zone, "engines:8000", away=0.01)
        made.until_urls(A)
        zone.names["engines"] = LookUpFailed("not_found", "the look-up of engines failed: no such name")
        made.until(lambda: "no such name" in made.report_error())
        asked = zone.asked
        made.until(lambda: zone.asked > asked + 2)
        assert made.urls() == [A]
        assert withheld(made, A) == ""
        assert made.report.failures["not_found"] > 2
        assert len([text for text in caplog.messages if "no such name" in text]) == 1
        zone.names["engines"] = ["10.0.0.1"]
        made.until(lambda: made.report_error() == "")


def test_several_names_are_one_set_and_nothing_is_removed_before_all_were_found() -> None:
    with scene() as made:
        old = made.owner(Source.DNS)
        made.router.call(lambda: made.fleet.add(old.defaults.spec(B, Source.DNS), 0.0))  # of an earlier start
        zone = Zone(one=["10.0.0.1"], two=LookUpFailed("not_found", "not yet"))
        started(made, zone, "prefill=one:8000", "two:8000")
        made.until_urls(A, B)  # what was found serves, though one name is not known
        asked = zone.asked
        made.until(lambda: zone.asked > asked + 4)
        assert made.urls() == [A, B]
        assert (withheld(made, A), withheld(made, B)) == ("", "")
        assert made.report.listed_secs is None
        looked = [made.do(lambda: made.discovery.looked)]
        zone.names["two"] = ["10.0.0.3", "10.0.0.1"]
        made.until_urls(A, "http://10.0.0.3:8000")
        assert made.worker(A).spec.worker_type == "prefill"  # the first name that has it
        assert [*looked, made.do(lambda: made.discovery.looked)] == [False, True]
        assert made.report.listed_secs is not None


def test_a_name_that_is_given_twice_is_one() -> None:
    with scene() as made:
        started(made, Zone(engines=["10.0.0.1"]), "engines:8000", "engines:8000")
        made.until_urls(A)
        made.until(lambda: made.report_error() == "" and made.discovery.looked)


def test_workers_of_an_earlier_start_are_away_before_they_are_gone() -> None:
    """DNS may name them a moment later; their prefixes would be lost."""
    with scene() as made:

        def restored() -> None:
            spec = made.owner(Source.DNS).defaults.spec(B, Source.DNS)
            spec.origin = "engines:8000"
            made.fleet.add(spec, 0.0)

        made.do(restored)
        started(made, Zone(engines=["10.0.0.1"]), "engines:8000")
        made.until_urls(A, B)
        made.until(lambda: withheld(made, B) == "DNS does not name it now")


# -- addresses ---------------------------------------------------------------------------------------------------------


def look_up(found: Callable[[str], Sequence[str]], slow: float = 10.0) -> LookedUp:
    return asyncio.run(AddressLookUp(found, slow)(NAME))


def test_a_host_of_both_families_is_one_worker() -> None:
    both = ("fd00::1", "10.0.0.2", "10.0.0.1", "10.0.0.1")
    assert look_up(lambda name: both).urls == (A, B)
    assert look_up(lambda name: ("fd00::2", "fd00::1%eth0")).urls == ("http://[fd00::1]:8000", "http://[fd00::2]:8000")


def refuse(name: str) -> Sequence[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def fail(name: str) -> Sequence[str]:
    raise UnicodeError("label too long")


def crash(name: str) -> Sequence[str]:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("resolve", "why"),
    [
        (refuse, "the look-up of engines failed: Name or service not known"),
        (fail, "the look-up of engines failed: label too long"),
        (crash, "the look-up of engines failed: RuntimeError"),
        (lambda name: (), "engines has no address"),
    ],
)
def test_why_there_is_no_address(resolve: Callable[[str], Sequence[str]], why: str) -> None:
    with pytest.raises(LookUpFailed, match=why) as caught:
        look_up(resolve)
    assert caught.value.kind == "not_found"


def test_a_resolver_that_hangs_holds_one_thread_and_its_answer_counts_when_it_comes() -> None:
    gate, calls = threading.Event(), []

    def hangs(name: str) -> Sequence[str]:
        calls.append(name)
        gate.wait(20)
        return ("10.0.0.1",)

    async def work() -> LookedUp:
        look = AddressLookUp(hangs, slow=0.02)
        for _ in range(2):
            with pytest.raises(LookUpFailed, match="takes longer than") as caught:
                await look(NAME)
            assert caught.value.kind == "silent"
        gate.set()
        while True:
            with contextlib.suppress(LookUpFailed):
                return await look(NAME)

    assert asyncio.run(work()).urls == (A,)
    assert calls == ["engines"]


# -- SRV ---------------------------------------------------------------------------------------------------------------


class NameServer(asyncio.DatagramProtocol):
    """Answers SRV questions with these records; None: there is no such name."""

    def __init__(self, records: list[str] | None, ttl: int) -> None:
        self._records = records
        self._ttl = ttl

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        if self._records is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif self._records:
            name = question.question[0].name
            answer.answer.append(dns.rrset.from_text(name, self._ttl, "IN", "SRV", *self._records))
        self._transport.sendto(answer.to_wire(), address)


SERVICE = parse_dns_name("_http._tcp.engines.test")


def srv(records: list[str] | None, name: DNSName = SERVICE, ttl: int = 30) -> LookedUp:
    async def work() -> LookedUp:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            lambda: NameServer(records, ttl), local_addr=("127.0.0.1", 0)
        )
        asked = dns.asyncresolver.Resolver(configure=False)
        asked.nameservers = ["127.0.0.1"]
        asked.port = transport.get_extra_info("sockname")[1]
        try:
            return await SRVLookUp(asked)(name)
        finally:
            transport.close()

    return asyncio.run(work())


def test_each_target_of_srv_records_is_a_worker_with_its_port() -> None:
    records = ["0 5 8001 B.engines.test.", "0 5 8000 a.engines.test.", "9 0 8000 a.engines.test."]
    found = srv(records, ttl=7)
    assert found.urls == ("http://a.engines.test:8000", "http://b.engines.test:8001")
    assert found.ttl == 7.0
    secure = parse_dns_name("https://_http._tcp.engines.test")
    assert srv(records[1:2], secure).urls == ("https://a.engines.test:8000",)


@pytest.mark.parametrize(
    ("records", "why", "kind"),
    [
        (None, "has no SRV records", "not_found"),
        ([], "has no SRV records", "not_found"),
        (["0 0 0 ."], "names no target", "not_found"),
        (["0 0 80 a\\@b.test."], "characters that are not allowed in a URL", "invalid"),
    ],
)
def test_why_there_are_no_targets(records: list[str] | None, why: str, kind: str) -> None:
    with pytest.raises(LookUpFailed, match=why) as caught:
        srv(records)
    assert caught.value.kind == kind


def test_who_looks_up_what(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = resolver([NAME, SERVICE], lambda name: ("10.0.0.1",))
    assert asyncio.run(resolve(NAME)).urls == (A,)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sglang_router.discovery.srv", None)
    assert isinstance(resolver([NAME], lambda name: ()), AddressLookUp)
    with pytest.raises(ConfigError, match=r"pip install 'sglang-router\[dns\]'"):
        resolver([SERVICE], lambda name: ())


# -- the option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Engines.LLM.svc.:8000", ("regular", "http", "engines.llm.svc", 8000)),
        ("https://e:1", ("regular", "https", "e", 1)),
        ("decode=e:65535", ("decode", "http", "e", 65535)),
        ("prefill=https://_x._tcp.e", ("prefill", "https", "_x._tcp.e", None)),
        ("10.0.0.1:80", ("regular", "http", "10.0.0.1", 80)),
    ],
)
def test_names(text: str, expected: tuple[str, str, str, int | None]) -> None:
    assert parse_dns_name(text)[1:] == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("engines", "needs a port, as in engines:8000"),
        ("engines:0", "the port must be from 1 to 65535"),
        ("engines:65536", "the port must be from 1 to 65535"),
        ("both=e:1", "the role before = must be one of regular, prefill, decode"),
        ("_http._tcp.e:80", "SRV records tell the port; remove :80"),
        ("http://e:1/path", "is not NAME:PORT"),
        ("ftp://e:1", "is not NAME:PORT"),
        ("", "is not NAME:PORT"),
    ],
)
def test_names_that_are_none(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_dns_name(text)
