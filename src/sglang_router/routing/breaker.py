"""The circuit breaker of a worker, as a table: what is heard in which state, and what happens then.

                 success   failure   probe success   probe failure   time up     check passed      process lost  doubted
    CLOSED       clear     count     -               -               -           keep              clear         doubt
    OPEN         keep      keep      -               -               half-open   close if contact  close         keep
    HALF_OPEN    keep      keep      prove           reopen          -           close if contact  close         keep

    keep                 nothing changes; in OPEN and HALF_OPEN these are late answers of requests sent before
    clear                failures = 0
    count                failures + 1; at `threshold` the breaker opens for `timeout` seconds
    half-open            OPEN was long enough: one request at a time may pass, the probe
    prove                successes + 1; at `successes` in a row the breaker closes
    reopen               OPEN again for twice as long, at most `max_timeout` seconds
    close if contact     a passed health check closes what failed contacts opened, and nothing else
    close                CLOSED, with no failures
    doubt                failures = `threshold` - 1: the next failure opens it, the next success clears it
    -                    cannot happen: RuntimeError

Only served requests close what failed answers opened: an engine whose /health is fine while every generation fails is
no use. A passed check of /health does prove that a lost listener is back, so it closes what refused connections, and
connections that broke, opened.

An open breaker does not always take its worker out. Answers and breaks may be the doing of requests, so that breakers
opened by them, together with outlier ejection, never take out more than half of the workers that are there, nor the
last one: see `routing.pools`. Failed contacts (nobody listens there) have no such limit. The probe of a half-open
breaker is never a request that has failed at another worker, see `routing.router`.

Pure: rules and time are arguments. The fleet owns all circuits and is the only one to call `hear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sglang_router.routing.outcome import Hears
from sglang_router.routing.rules import BreakerRules
from sglang_router.routing.states import Breaker, BreakerEvent


class Circuit:
    """The breaker of one worker.

    failures   consecutive failures; 0 only in CLOSED
    successes  probes served in a row, in HALF_OPEN
    opened_by  the kind of the last failure
    open_for   seconds that it is, or was last, open
    reopen_at  when OPEN becomes HALF_OPEN, seconds of the caller's clock
    """

    __slots__ = ("failures", "open_for", "opened_by", "reopen_at", "state", "successes")

    def __init__(self) -> None:
        self.state = Breaker.CLOSED
        self.failures = 0
        self.successes = 0
        self.opened_by = Hears.NOTHING
        self.open_for = 0.0
        self.reopen_at = 0.0

    def __repr__(self) -> str:
        return f"<Circuit {self.state.value}, {self.failures} failures, {self.successes} successes>"

    def hear(self, event: BreakerEvent, rules: BreakerRules, now: float, kind: Hears = Hears.NOTHING) -> None:
        """Handle one event; `kind` says which kind of failure it was.

        Raises: RuntimeError, when the event cannot happen in this state.
        """
        act = TABLE.get((self.state, event))
        if act is None:
            raise RuntimeError(f"A breaker cannot hear {event.value!r} while it is {self.state.value}.")
        act(self, rules, now, kind)

    def open(self, seconds: float, now: float) -> None:
        """Open for `seconds`."""
        self.state = Breaker.OPEN
        self.open_for = seconds
        self.reopen_at = now + seconds
        self.successes = 0

    def close(self) -> None:
        """Close, and forget all failures."""
        self.state = Breaker.CLOSED
        self.failures = self.successes = 0
        self.opened_by = Hears.NOTHING


# -- what happens ------------------------------------------------------------------------------------------------------

Action = Callable[[Circuit, BreakerRules, float, Hears], None]


def keep(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Change nothing."""


def clear(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Reset the count of consecutive failures."""
    circuit.failures = 0


def count(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Count a failure; open when there are too many in a row."""
    circuit.failures += 1
    circuit.opened_by = kind
    if circuit.failures >= rules.threshold:
        circuit.open(rules.timeout, now)


def doubt(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Count all failures but the last one that opens it."""
    circuit.failures = max(circuit.failures, rules.threshold - 1)


def half_open(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Let one request, the probe, pass."""
    circuit.state = Breaker.HALF_OPEN


def prove(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Count a served probe; close when there are enough in a row."""
    circuit.successes += 1
    if circuit.successes >= rules.successes:
        circuit.close()


def reopen(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Open again, for twice as long as before, up to `max_timeout`."""
    circuit.failures += 1
    circuit.opened_by = kind
    circuit.open(min(circuit.open_for * 2, rules.max_timeout), now)


def close_if_contact(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Close if the breaker was opened by failed or broken connections, which a passed check disproves."""
    if circuit.opened_by is not Hears.ANSWER_FAILURE:
        circuit.close()


def close(circuit: Circuit, rules: BreakerRules, now: float, kind: Hears) -> None:
    """Close."""
    circuit.close()


TABLE: Final[dict[tuple[Breaker, BreakerEvent], Action]] = {
    (Breaker.CLOSED, BreakerEvent.SUCCESS): clear,
    (Breaker.CLOSED, BreakerEvent.FAILURE): count,
    (Breaker.CLOSED, BreakerEvent.CHECK_PASSED): keep,
    (Breaker.CLOSED, BreakerEvent.PROCESS_LOST): clear,
    (Breaker.CLOSED, BreakerEvent.DOUBTED): doubt,
    (Breaker.OPEN, BreakerEvent.SUCCESS): keep,
    (Breaker.OPEN, BreakerEvent.FAILURE): keep,
    (Breaker.OPEN, BreakerEvent.TIME_UP): half_open,
    (Breaker.OPEN, BreakerEvent.CHECK_PASSED): close_if_contact,
    (Breaker.OPEN, BreakerEvent.PROCESS_LOST): close,
    (Breaker.OPEN, BreakerEvent.DOUBTED): keep,
    (Breaker.HALF_OPEN, BreakerEvent.SUCCESS): keep,
    (Breaker.HALF_OPEN, BreakerEvent.FAILURE): keep,
    (Breaker.HALF_OPEN, BreakerEvent.PROBE_SUCCESS): prove,
    (Breaker.HALF_OPEN, BreakerEvent.PROBE_FAILURE): reopen,
    (Breaker.HALF_OPEN, BreakerEvent.CHECK_PASSED): close_if_contact,
    (Breaker.HALF_OPEN, BreakerEvent.PROCESS_LOST): close,
    (Breaker.HALF_OPEN, BreakerEvent.DOUBTED): keep,
}
"""What happens, by state and event; a pair that is missing cannot happen."""

LEG_ENDS: Final = {
    (True, False): BreakerEvent.SUCCESS,
    (False, False): BreakerEvent.FAILURE,
    (True, True): BreakerEvent.PROBE_SUCCESS,
    (False, True): BreakerEvent.PROBE_FAILURE,
}
"""What a breaker hears at the end of a leg, by (whether it succeeded, whether it was the probe)."""
