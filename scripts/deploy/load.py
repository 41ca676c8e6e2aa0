"""Clients that go on while the router is restarted: each kind uses its connections in another way.

kind      how many   what it does
new       4          a connection for each request
kept      4          the next request on the same connection, until an answer says that it is closed
pausing   4          the same with pauses of up to 3 s, so that connections are idle when something ends
streams   4          streams of some seconds, which must end whole
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from types import TracebackType

KINDS = ("new", "kept", "pausing", "streams")
EACH = 4
TIMEOUT = 60.0
TOKENS = 120
"""Of a stream."""


class Clients:
    """See the module. Used with `with`; at its end all have finished their last request."""

    def __init__(self, port: int) -> None:
        self._over = threading.Event()
        self._clients = [_Client(kind, port, self._over, seed) for seed in range(EACH) for kind in KINDS]

    def __enter__(self) -> Clients:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        deadline = time.monotonic() + 2 * TIMEOUT
        for client in self._clients:
            client.join(max(deadline - time.monotonic(), 0.0))

    def served(self) -> int:
        return sum(client.seen["served"] for client in self._clients)

    def failures(self) -> Counter[str]:
        """Return what went wrong, with the kind of client, and how often."""
        found: Counter[str] = Counter()
        for client in self._clients:
            for what, count in client.seen.items():
                if what != "served":
                    found[f"{client.kind}: {what}"] += count
        return found

    def until_served(self, within: float = TIMEOUT) -> None:
        """Wait until each client was served again. Raises: TimeoutError."""
        enough = [client.seen["served"] + 1 for client in self._clients]
        deadline = time.monotonic() + within
        while any(client.seen["served"] < count for client, count in zip(self._clients, enough, strict=True)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"some client was not served within {within:g} s: {self.failures()}")
            time.sleep(0.05)


class _Client(threading.Thread):
    """seen: how its requests ended, and how often."""

    def __init__(self, kind: str, port: int, over: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self.kind = kind
        self.seen: Counter[str] = Counter()
        self._port = port
        self._over = over
        self._chance = random.Random(f"{kind} {seed}")

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        while not self._over.is_set():
            try:
                closes = self._ask(connection)
            except (OSError, http.client.HTTPException) as error:
                self.seen[repr(error)] += 1
                self._over.wait(0.2)  # a client that fails at once must not be all that is counted
                closes = True
            if closes or self.kind in ("new", "streams"):
                connection.close()
            self._over.wait(self._chance.uniform(0.0, 3.0) if self.kind == "pausing" else 0.02)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> bool:
        """Send one request, and judge its answer; return whether that announced the end of the connection."""
        stream = self.kind == "streams"
        prompt = f"{self._chance.randrange(8)} begins like others, {self._chance.random()} does not"
        body = {"text": prompt, "stream": stream, "sampling_params": {"max_new_tokens": TOKENS if stream else 2}}
        connection.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        whole = content.rstrip().endswith(b"data: [DONE]" if stream else b"}") and b'"error"' not in content
        self.seen["served" if answer.status == 200 and whole else f"status {answer.status}, {len(content)} bytes"] += 1
        return answer.getheader("connection") == "close"
