"""Find the workers that stand: those that may get requests although others are judged out.

    there     healthy, in rotation, and not known to refuse connections
    out       there, but ejected, or with an open breaker that answers or breaks opened: requests can be the cause
    stands    there and not out; of more than half that are out, so many stand again that half do, the least bad first

So judgements take out at most half of the workers, and never the last one. That holds for all who may serve a request:
the workers of a pool, and those of them that serve a name which others of the pool do not (`routing.models.Section`).
A worker that is not there stands only while its breaker lets a probe pass.
"""

from __future__ import annotations

from collections.abc import Iterable

from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker

THERE, OUT, STANDS = 1, 2, 4
"""What a worker is; it is there, or out and there, or stands."""


def awaits_continue(workers: Iterable[Worker]) -> bool:
    """Return whether one of these workers would take requests, if the control plane had not paused it."""
    return any(w.paused and not (w.draining or w.withheld) and w.health is Health.HEALTHY for w in workers)


def alone(worker: Worker) -> int:
    """Return what a worker is as long as at most half are out: the sum of THERE, OUT and STANDS."""
    if not worker.in_rotation:
        return 0
    passes = worker.lets_pass
    if worker.unreached:
        return STANDS if passes else 0
    return THERE | OUT if worker.ejected or not passes else THERE | STANDS


def standing(workers: Iterable[Worker], health: Health) -> list[Worker]:
    """Return the workers of this health that stand."""
    those = [w for w in workers if w.health is health and w.in_rotation]
    there = [w for w in those if not w.unreached]
    out = [w for w in there if w.ejected or not w.lets_pass]
    most = len(there) // 2
    if len(out) > most:
        out.sort(key=lambda w: (w.lets_pass, -w.circuit.open_for, -w.circuit.reopen_at, w.order))
        del out[most:]
    return [w for w in those if (w.lets_pass if w.unreached else w not in out)]
