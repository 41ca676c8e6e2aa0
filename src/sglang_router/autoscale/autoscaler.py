"""Autoscaling as it runs: every second a reading, a decision, and a call of every actuator.

    Observer.read --> Scaler.decide --> Actuator.scale ...       every `interval` seconds, on the event loop
                           |
                           '--> the last decisions that changed something, for GET /scale

Nothing here blocks: actuators have tasks of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from sglang_router.autoscale.actuator import Actuator, told
from sglang_router.autoscale.command import ScaleCommand
from sglang_router.autoscale.observer import Observer
from sglang_router.autoscale.scaler import Decision, Scaler, ScalingRules
from sglang_router.autoscale.webhook import Webhook
from sglang_router.config import RouterArgs
from sglang_router.relay.clients import Unanswered
from sglang_router.routing.fleet import Fleet

log = logging.getLogger("sglang_router.scaling")

_KEPT = 100  # decisions
_PATIENCE = 3.0
"""Seconds for which more workers must be wanted before one is added; less when the cool-down is shorter."""
_EVERY = 1.0
"""Seconds between two decisions; less when the cool-down is shorter."""


class Leadership(Protocol):
    """Says which of several routers acts."""

    @property
    def leads(self) -> bool:
        """Whether this one does, now."""


class Autoscaler:
    """See the module. Add `observer` to the listeners. `wall` gives seconds since 1970.

    leader  set it where several routers decide: only the one that leads acts. None: this one is alone
    """

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
        self._acted = True
        self.leader: Leadership | None = None

    @property
    def desired(self) -> int:
        """The number of workers that there should be."""
        return self._scaler.desired

    @property
    def acts(self) -> bool:
        """Whether the actuators hear the decisions: of several routers, only the one that leads lets them."""
        return self.leader is None or self.leader.leads

    def still_acts(self) -> bool:
        """Return whether this router acts, for an actuator about to act on a decision of before. If not, that one drops
        it, and all of them hear the decision of the moment when this router acts again."""
        self._acted = self._acted and self.acts
        return self.acts

    def add(self, actuator: Actuator) -> None:
        """Add an actuator; it hears the decisions from now on."""
        self._actuators.append(actuator)

    def start(self) -> None:
        """Decide now, and then every `interval` seconds."""
        self._beat()

    async def close(self) -> None:
        """Stop deciding, and close the actuators. May be called more than once."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(actuator.close() for actuator in self._actuators))

    def explain(self) -> dict[str, Any]:
        """Return the answer of GET /scale: the decision and its reason, the rules, the last changes (newest first)."""
        last, now = self._last, self._clock()
        answer: dict[str, Any] = {"desired": self.desired, "current": None, "reason": "nothing decided yet"}
        if last is not None:
            answer |= told(last, self._last_at)
            answer["next"] = {
                "up_in_seconds": _rounded(self._scaler.next_up(now)),
                "down_in_seconds": _rounded(self._scaler.next_down(last, now)),
            }
        answer["rules"] = msgspec.to_builtins(self.rules)
        answer["acts"] = self.acts
        answer["actuators"] = [actuator.explain() for actuator in self._actuators]
        answer["decisions"] = list(reversed(self._history))
        return answer

    def _beat(self) -> None:
        if self._closed:
            return
        self._timer = self._loop.call_later(self._interval, self._beat)
        try:
            self._decide()
        except Exception:  # a fault here must not end autoscaling: the number of workers would never change again
            log.exception("autoscaling failed in the router")

    def _decide(self) -> None:
        now = self._clock()
        decision = self._scaler.decide(self.observer.read(now), now)
        self._last, self._last_at = decision, self._wall()
        if decision.changed:
            log.info("desired workers: %d, current: %d; %s", decision.desired, decision.current, decision.reason)
            self._history.append(told(decision, self._last_at))
        acted, self._acted = self._acted, self.acts
        if self._acted:
            if not acted and decision.desired != decision.current:  # whoever acted before may not have
                decision = msgspec.structs.replace(decision, changed=True)
            for actuator in self._actuators:
                actuator.scale(decision)


def autoscaler(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    fleet: Fleet,
    unanswered: Callable[[], Unanswered],
    clock: Callable[[], float],
) -> Autoscaler | None:
    """Make what the options ask for; None without --autoscale."""
    if args.scale_range is None:
        return None
    rules = rules_of(args)
    interval = min(_EVERY, max(rules.up_cooldown, 0.1))
    scaler = Autoscaler(loop, rules, Observer(fleet, unanswered, clock), clock, interval=interval)
    if args.scale_webhook is not None:
        secret = args.scale_webhook_secret
        scaler.add(
            Webhook(
                *(loop, args.scale_webhook, secret, rules, time.time),
                new_id=lambda: str(uuid.uuid4()),
                acts=scaler.still_acts,
            )
        )
    if args.scale_command is not None:
        scaler.add(ScaleCommand(loop, args.scale_command, acts=scaler.still_acts))
    return scaler


def rules_of(args: RouterArgs) -> ScalingRules:
    """Return the rules that the options set."""
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
