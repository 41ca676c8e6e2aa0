"""Workers from DNS: each address of a name, or each target of its SRV records, is a worker.

    NAME:PORT            A and AAAA records, by the system's resolver: http://ADDRESS:PORT
    _http._tcp.NAME      SRV records, by dnspython (the extra `dns`): http://TARGET:PORT

A name is looked up again every `every` seconds, SRV records sooner if they are valid for less. DNS cannot tell a
worker that is gone from one that is not ready, and servers may leave some addresses out. So one that is not there any
more gets no new requests, and is removed when it stays away for a minute. A look-up that fails, or finds nothing,
changes nothing.

A host with addresses of both families is one worker, not two: the IPv4 ones count if there are any.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from sglang_router.config.dns_names import DNSName
from sglang_router.discovery.looked_up import LookedUp, LookUpFailed, Resolve
from sglang_router.discovery.owner import WorkerOwner
from sglang_router.discovery.progress import LookProgress
from sglang_router.discovery.reconcile import WantedWorker
from sglang_router.errors import ConfigError
from sglang_router.relay.addresses import LookUp

_AWAY_FOR: Final = 60.0
"""Seconds after which a worker is removed that DNS does not name any more."""
_AWAY: Final = "DNS does not name it now"
_SLOW: Final = 15.0
"""Seconds after which a look-up that is still running counts as failed."""
_SHORTEST: Final = 1.0
_LONGEST_PAUSE: Final = 30.0


class Seen(NamedTuple):
    """What a name has. here: URLs of the last answer; at: when each URL was in an answer last."""

    here: frozenset[str]
    at: dict[str, float]


_NEVER_SEEN: Final = Seen(frozenset(), {})


class DNSSource:
    """See the module.

    resolve  looks a name up
    every    seconds between two look-ups
    away     seconds after which a worker is removed that is not named any more
    """

    def __init__(
        self,
        owner: WorkerOwner,
        names: Sequence[DNSName],
        resolve: Resolve,
        clock: Callable[[], float],
        rng: random.Random,
        every: float,
        away: float = _AWAY_FOR,
    ) -> None:
        self.owner = owner
        self.progress = LookProgress("DNS", clock)
        self._names = list(dict.fromkeys(names))
        self._resolve = resolve
        self._clock = clock
        self._rng = rng
        self._every = every
        self._away = away
        self._seen: dict[DNSName, Seen] = {}
        self._passing = asyncio.Lock()
        self._failing: dict[DNSName, str] = {}

    def __repr__(self) -> str:
        return f"<DNSSource {self.looks_at}: {self.progress!r}>"

    @property
    def looks_at(self) -> str:
        """The names."""
        return ", ".join(name.text for name in self._names)

    async def run(self) -> None:
        """Follow all names until it is cancelled."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._follow(name)) for name in self._names]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _follow(self, name: DNSName) -> None:
        failures = 0
        while True:
            pause = self._every
            try:
                answer = await self._resolve(name)
            except LookUpFailed as error:
                failures += 1
                self._failing[name] = str(error)
                self.progress.failed(error.kind, str(error))
                pause = min(self._every, _SHORTEST * 2.0 ** min(failures - 1, 8), _LONGEST_PAUSE)
            else:
                failures = 0
                self._failing.pop(name, None)
                self._take(name, answer)
                pause = max(_SHORTEST, min(pause, pause if answer.ttl is None else answer.ttl))
            if not self._failing and len(self._seen) == len(self._names):
                self.progress.listed()
                self.progress.succeeded()
            await self._pass()
            await asyncio.sleep(pause * self._rng.uniform(0.8, 1.0))

    def _take(self, name: DNSName, answer: LookedUp) -> None:
        """Note what a name has now; forget what was away for too long. Those of an earlier start were seen just now."""
        now = self._clock()
        before = self._seen[name].at if name in self._seen else dict.fromkeys(self.owner.urls_of(name.text), now)
        at = before | dict.fromkeys(answer.urls, now)
        kept = {url: seen for url, seen in at.items() if now - seen < self._away}
        self._seen[name] = Seen(frozenset(answer.urls), kept)

    async def _pass(self) -> None:
        """Compare what all names have with the workers, once one was found."""
        if self._seen:
            async with self._passing:
                await self.owner.follow(self._wanted())

    def _wanted(self) -> dict[str, WantedWorker]:
        """Return what the names have. Until all were found, what nobody names stays as it is: it may be theirs."""
        found: dict[str, WantedWorker] = {}
        for name in self._names:
            seen = self._seen.get(name, _NEVER_SEEN)
            for url in seen.at:
                here = url in seen.here
                if url not in found or (here and not found[url].addable):
                    said = {} if name.role == "regular" else {"worker_type": name.role}
                    withheld = "" if here else _AWAY
                    found[url] = WantedWorker(url=url, said=said, origin=name.text, addable=here, withheld=withheld)
        if len(self._seen) < len(self._names):
            return {each.url: each for each in self.owner.untouched()} | found
        return found


# -- look-ups ----------------------------------------------------------------------------------------------------------


def resolver(names: Sequence[DNSName], look_up: LookUp) -> Resolve:
    """Return what looks these names up: addresses by `look_up`, SRV records by dnspython.

    Raises: ConfigError, when SRV records are wanted and dnspython is missing.
    """
    addresses = AddressLookUp(look_up)
    if all(name.port is not None for name in names):
        return addresses
    try:
        from sglang_router.discovery.srv import SRVLookUp
    except ImportError:
        raise ConfigError(
            "--discovery-dns with SRV records needs the extra `dns`: pip install 'sglang-router[dns]'"
        ) from None
    services = SRVLookUp()

    async def resolve(name: DNSName) -> LookedUp:
        return await (addresses if name.port is not None else services)(name)

    return resolve


class AddressLookUp:
    """Looks addresses up by the system's resolver, in threads of their own: it can hang, and cannot be cancelled."""

    def __init__(self, look_up: LookUp, slow: float = _SLOW) -> None:
        self._look_up = look_up
        self._slow = slow
        self._running: dict[DNSName, asyncio.Future[Sequence[str]]] = {}

    async def __call__(self, name: DNSName) -> LookedUp:
        """Return the workers at the addresses of a name. Raises: LookUpFailed."""
        job = self._running.get(name)
        if job is None:  # one that hung is waited for again, and there is never more than one thread for a name
            job = self._running[name] = self._start(name.name)
        done, _ = await asyncio.wait([job], timeout=self._slow)
        if not done:
            raise LookUpFailed("silent", f"the look-up of {name.name} takes longer than {self._slow:g} s")
        del self._running[name]
        try:
            found = job.result()
        except (OSError, UnicodeError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise LookUpFailed("not_found", f"the look-up of {name.name} failed: {why}") from None
        if not found:
            raise LookUpFailed("not_found", f"{name.name} has no address")
        return LookedUp(tuple(f"{name.scheme}://{host}:{name.port}" for host in _of_one_family(found)))

    def _start(self, host: str) -> asyncio.Future[Sequence[str]]:
        loop = asyncio.get_running_loop()
        job: asyncio.Future[Sequence[str]] = loop.create_future()

        def done(found: Sequence[str], error: Exception | None) -> None:
            if not job.done():
                job.set_result(found) if error is None else job.set_exception(error)

        def work() -> None:
            found: Sequence[str] = ()
            failure: Exception | None = None
            try:
                found = self._look_up(host)
            except Exception as error:  # whatever it is must reach who waits
                failure = error if isinstance(error, (OSError, UnicodeError)) else OSError(0, repr(error))
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(done, found, failure)

        threading.Thread(target=work, name="discovery-dns", daemon=True).start()
        return job


def _of_one_family(found: Sequence[str]) -> list[str]:
    """Return the IPv4 addresses, or the IPv6 ones in brackets when there are no others."""
    addresses = [ipaddress.ip_address(each.partition("%")[0]) for each in found]
    first = sorted({each for each in addresses if each.version == 4})
    return [str(each) for each in first] or [f"[{each}]" for each in sorted(set(addresses))]
