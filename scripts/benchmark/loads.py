"""The loads, as a table, and the rooms they need. To add a load, add a row.

A *room* is a set of workers; all targets are started in front of it. Loads of one room are measured on the same
processes, one after the other in the order of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Room:
    """How many workers, and how they stream: chunks of a stream, and milliseconds between two of them."""

    workers: int = 4
    chunks: int = 100
    interval_ms: int = 0


@dataclass(frozen=True)
class Load:
    """One kind of load: a row for each target.

    `amount`: connections at once, streams at once, requests a second, or connections in a burst; the client knows.
    `size`: of a prompt, in bytes. CPU time is divided by the number of `unit`s. `word`: a further one for the client.
    `fixed`: the seconds that it takes besides those that are asked for.
    """

    name: str
    group: str
    label: str
    client: str
    amount: int
    size: int
    room: Room = Room()
    unit: str = "requests"
    word: str = ""
    idle: int = 0
    fixed: float = 0.2


@dataclass(frozen=True)
class Group:
    """Loads that are one table. `latency`: what p50 to p99.9 are of."""

    name: str
    title: str
    rate: str = "requests/s"
    latency: str = "latency"


GROUPS = (
    Group("sizes", "Closed loop: 32 connections, each sends its next request when the last is answered"),
    Group("open", "Open loop: a fixed rate at random moments; latency counts from the planned moment"),
    Group("streams", "Streams: a chunk every 20 ms each; delay of a chunk from worker to client", "streams/s", "delay"),
    Group("special", "One connection, streams at once, bursts, idle connections, many workers"),
)

SIZES = {"200B": ("200 B", 200), "4kB": ("4 kB", 4_000), "16kB": ("16 kB", 16_000)}
SIZES |= {"60kB": ("60 kB", 60_000), "400kB": ("400 kB", 400_000)}
RATES = {"200B": 1_500, "4kB": 1_500, "16kB": 1_000, "60kB": 500, "400kB": 150}
STREAMS = (100, 500, 1_500, 3_000)
PACED = Room(chunks=50, interval_ms=20)
PACED_FIXED, PACED_SLOW = 2.8, 0.8
"""Seconds: a client of paced streams starts them, settles, and lets the last ones end. And more for each 1,000 streams,
which are more than a small machine carries in time."""
IDLE = 10_000
IDLE_FIXED = 4.0
BURST = 500


def _loads() -> Iterator[Load]:
    for name, (label, size) in SIZES.items():
        yield Load(name, "sizes", label, "load", 32, size)
    for name, (label, size) in SIZES.items():
        yield Load(f"open-{name}", "open", f"{label}, {RATES[name]:,}/s", "arrivals", RATES[name], size)
    for count in STREAMS:
        name, label = f"streams-{count}", f"{count:,} streams"
        fixed = PACED_FIXED + PACED_SLOW * count / 1_000
        yield Load(name, "streams", label, "streams", count, 1_000, PACED, "chunks", fixed=fixed)
    yield Load("alone", "special", "1 kB, one connection", "load", 1, 1_000)
    yield Load("at-once", "special", "1 kB, 100 chunks at once", "load", 32, 1_000, word="stream")
    yield Load("bursts", "special", f"200 B, bursts of {BURST}", "arrivals", BURST, 200, word="burst")
    yield Load("idle", "special", f"200 B, {IDLE:,} idle", "load", 32, 200, idle=IDLE, fixed=IDLE_FIXED)
    for count in (100, 1_000):
        yield Load(f"workers-{count}", "special", f"200 B, {count:,} workers", "load", 32, 200, Room(count))


LOADS = tuple(_loads())
BY_NAME = {load.name: load for load in LOADS}


def matches(patterns: Sequence[str], *names: str) -> bool:
    """Whether one of the names fits one of the patterns; without patterns, everything fits."""
    return not patterns or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def unknown(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the patterns that fit none of the names."""
    return [pattern for pattern in patterns if not matches([pattern], *names)]


def selected(patterns: Sequence[str]) -> list[Load]:
    """Return the loads whose name or group fits a pattern, in the order of the table."""
    return [load for load in LOADS if matches(patterns, load.name, load.group)]
