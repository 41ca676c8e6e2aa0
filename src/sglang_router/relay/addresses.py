"""The addresses of workers' names: looked up in threads of their own, kept, and refreshed beside the connections.

    await addresses.of("engine-7") --> ("10.0.0.7", ...)
              |  known      at once; when they are old, a look-up starts beside it
              |  not known  after the look-up, which all who ask share
              '- failed     at once, with the last reason, until the pause after a failure is over

    a look-up   one a name at a time, in a daemon thread; at most `_MOST_THREADS` at once, names that hung before last
    it fails    the last good addresses stay; the next look-up comes after a pause that doubles
    doubted     no address took a connection: the next look-up comes sooner
    worked      an address took a connection: it is tried first from now on
    on_moved    called when addresses of a name are gone

The resolver of the system can hang for minutes and cannot be cancelled, so a look-up that hangs may hold nothing but
its thread: no connection to a name that was found before, no other name, no shutdown. That is why these threads are
not those of an executor, which joins them at the end of the process.

The system does not say for how long an address is valid, so a name in use is looked up again a few times a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Final

LookUp = Callable[[str], Sequence[str]]
"""Returns the addresses of a name; blocks. Raises: OSError, UnicodeError."""

_MOST_THREADS: Final = 128
"""Look-ups at the same time."""
_FRESH: Final = 20.0
"""Seconds after which a name in use is looked up again."""
_FIRST_PAUSE: Final = 0.5
"""Seconds between a look-up that failed, or gave addresses that take no connection, and the next; doubled each time."""
_LONGEST_PAUSE: Final = 30.0
_SLOW: Final = 2.0
"""Seconds from which on a look-up counts as one that hung."""
_KEPT: Final = 600.0
"""Seconds that a name which nobody asks for is remembered."""


class Name:
    """What is known of one name. Times in seconds of the loop's clock.

    addresses  the last good ones, the one that worked last first
    why        why the last look-up failed; "" if it did not
    looking    done when the look-up in progress is; None: there is none
    begun      when the last look-up began
    due        when the next one may begin
    failures   look-ups that failed in a row
    doubts     look-ups in a row whose addresses took no connection
    doubted    the present addresses took no connection
    slow       its last look-up hung
    asked      when its addresses were asked for last
    """

    __slots__ = (
        "addresses",
        "asked",
        "begun",
        "doubted",
        "doubts",
        "due",
        "failures",
        "host",
        "looking",
        "slow",
        "why",
    )

    def __init__(self, host: str) -> None:
        self.host = host
        self.addresses: tuple[str, ...] = ()
        self.why = ""
        self.looking: asyncio.Future[None] | None = None
        self.begun = 0.0
        self.due = 0.0
        self.failures = 0
        self.doubts = 0
        self.doubted = False
        self.slow = False
        self.asked = 0.0

    def __repr__(self) -> str:
        state = "looking up" if self.looking is not None else self.why or "found"
        return f"<Name {self.host} {', '.join(self.addresses) or 'without addresses'}: {state}>"


class Addresses:
    """The addresses of all names; see the module. Not thread-safe: only `look_up` runs in other threads.

    look_up   finds the addresses of a name
    on_moved  called with a name and the addresses that it no longer has
    rng       for the jitter of pauses
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, look_up: LookUp | None = None, rng: random.Random | None = None
    ) -> None:
        self.rng = rng or random.Random()
        self.on_moved: Callable[[str, frozenset[str]], None] = _ignore
        self._loop = loop
        self._look_up = look_up or system_look_up
        self._names: dict[str, Name] = {}
        self._threads = 0
        self._waiting: list[Name] = []  # for a thread
        self._tidy_at = 0.0

    def __repr__(self) -> str:
        return f"<Addresses of {len(self._names)} names, {self._threads} look-ups>"

    async def of(self, host: str) -> tuple[str, ...]:
        """Return the addresses of a name, the best first; wait for a look-up only when none is known.

        Raises: OSError, when none is known and the look-up failed.
        """
        now = self._loop.time()
        name = self._names.get(host)
        if name is None:
            name = self._names[host] = Name(host)
        name.asked = now
        self._refresh(name, now)
        if not name.addresses and name.looking is not None:
            await asyncio.shield(name.looking)
        if not name.addresses:
            raise OSError(0, f"the look-up of its name failed: {name.why}")
        return name.addresses

    def refresh(self, host: str) -> None:
        """Look a name up beside everything else, if its addresses are old. Call it periodically for names in use."""
        name = self._names.get(host)
        if name is not None:
            name.asked = self._loop.time()
            self._refresh(name, name.asked)

    def known(self, host: str) -> bool:
        """Return whether a name was ever found."""
        return host in self._names and bool(self._names[host].addresses)

    def first(self, host: str) -> str:
        """Return the address of a name that is tried first; "" when none is known."""
        name = self._names.get(host)
        return name.addresses[0] if name is not None and name.addresses else ""

    def worked(self, host: str, address: str) -> bool:
        """Try this address first from now on: it took a connection. Return whether the name still has it."""
        name = self._names.get(host)
        if name is None:
            return True
        name.doubts, name.doubted = 0, False
        name.addresses = _first(address, name.addresses)
        return address in name.addresses

    def doubted(self, host: str) -> None:
        """Look a name up again soon: none of its addresses took a connection."""
        name = self._names.get(host)
        if name is not None and name.addresses:
            name.doubted = True
            name.due = min(name.due, name.begun + self._pause(name.doubts))
            self._refresh(name, self._loop.time())

    def tidy(self) -> None:
        """Forget the names for which nobody asked for long. Call it periodically."""
        now = self._loop.time()
        if now >= self._tidy_at:
            self._tidy_at = now + _KEPT / 10
            kept = {host: name for host, name in self._names.items() if name.looking or now - name.asked < _KEPT}
            self._names = kept

    # -- look-ups ------------------------------------------------------------------------------------------------------

    def _refresh(self, name: Name, now: float) -> None:
        """Start a look-up if one is due and none is in progress."""
        if name.looking is not None or now < name.due:
            return
        name.looking = self._loop.create_future()
        name.begun = now
        self._waiting.append(name)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Start the look-ups for which there is a thread, in order; names that hung before come last."""
        while self._waiting and self._threads < _MOST_THREADS:
            name = next((name for name in self._waiting if not name.slow), self._waiting[0])
            self._waiting.remove(name)
            name.begun = self._loop.time()
            self._threads += 1
            try:
                threading.Thread(target=self._work, args=(name,), name="look-up", daemon=True).start()
            except RuntimeError:  # the system has no thread left
                self._loop.call_soon(self._done, name, (), "the router can start no thread")

    def _work(self, name: Name) -> None:
        """Look a name up; runs in a thread."""
        found: Sequence[str] = ()
        why = "it has no address"
        try:
            found = self._look_up(name.host)
        except OSError as exc:
            why = exc.strerror or str(exc)
        except Exception as exc:  # a fault here must not leave the name in "looking up" for ever
            why = f"{exc.__class__.__name__}: {exc}"
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._done, name, found, why)

    def _done(self, name: Name, found: Sequence[str], why: str) -> None:
        """Take the result of a look-up."""
        now = self._loop.time()
        looking, name.looking = name.looking, None
        self._threads -= 1
        name.slow = now - name.begun >= _SLOW
        if found:
            self._found(name, tuple(found), now)
        else:
            name.why = why
            name.due = now + self._pause(name.failures)
            name.failures += 1
        if looking is not None and not looking.done():  # done: the loop is being closed
            looking.set_result(None)
        self._start_waiting()

    def _found(self, name: Name, found: tuple[str, ...], now: float) -> None:
        gone = frozenset(name.addresses) - frozenset(found)
        name.doubts = name.doubts + 1 if name.doubted and not gone else 0
        name.doubted = False
        name.why = ""
        name.failures = 0
        name.due = now + _FRESH * self._jitter()
        # The order that the system gives may change each time; an engine keeps what it has cached.
        name.addresses = _first(name.addresses[0], found) if name.addresses else found
        if gone:
            self.on_moved(name.host, gone)

    def _pause(self, times: int) -> float:
        return min(_FIRST_PAUSE * 2.0 ** min(times, 16), _LONGEST_PAUSE) * self._jitter()

    def _jitter(self) -> float:
        return self.rng.uniform(0.8, 1.2)


def system_look_up(host: str) -> tuple[str, ...]:
    """Ask the system's resolver: /etc/hosts, DNS and what else it is told to use.

    Raises: OSError, UnicodeError.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def _first(best: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Put an address first, if it is among these."""
    if best == addresses[0] or best not in addresses:
        return addresses
    return (best, *(address for address in addresses if address != best))


def _ignore(host: str, gone: frozenset[str]) -> None:
    """Do nothing: nobody keeps connections to these addresses."""
