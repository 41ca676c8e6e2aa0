"""What one worker's reports say of the router's belief in its cache: how much of it is there, and whether it is empty.

    judged          answers of which at least FEW tokens were predicted as cached, and which the engine tells
    surprising miss far below the prediction: less than half, and more than FEW tokens less
    evidence        a judged answer whose request was planned while no other prompt waited to be read there: else the
                    prefix may just not be there yet, because it came with one of those
    nothing is concluded before the first hit: an engine may report zeros because it has no such cache

*Learned capacity.* A cache that is smaller than believed evicts what the router still remembers. `share` is how much of
the predicted tokens was reported, of the recent evidence. When it falls below ALL, more is remembered than the cache
can hold; the bytes that are remembered at that moment are the capacity, roughly and too high. It is forgotten when
all is there again.

The memory is not cut down to that size. It was tried, and cost hits: a request whose prefix is forgotten goes to
another worker, and a prefix that was evicted is best read again where it was before, for then it stays one copy.

*An empty cache.* An engine that was restarted behind the router's back, or flushed, has nothing of what is remembered.
A row of evidence in which nearly nothing was cached, and nothing else in between, is that; of so many that it would be
one chance in a million, given how often this worker misses otherwise: 4 for one that hardly ever does, 20 for one that
misses half of the time. No single answer empties a memory.

Nor do requests that engines never answer from their cache, such as those for the log probabilities of a prompt, which
come with the same few beginnings again and again. In an empty cache a beginning is missed once, and then it is there.
So a miss of which one half was read in the same row already is none of that row, and ends it.
"""

from __future__ import annotations

import math
from typing import Final

from sglang_router.routing.usage import Usage

FEW: Final = 256
"""Tokens: what is less is no surprise. Engines cache in blocks, and templates add tokens."""
_NEARLY_NOTHING: Final = 4
"""A miss is cold, if less than the prediction divided by this was cached."""
_SHORTEST_ROW: Final = 4
_CHANCE: Final = math.log(1e-6)
LONGEST_PROMPT: Final = 1 << 14
"""Bytes of a prompt that are compared with others."""
_SHARE: Final = 1 / 128
"""How much the last evidence counts in what is averaged."""
_FIRST_RATE: Final = 0.5
"""The rate of cold misses that is assumed of a worker that is not known yet."""
_LEAST_RATE: Final = 0.01
_MOST_RATE: Final = 0.9
ALL: Final = 0.97
"""A share from which on all that is remembered counts as being there."""


def surprising(usage: Usage) -> bool:
    """Return whether far fewer tokens were cached than predicted."""
    return usage.predicted - usage.cached > FEW and usage.cached * 2 < usage.predicted


class Belief:
    """See the module.

    capacity  bytes of routing text that the cache holds; 0: nothing is known
    misses    surprising misses, evidence or not
    share     of the predicted tokens that was reported, recently; 1.0 before the first hit
    """

    __slots__ = ("_cached", "_predicted", "_rate", "_row", "capacity", "misses", "share")

    def __init__(self) -> None:
        self.misses = 0
        self.forget()

    def __repr__(self) -> str:
        return f"<Belief {self.misses} misses, {self.row} cold ones in a row, {self.share:.3f} is there>"

    def forget(self) -> None:
        """Begin anew: the cache is known to be empty."""
        self.capacity = 0
        self._row: list[bytes] = []  # prompts of the cold misses since anything else was reported
        self.share = 1.0
        self._rate = _FIRST_RATE  # of cold misses among the evidence
        self._predicted = self._cached = 0.0  # tokens, averaged; 0: there was no hit yet

    @property
    def row(self) -> int:
        """Cold misses since anything else was reported."""
        return len(self._row)

    def heard(self, usage: Usage, remembered: int, prompt: bytes, half: int) -> None:
        """Take evidence.

        remembered  bytes of prefixes
        prompt      its namespace, and up to LONGEST_PROMPT bytes of its text
        half        as many of these bytes stand for a half of the predicted tokens
        """
        predicted, cached = usage.predicted, min(usage.cached, usage.predicted)
        if not self._predicted:
            if usage.missed:
                return
            self._predicted, self._cached = float(predicted), float(cached)
        self._predicted += (predicted - self._predicted) * _SHARE
        self._cached += (cached - self._cached) * _SHARE
        self.share = self._cached / self._predicted
        if self.share >= ALL:
            self.capacity = 0
        elif not self.capacity:
            self.capacity = remembered
        cold = usage.missed and cached * _NEARLY_NOTHING < predicted
        if cold and not self._has_read(prompt[:half]):
            self._row.append(prompt)
            return
        for _ in self._row:
            self._rate += (1.0 - self._rate) * _SHARE
        self._row.clear()
        self._rate += ((1.0 if cold else 0.0) - self._rate) * _SHARE

    def _has_read(self, beginning: bytes) -> bool:
        """Return whether the engine has read this in the present row."""
        return any(prompt.startswith(beginning) for prompt in self._row)

    @property
    def empty(self) -> bool:
        """Whether the reports say that the cache is empty."""
        row = len(self._row)
        if row < _SHORTEST_ROW:
            return False
        rate = min(max(self._rate, _LEAST_RATE), _MOST_RATE)
        return row * math.log(rate) <= _CHANCE
