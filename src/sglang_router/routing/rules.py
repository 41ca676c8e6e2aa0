"""The rules of routing: frozen records, made from the options at the start. No logic.

They are msgspec Structs, which mypyc cannot compile, so they stand apart from the code that reads them.
"""

from __future__ import annotations

import msgspec

from sglang_router.routing.prefix_tree.informed import KVCaches


class BreakerRules(msgspec.Struct, frozen=True):
    """When a breaker opens and closes, see `routing.breaker`.

    threshold    consecutive failures that open it
    successes    consecutive probes that must be served to close it
    timeout      seconds open the first time; doubled each time a probe fails, to max_timeout
    """

    threshold: int = 4
    successes: int = 1
    timeout: float = 10.0
    max_timeout: float = 60.0
    enabled: bool = True


class HealthRules(msgspec.Struct, frozen=True):
    """Health checks. Thresholds in consecutive checks; interval and timeout in seconds; endpoint is the path asked."""

    failure_threshold: int = 3
    success_threshold: int = 2
    interval: float = 10.0
    timeout: float = 5.0
    endpoint: str = "/health"
    enabled: bool = True


class OutlierRules(msgspec.Struct, frozen=True):
    """When a worker is ejected as an outlier, see `routing.outliers`.

    window          seconds that are looked back on
    min_volume      answers in a window without which no worker is judged
    failure_rate    share of failures from which on a worker is bad
    failure_factor  and how many times the others' rate that must be
    latency_factor  how many times later than the others' its first byte comes; infinity: latency is not judged
    latency_above   and how many seconds later that must be
    ejection        seconds the first time; doubled each time it follows closely, to max_ejection
    max_share       of the workers that may be ejected
    """

    window: float = 30.0
    min_volume: int = 20
    failure_rate: float = 0.5
    failure_factor: float = 3.0
    latency_factor: float = 3.0
    latency_above: float = 1.0
    ejection: float = 30.0
    max_ejection: float = 300.0
    max_share: float = 0.5


class RetryBudgetRules(msgspec.Struct, frozen=True):
    """ratio: retries per request; floor: retries per second that are always free; window in seconds."""

    ratio: float = 0.2
    floor: float = 3.0
    window: float = 10.0


class RetryRules(msgspec.Struct, frozen=True):
    """per_worker: tries on one worker; total: retries of one request; backoff in seconds, jitter a share of it."""

    per_worker: int = 3
    total: int = 6
    initial_backoff: float = 0.05
    max_backoff: float = 30.0
    multiplier: float = 1.5
    jitter: float = 0.2


class QueueRules(msgspec.Struct, frozen=True):
    """What may begin, and what may wait, see `routing.queue`; None: no limit.

    max_concurrent  requests in flight at once, >= 1
    queue_size      requests that may wait for a place or for room at a worker; 0: none
    rate            requests per second, > 0
    burst           requests that may come at once after a pause, >= 1; None: one second's worth
    queue_timeout   seconds that a request may wait for a place or for room at a worker
    start_timeout   seconds that a request may wait for a worker to start
    most_starting   requests that may wait for a worker to start
    session_timeout seconds that a request may wait to begin a session
    paused_timeout  seconds that a request may wait for a paused worker to continue
    most_paused     requests that may wait for that
    aging           seconds of waiting that are worth one point of priority, > 0
    """

    max_concurrent: int | None = None
    queue_size: int = 100
    rate: float | None = None
    burst: float | None = None
    queue_timeout: float = 60.0
    start_timeout: float = 10.0
    most_starting: int = 4096
    session_timeout: float = 600.0
    paused_timeout: float = 600.0
    most_paused: int = 65536
    aging: float = 1.0


class LimitRules(msgspec.Struct, frozen=True):
    """What one client or one model may have, see `routing.quotas`; None: no limit.

    requests_per_second  > 0
    burst                requests that may come at once after a pause, >= 1; None: one second's worth
    max_concurrent       requests in flight, >= 1
    tokens_per_minute    of prompts and answers together, > 0
    """

    requests_per_second: float | None = None
    burst: float | None = None
    max_concurrent: int | None = None
    tokens_per_minute: float | None = None


NO_LIMITS = LimitRules()


class ClientRules(msgspec.Struct, frozen=True):
    """What applies to the clients with one name.

    models        those that they may ask for, by the JSON text of their names; None: all
    priority      of their requests, unless they ask for another one; None: that of the model
    max_priority  highest that they may ask for; None: that of all clients, or `priority` if it is higher
    """

    limits: LimitRules = NO_LIMITS
    models: frozenset[bytes] | None = None
    priority: int | None = None
    max_priority: int | None = None


class ModelRules(msgspec.Struct, frozen=True):
    """What applies to all requests for one model. priority: theirs, unless client or key say another one."""

    limits: LimitRules = NO_LIMITS
    priority: int = 0


class PairRules(msgspec.Struct, frozen=True):
    """Where workers do one half of a request each, see `routing.pairs` and `routing.pairing`.

    uncached_tokens  tokens of a prompt that are not cached up to which one worker does all of it; 0: none does
    by_cost          so it is also where that is believed to take less time
    connector        how workers hand over: "sglang" or "nixl"; "": as their engines tell
    pushes           prefill workers find the decode worker by the request's id, which must be theirs alone (Nixl push)
    """

    uncached_tokens: int = 0
    by_cost: bool = False
    connector: str = ""
    pushes: bool = False


class FleetRules(msgspec.Struct, frozen=True):
    """What applies to all workers, see `routing.fleet` and `routing.pools`.

    startup_timeout  seconds after which a worker that is still starting counts as unhealthy
    slow_start       seconds in which a worker with an empty cache gets a growing share of requests; 0: none
    most_load        requests in flight that one worker may have; 0: no limit
    elastic          the autoscaler starts a worker when there is none, so that requests may wait for it
    outliers         None: no worker is ejected
    """

    breaker: BreakerRules = BreakerRules()
    startup_timeout: float = 1800.0
    slow_start: float = 30.0
    most_load: int = 0
    elastic: bool = False
    outliers: OutlierRules | None = OutlierRules()


class PolicySettings(msgspec.Struct, frozen=True):
    """The options that policies read; each policy takes what concerns it. Sizes in bytes, times in seconds.

    kv_caches  what workers say of their caches; None: they are not asked
    """

    cache_threshold: float = 0.5
    balance_abs_threshold: int = 32
    balance_rel_threshold: float = 1.0001
    max_tree_size: int = 1 << 24
    max_idle: float = 14400.0
    assignment_mode: str = "random"
    prefix_hash_bytes: int = 1024
    hash_load_factor: float = 1.25
    cost_load_cap: float = 0.0
    kv_caches: KVCaches | None = None
