"""The record of a decision: which worker a request got and why, and what came of it.

    DecisionRecord     one request
      DecisionAttempt  one leg of it, with what was looked at; only where that was recorded
        Considered     a worker that was looked at
        ShadowChoice   what the policy of --shadow-policy would have done

No part of a prompt is in it. Ids are at most 256 bytes long, sessions are cut, so that a record has a bounded size. The
records hold no reference to anything alive, and the cyclic garbage collector does not see them: thousands are kept.
"""

from __future__ import annotations

import msgspec

from sglang_router.routing.considered import Considered
from sglang_router.routing.roles import REGULAR


class ShadowChoice(msgspec.Struct, gc=False):
    """What another policy would have done with the request.

    worker          that it would have chosen; branch: its reason
    matched         bytes of the routing text that it believes to be cached there
    actual_matched  and at the worker that got the request
    cost            that it sees there; null for a policy without costs
    actual_cost     and at the worker that got the request
    """

    policy: str
    worker: str
    branch: str
    matched: int = 0
    actual_matched: int = 0
    cost: float | None = None
    actual_cost: float | None = None


class DecisionAttempt(msgspec.Struct, gc=False):
    """A leg.

    attempt      1 for the first; the two legs of a pair have the same
    at           when it was planned, seconds after the request was complete
    matched      bytes of the routing text that the worker was believed to have cached, of `total`
    text_bytes   of the routing text
    candidates   how many workers the policy could choose from
    considered   at most 32 of them, the chosen one among them
    excluded     at most 32 of the other workers, with reasons
    outcome      how it ended, of a pair how both did; "" until then
    role         of its worker: "prefill" and "decode" in a pair
    """

    attempt: int
    at: float
    worker: str
    branch: str
    matched: int
    total: int
    text_bytes: int
    candidates: int
    considered: list[Considered]
    excluded: list[Considered]
    outcome: str = ""
    shadow: ShadowChoice | None = None
    role: str = REGULAR


class DecisionRecord(msgspec.Struct, gc=False):
    """A request.

    id                 of the request
    at                 when it was complete, seconds since 1970
    endpoint           name of the endpoint
    model              as the request names it; "" when it names none
    session            what the client calls its session; "" when it does not
    stream             it asked for a stream
    body_bytes         of the request's body
    policy             that chose
    worker             of the last leg; null when there was none. Of a pair it is the decode worker
    branch             the policy's reason, one word
    matched            bytes of the routing text that the worker was believed to have cached, of `total`
    retries            attempts after the first
    outcome            how the last leg ended; "running", or "unrouted" when no worker was asked
    status             that the client was sent; 0: nothing
    code               of the router's error; "" for a worker's own answer
    first_byte         seconds from the complete request to the first byte of the answer; null when there was none
    duration           seconds to the last byte; of a running request, until now
    prompt_tokens      that the engine reported; null when it did not
    cached_tokens      those of them that it had cached
    completion_tokens  that it made
    served_model       what the engine was told instead of `model`: an alias, or a fallback; null: the same
    prefill_worker     that read the prompt, in a pair; null without one
    prefill_branch     and prefill_matched: as above, of that one
    attempts           each leg with what was looked at; those for which that was recorded
    """

    id: str
    at: float
    endpoint: str
    model: str
    session: str
    stream: bool
    body_bytes: int
    policy: str
    worker: str | None
    branch: str
    matched: int
    total: int
    retries: int
    outcome: str
    status: int
    code: str
    first_byte: float | None
    duration: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    served_model: str | None = None
    prefill_worker: str | None = None
    prefill_branch: str = ""
    prefill_matched: int = 0
    attempts: tuple[DecisionAttempt, ...] = ()
