"""Tells a URL of each change of the number of workers there should be: a signed POST, until one is taken.

    changed decision --> newest --> POST --2xx--> told
                           ^          |
                           '-- pause -+-- anything else: 1 s, 2 s, 4 s ... 60 s

There is one message at most: a newer decision takes the place of one that could not be told yet, as the number in it
is absolute. It goes over connections such as those to workers (`net.upstream`), but none of theirs: certificates are
verified by what the system trusts, redirects are answers like any other that is not 2xx, and nothing needs a thread.

Signature: HMAC-SHA256 with the secret over the timestamp, a dot and the body. The timestamp is that of the sending, so
a receiver may refuse what is old; the id stays the same however often a message is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from sglang_router.core.worker import HealthRules, Outcome, Worker, WorkerSpec
from sglang_router.net.fetch import Answer, Collector, FetchError
from sglang_router.net.upstream import Upstream
from sglang_router.scaling.actuator import told

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_router.core.scaling import Decision, ScalingRules

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
    """See the module. `wall` gives seconds since 1970, `new_id` an id for each message."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        url: str,
        secret: str | None,
        rules: ScalingRules,
        wall: Callable[[], float],
        new_id: Callable[[], str],
        patience: Patience | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._loop = loop
        # The path stays out of logs and answers: in many services it is the password.
        self._place = f"{parts.scheme}://{parts.netloc}"
        self._target = ((parts.path or "/") + (f"?{parts.query}" if parts.query else "")).encode()
        self._receiver = Worker(WorkerSpec(url=self._place, health=HealthRules(enabled=False)), "webhook", 0, 0.0)
        self._receiver.removed = True  # no connection to it is kept
        self._secret = secret.encode() if secret else None
        self._rules = rules
        self._wall = wall
        self._new_id = new_id
        self._patience = patience or Patience()
        self._upstream = Upstream(loop, connect_timeout=self._patience.timeout)
        self._newest: dict[str, Any] | None = None  # what is still to be told
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._told: dict[str, Any] | None = None
        self._failures = 0  # in a row
        self._error = ""

    def scale(self, decision: Decision) -> None:
        if not decision.changed or self._closed:
            return
        bounds = {"min": self._rules.fewest, "max": self._rules.most}
        self._newest = {"id": self._new_id(), **told(decision, self._wall()), **bounds}
        self._news.set()
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._deliver())

    def explain(self) -> dict[str, Any]:
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
        self._closed = True
        self._news.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._upstream.close()

    async def _deliver(self) -> None:
        """Until there is nothing to tell."""
        pause = self._patience.first_pause
        while (message := self._newest) is not None and not self._closed:
            self._news.clear()
            try:
                problem = await self._post(msgspec.json.encode(message))
            except Exception as exc:  # a fault here must not end the telling: nobody else would take it up
                log.exception("the scaling webhook failed in the router")
                problem = f"a fault of the router: {exc.__class__.__name__}"
            if not problem:
                log.info("webhook %s told: workers wanted: %d", self._place, message["desired"])
                self._told, self._failures, self._error = message, 0, ""
                pause = self._patience.first_pause
                if self._newest is message:
                    self._newest = None
                continue
            self._failures += 1
            self._error = problem
            log.warning("webhook %s not told: %s; again in %g s", self._place, problem, pause)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), pause)
            pause = min(pause * 2, self._patience.longest_pause)

    async def _post(self, body: bytes) -> str:
        """Sends one message; what was wrong, or nothing."""
        timestamp = b"%d" % self._wall()
        lines = [
            self._upstream.origin(self._receiver).start(b"POST", self._target),
            b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body),
            b"user-agent: sglang-router\r\nconnection: close\r\nx-sglang-router-timestamp: %s\r\n" % timestamp,
        ]
        if self._secret is not None:
            digest = hmac.new(self._secret, timestamp + b"." + body, hashlib.sha256).hexdigest()
            lines.append(b"x-sglang-router-signature: sha256=%s\r\n" % digest.encode())
        try:
            answer = await self._ask(b"".join((*lines, b"\r\n")), body)
        except FetchError as exc:
            # What is said of workers holds here as well, but for the option that comes behind a semicolon.
            _, _, cause = str(exc).partition(": ")
            cause = cause.partition(";")[0].replace("the worker's", "its")
            problem = _ERRORS.get(exc.outcome, "it broke off before it answered")
            return f"{problem} ({cause.rstrip('.')})" if cause else problem
        if 200 <= answer.status < 300:
            return ""
        return f"it answered {answer.status}{', and redirects are not followed' if answer.status < 400 else ''}"

    async def _ask(self, head: bytes, body: bytes) -> Answer:
        collector = Collector(self._loop.create_future(), _MOST_ANSWER)
        collector.leg = self._upstream.send(self._receiver, collector, head, body, fresh=True)
        try:
            return await asyncio.wait_for(collector.answer, self._patience.timeout)
        except asyncio.TimeoutError:
            collector.leg.abort()
            raise FetchError(Outcome.TIMEOUT, "") from None
        except asyncio.CancelledError:
            collector.leg.abort()
            raise
