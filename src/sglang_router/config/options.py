"""The options that do something, in the order in which --help and the documentation show them.

One line (or a few) each: see `option.py` for what follows from it. Names are those of the reference router,
and so are the defaults of its first public version where it had the option. Durations may be fractions.
"""

# ruff: noqa: RUF009 - `option` declares a field, as `dataclasses.field` does

from __future__ import annotations

from dataclasses import dataclass

from sglang_router.config import checks, keys
from sglang_router.config.checks import above, at_least, between
from sglang_router.config.kinds import ClientKeys, ControlKeys
from sglang_router.config.option import alias, option

# also the names in `core.policies.POLICIES`, which this module may not import; a test holds the two equal
POLICY_NAMES = (
    "cache_aware",
    "round_robin",
    "random",
    "power_of_two",
    "least_load",
    "consistent_hashing",
    "prefix_hash",
    "manual",
)

WORKERS = "Workers"
LISTENING = "Listening"
SECURITY = "Access and TLS"
AUTOSCALING = "Autoscaling"
POLICY = "Routing policy"
REQUESTS = "Requests and connections"
RETRIES = "Retries"
BREAKER = "Circuit breaker"
OVERLOAD = "Overload"
OUTLIERS = "Outliers"
HEALTH = "Health checks"
METRICS = "Metrics"
LOGGING = "Logging"


@dataclass
class HTTPOptions:
    """What an HTTP router can be told."""

    # -- workers; the first three fields are in the reference's order, for those who give them by position
    worker_urls: list[str] = option(
        [],
        "Base URLs of the workers. They are registered at once and get requests as soon as they are healthy;"
        " more can be added while the router serves.",
        WORKERS,
        metavar="URL",
        check=checks.worker_urls,
    )
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 or :: for all.", LISTENING, check=checks.address)
    port: int = option(30000, "Port to listen on.", LISTENING, check=between(1, 65535))
    worker_api_key: str | None = option(
        None,
        "Key for these workers: sent as `Authorization: Bearer KEY` with health checks, and with requests"
        " whose client sent no Authorization.",
        WORKERS,
        metavar="KEY",
        check=checks.bearer_key,
        secret=True,
    )
    worker_startup_timeout_secs: float = option(
        1800, "How long a new worker may take to become healthy.", WORKERS, unit="s", check=above(0)
    )
    worker_startup_check_interval: float = option(
        1,
        "Pause between health checks of a worker that is not healthy yet.",
        WORKERS,
        unit="s",
        check=above(0),
    )
    startup_wait_secs: float = option(
        10,
        "How long a request waits when it comes while every worker is still starting.",
        WORKERS,
        unit="s",
        check=at_least(0),
    )
    slow_start_secs: float = option(
        30,
        "For this long a worker that comes with an empty cache gets no more than a growing share of the others'"
        " load, however small its queue; 0: all at once.",
        WORKERS,
        unit="s",
        check=at_least(0),
    )
    dp_aware: bool = option(
        False,
        "Make each data-parallel rank of an engine a worker of its own (URL@0, URL@1 ...), and choose the rank"
        " with every request.",
        WORKERS,
    )
    engine_report_interval_secs: float = option(
        5,
        "Pause between readings of what an engine tells of itself: running and queued requests, KV cache, model;"
        " 0: never asked.",
        WORKERS,
        unit="s",
        check=at_least(0),
    )

    # -- listening
    config: str | None = option(
        None,
        "YAML or TOML file with any of these options, named as here without the dashes in front. Flags win"
        " over the environment, the environment over the file.",
        LISTENING,
        metavar="FILE",
    )
    shutdown_grace_period_secs: float = option(
        180,
        "How long running requests may take to finish after SIGTERM.",
        LISTENING,
        unit="s",
        check=at_least(0),
    )

    reuse_port: bool = option(
        False,
        "Take over the port from the router that listens there, and let the next one take it over: restarts without"
        " a lost request. Both must have this option.",
        LISTENING,
    )
    state_file: str | None = option(
        None,
        "File that keeps workers, drained marks and, with cache_aware, the prefixes over a restart. Only its owner may"
        " read it: it holds keys of workers and parts of prompts.",
        LISTENING,
        metavar="FILE",
    )
    state_interval_secs: float = option(
        60,
        "How often that file is written while the router serves; it is at the end as well.",
        LISTENING,
        unit="s",
        check=above(0),
    )

    # -- access and TLS, explained in docs/security.md
    api_key: ClientKeys = option(
        [],
        "Key that clients must show, or 'NAME KEY' to know whose it is; may be given several times. (The key for"
        " workers is --worker-api-key.)",
        SECURITY,
        metavar="KEY",
        check=keys.client_keys,
        secret=True,
        repeat=True,
    )
    api_key_file: str | None = option(
        None, "File of such keys, one in a line: unlike flags, it does not show in `ps`.", SECURITY, metavar="FILE"
    )
    control_plane_api_keys: ControlKeys = option(
        [],
        "Keys of the control plane: with the role admin they may change things, with user only look.",
        SECURITY,
        check=keys.control_keys,
        secret=True,
    )
    control_plane_api_keys_file: str | None = option(
        None, "File of such keys, one in a line.", SECURITY, metavar="FILE"
    )
    control_plane_open: bool = option(
        False,
        "Take changes from everywhere although there are no keys of the control plane; without it they are taken"
        " from this machine only.",
        SECURITY,
    )
    server_cert_path: str | None = option(
        None,
        "Certificate of the router with its chain (PEM): clients speak TLS then. Read again when it changes.",
        SECURITY,
        flag="--tls-cert-path",
        metavar="FILE",
    )
    server_key_path: str | None = option(
        None, "Its private key (PEM).", SECURITY, flag="--tls-key-path", metavar="FILE"
    )
    ca_cert_paths: list[str] = option(
        [],
        "Certificates that vouch for https workers (PEM); they take the place of the system's.",
        SECURITY,
        metavar="FILE",
    )
    client_cert_path: str | None = option(
        None, "Certificate shown to https workers that ask for one (PEM).", SECURITY, metavar="FILE"
    )
    client_key_path: str | None = option(None, "Its private key (PEM).", SECURITY, metavar="FILE")
    cors_allowed_origins: list[str] = option(
        [],
        "Origins of web pages that may read the router's answers, as in https://chat.example.com; * for all.",
        SECURITY,
        metavar="ORIGIN",
        check=checks.origins,
    )

    # -- routing policy
    policy: str = option("cache_aware", "How the worker of a request is chosen.", POLICY, choices=POLICY_NAMES)
    cache_threshold: float = option(
        0.5,
        "cache_aware: share of a prompt that a worker must have seen for the request to follow it.",
        POLICY,
        check=between(0, 1),
    )
    balance_abs_threshold: int = option(
        32,
        "cache_aware: the shortest queue is taken when the loads of the most and least loaded worker differ"
        " by more than this, and by more than --balance-rel-threshold.",
        POLICY,
        unit="requests",
        check=at_least(0),
    )
    balance_rel_threshold: float = option(
        1.0001,
        "cache_aware: the factor that belongs to --balance-abs-threshold.",
        POLICY,
        check=at_least(1),
    )
    eviction_interval_secs: float = option(
        60,
        "cache_aware: how often entries that rested too long are cleared.",
        POLICY,
        unit="s",
        check=above(0),
    )
    max_tree_size: int = option(
        16_777_216,
        "cache_aware: most text remembered for one worker; the least recently used goes first.",
        POLICY,
        unit="bytes",
        check=at_least(1),
    )
    max_idle_secs: float = option(
        14400, "manual: a routing key unused for this long is forgotten.", POLICY, unit="s", check=above(0)
    )
    assignment_mode: str = option(
        "random",
        "manual: which worker a new routing key gets: any, the one with the fewest requests, or the one with"
        " the fewest keys.",
        POLICY,
        choices=("random", "min_load", "min_group"),
    )
    prefix_hash_bytes: int = option(
        1024,
        "prefix_hash: how much of a prompt's beginning is hashed.",
        POLICY,
        unit="bytes",
        check=at_least(1),
    )
    hash_load_factor: float = option(
        1.25,
        "prefix_hash: a worker loaded above this multiple of the average is passed over.",
        POLICY,
        check=at_least(1),
    )

    # -- requests and connections
    max_payload_size: int = option(
        536_870_912, "Largest body of a request; above it 413.", REQUESTS, unit="bytes", check=at_least(1)
    )
    max_head_bytes: int = option(
        65536, "Largest head of a request; above it 431.", REQUESTS, unit="bytes", check=at_least(256)
    )
    max_header_count: int = option(128, "Most headers of a request; above it 431.", REQUESTS, check=at_least(1))
    head_timeout_secs: float = option(
        30, "Time a client has to send a whole head; after it 408.", REQUESTS, unit="s", check=above(0)
    )
    body_timeout_secs: float = option(
        60, "Longest silence of a client inside a body; after it 408.", REQUESTS, unit="s", check=above(0)
    )
    keepalive_timeout_secs: float = option(
        75, "A client's connection that is idle for this long is closed.", REQUESTS, unit="s", check=above(0)
    )
    request_timeout_secs: float = option(
        1800, "Longest time for a whole request; after it 504.", REQUESTS, unit="s", check=above(0)
    )
    connect_timeout_secs: float = option(
        10, "Time a worker has to accept a connection.", REQUESTS, unit="s", check=above(0)
    )
    upstream_idle_timeout_secs: float = option(
        50, "An unused connection to a worker is closed after this time.", REQUESTS, unit="s", check=above(0)
    )
    forward_headers: str = option(
        "whitelist",
        "Request headers that reach the worker: those that engines and tracing use, or every end-to-end one.",
        REQUESTS,
        choices=("whitelist", "all"),
    )
    request_id_headers: list[str] | None = option(
        None,
        "Headers looked through, in this order, for the id of a request.",
        REQUESTS,
        check=checks.header_names,
        shown_default="the usual ones",
    )

    # -- retries
    max_worker_retries: int = option(
        3, "Most times a request is sent to one worker, the first time included.", RETRIES, check=at_least(1)
    )
    max_total_retries: int = option(
        6, "Most times a request is sent again after it failed, all workers together.", RETRIES, check=at_least(0)
    )
    retry_max_retries: int | None = option(
        None,
        "The same limit as the Rust router counts it: most times a request is sent in all, the first time included.",
        RETRIES,
        check=at_least(1),
        shown_default="one more than --max-total-retries",
    )
    disable_retries: bool = option(False, "Send each request once.", RETRIES)
    retry_initial_backoff_ms: float = option(
        50,
        "Pause before a request returns to a worker that has failed it.",
        RETRIES,
        unit="ms",
        check=above(0),
    )
    retry_max_backoff_ms: float = option(30000, "Longest such pause.", RETRIES, unit="ms", check=above(0))
    retry_backoff_multiplier: float = option(1.5, "Factor by which such pauses grow.", RETRIES, check=at_least(1))
    retry_jitter_factor: float = option(
        0.2, "Share by which chance makes such pauses longer or shorter.", RETRIES, check=between(0, 1)
    )

    # -- streams, see docs/resume.md
    resume_streams: bool = option(
        False,
        "When a worker dies inside a stream, have another one continue the text: /generate, /v1/completions and"
        " /v1/chat/completions at temperature 0.",
        RETRIES,
    )
    resume_max_bytes: int = option(
        1_048_576,
        "Most text kept for that of one stream; longer ones are not continued.",
        RETRIES,
        unit="bytes",
        check=at_least(1),
    )
    resume_nonzero_temperature: bool = option(
        False,
        "Continue other temperatures, and penalties, as well: the text goes on, but not as one worker would have"
        " written it.",
        RETRIES,
    )

    # -- circuit breaker
    cb_failure_threshold: int | None = option(
        None,
        "Failures in a row that open the breaker of a worker.",
        BREAKER,
        check=at_least(1),
        shown_default="one more than --max-worker-retries",
    )
    cb_success_threshold: int = option(
        1, "Successes in a row that close a half-open breaker.", BREAKER, check=at_least(1)
    )
    cb_timeout_duration_secs: float = option(
        10,
        "How long a breaker stays open before one request may try the worker.",
        BREAKER,
        unit="s",
        check=above(0),
    )
    cb_max_timeout_duration_secs: float = option(
        60,
        "That time doubles with each failed try up to this (or to --cb-timeout-duration-secs, if longer).",
        BREAKER,
        unit="s",
        check=above(0),
    )
    disable_circuit_breaker: bool = option(False, "Never hold a worker off for its failures.", BREAKER)

    retry_budget_ratio: float = option(
        0.2,
        "Retries may be at most this share of the requests of the last 10 seconds, and --retry-budget-min-per-second.",
        RETRIES,
        check=between(0, 10),
    )
    retry_budget_min_per_second: float = option(
        3, "Retries per second that are always free.", RETRIES, check=at_least(0)
    )

    # -- overload
    max_concurrent_requests: int = option(
        -1, "Most requests under way at once; -1 for no limit. More of them wait.", OVERLOAD, check=at_least(-1)
    )
    queue_size: int = option(
        100,
        "Most requests that wait for their turn, or for a worker with room; above it 429.",
        OVERLOAD,
        check=at_least(0),
    )
    queue_timeout_secs: float = option(
        60, "Longest wait for a turn, or for a worker with room; after it 408.", OVERLOAD, unit="s", check=at_least(0)
    )
    rate_limit_tokens_per_second: int | None = option(
        None,
        "Requests admitted per second, with a burst of one second's worth; above it 429. 0 for no limit.",
        OVERLOAD,
        check=at_least(0),
    )
    max_running_per_worker: int = option(
        0,
        "Most requests of a worker at once; more wait here and go to the first worker that has room, the one that"
        " holds their prefix before others. 0 for no limit.",
        OVERLOAD,
        check=at_least(0),
    )
    max_buffered_request_bytes: int = option(
        1_073_741_824,
        "Most bytes of requests held at once; beyond it bodies are not read on for 5 seconds, then 429.",
        OVERLOAD,
        unit="bytes",
        check=at_least(65536),
    )
    first_byte_timeout_secs: float = option(
        300, "Time a worker has for the first byte of a stream; after it 504.", OVERLOAD, unit="s", check=above(0)
    )
    chunk_timeout_secs: float = option(
        300,
        "Longest silence of a worker inside its answer; after it the answer is broken off.",
        OVERLOAD,
        unit="s",
        check=above(0),
    )

    # -- outliers
    disable_outlier_ejection: bool = option(
        False, "Do not hold off workers that fail far more often, or begin far later, than the others.", OUTLIERS
    )
    outlier_window_secs: float = option(
        30, "What is looked back on; a worker is judged by 20 answers at least.", OUTLIERS, unit="s", check=above(0)
    )
    outlier_failure_rate: float = option(
        0.5, "Share of failed requests that is too much.", OUTLIERS, check=between(0.01, 1)
    )
    outlier_latency_factor: float = option(
        3,
        "How many times later than at the others, in like circumstances, the first byte of streams must come.",
        OUTLIERS,
        check=above(1),
    )
    outlier_ejection_secs: float = option(
        30,
        "How long such a worker is held off, and twice as long each next time up to ten times this.",
        OUTLIERS,
        unit="s",
        check=above(0),
    )

    # -- health checks
    health_check_interval_secs: float = option(
        10, "Pause between checks of a worker.", HEALTH, unit="s", check=above(0)
    )
    health_check_timeout_secs: float = option(
        5, "Time a worker has to answer a check.", HEALTH, unit="s", check=above(0)
    )
    health_failure_threshold: int = option(
        3, "Failed checks in a row that make a worker unhealthy.", HEALTH, check=at_least(1)
    )
    health_success_threshold: int = option(
        2, "Good checks in a row that make it healthy again.", HEALTH, check=at_least(1)
    )
    health_check_endpoint: str = option("/health", "Path that is checked.", HEALTH, check=checks.path)
    disable_health_check: bool = option(False, "Believe that every worker is healthy.", HEALTH)

    # -- autoscaling
    autoscale: str | None = option(
        None,
        "Fewest and most workers, as in 1:8 or 0:4: decides all the time how many there should be, and tells"
        " GET /scale, the metric sgl_router_desired_workers and those named below. launch_server starts and stops"
        " its replicas by it. With 0 the last one is stopped when there is nothing to do, and a request starts it.",
        AUTOSCALING,
        metavar="MIN:MAX",
        check=checks.scale_range,
    )
    autoscale_target_load: float = option(
        32, "Requests that a worker should have, running and waiting.", AUTOSCALING, unit="requests", check=above(0)
    )
    autoscale_target_queue: float = option(
        4, "Of these, requests that may wait for their first token.", AUTOSCALING, unit="requests", check=above(0)
    )
    autoscale_target_tokens: int = option(
        65536,
        "Prompt tokens that may wait to be computed, for each worker.",
        AUTOSCALING,
        unit="tokens",
        check=above(0),
    )
    autoscale_ttft_goal_secs: float | None = option(
        None,
        "Time to the first token that nine of ten streams should not exceed.",
        AUTOSCALING,
        unit="s",
        check=above(0),
    )
    autoscale_step: int = option(2, "Most workers added at once.", AUTOSCALING, check=at_least(1))
    autoscale_up_cooldown_secs: float = option(
        15, "Pause between two additions.", AUTOSCALING, unit="s", check=at_least(0)
    )
    autoscale_down_cooldown_secs: float = option(
        300,
        "How long fewer workers must have been enough before one is taken away.",
        AUTOSCALING,
        unit="s",
        check=at_least(0),
    )
    autoscale_wake_timeout_secs: float = option(
        600,
        "How long a request waits for the first worker after a scaling to zero.",
        AUTOSCALING,
        unit="s",
        check=above(0),
    )
    scale_webhook: str | None = option(
        None,
        "URL that is told by POST of each change of the number of workers there should be.",
        AUTOSCALING,
        metavar="URL",
        check=checks.webhook,
    )
    scale_webhook_secret: str | None = option(
        None,
        "Key with which these messages are signed (HMAC-SHA256, header x-sglang-router-signature).",
        AUTOSCALING,
        metavar="SECRET",
        secret=True,
    )
    scale_command: str | None = option(
        None,
        "Command that is run at each such change, without a shell, with SGLANG_ROUTER_DESIRED_WORKERS,"
        " _CURRENT_WORKERS and _SCALE_REASON in its environment.",
        AUTOSCALING,
        metavar="CMD",
        check=checks.command,
    )

    # -- metrics
    prometheus_host: str = option(
        "",
        "Address of the listener for metrics (they are on /metrics of the router's own port as well).",
        METRICS,
        check=lambda host: host and checks.address(host),
        shown_default="the value of --host",
    )
    prometheus_port: int = option(
        29000,
        "Port of the listener for metrics. If it is taken, a warning for the default, an error for a port you"
        " give. 0 takes a free one.",
        METRICS,
        check=between(0, 65535),
    )
    prometheus_duration_buckets: list[float] | None = option(
        None,
        "Upper bounds of the histograms of durations, ascending.",
        METRICS,
        unit="s",
        check=checks.buckets,
        shown_default="from 1 ms to 240 s",
    )

    # -- logging
    log_level: str = option(
        "info", "Least severe messages to log.", LOGGING, choices=("debug", "info", "warn", "error")
    )
    log_format: str = option("text", "Shape of log lines.", LOGGING, choices=("text", "json"))
    log_dir: str | None = option(
        None, "Folder for log files, made if it is not there.", LOGGING, shown_default="standard error only"
    )
    disable_access_log: bool = option(False, "Do not log a line for each request.", LOGGING)

    # -- other names
    eviction_interval: float | None = alias("eviction_interval_secs")
    verbose: bool | None = alias("log_level", means="debug")
