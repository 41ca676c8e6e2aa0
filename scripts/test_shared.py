"""Break the store of three routers in every way while they serve a load; check what clients and routers saw.

Promises: no request fails, none takes as long as a store that does not answer (3 s), the routers notice each fault, and
know of each other again soon after it is over, with no load left over. `scripts/test-shared` (a shell script) prepares
the environment and runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.reliability.command import run, say
from scripts.reliability.load import Load, Loop, Tally
from scripts.reliability.page import write_tables
from scripts.reporting import machine, table

from engines import engine_processes
from routers import RouterProcess, start_router
from store_proxy import StoreProxy
from valkeys import ValkeyServer, valkey_server

ROUTERS, ENGINES = 3, 3
HEAD = ("fault", "requests", "failed", "p50 ms", "p99 ms", "longest s", "noticed s", "as one again s", "verdict")
LONGEST = 2.5
"""Seconds for the longest request: less than what an operation of the store may take."""
AGAIN = 15.0
"""Seconds until the routers must know of each other again."""
CALM = 3.0
CLOSED = 60.0
"""Seconds until a client of the load has closed each connection that it keeps for a while."""
LEADS = 60.0
"""Seconds until another router leads: the leadership ends, and who finds none waits as long again."""
FLAGS = ("--policy", "cost", "--log-level", "info", "--disable-access-log")
SCALES = ("--autoscale", f"{ENGINES}:{ENGINES}", "--scale-command", "true")


@dataclass
class SharedField:
    """All processes.

    routers  by number; None while one is down, or gets no requests
    proxies  the way of each to the store
    frozen   routers that are stopped as they are, by number
    """

    folder: Path
    engines: list[str]
    store: ValkeyServer
    proxies: list[StoreProxy]
    loop: Loop
    routers: list[RouterProcess | None] = field(default_factory=list)
    frozen: dict[int, RouterProcess] = field(default_factory=dict)
    started: int = 0

    def start(self, number: int, *flags: str, variables: dict[str, str] | None = None) -> RouterProcess:
        """Start a router whose way to the store is the proxy of that number."""
        self.started += 1
        log = self.folder / f"router-{number}-{self.started}.log"
        shared = ("--shared-state", self.proxies[number].url) if number < len(self.proxies) else ()
        router = start_router(self.engines, *FLAGS, *SCALES, *shared, *flags, log=log, variables=variables)
        router.until_healthy(*self.engines)
        return router

    def port(self) -> int:
        """Return the port of some router that is up, as a load balancer would."""
        up = [router for router in self.routers if router is not None and router.process.poll() is None]
        return int(random.choice(up).url.rpartition(":")[2])

    def standing(self, number: int) -> dict[str, Any]:
        router = self.routers[number]
        assert router is not None
        found: dict[str, Any] = router.get("/readiness").json()["shared_state"]
        return found

    def say(self, state: str, numbers: Sequence[int]) -> bool:
        """Whether these routers say that their store is in a state."""
        return all(self.standing(number)["state"] == state for number in numbers)

    def as_one(self) -> bool:
        """Whether each router knows of all others, and of no load at rest."""
        states = [self.standing(number) for number in range(len(self.routers)) if self.routers[number] is not None]
        return all(each["state"] == "connected" and each["peers"] == len(states) - 1 for each in states)

    def leaders(self) -> list[int]:
        """Return the numbers of the routers that may scale."""
        up = [(number, router) for number, router in enumerate(self.routers) if router is not None]
        return [number for number, router in up if router.get("/scale").json()["acts"]]

    def at_rest(self) -> bool:
        return all(
            not worker["load"] and not worker["elsewhere"]
            for router in self.routers
            if router is not None
            for worker in router.workers().values()
        )


def wait(holds: Callable[[], bool], within: float, what: str) -> float:
    """Wait until something holds; return the seconds. Raises: AssertionError."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within, f"{what}: not within {within:g} s"
        time.sleep(0.02)
    return time.monotonic() - began


@dataclass
class StoreFault:
    """One fault. strike: causes it; mend: ends it; state: what the routers say meanwhile, of those numbers."""

    name: str
    strike: Callable[[SharedField], object]
    mend: Callable[[SharedField], object]
    state: str = ""
    seen_by: Sequence[int] = range(ROUTERS)
    allowed: tuple[str, ...] = ()


def nothing(place: SharedField) -> None:
    """Do nothing."""


def kill_router(place: SharedField) -> None:
    """Kill a router, and start another one in its place once the others have forgotten it."""
    router = place.routers[0]
    assert router is not None
    router.process.kill()
    router.process.wait()
    place.routers[0] = None
    wait(lambda: place.standing(1)["peers"] == ROUTERS - 2, AGAIN, "the others forget a router that was killed")


def replace_router(place: SharedField) -> None:
    place.routers[0] = place.start(0)


def take_out(place: SharedField, number: int) -> RouterProcess:
    """Give a router no more requests, as a load balancer does; return it when its last client has closed."""
    router = place.routers[number]
    assert router is not None
    place.routers[number] = None
    wait(lambda: router.samples().total("smg_http_connections_active") <= 1, CLOSED, "its clients have left")
    return router


def freeze_leader(place: SharedField) -> None:
    """Stop the router that leads, as a machine does that hangs; wait until another one leads."""
    wait(lambda: bool(place.leaders()), LEADS, "a router leads")
    (number,) = place.leaders()
    place.frozen[number] = router = take_out(place, number)
    router.process.send_signal(signal.SIGSTOP)
    wait(lambda: bool(place.leaders()), LEADS, "another router leads")


def wake_leader(place: SharedField) -> None:
    """Let it go on: it believes for no moment that it leads still."""
    (number, router), *_ = place.frozen.items()
    (leader,) = place.leaders()
    router.process.send_signal(signal.SIGCONT)
    until = time.monotonic() + CALM
    while time.monotonic() < until:
        assert not router.get("/scale").json()["acts"], "two routers lead"
        time.sleep(0.01)
    place.routers[number] = place.frozen.pop(number)
    assert place.leaders() == [leader], "another router leads after the first one came back"


def change_password(place: SharedField) -> None:
    """Let the store want a password that the routers do not have."""
    place.store.cli("CONFIG", "SET", "requirepass", "x")
    with contextlib.suppress(OSError):
        place.store.cli_as("x", "CLIENT", "KILL", "TYPE", "normal")


def garbage(place: SharedField) -> None:
    """Write what a stranger with access to the store may write, for some seconds."""
    lot = random.Random(1)
    until = time.monotonic() + CALM
    with socket.create_connection(("127.0.0.1", place.store.port)) as door:
        while time.monotonic() < until:
            for topic in ("loads", "placements", "orders"):
                payload = lot.randbytes(lot.randrange(0, 20_000))
                name = b"{sglang-router}:" + topic.encode()
                parts = [b"XADD", name, b"MAXLEN", b"~", b"1000", b"*", b"b", payload]
                door.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
            door.recv(1 << 16)
            time.sleep(0.002)


def other_fleet(place: SharedField) -> None:
    """Let another fleet use the same store: it must neither hear nor be heard."""
    other = place.start(0, "--shared-state-prefix", "another")
    try:
        wait(lambda: other.get("/readiness").json()["shared_state"]["state"] == "connected", AGAIN, "the other fleet")
        for _ in range(100):
            other.post("/generate", {"text": "x" * 2000, "sampling_params": {"max_new_tokens": 1}})
        assert other.get("/readiness").json()["shared_state"]["peers"] == 0
        assert place.as_one()
    finally:
        other.end()


def wrong_clocks(place: SharedField) -> None:
    """Replace two routers by some whose clocks are a minute early and late."""
    for number, offset in ((0, "+60"), (1, "-60")):
        take_out(place, number).end()
        place.routers[number] = place.start(number, variables=clock(offset))
    wait(place.as_one, AGAIN, "as one, with wrong clocks")


def clock(offset: str) -> dict[str, str]:
    """Return the environment of a process whose wall clock is wrong by some seconds."""
    return {"LD_PRELOAD": faketime(), "FAKETIME": f"{offset}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def faketime() -> str:
    """Return the path of libfaketime; "" where it is not installed."""
    found = importlib.util.find_spec("libfaketime")
    if found is None or found.origin is None:
        return ""
    return next(map(str, Path(found.origin).parent.rglob("libfaketime.so.1")), "")


FAULTS = (
    StoreFault("none", nothing, nothing),
    StoreFault("store killed, started empty", lambda p: p.store.kill(), lambda p: p.store.start(), "unreachable"),
    StoreFault("store frozen", lambda p: p.store.freeze(), lambda p: p.store.thaw(), "slow"),
    StoreFault(
        "store cut off from one router",
        lambda p: p.proxies[1].cut(True),
        lambda p: p.proxies[1].cut(False),
        "slow",
        (1,),
    ),
    StoreFault("store flushed", lambda p: p.store.cli("FLUSHALL"), nothing),
    StoreFault(
        "store full",
        lambda p: p.store.cli("CONFIG", "SET", "maxmemory", "1"),
        lambda p: p.store.cli("CONFIG", "SET", "maxmemory", "0"),
        "full",
    ),
    StoreFault(
        "store becomes a replica",
        lambda p: p.store.cli("REPLICAOF", "127.0.0.1", "1"),
        lambda p: p.store.cli("REPLICAOF", "NO", "ONE"),
        "read_only",
    ),
    StoreFault(
        "password changed",
        change_password,
        lambda p: p.store.cli_as("x", "CONFIG", "SET", "requirepass", ""),
        "denied",
    ),
    StoreFault("garbage in the streams", garbage, nothing),
    StoreFault("another fleet on the store", other_fleet, nothing),
    StoreFault("router killed and replaced", kill_router, replace_router, allowed=("cut", "refused", "lost")),
    StoreFault("the router that scales frozen", freeze_leader, wake_leader),
    StoreFault("clocks wrong by a minute", wrong_clocks, nothing, allowed=("refused",)),
)


@dataclass
class StoreRow:
    """The outcome of one fault."""

    name: str
    tally: Tally
    noticed: float | None
    again: float | None
    wrong: list[str]

    def cells(self) -> list[str]:
        tally = self.tally
        failed = ", ".join(f"{count} {what}" for what, count in sorted(tally.bad.items())) or "0"
        times = [f"{tally.quantile(share) * 1000:.0f}" for share in (0.5, 0.99)]
        after = ["-" if each is None else f"{each:.1f}" for each in (self.noticed, self.again)]
        verdict = "BROKEN" if self.wrong else "holds"
        return [self.name, f"{tally.requests:,}", failed, *times, f"{tally.quantile(1.0):.2f}", *after, verdict]


def strike(place: SharedField, fault: StoreFault, options: argparse.Namespace) -> StoreRow:
    """Cause one fault under load; return its row."""
    load = Load(place.loop, place.port, clients=options.rate, rate=options.rate, tokens=(2, 8), size=2000)
    noticed = again = None
    wrong: list[str] = []
    load.start()
    try:
        time.sleep(CALM)  # a part of the load without the fault
        fault.strike(place)
        if fault.state:
            noticed = wait(
                lambda: all(place.standing(number)["state"] == fault.state for number in fault.seen_by),
                AGAIN,
                "noticed",
            )
        time.sleep(options.seconds)  # the duration of the fault
        fault.mend(place)
        again = wait(place.as_one, AGAIN, "as one again")
        time.sleep(CALM)
    except AssertionError as error:
        wrong.append(str(error)[:500])
    load.stop()
    tally = load.tally()
    wrong += [f"{count} x {what}" for what, count in tally.bad.items() if not what.startswith(fault.allowed or "-")]
    if tally.quantile(1.0) > LONGEST:
        wrong.append(f"a request took {tally.quantile(1.0):.1f} s")
    with contextlib.suppress(AssertionError):
        wait(place.at_rest, AGAIN, "")
    if not place.at_rest():
        wrong.append("loads are left over")
    return StoreRow(fault.name, tally, noticed, again, wrong)


@contextlib.contextmanager
def field_of(folder: Path) -> Iterator[SharedField]:
    """Yield all processes."""
    with contextlib.ExitStack() as stack:
        engines = stack.enter_context(engine_processes(ENGINES, "--speed", "0"))
        store = stack.enter_context(valkey_server())
        proxies = [stack.enter_context(StoreProxy(store.port)) for _ in range(ROUTERS)]
        place = SharedField(folder, engines, store, proxies, Loop())
        stack.callback(place.loop.close)
        try:
            place.routers = [place.start(number) for number in range(ROUTERS)]
            wait(place.as_one, AGAIN, "as one at the start")
            yield place
        finally:
            for frozen in place.frozen.values():
                frozen.process.send_signal(signal.SIGCONT)
            for router in (*place.routers, *place.frozen.values()):
                if router is not None and router.process.poll() is None:
                    router.process.send_signal(signal.SIGTERM)
                    router.process.wait(20)


def alone(folder: Path, options: argparse.Namespace) -> StoreRow:
    """Return the row of the same routers without a store."""
    with contextlib.ExitStack() as stack:
        engines = stack.enter_context(engine_processes(ENGINES, "--speed", "0"))
        store = ValkeyServer(folder)
        place = SharedField(folder, engines, store, [], Loop())
        stack.callback(place.loop.close)
        place.routers = [place.start(number) for number in range(ROUTERS)]
        for router in place.routers:
            assert router is not None
            stack.callback(router.end)
        load = Load(place.loop, place.port, clients=options.rate, rate=options.rate, tokens=(2, 8), size=2000)
        load.start()
        time.sleep(2 * CALM + options.seconds)  # the duration of the load
        load.stop()
        tally = load.tally()
        return StoreRow("(without --shared-state)", tally, None, None, [f"{n} x {w}" for w, n in tally.bad.items()])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/test-shared", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="FAULT", help="faults whose name contains this text")
    parser.add_argument("--seconds", type=float, default=6, help="that each fault lasts (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=40, help="requests a second (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    return parser.parse_args()


def show(options: argparse.Namespace, folder: Path) -> bool:
    """Run all faults and print their table; return whether every promise held."""
    started = machine((*FLAGS, *SCALES))
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    if not faketime():
        say("libfaketime is not installed (it needs a C compiler): the row with wrong clocks is left out")
        chosen = [fault for fault in chosen if fault.strike is not wrong_clocks]
    rows = [alone(folder, options)]
    say("  ".join(rows[0].cells()))
    with field_of(folder) as place:
        for fault in chosen:
            rows.append(strike(place, fault, options))
            say("  ".join(rows[-1].cells()))
            for what in rows[-1].wrong:
                say(f"    {what}")
    cells = [row.cells() for row in rows]
    print(table(HEAD, cells, markdown=False))
    if options.write:
        about = f"{started} {ROUTERS} routers, {ENGINES} engines, {options.rate} requests a second; a fault lasts"
        about += f" {options.seconds:g} s."
        write_tables("shared", f"{about}\n\n{table(HEAD, cells, markdown=True)}")
    return not any(row.wrong for row in rows)


def main() -> int:
    os.environ.setdefault("SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS", "0")
    options = parse()
    return run("test-shared", lambda folder: show(options, folder))


if __name__ == "__main__":
    sys.exit(main())
