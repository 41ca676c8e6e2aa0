"""Automatic scaling as it runs: every second a reading, a decision, and word to those who act on it.

    Observer.read --> Scaler.decide --> Actuator.scale ...       every `interval` seconds, on the event loop
                           |
                           '--> the last decisions that changed something, for GET /scale

Nothing here waits: actuators have tasks of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_router.core.scaling import Decision, Scaler, ScalingRules
from sglang_router.scaling.actuator import Actuator, told
from sglang_router.scaling.command import Command
from sglang_router.scaling.observer import Observer
from sglang_router.scaling.webhook import Webhook

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_router.config import RouterArgs
    from sglang_router.core.fleet import Fleet
    from sglang_router.net.service import Unanswered

log = logging.getLogger("sglang_router.scaling")

_KEPT = 100
_PATIENCE = 3.0
_EVERY = 1.0
"""Seconds between two decisions; less when the cool-down is shorter than that."""


class Autoscaler:
    """See the module. `observer` is to be added to the listeners; `wall` gives seconds since 1970."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        rules: ScalingRules,
        observer: Observer,
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
        interval: float = _EVERY,
    ) -> None:
        self.rules = rules
        self.observer = observer
        self._loop = loop
        self._scaler = Scaler(rules)
        self._clock = clock
        self._wall = wall
        self._interval = interval
        self._actuators: list[Actuator] = []
        self._history: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._last: Decision | None = None
        self._last_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def desired(self) -> int:
        """How many workers there should be."""
        return self._scaler.desired

    def add(self, actuator: Actuator) -> None:
        """Has one more act on decisions from now on."""
        self._actuators.append(actuator)

    def start(self) -> None:
        """Decides at once, and from now on."""
        self._beat()

    async def close(self) -> None:
        """Decides nothing any more. May be called more than once."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(actuator.close() for actuator in self._actuators))

    def explain(self) -> dict[str, Any]:
        """The answer of GET /scale: what should be and why, by which rules, and the last changes, newest first."""
        last, now = self._last, self._clock()
        answer: dict[str, Any] = {"desired": self.desired, "current": None, "reason": "nothing decided yet"}
        if last is not None:
            answer |= told(last, self._last_at)
            answer["next"] = {
                "up_in_seconds": _rounded(self._scaler.next_up(now)),
                "down_in_seconds": _rounded(self._scaler.next_down(last, now)),
            }
        answer["rules"] = msgspec.to_builtins(self.rules)
        answer["actuators"] = [actuator.explain() for actuator in self._actuators]
        answer["decisions"] = list(reversed(self._history))
        return answer

    def _beat(self) -> None:
        if self._closed:
            return
        self._timer = self._loop.call_later(self._interval, self._beat)
        try:
            self._decide()
        except Exception:  # a fault here must not end the scaling: the number would stay for ever
            log.exception("the scaling failed in the router")

    def _decide(self) -> None:
        now = self._clock()
        decision = self._scaler.decide(self.observer.read(now), now)
        self._last, self._last_at = decision, self._wall()
        if decision.changed:
            log.info("workers wanted: %d, there: %d; %s", decision.desired, decision.current, decision.reason)
            self._history.append(told(decision, self._last_at))
        for actuator in self._actuators:
            actuator.scale(decision)


def autoscaler(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    fleet: Fleet,
    unanswered: Callable[[], Unanswered],
    clock: Callable[[], float],
) -> Autoscaler | None:
    """What the options ask for: None without --autoscale."""
    if args.scale_range is None:
        return None
    rules = rules_of(args)
    interval = min(_EVERY, max(rules.up_cooldown, 0.1))
    scaler = Autoscaler(loop, rules, Observer(fleet, unanswered, clock), clock, interval=interval)
    if args.scale_webhook is not None:
        secret = args.scale_webhook_secret
        webhook = Webhook(loop, args.scale_webhook, secret, rules, time.time, lambda: str(uuid.uuid4()))
        scaler.add(webhook)
    if args.scale_command is not None:
        scaler.add(Command(loop, args.scale_command))
    return scaler


def rules_of(args: RouterArgs) -> ScalingRules:
    """The rules that the options make."""
    fewest, most = args.scale_range or (1, 1)
    return ScalingRules(
        fewest=fewest,
        most=most,
        target_load=args.autoscale_target_load,
        target_queue=args.autoscale_target_queue,
        target_tokens=args.autoscale_target_tokens,
        ttft_goal=args.autoscale_ttft_goal_secs,
        step=args.autoscale_step,
        up_cooldown=args.autoscale_up_cooldown_secs,
        down_cooldown=args.autoscale_down_cooldown_secs,
        patience=min(_PATIENCE, args.autoscale_up_cooldown_secs),
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
