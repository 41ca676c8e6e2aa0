"""Load from several threads, and the outcome of each request.

answered    the whole answer arrived
failed      no answer: no connection, or an error status. The router could have asked another worker, so this must not
            happen
cut         the answer began and ended early, or ended with an error event: the worker died in the middle of it
"""

from __future__ import annotations

import enum
import http.client
import json
import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from scripts.real_engines.text import document

PAUSE = 0.2
"""Seconds between two requests of a thread: it leaves CPU to an engine that starts under load."""
PREFIXES = 6
TIMEOUT = 120.0


class Fate(enum.Enum):
    ANSWERED = "answered"
    FAILED = "failed"
    CUT = "cut"


class Load:
    """A load that begins at once. Half of the requests are streams; the tokens of an answer are drawn from
    `lengths`."""

    def __init__(self, address: str, model: str, lengths: Sequence[int], threads: int = 4) -> None:
        self._address = address
        self._model = model
        self._lengths = lengths
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.in_flight = 0
        self.fates: Counter[Fate] = Counter()
        self.reasons: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Begin no more requests; those in flight, which are counted from before they connect, continue."""
        with self._lock:
            self._stop.set()

    def _begins(self) -> bool:
        """Count a request as in flight, unless the load has stopped."""
        with self._lock:
            going_on = not self._stop.is_set()
            self.in_flight += going_on
        return going_on

    def join(self) -> Counter[Fate]:
        """Wait for the requests in flight."""
        self.stop()
        for thread in self._threads:
            thread.join(TIMEOUT)
        return self.fates

    def _work(self, n: int) -> None:
        lot = random.Random(n)
        while self._begins():
            group = lot.randrange(PREFIXES)
            body = {
                "model": self._model,
                "prompt": document(f"LOAD {group}", 400) + document(str(lot.random()), 40),
                "max_tokens": lot.choice(self._lengths),
                "stream": lot.random() < 0.5,
                "temperature": 0,
            }
            fate, reason = send(self._address, "/v1/completions", body)
            with self._lock:
                self.in_flight -= 1
                self.fates[fate] += 1
                if reason:
                    self.reasons[f"{fate.value}: {reason}"] += 1
            self._stop.wait(PAUSE)


def send(address: str, path: str, body: dict[str, Any]) -> tuple[Fate, str]:
    """Send one request on its own connection; return its outcome, and the reason if it was not answered."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    begun = False
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Fate.FAILED, f"{response.status} {response.read(200).decode(errors='replace')}"
        begun = True
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        return Fate.CUT if begun else Fate.FAILED, type(error).__name__
    finally:
        connection.close()
    if body["stream"]:
        if b"data: [DONE]" not in text:
            return Fate.CUT, "no end"
        return (Fate.CUT, "error event") if b'"error"' in text else (Fate.ANSWERED, "")
    return (Fate.ANSWERED, "") if "choices" in json.loads(text) else (Fate.FAILED, "no choices")
