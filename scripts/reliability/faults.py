"""Faults that happen to a router that keeps running: one function each, with the seconds that it may last.

A fault begins after a calm moment and is over before the time is up, so that the load sees the change and the recovery.
`allowed` lists what clients may see besides right answers; everything else is wrong. A stream that breaks because its
engine died may end with an error event; no other request may fail as long as one engine is left.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from scripts.reliability.field import Engine, Field, ReliabilityError, Router, worker_path
from scripts.reliability.shim import Mode, Shim

from routers import free_port

# The sleeps here are the duration of a state, a share of the fault's time, under load; they are no waits for an event.
# An answer is "cut without a word" if there is no place for an error event: in an unstreamed answer, or inside a chunk.
CUT = ("cut stream_broken", "cut without a word")
NOBODY = ("failed no_available_workers", "failed worker_unreachable", "failed worker_broken", "failed workers_starting")


class Fault(NamedTuple):
    """`strike(field, seconds)` causes it. `allowed`: outcomes of requests that are allowed besides right answers."""

    name: str
    strike: Callable[[Field, float], None]
    allowed: tuple[str, ...] = ()


def nothing(field: Field, seconds: float) -> None:
    time.sleep(seconds)


def kill(field: Field, seconds: float) -> None:
    """Kill two engines, one after the other, under load, and start them again."""
    for engine in field.engines[:2]:
        time.sleep(0.1 * seconds)
        engine.kill()
        time.sleep(0.2 * seconds)
        engine.start()
    time.sleep(0.2 * seconds)


def pause(field: Field, seconds: float) -> None:
    """Stop an engine (SIGSTOP): it accepts connections and sends nothing; its requests are answered when it
    continues."""
    engine = field.engines[0]
    time.sleep(0.1 * seconds)
    engine.signal(signal.SIGSTOP)
    time.sleep(min(0.4 * seconds, 12.0))
    engine.signal(signal.SIGCONT)
    time.sleep(0.3 * seconds)


def _network(mode: Mode, most: float = 12.0) -> Callable[[Field, float], None]:
    def strike(field: Field, seconds: float) -> None:
        time.sleep(0.1 * seconds)
        field.loop.run(field.shim.set(mode))
        time.sleep(min(0.5 * seconds, most))
        field.loop.run(field.shim.set("pass"))
        time.sleep(0.3 * seconds)

    return strike


def flapping(field: Field, seconds: float) -> None:
    """Start and end a worker faster than health checks can notice."""
    end = time.monotonic() + 0.8 * seconds
    modes: tuple[Mode, ...] = ("refuse", "pass", "reset", "pass")
    for mode in itertools.cycle(modes):
        if time.monotonic() >= end:
            break
        field.loop.run(field.shim.set(mode))
        time.sleep(0.15)
    field.loop.run(field.shim.set("pass"))
    time.sleep(0.2 * seconds)


def cold(field: Field, seconds: float) -> None:
    """End an engine and start it again with an empty cache: the router must have dropped its prefixes as well."""
    router = field.router
    assert router is not None
    engine = field.engines[1]
    time.sleep(0.2 * seconds)
    restarts = router.samples().total("sgl_router_worker_changes_total", what="restarted")
    engine.end()
    time.sleep(0.2 * seconds)
    engine.start()
    router.until(lambda: router.samples().total("sgl_router_worker_changes_total", what="restarted") > restarts)
    time.sleep(0.3 * seconds)


def all_gone(field: Field, seconds: float) -> None:
    """End all engines, then start all again."""
    time.sleep(0.2 * seconds)
    gone = time.monotonic()
    for engine in field.engines:
        engine.kill()
    time.sleep(0.2 * seconds)
    for engine in field.engines:
        engine.start()
    field.outage = time.monotonic() - gone
    time.sleep(0.4 * seconds)


def replaced(field: Field, seconds: float) -> None:
    """Replace an engine at the same URL in the order that an operator uses: remove, wait, replace, add."""
    router, engine, url = field.router, field.engines[1], field.urls[1]
    assert router is not None
    time.sleep(0.2 * seconds)
    old = router.worker(url)["id"]
    router.ask("DELETE", worker_path(url))
    router.until(engine.at_rest)
    engine.end()
    engine.start()
    router.post("/workers", {"url": url})
    router.until_healthy(url)
    if router.worker(url)["id"] == old:
        raise ReliabilityError("a replaced worker is taken for the old one")
    time.sleep(0.3 * seconds)


def drain(field: Field, seconds: float) -> None:
    """Restart all engines one after the other, with drain and resume: no request and no stream may be lost."""
    router = field.router
    assert router is not None
    for engine, url in zip(field.engines, field.urls, strict=True):
        time.sleep(0.05 * seconds)
        router.post(worker_path(url, "drain"))
        _until_idle(router, url, engine)
        engine.end()
        engine.start()
        router.post(worker_path(url, "resume"))
        router.until_healthy(url)
    time.sleep(0.1 * seconds)


def _until_idle(router: Router, url: str, engine: Engine) -> None:
    router.until(lambda: router.worker(url)["load"] == 0 and engine.at_rest())


def storm(field: Field, seconds: float) -> None:
    """Add and remove workers all the time, live ones and dead ones."""
    router = field.router
    assert router is not None
    aliases = [f"127.0.2.{number}" for number in range(1, 9)]
    alive = field.more(Shim(free_port(), field.engines[0].port, aliases))
    urls = [f"http://{alias}:{alive.port}" for alias in aliases] + [f"http://127.0.3.{n}:9" for n in range(1, 5)]
    end = time.monotonic() + 0.8 * seconds
    for turn in itertools.count():
        if time.monotonic() >= end:
            break
        url = urls[turn * 5 % len(urls)]
        if url in router.workers():
            router.ask("DELETE", worker_path(url))
        else:
            router.post("/workers", {"url": url})
    for url in router.workers().keys() - set(field.urls):
        router.ask("DELETE", worker_path(url))
    time.sleep(0.2 * seconds)


FAULTS = (
    Fault("nothing", nothing),
    Fault("kill -9", kill, CUT),
    Fault("SIGSTOP, SIGCONT", pause),
    Fault("connections refused", _network("refuse")),
    Fault("connections reset", _network("reset"), CUT),
    Fault("black hole", _network("hole")),
    Fault("latency of 200 ms", _network("slow")),
    Fault("restart with a cold cache", cold, (*CUT, "cut aborted by the engine")),
    Fault("flapping", flapping, CUT),
    Fault("all workers gone and back", all_gone, (*CUT, *NOBODY)),
    Fault("replaced at the same URL", replaced),
    Fault("rolling drain with streams", drain),
    Fault("add/remove storm", storm),
)
