"""How quick a worker is: figures that are fitted to what was measured of it, and of its pool.

    prompts    seconds = requests x per_item + uncached bytes x per_unit        `Pace`
    answers    seconds that each further request adds to an answer              `AnswerPace`

Older measurements fade with each new one. A worker's own figures contain a little of the mean of its pool: a new worker
has these until it has its own, and one that gets no requests goes back to them. Until anything is measured, the figures
are those of a published calibration (6 ms and 0.35 ms a request for each decode step), but for the reading of a prompt:
32,000 tokens/s, not 8,000. Who guesses that too slow keeps the first sessions together, where the prompt that they have
in common was read first, and sessions stay where they began; who guesses it too quick reads some prompts twice.
"""

from __future__ import annotations

from typing import Final

BYTES_PER_TOKEN: Final = 4.0
"""Bytes of routing text for one token, until it is known."""
_KEPT: Final = 0.95
"""What is left of older measurements with each new one."""
_OF_POOL: Final = 2.0
"""So many measurements count the figures of the pool for as much as."""
_MOST_FACTOR: Final = 4.0
"""A measurement that is further from what was expected counts as so many times that, or as that part of it."""
_TRUSTED: Final = 4.0
"""Measurements from which on there is something to be expected."""
_WIDEST_FACTOR: Final = 1000.0
"""The same before that: what an engine tells of itself may be nonsense."""
_MOST_UNITS: Final = float(1 << 24)
"""A measurement of more units counts as one of so many, so that none stands for ever."""
_STEADY: Final = 0.002
"""How much the last figures count, so that measurements which cannot tell items from units change both alike."""
_LEAST: Final = 0.001
"""The least part of the whole that items or units are."""
_ALONE: Final = 16.0
"""Requests that the fixed part of a decode step weighs as much as."""
_TOKENS_PER_ITEM: Final = 64.0
_PER_PROMPT: Final = 0.006
_PER_TOKEN: Final = 1.0 / 32000.0
_PER_REQUEST: Final = 0.035


class Pace:
    """seconds = items x per_item + units x per_unit, fitted to measurements; older ones fade.

    scale  units that weigh as much as one item

    Each measurement is weighted with 1 / (items x scale + units), which makes the sum of what the figures say that of
    what was measured: a mean rate that knows of a fixed part. Both figures are positive.
    """

    __slots__ = ("_ii", "_is", "_iu", "_us", "_uu", "per_item", "per_unit", "scale", "weight")

    def __init__(self, scale: float, per_item: float, per_unit: float) -> None:
        self.scale = scale
        self.per_item = per_item
        self.per_unit = per_unit
        self.weight = 0.0  # measurements that are left
        self._ii = self._iu = self._uu = self._is = self._us = 0.0

    def __repr__(self) -> str:
        return f"<Pace {self.per_item:.3g} s each + {self.per_unit:.3g} s a unit, {self.weight:.1f} measurements>"

    def expect(self, others: Pace) -> None:
        """Begin with the figures of others."""
        self.scale, self.per_item, self.per_unit = others.scale, others.per_item, others.per_unit

    def count_in(self, per_token: float) -> None:
        """Take how many units a token has. Call it before anything is measured."""
        self.scale = _TOKENS_PER_ITEM * per_token
        self.per_unit = _PER_TOKEN / per_token

    def expected(self, items: float, units: float) -> float:
        """Return the seconds for so much."""
        return items * self.per_item + units * self.per_unit

    def add(self, items: float, units: float, seconds: float, common: Pace | None = None) -> None:
        """Add one measurement. common: the pace of all, which fills in for what is not known here."""
        if units > _MOST_UNITS:
            part = _MOST_UNITS / units
            items, units, seconds = items * part, _MOST_UNITS, seconds * part
        expected = self.expected(items, units)
        factor = _MOST_FACTOR if self.weight > _TRUSTED or common is not None else _WIDEST_FACTOR
        seconds = min(max(seconds, expected / factor), expected * factor)
        self.fade(_KEPT)
        share = 1.0 / (items * self.scale + units)
        self.weight += 1.0
        self._ii += items * items * share
        self._iu += items * units * share
        self._uu += units * units * share
        self._is += items * seconds * share
        self._us += units * seconds * share
        self.settle(common)

    def rescale(self, items: float, units: float, seconds: float, common: Pace | None = None) -> None:
        """Add one measurement that says nothing of what an item takes beside a unit: both figures follow it alike."""
        of_items, of_units = items * self.per_item, units * self.per_unit
        factor = min(max(seconds / (of_items + of_units), 1.0 / _MOST_FACTOR), _MOST_FACTOR)
        self.fade(_KEPT)
        share = 1.0 / (items * self.scale + units)
        self.weight += 1.0
        self._ii += items * items * share
        self._uu += units * units * share
        self._is += items * of_items * factor * share
        self._us += units * of_units * factor * share
        self.settle(common)

    def fade(self, share: float) -> None:
        """Let only this share of the measurements count from now on."""
        self.weight *= share
        self._ii *= share
        self._iu *= share
        self._uu *= share
        self._is *= share
        self._us *= share

    def settle(self, common: Pace | None = None) -> None:
        """Work out the figures."""
        ii, iu, uu, is_, us, weight = self._ii, self._iu, self._uu, self._is, self._us, self.weight
        if common is not None and common.weight > 0.0:
            part = _OF_POOL / common.weight
            ii += common._ii * part
            iu += common._iu * part
            uu += common._uu * part
            is_ += common._is * part
            us += common._us * part
            weight += _OF_POOL
        scale = self.scale
        items, units, seconds = scale * ii + iu, scale * iu + uu, scale * is_ + us
        if seconds <= 0.0:
            return
        hold_items, hold_units = _STEADY * ii + 1e-12, _STEADY * uu + 1e-12
        ii += hold_items
        is_ += hold_items * self.per_item
        uu += hold_units
        us += hold_units * self.per_unit
        determinant = ii * uu - iu * iu
        per_item = (is_ * uu - us * iu) / determinant
        per_unit = (us * ii - is_ * iu) / determinant
        if items <= 0.0 or units <= 0.0:  # of what was not there, nothing is learnt
            per_item = seconds / items if items > 0.0 else self.per_item
            per_unit = seconds / units if units > 0.0 else self.per_unit
        elif per_item < _LEAST * seconds / items:
            per_item = _LEAST * seconds / items
            per_unit = (1.0 - _LEAST) * seconds / units
        elif per_unit < _LEAST * seconds / units:
            per_unit = _LEAST * seconds / units
            per_item = (1.0 - _LEAST) * seconds / items
        self.per_item, self.per_unit = per_item, per_unit


class AnswerPace:
    """How long answers take, and how much longer beside each further request; older measurements fade.

    per_request  seconds: mean seconds of an answer / (mean number of requests beside it + _ALONE)

    The two parts of a decode step, the fixed one and that per request, cannot be told apart while loads hardly differ.
    So the fixed part is believed to weigh as much as `_ALONE` requests.
    """

    __slots__ = ("_beside", "_seconds", "per_request", "weight")

    def __init__(self) -> None:
        self.weight = 0.0
        self._seconds = 0.0
        self._beside = 0.0
        self.per_request = _PER_REQUEST

    def __repr__(self) -> str:
        return f"<AnswerPace {self.per_request:.3g} s a request beside them, {self.weight:.1f} measurements>"

    def expect(self, others: AnswerPace) -> None:
        """Begin with the figure of others."""
        self.per_request = others.per_request

    def add(self, seconds: float, beside: float, common: AnswerPace | None = None) -> None:
        """Add the mean of some answers. common: those of all, which fill in for what is not known here."""
        self.fade(_KEPT)
        self.weight += 1.0
        self._seconds += seconds
        self._beside += beside
        self.settle(common)

    def fade(self, share: float) -> None:
        """Let only this share of the measurements count from now on."""
        self.weight *= share
        self._seconds *= share
        self._beside *= share

    def settle(self, common: AnswerPace | None = None) -> None:
        """Work out the figure."""
        weight, seconds, beside = self.weight, self._seconds, self._beside
        if common is not None and common.weight > 0.0:
            part = _OF_POOL / common.weight
            weight += _OF_POOL
            seconds += common._seconds * part
            beside += common._beside * part
        if weight > 0.0:
            self.per_request = seconds / (beside + _ALONE * weight)


class Paces:
    """How quick a worker is, or the mean of a pool's workers: with prompts, and with answers.

    gap  of a pool: mean seconds between two requests, at the worker that got the last one; 1 before there are two
    """

    __slots__ = ("answers", "gap", "prompts")

    def __init__(self) -> None:
        self.prompts = Pace(_TOKENS_PER_ITEM * BYTES_PER_TOKEN, _PER_PROMPT, _PER_TOKEN / BYTES_PER_TOKEN)
        self.answers = AnswerPace()
        self.gap = 1.0

    def __repr__(self) -> str:
        return f"<Paces prompts {self.prompts!r}, answers {self.answers!r}>"
