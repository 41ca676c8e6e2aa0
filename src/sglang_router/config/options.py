"""The options that have an effect, in the order in which --help and the documentation show them.

Each option is declared once, in one line or a few; `option.py` says what is derived from a declaration. Names are
those of the reference router. Defaults are those of its first public version, where it had the option. Durations may
be fractions.
"""

# ruff: noqa: RUF009 - `option` declares a field, as `dataclasses.field` does

from __future__ import annotations

from dataclasses import dataclass

from sglang_router.config import checks, keys
from sglang_router.config.checks import above, at_least, between
from sglang_router.config.compat import VERSIONS
from sglang_router.config.key_files import MOST_PRIORITY
from sglang_router.config.kinds import ClientKeys, ControlKeys, ModelsMapping, Pairs
from sglang_router.config.option import alias, option
from sglang_router.config.store_urls import store_url

# The keys of `routing.policies.POLICIES`, which this module must not import. A test holds the two equal.
POLICY_NAMES = (
    "cache_aware",
    "cost",
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
DISCOVERY = "Discovery"
PICKER = "Endpoint picker"
AUTOSCALING = "Autoscaling"
MODELS = "Models"
POLICY = "Routing policy"
PREFILL_DECODE = "Prefill/decode disaggregation"
REQUESTS = "Requests and connections"
RETRIES = "Retries"
BREAKER = "Circuit breaker"
OVERLOAD = "Overload"
OUTLIERS = "Outliers"
SHARED = "Several routers as one"
HEALTH = "Health checks"
METRICS = "Metrics"
DECISIONS = "Decisions"
TRACING = "Tracing"
LOGGING = "Logging"


@dataclass
class HTTPOptions:
    """The options of an HTTP router."""

    # -- workers; the first three fields are in the reference's order, because programs may pass them by position
    worker_urls: list[str] = option(
        [],
        "Base URLs of the workers. The router registers them at the start and sends them requests as soon as they"
        " are healthy; POST /add_worker adds more later.",
        WORKERS,
        metavar="URL",
        check=checks.worker_urls,
    )
    host: str = option(
        "127.0.0.1", "Address to listen on; 0.0.0.0 or :: listens on all.", LISTENING, check=checks.address
    )
    port: int = option(30000, "Port to listen on.", LISTENING, check=between(1, 65535))
    worker_api_key: str | None = option(
        None,
        "API key for these workers: the router sends it as `Authorization: Bearer KEY` with health checks, and with"
        " requests whose client sent no Authorization header.",
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
        "Pause between health checks of a worker that is not healthy yet; while they fail it grows, to 10 to 15 s.",
        WORKERS,
        unit="s",
        check=above(0),
    )
    startup_wait_secs: float = option(
        10,
        "How long a request is queued when it arrives while every worker is still starting. A worker whose checks fail"
        " for a reason that waiting does not heal (refused connections, TLS, 404) does not count as starting.",
        WORKERS,
        unit="s",
        check=at_least(0),
    )
    slow_start_secs: float = option(
        30,
        "For this long, a worker that starts with an empty cache gets at most a growing share of the other workers'"
        " mean load, however short its queue is. 0: no slow start.",
        WORKERS,
        unit="s",
        check=at_least(0),
    )
    dp_aware: bool = option(
        False,
        "Treat each data-parallel rank of an engine as a worker of its own (URL@0, URL@1 ...), and choose a rank"
        " for every request.",
        WORKERS,
    )
    engine_report_interval_secs: float = option(
        5,
        "Pause between queries of what an engine reports: running and queued requests, KV cache, model. 0: never"
        " query.",
        WORKERS,
        unit="s",
        check=at_least(0),
    )

    # -- discovery
    service_discovery: bool = option(
        False, "Find workers among Kubernetes pods; see docs/kubernetes.md. It needs --selector.", DISCOVERY
    )
    selector: dict[str, str] = option(
        {},
        "Labels of the workers' pods, all of which a pod must have. Not used beside --prefill-selector or"
        " --decode-selector.",
        DISCOVERY,
        check=checks.pod_labels,
    )
    prefill_selector: dict[str, str] = option(
        {}, "Labels of the prefill workers' pods.", DISCOVERY, check=checks.pod_labels
    )
    decode_selector: dict[str, str] = option(
        {}, "Labels of the decode workers' pods.", DISCOVERY, check=checks.pod_labels
    )
    service_discovery_port: int = option(
        80, "Port on which pods serve that do not name theirs.", DISCOVERY, check=between(1, 65535)
    )
    service_discovery_namespace: str | None = option(
        None,
        "Kubernetes namespace of the pods.",
        DISCOVERY,
        shown_default="all namespaces",
        check=checks.namespace,
    )
    worker_ports_annotation: str = option(
        "sglang.ai/worker-ports",
        "Annotation of a pod that holds the ports of its engines, as in 8000 or 8000,8001; each is a worker.",
        DISCOVERY,
        check=checks.pod_key,
    )
    bootstrap_port_annotation: str = option(
        "sglang.ai/bootstrap-port",
        "Annotation of a prefill pod that holds its bootstrap port: one for all its engines, or one for each.",
        DISCOVERY,
        check=checks.pod_key,
    )
    model_id_from: str | None = option(
        None,
        "What names the model of a pod: namespace, label:KEY or annotation:KEY.",
        DISCOVERY,
        metavar="WHERE",
        check=checks.model_source,
        shown_default="what its engine says",
    )
    inference_pool: str | None = option(
        None,
        "Find workers among the pods of this InferencePool (inference.networking.k8s.io/v1), by its selector and target"
        " ports, in place of --service-discovery; see docs/endpoint-picker.md.",
        DISCOVERY,
        metavar="NAMESPACE/NAME",
        check=checks.inference_pool,
    )
    kubeconfig: str | None = option(
        None,
        "File that says where the API server of Kubernetes is and who the router is.",
        DISCOVERY,
        metavar="FILE",
        shown_default="$KUBECONFIG, else the pod's service account, else ~/.kube/config",
    )
    discovery_file: str | None = option(
        None,
        "YAML or JSON file that lists workers, read again when it changes; see docs/discovery.md.",
        DISCOVERY,
        metavar="FILE",
        check=checks.workers_file,
    )
    discovery_dns: list[str] = option(
        [],
        "DNS names whose addresses are workers: NAME:PORT, or the name of SRV records, as in _http._tcp.engines.local."
        " Before it, ROLE= (prefill or decode) and https:// may stand.",
        DISCOVERY,
        metavar="NAME",
        check=checks.dns_names,
    )
    discovery_dns_interval_secs: float = option(
        10,
        "Pause between two look-ups of a name of --discovery-dns. SRV records with a shorter time to live are looked up"
        " sooner.",
        DISCOVERY,
        unit="s",
        check=at_least(1),
    )

    # -- the endpoint picker, for `sglang-router epp` only
    epp_host: str = option(
        "127.0.0.1",
        "Address on which `sglang-router epp` serves gateways; 0.0.0.0 or :: listens on all.",
        PICKER,
        check=checks.address,
    )
    epp_port: int = option(9002, "Port on which it serves gateways (gRPC, ext_proc).", PICKER, check=between(1, 65535))
    epp_tls_cert_path: str | None = option(
        None,
        "Its certificate with the chain (PEM). With it, gateways must use TLS. The file is read again when it changes.",
        PICKER,
        metavar="FILE",
    )
    epp_tls_key_path: str | None = option(None, "Private key of --epp-tls-cert-path (PEM).", PICKER, metavar="FILE")
    epp_fallback_endpoints: int = option(
        0,
        "How many further workers a gateway is told, in order, should the chosen one not answer. Set it only for"
        " gateways that take a list: Envoy's ORIGINAL_DST clusters answer 503 to one.",
        PICKER,
        check=between(0, 16),
    )

    # -- listening
    config: str | None = option(
        None,
        "YAML or TOML file with any of these options, named as here without the leading dashes. Flags override"
        " environment variables; environment variables override the file.",
        LISTENING,
        metavar="FILE",
    )
    compat: str | None = option(
        None,
        "Use the defaults of another router for all options that are not set: 0.3.2 is the Rust router of the same name"
        " (see docs/migrating.md).",
        LISTENING,
        choices=VERSIONS,
        metavar="VERSION",
    )
    shutdown_drain_secs: float = option(
        5,
        "After SIGTERM, how long the router still accepts and serves everything while /readiness fails, so that load"
        " balancers notice before connections are refused. Ctrl-C does not wait.",
        LISTENING,
        unit="s",
        check=at_least(0),
    )
    shutdown_grace_period_secs: float = option(
        180,
        "How long running requests may take to finish after that.",
        LISTENING,
        unit="s",
        check=at_least(0),
    )

    reuse_port: bool = option(
        False,
        "Take over the port from a router that listens there already, and let the next router take it over: a restart"
        " loses no request. Both routers need this option.",
        LISTENING,
    )
    relay_processes: int = option(
        0,
        "Processes that relay requests, so that the router uses several cores; one more process decides for all of them"
        " (docs/architecture.md). Each has connections of its own to workers, and an equal part of"
        " --max-buffered-request-bytes. 0: one process does everything.",
        LISTENING,
        check=between(0, 64),
    )
    state_file: str | None = option(
        None,
        "File that keeps the workers, their drain marks and, with cache_aware and cost, the prefixes across a restart."
        " Only its owner can read it, because it holds API keys of workers and parts of prompts.",
        LISTENING,
        metavar="FILE",
    )
    state_interval_secs: float = option(
        60,
        "Pause between writes of --state-file while the router serves. The router also writes it when it ends.",
        LISTENING,
        unit="s",
        check=above(0),
    )

    # -- access and TLS, explained in docs/security.md
    api_key: ClientKeys = option(
        [],
        "API key that clients must send, or 'NAME KEY' so that logs show the name. Repeat the flag for several keys."
        " (--worker-api-key sets the key for workers.)",
        SECURITY,
        metavar="KEY",
        check=keys.client_keys,
        secret=True,
        repeat=True,
    )
    api_key_file: str | None = option(
        None,
        "File of client keys, one per line; or in YAML, TOML or JSON, with names, limits and expiry. Unlike flags, `ps`"
        " does not show them. The router reads the file again when it changes.",
        SECURITY,
        metavar="FILE",
    )
    control_plane_api_keys: ControlKeys = option(
        [],
        "Keys for the control plane. The role admin can read and change; the role user can only read.",
        SECURITY,
        check=keys.control_keys,
        secret=True,
    )
    control_plane_api_keys_file: str | None = option(
        None,
        "File of control-plane keys, one per line; or in YAML, TOML or JSON, with expiry. The router reads the file"
        " again when it changes.",
        SECURITY,
        metavar="FILE",
    )
    control_plane_open: bool = option(
        False,
        "Accept changes from any address although there are no control-plane keys. Without this option and without"
        " keys, the router accepts changes from this machine only.",
        SECURITY,
    )
    control_plane_allowed_hosts: list[str] = option(
        [],
        "Names by which browsers may open a control plane that needs no key over plain HTTP, as in router.example.com;"
        " .example.com for all below it, * for any. IP addresses, names without a dot, *.localhost, *.local, *.internal"
        " and the machine's own name need not be named.",
        SECURITY,
        metavar="NAME",
        check=checks.host_names,
    )
    jwt_issuer: str | None = option(
        None,
        "Accept tokens (JWT) of this OpenID Connect issuer beside the control plane's keys, as in"
        " https://auth.example.com/realms/main. Needs --jwt-audience, and the package PyJWT[crypto].",
        SECURITY,
        metavar="URL",
    )
    jwt_audience: str | None = option(None, "Audience (`aud`) that these tokens must name.", SECURITY)
    jwt_jwks_uri: str | None = option(
        None,
        "URL of the issuer's public keys. Without it, the issuer's discovery document names it.",
        SECURITY,
        metavar="URL",
    )
    jwt_role_mapping: dict[str, str] = option(
        {},
        "Maps the issuer's roles or groups to the router's, as in Gateway.Admin=admin. The role admin may read and"
        " change the control plane, the role user read it; where clients need a key, both may send requests. Without"
        " it, the roles admin and user of the issuer count.",
        SECURITY,
    )
    server_cert_path: str | None = option(
        None,
        "The router's certificate with its chain (PEM). With it, clients must use TLS. The router reads the file again"
        " when it changes.",
        SECURITY,
        flag="--tls-cert-path",
        metavar="FILE",
    )
    server_key_path: str | None = option(
        None, "Private key of --tls-cert-path (PEM).", SECURITY, flag="--tls-key-path", metavar="FILE"
    )
    ca_cert_paths: list[str] = option(
        [],
        "CA certificates that verify https workers (PEM), instead of the system's.",
        SECURITY,
        metavar="FILE",
    )
    client_cert_path: str | None = option(
        None, "Client certificate for https workers that ask for one (PEM).", SECURITY, metavar="FILE"
    )
    client_key_path: str | None = option(None, "Private key of --client-cert-path (PEM).", SECURITY, metavar="FILE")
    cors_allowed_origins: list[str] = option(
        [],
        "Origins of web pages that may read the router's answers (CORS), as in https://chat.example.com; * for all.",
        SECURITY,
        metavar="ORIGIN",
        check=checks.origins,
    )

    # -- models
    model_alias: dict[str, str] = option(
        {},
        "Another name of a model, as in gpt-4=llama-70b: requests for gpt-4 go to the workers of llama-70b. The body"
        " changes only for engines that do not announce the alias.",
        MODELS,
        metavar="ALIAS=MODEL",
        repeat=True,
    )
    model_fallback: dict[str, str] = option(
        {},
        "Which model stands in for another, as in llama-70b=llama-8b: while no worker of llama-70b can take requests,"
        " llama-8b serves them, and the header x-sglang-router-model says so. A fallback may have one, too.",
        MODELS,
        metavar="MODEL=OTHER",
        repeat=True,
    )
    worker_model: dict[str, str] = option(
        {},
        "What the model of a worker of --worker-urls is called, as in http://10.0.0.1:8000=llama-70b, whatever its"
        " engine announces.",
        MODELS,
        metavar="URL=MODEL",
        repeat=True,
    )
    models: ModelsMapping = option(
        {},
        "Settings of single models: a mapping in a --config file, or JSON; see docs/models.md. Keys of a model: policy"
        " and its options, aliases, fallback.",
        MODELS,
    )
    enable_igw: bool = option(
        False,
        "Be strict about models: a model that no worker announces is unknown (404), also while the fleet serves only"
        " one. And the label `policy` of a model's first worker sets the policy of the model.",
        MODELS,
    )

    # -- routing policy
    policy: str = option("cache_aware", "How the worker of a request is chosen.", POLICY, choices=POLICY_NAMES)
    shadow_policy: str | None = option(
        None,
        "Ask a second policy about all requests, without obeying it, and compare the two in the metrics and in GET"
        " /decisions. It costs a decision about 7 us, 1 us for each worker, and what the second policy takes.",
        POLICY,
        choices=POLICY_NAMES,
    )
    cache_threshold: float = option(
        0.5,
        "cache_aware: send a request to the worker with the longest known prefix when that prefix is at least this"
        " share of the prompt.",
        POLICY,
        check=between(0, 1),
    )
    balance_abs_threshold: int = option(
        32,
        "cache_aware: take the least loaded worker when the loads of the most and the least loaded worker differ"
        " by more than this and by more than the factor --balance-rel-threshold.",
        POLICY,
        unit="requests",
        check=at_least(0),
    )
    balance_rel_threshold: float = option(
        1.0001,
        "cache_aware: see --balance-abs-threshold.",
        POLICY,
        check=at_least(1),
    )
    eviction_interval_secs: float = option(
        60,
        "cache_aware, cost, manual: pause between removals of entries that were unused for --max-idle-secs.",
        POLICY,
        unit="s",
        check=above(0),
    )
    max_tree_size: int = option(
        16_777_216,
        "cache_aware, cost: most bytes of prompts remembered for each worker; the least recently used are evicted"
        " first, and one prompt takes at most an eighth. With many short prompts the process needs up to 7 times as"
        " much memory.",
        POLICY,
        unit="bytes",
        check=at_least(1),
    )
    max_idle_secs: float = option(
        14400,
        "manual, cache_aware, cost: forget a routing key or a prefix that was unused for this long.",
        POLICY,
        unit="s",
        check=above(0),
    )
    assignment_mode: str = option(
        "random",
        "manual: which worker a new routing key gets: a random one, the one with the fewest requests (min_load), or"
        " the one with the fewest routing keys (min_group).",
        POLICY,
        choices=("random", "min_load", "min_group"),
    )
    prefix_hash_bytes: int = option(
        1024,
        "prefix_hash: how many bytes at the start of a prompt are hashed.",
        POLICY,
        unit="bytes",
        check=at_least(1),
    )
    hash_load_factor: float = option(
        1.25,
        "prefix_hash: skip a worker whose load is above this multiple of the mean load.",
        POLICY,
        check=at_least(1),
    )
    cost_load_cap: float = option(
        0,
        "cost: skip a worker that has more than this multiple of the mean number of requests in flight. 0: no cap.",
        POLICY,
        check=at_least(0),
    )

    # -- prefill/decode
    pd_disaggregation: bool = option(
        False,
        "Send each request to two workers: a prefill worker reads the prompt, a decode worker writes the answer. The"
        " router is ready when there is one of each (docs/disaggregation.md).",
        PREFILL_DECODE,
    )
    prefill_urls: Pairs = option(
        [],
        "Base URL of a prefill worker, and its bootstrap port or `none`; without one its engine tells it. Repeat the"
        " flag for several workers.",
        PREFILL_DECODE,
        flag="--prefill",
        repeat=True,
        check=checks.prefill_urls,
    )
    decode_urls: list[str] = option(
        [],
        "Base URL of a decode worker. Repeat the flag for several workers.",
        PREFILL_DECODE,
        flag="--decode",
        metavar="URL",
        repeat=True,
        check=checks.worker_urls,
    )
    prefill_policy: str | None = option(
        None,
        "How the prefill worker of a request is chosen.",
        PREFILL_DECODE,
        choices=("bucket", *POLICY_NAMES),
        shown_default="that of --policy",
        check=checks.prefill_policy,
    )
    decode_policy: str | None = option(
        None,
        "How the decode worker of a request is chosen.",
        PREFILL_DECODE,
        choices=POLICY_NAMES,
        shown_default="that of --policy",
    )
    pd_uncached_token_threshold: int = option(
        0,
        "Spare a pair of workers a prompt of which no more than so many tokens are not cached: a regular worker of the"
        " model serves it, or else a decode worker alone, which only engines of vLLM can. 0: none is spared, unless"
        " both policies are `cost`.",
        PREFILL_DECODE,
        unit="tokens",
        check=at_least(0),
    )
    pd_kv_connector: str = option(
        "auto",
        "How a prefill worker hands over to a decode worker: as SGLang does (sglang), or vLLM with Nixl, which decode"
        " workers pull (nixl) or prefill workers push (nixl_push). auto: as the engine tells what it is: sglang or"
        " nixl, without an answer sglang.",
        PREFILL_DECODE,
        choices=("auto", "sglang", "mooncake", "nixl_push", "nixl"),
        check=checks.kv_connector,
    )

    # -- sessions
    session_affinity: bool = option(
        False,
        "Send all requests of a session to the same worker, with any --policy, as long as that worker can take them and"
        " is not far more loaded than the others (docs/sessions.md).",
        POLICY,
    )
    session_headers: list[str] | None = option(
        None,
        "Request headers that may name the session of a request; the first one that is present counts.",
        POLICY,
        check=checks.session_headers,
        shown_default="the routing key, and those that agents send",
    )
    session_fields: list[str] | None = option(
        None,
        "Fields of a body that may name its session when no header does, as in session_id or metadata.user_id; the"
        " first one that is present counts.",
        POLICY,
        check=checks.field_names,
        shown_default="those that engines and agents know",
    )

    session_admission: bool = option(
        False,
        "Let a new session start only where its expected context fits into the KV cache beside those of the live"
        " sessions; else its first request is queued. Implies --session-affinity (docs/sessions.md).",
        POLICY,
    )
    session_capacity_tokens: int = option(
        0,
        "Tokens that the KV cache of a worker holds whose engine does not report it, for --session-affinity and"
        " --session-admission. 0: unknown, any number of sessions fits.",
        POLICY,
        unit="tokens",
        check=at_least(0),
    )
    session_wait_secs: float = option(
        600,
        "--session-admission: longest time for which a new session is queued; then 429. At most --queue-size of them"
        " are queued.",
        POLICY,
        unit="s",
        check=at_least(0),
    )

    # -- what workers say of their caches, see docs/kv-events.md
    kv_events: bool = option(
        False,
        "Follow the KV events of the workers (SGLang, vLLM), and use them in place of the estimate of what each has"
        " cached, for prompts of which the tokens are known: lists of ids, and texts with --kv-events-tokenizer. Needs"
        " the extra `kv`.",
        POLICY,
    )
    kv_events_endpoint: str | None = option(
        None,
        "Where a worker publishes its KV events if it does not say so itself, as in tcp://{host}:5557; {host} is the"
        " host of its URL. The port of a data-parallel rank is so many higher.",
        POLICY,
        metavar="ADDRESS",
        check=checks.kv_endpoint,
    )
    kv_events_replay_endpoint: str | None = option(
        None,
        "The same for the socket that replays events; without it, missed events cannot be made good.",
        POLICY,
        metavar="ADDRESS",
        check=checks.kv_endpoint,
    )
    kv_events_max_blocks: int = option(
        262_144,
        "Most blocks of a worker's KV cache to know, of about 170 bytes each; what exceeds is not learnt.",
        POLICY,
        check=at_least(1),
    )
    kv_events_tokenizer: str | None = option(
        None,
        "File tokenizer.json, or the folder with it, of the model that all workers serve: with it, the texts of"
        " /generate and /v1/completions are compared too, the first 8 kB of each. Encoding takes up to 4 ms.",
        POLICY,
        metavar="FILE",
    )

    # -- several routers as one, see docs/shared-state.md
    shared_state: str | None = option(
        None,
        "URL of the Valkey or Redis through which the routers of one fleet tell each other what they know:"
        " redis://HOST, rediss://HOST (TLS), redis+sentinel://HOST,HOST/SERVICE or redis+cluster://HOST,HOST"
        " (docs/shared-state.md). A user and a password belong into the variable or the file, for `ps` shows flags."
        " Needs the extra `shared`.",
        SHARED,
        metavar="URL",
        check=store_url,
        secret=True,
    )
    shared_state_prefix: str = option(
        "sglang-router",
        "What the names of all keys in the store begin with: routers with the same one are one fleet.",
        SHARED,
        check=checks.store_prefix,
    )
    shared_state_key: str | None = option(
        None,
        "File with a key of 32 bytes, as 64 hexadecimal digits, with which the routers of a fleet make unreadable what"
        " they tell. Without it, the first router makes one and keeps it in the store: who can read the store can then"
        " find out whether a text that he knows was sent.",
        SHARED,
        metavar="FILE",
    )
    shared_state_password_file: str | None = option(
        None,
        "File with the password of the store, in place of one in its URL. Read again when it changes, and used for new"
        " connections from then on.",
        SHARED,
        metavar="FILE",
    )
    shared_state_workers: bool = option(
        False,
        "Workers that are added or removed by POST /add_worker, /workers and the like at one router are added and"
        " removed at all that have this option, also at those that start later. Their URLs are then in the store, to"
        " be read by who can read it. It needs --shared-state-key; see docs/shared-state.md.",
        SHARED,
    )
    shared_state_ca_cert: str | None = option(
        None,
        "PEM file with the certificates that the store's certificate is verified with.",
        SHARED,
        metavar="FILE",
        shown_default="those of the system",
    )
    shared_state_client_cert: str | None = option(
        None, "PEM file with the certificate that the router shows to the store.", SHARED, metavar="FILE"
    )
    shared_state_client_key: str | None = option(
        None, "PEM file with the private key of --shared-state-client-cert.", SHARED, metavar="FILE"
    )
    shared_state_memory: int = option(
        67_108_864,
        "About how much memory the placements of an hour may take in the store; older ones are dropped.",
        SHARED,
        unit="bytes",
        check=at_least(65_536),
    )
    shared_state_blocks: int = option(
        262_144,
        "Most blocks of prompts of which this router knows through others which workers have them, of about 130 bytes"
        " each.",
        SHARED,
        check=at_least(1024),
    )

    # -- requests and connections
    max_payload_size: int = option(
        536_870_912, "Largest body of a request; a larger one gets 413.", REQUESTS, unit="bytes", check=at_least(1)
    )
    max_head_bytes: int = option(
        65536, "Largest head of a request; a larger one gets 431.", REQUESTS, unit="bytes", check=at_least(256)
    )
    max_header_count: int = option(
        128, "Most headers of a request; a request with more gets 431.", REQUESTS, check=at_least(1)
    )
    head_timeout_secs: float = option(
        30, "Longest time for a client to send a request's head; then 408.", REQUESTS, unit="s", check=above(0)
    )
    body_timeout_secs: float = option(
        60,
        "Longest pause of a client while it sends a body; then 408. On the whole, a body may be as much later than"
        " --body-min-bytes-per-second.",
        REQUESTS,
        unit="s",
        check=above(0),
    )
    body_min_bytes_per_second: int = option(
        16_000,
        "Slowest rate at which a client may send a body, once it is --body-timeout-secs late; then 408. While others"
        " wait for memory or for a connection, a body that is 5 seconds late gets 408. 0: any rate.",
        REQUESTS,
        check=at_least(0),
    )
    keepalive_timeout_secs: float = option(
        75, "Close a client's connection that was idle for this long.", REQUESTS, unit="s", check=above(0)
    )
    request_timeout_secs: float = option(
        1800, "Longest time for a whole request; then 504.", REQUESTS, unit="s", check=above(0)
    )
    rl_control_timeout_secs: float = option(
        600,
        "Longest time for an engine to carry out a request of the control plane (new weights, pause, sleep, flush,"
        " /engine/...), and longest wait of requests while all workers are paused.",
        REQUESTS,
        unit="s",
        check=above(0),
    )
    rl_fanout_concurrency: int = option(
        0,
        "Most engines that carry out a request of the control plane for several at the same time. 0: all. What engines"
        " do together, each waiting for the others, is always sent to all at once.",
        REQUESTS,
        unit="workers",
        check=at_least(0),
    )
    tunnel_idle_timeout_secs: float = option(
        300,
        "Close a WebSocket (/v1/realtime) in which neither side has sent anything for this long.",
        REQUESTS,
        unit="s",
        check=above(0),
    )
    tunnel_max_secs: float = option(
        0, "Close a WebSocket that has been open for this long. 0: no limit.", REQUESTS, unit="s", check=at_least(0)
    )
    max_tunnels: int = option(
        1024,
        "Most WebSockets open at once; a further one gets 429. Each takes two file descriptors. With --relay-processes:"
        " of each relay process.",
        REQUESTS,
        check=at_least(0),
    )
    connect_timeout_secs: float = option(
        10, "Longest time for a worker to accept a connection.", REQUESTS, unit="s", check=above(0)
    )
    upstream_idle_timeout_secs: float = option(
        50, "Close a connection to a worker that was idle for this long.", REQUESTS, unit="s", check=above(0)
    )
    upstream_max_age_secs: float = option(
        300,
        "Open a new connection to a worker in place of one that is this old; a request in flight ends first. 0: never.",
        REQUESTS,
        unit="s",
        check=at_least(0),
    )
    forward_headers: str = option(
        "whitelist",
        "Request headers to forward to the worker: those that engines and tracing use (whitelist), or all end-to-end"
        " headers (all).",
        REQUESTS,
        choices=("whitelist", "all"),
    )
    trust_client_routing_fields: bool = option(
        False,
        "Let clients choose engines and ranks: forward the headers x-override-* and x-data-parallel-rank, and accept"
        " body fields such as kv_transfer_params, bootstrap_host and data_parallel_rank. These fields can end an"
        " engine.",
        REQUESTS,
    )
    relay_unknown_paths: bool = option(
        False,
        "Relay requests for paths that the router does not know, with any method, to a worker that the policy chooses:"
        " unread, so that no model, prompt or reserved field is looked for. Clients then reach every path of the"
        " engines but those that the router has itself, also paths that change an engine.",
        REQUESTS,
    )
    request_id_headers: list[str] | None = option(
        None,
        "Request headers to read the request id from; the first one that is present counts.",
        REQUESTS,
        check=checks.header_names,
        shown_default="the usual ones",
    )

    # -- retries
    max_worker_retries: int = option(
        3, "Most attempts of a request at one worker, the first one included.", RETRIES, check=at_least(1)
    )
    max_total_retries: int = option(
        6,
        "Most retries of a request at all workers together, the first attempt not included.",
        RETRIES,
        check=at_least(0),
    )
    retry_max_retries: int | None = option(
        None,
        "The same limit, counted as the Rust router does: most attempts of a request, the first one included.",
        RETRIES,
        check=at_least(1),
        shown_default="one more than --max-total-retries",
    )
    disable_retries: bool = option(False, "Never retry a request.", RETRIES)
    retry_initial_backoff_ms: float = option(
        50,
        "Pause before a request is retried at a worker that failed it already.",
        RETRIES,
        unit="ms",
        check=above(0),
    )
    retry_max_backoff_ms: float = option(
        30000, "Longest pause before such a retry.", RETRIES, unit="ms", check=above(0)
    )
    retry_backoff_multiplier: float = option(
        1.5, "Factor by which that pause grows with each retry.", RETRIES, check=at_least(1)
    )
    retry_jitter_factor: float = option(
        0.2, "Random share by which that pause is made longer or shorter.", RETRIES, check=between(0, 1)
    )

    # -- what engines report, see docs/routing.md
    inject_usage: bool = option(
        False,
        "Ask engines for the usage of streams of /v1/chat/completions and /v1/completions whose clients do not set"
        " stream_options, and hide it from these again.",
        METRICS,
    )

    # -- streams, see docs/resume.md
    resume_streams: bool = option(
        False,
        "When a worker breaks inside a stream, let another worker continue the text: /generate, /v1/completions and"
        " /v1/chat/completions at temperature 0.",
        RETRIES,
    )
    resume_max_bytes: int = option(
        1_048_576,
        "Most text kept per stream to resume it; a longer stream is not resumed.",
        RETRIES,
        unit="bytes",
        check=at_least(1),
    )
    resume_nonzero_temperature: bool = option(
        False,
        "Resume streams with other temperatures and with penalties as well: the text continues, but differs from what"
        " a single worker would have written.",
        RETRIES,
    )

    # -- circuit breaker
    cb_failure_threshold: int | None = option(
        None,
        "Failures in a row that open a worker's circuit breaker.",
        BREAKER,
        check=at_least(1),
        shown_default="one more than --max-worker-retries",
    )
    cb_success_threshold: int = option(
        1, "Successes in a row that close a half-open circuit breaker.", BREAKER, check=at_least(1)
    )
    cb_timeout_duration_secs: float = option(
        10,
        "How long a circuit breaker stays open before one request may test the worker.",
        BREAKER,
        unit="s",
        check=above(0),
    )
    cb_max_timeout_duration_secs: float = option(
        60,
        "That time doubles with each failed test, up to this (or to --cb-timeout-duration-secs, if that is longer).",
        BREAKER,
        unit="s",
        check=above(0),
    )
    disable_circuit_breaker: bool = option(False, "Send requests to a worker however often it failed.", BREAKER)

    retry_budget_ratio: float = option(
        0.2,
        "Allow retries up to this share of the requests of the last 10 seconds, plus --retry-budget-min-per-second.",
        RETRIES,
        check=between(0, 10),
    )
    retry_budget_min_per_second: float = option(
        3, "Retries per second that are allowed in any case.", RETRIES, check=at_least(0)
    )

    # -- overload
    max_concurrent_requests: int = option(
        -1, "Most requests in flight at once; more are queued. -1: no limit.", OVERLOAD, check=at_least(-1)
    )
    queue_size: int = option(
        100,
        "Most queued requests; when the queue is full, a request gets 429.",
        OVERLOAD,
        check=at_least(0),
    )
    queue_timeout_secs: float = option(
        60, "Longest time that a request is queued; then 408.", OVERLOAD, unit="s", check=at_least(0)
    )
    rate_limit_tokens_per_second: int | None = option(
        None,
        "Most requests admitted per second, with bursts of one second's worth; others get 429. 0: no limit.",
        OVERLOAD,
        check=at_least(0),
    )
    max_priority: int = option(
        0,
        f"Highest priority that clients may ask for with the header x-smg-priority, from -{MOST_PRIORITY} to"
        f" {MOST_PRIORITY}, unless the file of their key says another one. Queued requests of a higher priority begin"
        " sooner.",
        OVERLOAD,
        check=between(-MOST_PRIORITY, MOST_PRIORITY),
    )
    priority_aging_secs: float = option(
        1,
        "A queued request that has waited for so long begins as soon as one of the next higher priority that comes"
        " then.",
        OVERLOAD,
        unit="s",
        check=above(0),
    )
    max_running_per_worker: int = option(
        0,
        "Most requests in flight at one worker; more are queued here and sent to the first worker below its limit,"
        " with preference for the worker that holds their prefix. 0: no limit.",
        OVERLOAD,
        check=at_least(0),
    )
    max_buffered_request_bytes: int = option(
        1_073_741_824,
        "Most bytes of requests with bodies above 64 kB held in memory at once. What does not fit waits unread, first"
        " come, first served; after --queue-timeout-secs it gets 429. A larger body gets 413.",
        OVERLOAD,
        unit="bytes",
        check=at_least(65536),
    )
    first_byte_timeout_secs: float = option(
        300,
        "Longest time for a worker to send the first event of a stream; then 504.",
        OVERLOAD,
        unit="s",
        check=above(0),
    )
    chunk_timeout_secs: float = option(
        300,
        "Longest pause of a worker while it sends an answer; then the router ends the answer with an error.",
        OVERLOAD,
        unit="s",
        check=above(0),
    )
    send_timeout_secs: float = option(
        60,
        "Longest time in which a client takes nothing of its answer; then the router closes its connection.",
        OVERLOAD,
        unit="s",
        check=above(0),
    )
    sse_keepalive_secs: float = option(
        0,
        "Send a comment (on /v1/messages a ping) into streams that are silent for this long, for proxies that close "
        "idle connections; 0: never. Sent before the first event, it commits to status 200: a failure that no retry "
        "mends is an error event then.",
        OVERLOAD,
        unit="s",
        check=at_least(0),
    )

    # -- outliers
    disable_outlier_ejection: bool = option(
        False, "Do not eject workers that fail far more often, or answer far later, than the others.", OUTLIERS
    )
    outlier_window_secs: float = option(
        30,
        "Window of answers that count. A worker with fewer than 20 is not judged.",
        OUTLIERS,
        unit="s",
        check=above(0),
    )
    outlier_failure_rate: float = option(
        0.5, "Share of failed requests that makes a worker an outlier.", OUTLIERS, check=between(0.01, 1)
    )
    outlier_latency_factor: float = option(
        3,
        "A worker is an outlier when the first bytes of its streams come this many times later than those of other"
        " workers under similar load.",
        OUTLIERS,
        check=above(1),
    )
    outlier_ejection_secs: float = option(
        30,
        "How long an outlier is ejected; twice as long each next time, up to ten times this.",
        OUTLIERS,
        unit="s",
        check=above(0),
    )

    # -- health checks
    health_check_interval_secs: float = option(
        10, "Pause between health checks of a worker.", HEALTH, unit="s", check=above(0)
    )
    health_check_timeout_secs: float = option(
        5, "Longest time for a worker to answer a health check.", HEALTH, unit="s", check=above(0)
    )
    health_failure_threshold: int = option(
        3, "Failed checks in a row that make a worker unhealthy.", HEALTH, check=at_least(1)
    )
    health_success_threshold: int = option(
        2, "Successful checks in a row that make it healthy again.", HEALTH, check=at_least(1)
    )
    health_check_endpoint: str = option("/health", "Path of the health check.", HEALTH, check=checks.path)
    disable_health_check: bool = option(False, "Treat every worker as healthy.", HEALTH)

    # -- autoscaling
    autoscale: str | None = option(
        None,
        "Fewest and most workers, as in 1:8 or 0:4. The router decides how many workers there should be and shows it in"
        " GET /scale, in the metric sgl_router_desired_workers and to the webhook and command below. launch_server"
        " starts and stops its replicas accordingly. With MIN 0 it also stops the last replica when there is nothing to"
        " do; the next request starts it again.",
        AUTOSCALING,
        metavar="MIN:MAX",
        check=checks.scale_range,
    )
    autoscale_target_load: float = option(
        32, "Requests in flight that a worker should have.", AUTOSCALING, unit="requests", check=above(0)
    )
    autoscale_target_queue: float = option(
        4,
        "Requests per worker that may be waiting for their first token.",
        AUTOSCALING,
        unit="requests",
        check=above(0),
    )
    autoscale_target_tokens: int = option(
        65536,
        "Prompt tokens per worker that may be waiting for prefill.",
        AUTOSCALING,
        unit="tokens",
        check=above(0),
    )
    autoscale_ttft_goal_secs: float | None = option(
        None,
        "Time to first token that nine of ten streams should not exceed.",
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
        "How long fewer workers must have been enough before one is removed.",
        AUTOSCALING,
        unit="s",
        check=at_least(0),
    )
    autoscale_wake_timeout_secs: float = option(
        600,
        "How long a request is queued for the first worker after scaling to zero.",
        AUTOSCALING,
        unit="s",
        check=above(0),
    )
    scale_webhook: str | None = option(
        None,
        "URL that gets a POST at each change of the desired number of workers.",
        AUTOSCALING,
        metavar="URL",
        check=checks.webhook,
        secret=True,  # such URLs often hold a token
    )
    scale_webhook_secret: str | None = option(
        None,
        "Secret that signs the webhook's messages (HMAC-SHA256, header x-sglang-router-signature).",
        AUTOSCALING,
        metavar="SECRET",
        secret=True,
    )
    scale_command: str | None = option(
        None,
        "Command to run at each change of the desired number of workers, without a shell, with"
        " SGLANG_ROUTER_DESIRED_WORKERS, SGLANG_ROUTER_CURRENT_WORKERS and SGLANG_ROUTER_SCALE_REASON in its"
        " environment.",
        AUTOSCALING,
        metavar="CMD",
        check=checks.command,
        secret=True,  # a word of it may be a token
    )

    # -- metrics
    prometheus_host: str = option(
        "",
        "Address of the metrics listener. (/metrics on the router's own port serves the metrics as well.)",
        METRICS,
        check=lambda host: host and checks.address(host),
        shown_default="the value of --host",
    )
    prometheus_port: int = option(
        29000,
        "Port of the metrics listener. If the port is in use, the router warns when it is the default, and ends when"
        " you gave it. 0: any free port.",
        METRICS,
        check=between(0, 65535),
    )
    prometheus_duration_buckets: list[float] | None = option(
        None,
        "Upper bounds of the duration histograms, ascending.",
        METRICS,
        unit="s",
        check=checks.buckets,
        shown_default="from 1 ms to 240 s",
    )
    metrics_interval_secs: float = option(
        1,
        "Metrics are made at most once in this time; whoever asks meanwhile gets the same. 0: made anew each time.",
        METRICS,
        unit="s",
        check=at_least(0),
    )

    # -- decisions
    decision_records: int = option(
        2048,
        "Decisions to keep in memory for GET /decisions and `sglang-router explain`. 0: none.",
        DECISIONS,
        check=between(0, 65536),
    )
    decision_table_every: int = option(
        64,
        "Keep the table of the candidates for one decision of so many, besides those of retries and of requests with"
        " the header x-sglang-router-explain: 1. 1: for all; 0: for no other.",
        DECISIONS,
        check=at_least(0),
    )
    decision_log: str | None = option(
        None,
        "File for one JSON line about each request: when, how long, which worker and why, and keyed hashes of the"
        " prompt's blocks, but no text. `sglang-router replay` reads it. The key is kept beside it, in FILE.key.",
        DECISIONS,
        metavar="FILE",
    )
    decision_log_max_bytes: int = option(
        268_435_456,
        "Begin another --decision-log when it is larger than this; the old one is called FILE.1. 0: no limit.",
        DECISIONS,
        unit="bytes",
        check=at_least(0),
    )
    decision_log_files: int = option(
        4, "Most files of --decision-log, the current one included.", DECISIONS, check=between(1, 1000)
    )
    decision_headers: bool = option(
        False,
        "Tell in each answer which worker was chosen and why, in x-sglang-router-worker and x-sglang-router-decision."
        " Otherwise only requests with the header x-sglang-router-explain: 1 are told.",
        DECISIONS,
    )

    # -- tracing
    enable_trace: bool = option(
        False,
        "Send OpenTelemetry traces: a span of each request, and one of each attempt at a worker, which is the parent of"
        " the engine's own spans. Needs the extra `otel`.",
        TRACING,
    )
    otlp_traces_endpoint: str = option(
        "localhost:4317",
        "Where to send traces: host and port of a collector, or a URL; https:// for TLS. The usual port is 4317 for"
        " grpc, and 4318 for http/protobuf.",
        TRACING,
        check=checks.collector,
        metavar="HOST:PORT",
    )
    otlp_traces_protocol: str = option(
        "grpc", "How to send traces.", TRACING, choices=("grpc", "http/protobuf"), synonyms={"http": "http/protobuf"}
    )
    trace_sample_ratio: float = option(
        1.0,
        "Which part of the traces that begin at the router is recorded. A request with a traceparent is recorded if"
        " that says so.",
        TRACING,
        check=between(0, 1),
    )

    # -- logging
    log_level: str = option(
        "info",
        "Lowest severity to log.",
        LOGGING,
        choices=("debug", "info", "warn", "error"),
        synonyms={"warning": "warn", "critical": "error", "fatal": "error", "trace": "debug"},
    )
    log_format: str = option(
        "auto",
        "Format of log lines. auto: short, coloured lines where standard error is a terminal and no --log-dir is given"
        " (without colours if NO_COLOR is set), else text.",
        LOGGING,
        choices=("auto", "text", "json"),
    )
    log_dir: str | None = option(
        None,
        "Folder for log files, one a day; created if it does not exist. A file that was moved away is begun anew.",
        LOGGING,
        shown_default="standard error only",
    )
    log_keep_files: int = option(
        0, "Most log files kept in --log-dir; the oldest are removed. 0: no limit.", LOGGING, check=at_least(0)
    )
    log_keep_days: float = option(
        0,
        "Remove log files in --log-dir that were not written to for so many days. 0: no limit.",
        LOGGING,
        unit="days",
        check=at_least(0),
    )
    log_max_bytes: int = option(
        0,
        "Begin another log file of the day when one is larger than this. 0: no limit.",
        LOGGING,
        unit="bytes",
        check=at_least(0),
    )
    disable_access_log: bool = option(False, "Do not write a log line for each request.", LOGGING)
    log_probes: bool = option(
        False,
        "Write a line also for requests that watch the router: /health, /readiness, /liveness, /metrics and the like.",
        LOGGING,
    )

    # -- other names
    eviction_interval: float | None = alias("eviction_interval_secs")
    verbose: bool | None = alias("log_level", means="debug")
