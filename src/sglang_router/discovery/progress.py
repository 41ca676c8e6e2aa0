"""How well a source knows its workers: when it knew all of them last, why it does not now, and what is logged.

listed()                 it knows all of its workers at this moment
succeeded()              and will go on to know them: no trouble is left
failed(kind, text)       it does not; known workers are kept. Logged the first time, when the reason changes, and once
                         a minute while it lasts
complaints(texts)        what is wrong with single workers; each is logged once, as long as it lasts
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

log = logging.getLogger("sglang_router.discovery")

_TOLD_EVERY: Final = 60.0
"""Seconds between two warnings of the same reason."""
_TOLD_APART: Final = 5.0
"""Seconds between two warnings of different reasons."""
_MOST_COMPLAINTS: Final = 1000
"""Complaints that are remembered."""


class LookProgress:
    """See the module. Times in seconds of `clock`.

    topic      begins each log line
    listed_at  when it knew all of its workers last; None: it never did
    error      why it does not know them now; "": it does
    failures   looks that failed, by kind
    """

    def __init__(self, topic: str, clock: Callable[[], float]) -> None:
        self.topic = topic
        self.listed_at: float | None = None
        self.error = ""
        self.failures: Counter[str] = Counter()
        self._clock = clock
        self._failing_since: float | None = None
        self._told: tuple[str, float] | None = None  # the last warning and when
        self._complaints: dict[str, None] = {}

    def __repr__(self) -> str:
        return f"<LookProgress of {self.topic}: {self.error or 'well'}>"

    @property
    def age(self) -> float | None:
        """Seconds since it knew all of its workers; None: it never did."""
        return None if self.listed_at is None else max(0.0, self._clock() - self.listed_at)

    def listed(self) -> None:
        """Note that all workers are known at this moment."""
        self.listed_at = self._clock()

    def succeeded(self) -> None:
        """Note that there is no trouble any more."""
        if self._told is not None and self._failing_since is not None:
            log.info("%s: it works again, after %.1f s", self.topic, self._clock() - self._failing_since)
        self.error, self._failing_since, self._told = "", None, None

    def failed(self, kind: str, text: str) -> None:
        """Note that the workers are not known now. kind: a word for metrics; text: completes a log line."""
        now = self._clock()
        self.failures[kind] += 1
        self.error = text
        if self._failing_since is None:
            self._failing_since = now
        if self._told is not None:
            last, at = self._told
            if now - at < (_TOLD_EVERY if text == last else _TOLD_APART):
                return
        self._told = text, now
        log.warning("%s: %s; the workers that are known stay", self.topic, text)

    def complaints(self, texts: Iterable[str]) -> None:
        """Log what is wrong with single workers now, unless it was logged before and is so since then."""
        now = dict.fromkeys(texts)
        for text in now:
            if text not in self._complaints and len(self._complaints) < _MOST_COMPLAINTS:
                log.warning("%s: %s", self.topic, text)
        self._complaints = now
