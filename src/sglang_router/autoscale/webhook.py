"""Posts each change of the desired number of workers to a URL, signed, until the receiver accepts it.

    changed decision --> newest --> POST --2xx--> told
                           ^          |
                           '-- pause -+-- anything else: 1 s, 2 s, 4 s ... 60 s

At most one message is pending: a newer decision replaces one that was not delivered yet, because its number is
absolute. Of several routers only the one that leads posts; one that does not lead any more, also because it was stopped
for a while, drops what waits: the next one has told what it wants.

It goes over connections such as those to workers (`relay.connection_pool`), but out of a pool of its own: certificates
are verified by what the system trusts, redirects are answers like any other that is not 2xx, and nothing needs a
thread.

Signature: HMAC-SHA256 with the secret over the timestamp, a dot and the body. The timestamp is the time of sending, so
a receiver may refuse old messages; the id is the same each time a message is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from sglang_router.autoscale.actuator import told
from sglang_router.autoscale.scaler import Decision, ScalingRules
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.workers.fetch import FetchError, ask_once

log = logging.getLogger("sglang_router.scaling")

_MOST_ANSWER = 65536
_ERRORS = {
    Outcome.REFUSED: "nobody listens there",
    Outcome.UNREACHABLE: "it cannot be reached",
    Outcome.UNCONNECTED: "no connection in time",
    Outcome.TIMEOUT: "no answer in time",
}


class Patience(msgspec.Struct, frozen=True):
    """Seconds: for one answer; the first pause after a failure, which doubles; the longest pause."""

    timeout: float = 10.0
    first_pause: float = 1.0
    longest_pause: float = 60.0


class Webhook:
    """See the module. `wall` gives seconds since 1970, `new_id` an id for each message.

    acts  returns whether this router still acts for all: asked before each post
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        url: str,
        secret: str | None,
        rules: ScalingRules,
        wall: Callable[[], float],
        new_id: Callable[[], str],
        patience: Patience | None = None,
        acts: Callable[[], bool] = lambda: True,
    ) -> None:
        parts = urlsplit(url)
        self._loop = loop
        # The path stays out of logs and answers: in many services it is the password.
        self._place = f"{parts.scheme}://{parts.netloc}"
        self._path = ((parts.path or "/") + (f"?{parts.query}" if parts.query else "")).encode()
        self._receiver = Target(self._place)
        self._secret = secret.encode() if secret else None
        self._rules = rules
        self._wall = wall
        self._new_id = new_id
        self._patience = patience or Patience()
        self._acts = acts
        self._pool = _own_pool(loop, self._patience.timeout)
        self._newest: dict[str, Any] | None = None  # the message to deliver
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._told: dict[str, Any] | None = None
        self._failures = 0  # in a row
        self._error = ""

    def scale(self, decision: Decision) -> None:
        """Send a changed decision; a newer one replaces one that waits."""
        if not decision.changed or self._closed:
            return
        bounds = {"min": self._rules.fewest, "max": self._rules.most}
        self._newest = {"id": self._new_id(), **told(decision, self._wall()), **bounds}
        self._news.set()
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._deliver())

    def explain(self) -> dict[str, Any]:
        """Describe the state, for GET /scale."""
        waiting, last = self._newest, self._told
        return {
            "kind": "webhook",
            "to": self._place,
            "signed": self._secret is not None,
            "told": None if last is None else {name: last[name] for name in ("id", "at", "desired")},
            "waiting": None if waiting is None else {name: waiting[name] for name in ("id", "at", "desired")},
            "failures": self._failures,
            "last_error": self._error,
        }

    async def close(self) -> None:
        """Stop; close the connections."""
        self._closed = True
        self._news.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._pool.close()

    async def _deliver(self) -> None:
        """Post the newest message until it is accepted and no other one is pending."""
        pause = self._patience.first_pause
        while (message := self._newest) is not None and not self._closed:
            if not self._acts():
                log.info("webhook %s: another router acts now, so it is not told", self._place)
                self._newest, self._failures, self._error = None, 0, ""
                return
            self._news.clear()
            try:
                problem = await self._post(msgspec.json.encode(message))
            except Exception as exc:  # a fault here must not end the delivery: nothing would start it again
                log.exception("the scaling webhook failed in the router")
                problem = f"a fault of the router: {exc.__class__.__name__}"
            if not problem:
                log.info("webhook %s delivered, desired workers: %d", self._place, message["desired"])
                self._told, self._failures, self._error = message, 0, ""
                pause = self._patience.first_pause
                if self._newest is message:
                    self._newest = None
                continue
            self._failures += 1
            self._error = problem
            log.warning("webhook %s not delivered: %s; again in %g s", self._place, problem, pause)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), pause)
            pause = min(pause * 2, self._patience.longest_pause)

    async def _post(self, body: bytes) -> str:
        """Sends one message; what was wrong, or nothing."""
        timestamp = b"%d" % self._wall()
        lines = [
            self._pool.origin(self._receiver).start(b"POST", self._path),
            b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body),
            b"user-agent: sglang-router\r\nconnection: close\r\nx-sglang-router-timestamp: %s\r\n" % timestamp,
        ]
        if self._secret is not None:
            digest = hmac.new(self._secret, timestamp + b"." + body, hashlib.sha256).hexdigest()
            lines.append(b"x-sglang-router-signature: sha256=%s\r\n" % digest.encode())
        try:
            answer = await ask_once(
                self._pool,
                self._receiver,
                b"".join((*lines, b"\r\n")),
                body,
                timeout=self._patience.timeout,
                max_bytes=_MOST_ANSWER,
                fresh=True,
            )
        except FetchError as exc:
            # What is said of workers holds here as well, but for the option that comes behind a semicolon.
            _, _, cause = str(exc).partition(": ")
            cause = cause.partition(";")[0].replace("the worker's", "its")
            problem = _ERRORS.get(exc.outcome, "it broke off before it answered")
            return f"{problem} ({cause.rstrip('.')})" if cause else problem
        if 200 <= answer.status < 300:
            return ""
        return f"it answered {answer.status}{', and redirects are not followed' if answer.status < 400 else ''}"


def _own_pool(loop: asyncio.AbstractEventLoop, timeout: float) -> ConnectionPool:
    """Make a pool for the receiver alone; it keeps no connection, because the receiver is not known to it."""
    return ConnectionPool(loop, Batch(loop), connect_timeout=timeout, idle_timeout=0.0, max_idle=0, tls=None)
