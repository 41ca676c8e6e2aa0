"""How many workers there should be: one decision per reading of the fleet. Pure: no clock, no I/O.

    Reading --> each measure wants a number --> the largest --> within MIN:MAX, step and cool-downs --> Decision

    measure   wants
    load      requests in flight / target_load
    queue     requests without a first token / target_queue
    tokens    prompt tokens that wait to be computed / target_tokens
    ttft      ready workers * time to first token / goal, at most twice the ready workers

The first three numbers are absolute, so workers that start are counted as there. The last one is relative to the
workers that produced the time. While a model loads for minutes, the queue grows and wants ever more workers, although
the demand is the same and will be met. So while workers start, no more are added than keep up with the arrivals
(`Flow`).

    up       when more were wanted in every reading of `patience` seconds: at most `step` at a time, then the cool-down
    down     when fewer were enough, with room to spare, in every reading of the down cool-down: one at a time
    to zero  when there was no request for that long; a held request brings the first worker back at once

"Room to spare" (`_ROOM`) keeps a constant load from moving the number up and down at a boundary: between the number
wanted and the number that is enough with room, nothing changes. The largest number needed within the down cool-down is
what Kubernetes calls the stabilization window.

While the control plane has paused workers (docs/rl.md), the number stays: requests that wait for them ask for no more
workers, and an engine that a trainer holds is not idle.

Workers found at the start count as wanted until the first cool-down is over: a restarted router does not begin by
removing workers. A worker that still starts is not removed for being idle.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import msgspec

from sglang_router.words import counted

_ROOM = 0.8
"""Share of a target that the remaining workers may reach after one was removed."""
_MOST_RATIO = 2.0
"""In a queue the time to first token grows without bound: it says that there are too few workers, not how many."""
_REMOVALS = 10
"""Removals that fit into one down cool-down: the effect of each should show before the next."""
_SETTLING = 10.0
"""Seconds after the start in which workers may still be found, however short the cool-down is."""
_FLOW_WINDOW = 60.0
_SHORTEST_FLOW = 10.0
"""Seconds over which arrivals are compared with ends, and the fewest seconds that say anything."""


class ScalingRules(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and targets.

    fewest, most  bounds of the number of workers (--autoscale MIN:MAX)
    target_*      per worker
    ttft_goal     seconds; None: the time to first token is no measure
    step          most workers added at a time
    up_cooldown   seconds between two additions
    down_cooldown seconds in which fewer must be enough before one is removed
    patience      seconds in which more must be wanted before one is added
    """

    fewest: int = 1
    most: int = 8
    target_load: float = 32.0
    target_queue: float = 4.0
    target_tokens: float = 65536.0
    ttft_goal: float | None = None
    step: int = 2
    up_cooldown: float = 15.0
    down_cooldown: float = 300.0
    patience: float = 3.0


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet at one moment.

    ready    workers that take requests
    coming   workers that start
    leaving  workers that drain for good, or get no requests because their source says so
    paused   workers that the control plane has paused, whatever else they are
    failed   workers that are unhealthy or given up
    load     requests in flight on workers, and held ones
    held     requests queued because no worker is ready
    queue    requests without a first token, the held ones included
    tokens   prompt tokens that wait to be computed
    ttft     seconds to the first token that one stream in ten exceeds; None: not known
    inflow   requests that came for each one that ended, see `Flow`; None: not known
    idle     seconds since the last request
    """

    ready: int = 0
    coming: int = 0
    leaving: int = 0
    paused: int = 0
    failed: int = 0
    load: int = 0
    held: int = 0
    queue: int = 0
    tokens: int = 0
    ttft: float | None = None
    inflow: float | None = None
    idle: float = 0.0

    @property
    def current(self) -> int:
        """Workers that are ready or start."""
        return self.ready + self.coming


class Want(msgspec.Struct, frozen=True):
    """What one measure asks for: `wants` workers meet its target, `enough` workers meet it with room to spare."""

    measure: str
    value: float
    target: float
    wants: int
    enough: int

    def __str__(self) -> str:
        said = _SENTENCES[self.measure].format(value=self.value, target=self.target, s="" if self.value == 1 else "s")
        return f"{self.measure}: {said}, wants {self.wants}"


class Decision(msgspec.Struct, frozen=True):
    """How many workers there should be, and why.

    changed  the number is another one than before, or a worker failed: actuators must be told
    at       moment of the reading
    """

    desired: int
    current: int
    reason: str
    changed: bool
    wants: tuple[Want, ...]
    reading: Reading
    at: float


_SENTENCES = {
    "load": "{value:g} request{s} in flight, target {target:g} per worker",
    "queue": "{value:g} queued, target {target:g} per worker",
    "tokens": "{value:.0f} prompt tokens to compute, target {target:.0f} per worker",
    "ttft": "{value:.3g} s until the first token, goal {target:g} s",
}


def wants_of(reading: Reading, rules: ScalingRules) -> tuple[Want, ...]:
    """Return what each measure asks for, not yet within the bounds."""
    found = [
        Want(name, value, target, _ceil(value / target), _ceil(value / (target * _ROOM)))
        for name, value, target in (
            ("load", reading.load, rules.target_load),
            ("queue", reading.queue, rules.target_queue),
            ("tokens", reading.tokens, rules.target_tokens),
        )
    ]
    if rules.ttft_goal is not None and reading.ttft is not None and reading.load and reading.ready:
        ratio = reading.ttft / rules.ttft_goal
        wants, enough = (_ceil(reading.ready * min(r, _MOST_RATIO)) for r in (ratio, ratio / _ROOM))
        found.append(Want("ttft", reading.ttft, rules.ttft_goal, wants, enough))
    return tuple(found)


def _ceil(workers: float) -> int:
    return math.ceil(workers - 1e-9)  # 2.0000000001 workers are two


class _Extreme:
    """The largest (or smallest) number of the last `span` seconds, and when each number was last said.

    A number that is not larger than a later one can never be the largest again. So the kept numbers fall from left to
    right, and there are never more entries than different numbers.
    """

    def __init__(self, span: float, beats: Callable[[int, int], bool]) -> None:
        self._span = span
        self._beats = beats
        self._kept: deque[tuple[float, int]] = deque()

    def say(self, number: int, now: float) -> int:
        """Add a number; return the extreme."""
        kept = self._kept
        while kept and not self._beats(kept[-1][1], number):
            kept.pop()
        kept.append((now, number))
        while kept[0][0] <= now - self._span and len(kept) > 1:
            kept.popleft()
        return kept[0][1]

    def last(self, holds: Callable[[int], bool]) -> float:
        """Return when a number for which `holds` is true was last said; -inf for never."""
        return next((at for at, number in reversed(self._kept) if holds(number)), -math.inf)


class Flow:
    """How many requests came for each one that ended, lately.

    1 while the workers keep up; 4 when four times as many workers are needed. The window is emptied when the number of
    ready workers changes.
    """

    def __init__(self) -> None:
        self._ready = 0
        self._seen: deque[tuple[float, int, int]] = deque()  # moment; requests that ended and came until then

    def say(self, ready: int, ended: int, load: int, now: float) -> float | None:
        """Take the numbers of all ended and of the present requests; return the flow, None while it is not known."""
        if ready != self._ready:
            self._ready = ready
            self._seen.clear()
        seen = self._seen
        seen.append((now, ended, ended + load))
        while seen[0][0] < now - _FLOW_WINDOW:
            seen.popleft()
        began, ended_then, came_then = seen[0]
        if now - began < _SHORTEST_FLOW or ended == ended_then:
            return None
        return (ended + load - came_then) / (ended - ended_then)


class Scaler:
    """Decides; see the module. Time is an argument that must not go back.

    desired  the number of the last decision
    """

    def __init__(self, rules: ScalingRules) -> None:
        self.rules = rules
        self.desired = rules.fewest
        self._started: float | None = None
        self._up_at = -math.inf  # the last addition
        self._down_at = -math.inf  # the last removal
        self._failed = 0  # failed workers of the last reading
        self._wanted = _Extreme(rules.patience, lambda a, b: a < b)  # the smallest number wanted lately
        self._needed = _Extreme(rules.down_cooldown, lambda a, b: a > b)  # the largest number needed lately

    def decide(self, reading: Reading, now: float) -> Decision:
        """Return the decision about a reading. Call it every second or two."""
        rules, before = self.rules, self.desired
        first = self._started is None
        found = self._adopt(reading, now)
        wants = wants_of(reading, rules)
        top = max(wants, key=lambda want: want.wants)
        due, least = self._within(self._due(top, reading)), self._within(max(want.enough for want in wants))
        if reading.paused:
            due = least = self.desired
        wanted, needed = self._wanted.say(due, now), self._needed.say(least, now)
        if reading.paused:
            reason = f"paused: {counted(reading.paused, 'worker')} by the control plane, so that the number stays"
        elif self.desired == 0 and reading.held:
            reason = self._wake(reading, top, now)
        elif due > self.desired:
            reason = self._up(top, due, wanted, now)
        elif needed < self.desired:
            reason = self._down(needed, reading, now)
        else:
            reason = self._keep(top, needed, reading)
        if found:
            reason = f"found: {counted(reading.current, 'worker')} at the start; {reason}"
        lost = reading.failed > self._failed and reading.current < self.desired
        self._failed = reading.failed
        if lost:
            reason = f"failed: {reading.failed} down or unhealthy, {reading.current} of {self.desired} left; {reason}"
        changed = lost or self.desired != (reading.current if first else before)
        return Decision(self.desired, reading.current, reason, changed, wants, reading, now)

    # -- the moves ---------------------------------------------------------------------------------------------------

    def _adopt(self, reading: Reading, now: float) -> bool:
        """Take the workers found at the start for the number wanted until now; return whether that raised it."""
        if self._started is None:
            self._started = now
            self._wanted.say(self.desired, now)
        found = self._within(reading.current)
        over = now - self._started >= max(self.rules.down_cooldown, _SETTLING) or self._down_at > -math.inf
        if over or found <= self.desired:
            return False
        self.desired = found
        self._needed.say(found, now)
        return True

    def _due(self, top: Want, reading: Reading) -> int:
        """Return what is wanted; while workers start, no more than keep up with the arrivals."""
        if not reading.coming or not reading.ready:
            return top.wants
        return min(top.wants, max(self.desired, _ceil(reading.ready * (reading.inflow or 0.0) / _ROOM)))

    def _wake(self, reading: Reading, top: Want, now: float) -> str:
        self.desired = max(1, min(self._within(top.wants), self.rules.step))
        self._up_at = now
        return f"wake: {reading.held} queued and no worker is ready"

    def _up(self, top: Want, due: int, wanted: int, now: float) -> str:
        rules = self.rules
        if wanted <= self.desired:
            return f"{top}; added when this lasts {rules.patience:g} s"
        if now - self._up_at < rules.up_cooldown:
            return f"{top}; next addition in {self._up_at + rules.up_cooldown - now:.0f} s"
        self.desired = min(wanted, self.desired + rules.step)
        self._up_at = now
        if self.desired < wanted:
            return f"{top}; {rules.step} at a time"
        if top.wants > due:
            return f"{top}; MAX is {rules.most}" if due == rules.most else f"{top}; {due} keep up with the arrivals"
        return str(top)

    def _down(self, needed: int, reading: Reading, now: float) -> str:
        rules = self.rules
        if self.desired == 1 and reading.coming:
            return "idle: the last worker still starts"
        if self.desired == 1 and reading.idle < rules.down_cooldown:
            return f"idle for {reading.idle:.0f} s; the last worker is removed after {rules.down_cooldown:g} s"
        if now < (pause := self._down_at + rules.down_cooldown / _REMOVALS):
            return f"fewer: at most {needed} needed; next removal in {pause - now:.0f} s"
        self.desired -= 1
        self._down_at = now
        if self.desired == 0:
            return f"idle: no request for {reading.idle:.0f} s"
        return f"fewer: at most {needed} needed in {rules.down_cooldown:g} s"

    def _keep(self, top: Want, needed: int, reading: Reading) -> str:
        if not top.wants and not self.desired:
            return "idle: nothing to do"
        if self.desired == self.rules.fewest and top.wants <= self.desired:
            return f"{top}; MIN is {self.rules.fewest}" if top.wants < self.desired else str(top)
        if top.wants > self.desired:
            full = self.desired == self.rules.most
            return f"{top}; MAX is {self.rules.most}" if full else f"{top}; {reading.coming} starting"
        if top.enough < self.desired:
            return f"{top}; {needed} needed within the last {self.rules.down_cooldown:g} s"
        return f"{top}; {self.desired} leave room to spare" if top.wants < self.desired else str(top)

    def _within(self, number: int) -> int:
        return max(self.rules.fewest, min(number, self.rules.most))

    # -- what may come next ------------------------------------------------------------------------------------------

    def next_up(self, now: float) -> float | None:
        """Return the seconds until a worker may be added, if one is wanted then; None at the maximum."""
        if self.desired >= self.rules.most:
            return None
        return max(0.0, self._up_at + self.rules.up_cooldown - now) if self.desired else 0.0

    def next_down(self, decision: Decision, now: float) -> float | None:
        """Return the seconds until a worker may be removed if the need stays as at the last decision.

        None: the need must fall first.
        """
        rules = self.rules
        last = self._needed.last(lambda number: number >= self.desired)
        if self.desired <= rules.fewest or last >= decision.at:
            return None
        at = max(last + rules.down_cooldown, self._down_at + rules.down_cooldown / _REMOVALS)
        if self.desired == 1:
            at = max(at, decision.at - decision.reading.idle + rules.down_cooldown)
        return max(0.0, at - now)
