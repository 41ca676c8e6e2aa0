"""Options: reading, errors and documentation of each; precedence of sources; what other launchers rely on."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.config import (
    ALIASES,
    OPTIONS,
    POLICY_NAMES,
    Option,
    RouterArgs,
    markdown,
    parse,
    parse_worker_url,
)
from sglang_router.config.checks import NumberRange
from sglang_router.config.flags import new_parser
from sglang_router.errors import ConfigError
from sglang_router.routing.policies import POLICIES

A, B = "http://a:8000", "http://b:8000"

# The 98 flags of the reference router 0.3.2: words on the command line, attribute, value.
REFERENCE: list[tuple[str, str, Any]] = [
    ("--host 0.0.0.0", "host", "0.0.0.0"),
    ("--port 8080", "port", 8080),
    (f"--worker-urls {A} {B}", "worker_urls", [A, B]),
    ("--policy power_of_two", "policy", "power_of_two"),
    ("--prefill-policy cost", "prefill_policy", "cost"),
    ("--decode-policy random", "decode_policy", "random"),
    ("--cache-threshold 0.3", "cache_threshold", 0.3),
    ("--balance-abs-threshold 64", "balance_abs_threshold", 64),
    ("--balance-rel-threshold 1.5", "balance_rel_threshold", 1.5),
    ("--bucket-adjust-interval-secs 7", "bucket_adjust_interval_secs", 7),
    ("--eviction-interval-secs 120", "eviction_interval_secs", 120),
    ("--max-tree-size 67108864", "max_tree_size", 67108864),
    ("--max-idle-secs 60", "max_idle_secs", 60),
    ("--assignment-mode min_group", "assignment_mode", "min_group"),
    ("--max-payload-size 1024", "max_payload_size", 1024),
    ("--dp-aware", "dp_aware", True),
    ("--enable-igw", "enable_igw", True),
    ("--mini-lb", "mini_lb", True),
    ("--pd-disaggregation", "pd_disaggregation", True),
    (
        f"--prefill {A} 9000 --prefill {B} none --prefill http://c",
        "prefill_urls",
        [(A, 9000), (B, None), ("http://c", None)],
    ),
    (f"--decode {A} --decode {B}", "decode_urls", [A, B]),
    ("--worker-startup-timeout-secs 5", "worker_startup_timeout_secs", 5),
    ("--worker-startup-check-interval 30", "worker_startup_check_interval", 30),
    ("--service-discovery", "service_discovery", True),
    ("--selector app=llm tier=gpu", "selector", {"app": "llm", "tier": "gpu"}),
    ("--service-discovery-port 8000", "service_discovery_port", 8000),
    ("--service-discovery-namespace prod", "service_discovery_namespace", "prod"),
    ("--prefill-selector role=p", "prefill_selector", {"role": "p"}),
    ("--decode-selector role=d", "decode_selector", {"role": "d"}),
    ("--log-dir logs", "log_dir", "logs"),
    ("--log-level warn", "log_level", "warn"),
    ("--prometheus-port 9100", "prometheus_port", 9100),
    ("--prometheus-host ::1", "prometheus_host", "::1"),
    ("--prometheus-duration-buckets 0.1 1 10", "prometheus_duration_buckets", [0.1, 1, 10]),
    ("--request-id-headers X-Request-Id x-trace", "request_id_headers", ["x-request-id", "x-trace"]),
    ("--request-timeout-secs 60", "request_timeout_secs", 60),
    ("--shutdown-grace-period-secs 0", "shutdown_grace_period_secs", 0),
    ("--cors-allowed-origins http://x", "cors_allowed_origins", ["http://x"]),
    ("--max-concurrent-requests 64", "max_concurrent_requests", 64),
    ("--queue-size 0", "queue_size", 0),
    ("--queue-timeout-secs 5", "queue_timeout_secs", 5),
    ("--rate-limit-tokens-per-second 9", "rate_limit_tokens_per_second", 9),
    ("--retry-max-retries 5", "retry_max_retries", 5),
    ("--retry-initial-backoff-ms 10", "retry_initial_backoff_ms", 10),
    ("--retry-max-backoff-ms 1000", "retry_max_backoff_ms", 1000),
    ("--retry-backoff-multiplier 2", "retry_backoff_multiplier", 2),
    ("--retry-jitter-factor 0", "retry_jitter_factor", 0),
    ("--disable-retries", "disable_retries", True),
    ("--cb-failure-threshold 10", "cb_failure_threshold", 10),
    ("--cb-success-threshold 3", "cb_success_threshold", 3),
    ("--cb-timeout-duration-secs 60", "cb_timeout_duration_secs", 60),
    ("--cb-window-duration-secs 90", "cb_window_duration_secs", 90),
    ("--disable-circuit-breaker", "disable_circuit_breaker", True),
    ("--health-failure-threshold 1", "health_failure_threshold", 1),
    ("--health-success-threshold 1", "health_success_threshold", 1),
    ("--health-check-timeout-secs 1", "health_check_timeout_secs", 1),
    ("--health-check-interval-secs 60", "health_check_interval_secs", 60),
    ("--health-check-endpoint /healthz", "health_check_endpoint", "/healthz"),
    ("--disable-health-check", "disable_health_check", True),
    ("--model-path org/model", "model_path", "org/model"),
    ("--tokenizer-path t", "tokenizer_path", "t"),
    ("--chat-template c", "chat_template", "c"),
    ("--tokenizer-cache-enable-l0", "tokenizer_cache_enable_l0", True),
    ("--tokenizer-cache-l0-max-entries 5", "tokenizer_cache_l0_max_entries", 5),
    ("--tokenizer-cache-enable-l1", "tokenizer_cache_enable_l1", True),
    ("--tokenizer-cache-l1-max-memory 5", "tokenizer_cache_l1_max_memory", 5),
    ("--reasoning-parser qwen3", "reasoning_parser", "qwen3"),
    ("--tool-call-parser json", "tool_call_parser", "json"),
    ("--mcp-config-path m", "mcp_config_path", "m"),
    ("--backend openai", "backend", "openai"),
    ("--history-backend redis", "history_backend", "redis"),
    ("--oracle-wallet-path w", "oracle_wallet_path", "w"),
    ("--oracle-tns-alias a", "oracle_tns_alias", "a"),
    ("--oracle-connect-descriptor d", "oracle_connect_descriptor", "d"),
    ("--oracle-username u", "oracle_username", "u"),
    ("--oracle-password p", "oracle_password", "p"),
    ("--oracle-pool-min 2", "oracle_pool_min", 2),
    ("--oracle-pool-max 3", "oracle_pool_max", 3),
    ("--oracle-pool-timeout-secs 4", "oracle_pool_timeout_secs", 4),
    ("--postgres-db-url postgres://x", "postgres_db_url", "postgres://x"),
    ("--postgres-pool-max 3", "postgres_pool_max", 3),
    ("--redis-url redis://x", "redis_url", "redis://x"),
    ("--redis-pool-max 3", "redis_pool_max", 3),
    ("--redis-retention-days -1", "redis_retention_days", -1),
    ("--client-cert-path c", "client_cert_path", "c"),
    ("--client-key-path k", "client_key_path", "k"),
    ("--ca-cert-paths a b", "ca_cert_paths", ["a", "b"]),
    ("--tls-cert-path c", "server_cert_path", "c"),
    ("--tls-key-path k", "server_key_path", "k"),
    ("--enable-trace", "enable_trace", True),
    ("--otlp-traces-endpoint h:1", "otlp_traces_endpoint", "h:1"),
    ("--api-key k", "api_key", [("", "k")]),
    ("--control-plane-api-keys i:n:admin:a:b", "control_plane_api_keys", [("i", "n", "a:b", "admin")]),
    ("--control-plane-audit-enabled", "control_plane_audit_enabled", True),
    ("--jwt-issuer i", "jwt_issuer", "i"),
    ("--jwt-audience a", "jwt_audience", "a"),
    ("--jwt-jwks-uri u", "jwt_jwks_uri", "u"),
    ("--jwt-role-mapping x=admin", "jwt_role_mapping", {"x": "admin"}),
]


def read(words: str = "", **environ: str) -> RouterArgs:
    return parse(words.split(), {"SGLANG_ROUTER_" + name: value for name, value in environ.items()})


def refused(words: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(words, **environ).checked()
    message = str(caught.value)
    assert "\n" not in message
    return message


def sample(option: Option) -> tuple[str, Any]:
    """A text that the option accepts, not its default, and the value it stands for."""
    if option.choices:
        choice = next(choice for choice in reversed(option.choices) if choice != option.default)
        return choice, choice
    if isinstance(option.default, bool):
        return "true", True
    if option.kind.metavar in ("N", "X"):
        if option.kind.nargs == "*":
            return "1 2.5", [1, 2.5]
        bounds = option.check if isinstance(option.check, NumberRange) else NumberRange(1)
        number = next(n for n in (bounds.low + 1, bounds.low + 2, 0.75) if n != option.default and fits(bounds, n))
        return f"{number:g}", number
    return SAMPLES[option.name] if option.name in SAMPLES else TEXTS[option.kind.metavar]


def fits(bounds: NumberRange, number: float) -> bool:
    try:
        return bounds(number) == number
    except ValueError:
        return False


TEXTS: dict[str, tuple[str, Any]] = {
    "TEXT": ("word", "word"),
    "KEY=VALUE": ("a=b, c=d", {"a": "b", "c": "d"}),
    "URL": (A, [(A, None)]),
    "JSON": ('{"m":{"policy":"cost"}}', {"m": {"policy": "cost"}}),
    "KEY": ("alice k,1", [("alice", "k,1")]),
    "ID:NAME:ROLE:KEY": ("i:n:user:k", [("i", "n", "k", "user")]),
}
SAMPLES: dict[str, tuple[str, Any]] = {
    "worker_urls": (f"{A}, {B}", [A, B]),
    "inference_pool": ("llm/llama", "llm/llama"),
    "otlp_traces_endpoint": ("https://collector:4318", "https://collector:4318"),
    "decode_urls": (A, [A]),
    "model_alias": ("a=b, c=d", {"a": "b", "c": "d"}),
    "model_fallback": ("a=b, c=d", {"a": "b", "c": "d"}),
    "worker_model": ("http://a=b", {"http://a": "b"}),
    "ca_cert_paths": ("a b", ["a", "b"]),
    "cors_allowed_origins": ("https://A:443/, http://b:8080", ["https://a", "http://b:8080"]),
    "control_plane_allowed_hosts": ("Router.Example.com., .lab.example", ["router.example.com", ".lab.example"]),
    "request_id_headers": ("X-A x-b", ["x-a", "x-b"]),
    "shared_state": ("redis://h", "redis://h"),
    "session_headers": ("X-A x-b", ["x-a", "x-b"]),
    "session_fields": ("session_id, metadata.user_id", ["session_id", "metadata.user_id"]),
    "health_check_endpoint": ("/h", "/h"),
    "model_id_from": ("label:llm", "label:llm"),
    "discovery_file": ("w.yaml", "w.yaml"),
    "discovery_dns": ("a:1, _http._tcp.b", ["a:1", "_http._tcp.b"]),
    "jwt_issuer": ("https://h", "https://h"),
    "jwt_jwks_uri": ("https://h/keys", "https://h/keys"),
    "autoscale": ("1:4", "1:4"),
    "scale_webhook": ("https://h/scale", "https://h/scale"),
    "kv_events_endpoint": ("tcp://{host}:5557", "tcp://{host}:5557"),
    "kv_events_replay_endpoint": ("ipc:///run/kv", "ipc:///run/kv"),
}


def options(*, without: str = "") -> list[Any]:
    return [pytest.param(option, id=name) for name, option in OPTIONS.items() if name != without]


# -- every option ------------------------------------------------------------------------------------------


def test_reference_has_98_flags() -> None:
    assert len({words.split()[0] for words, _, _ in REFERENCE}) == len(REFERENCE) == 98


@pytest.mark.parametrize(("words", "name", "value"), REFERENCE, ids=[r[0].split()[0] for r in REFERENCE])
def test_flag_of_the_reference(words: str, name: str, value: object) -> None:
    assert getattr(read(words), name) == value


def test_all_98_at_once() -> None:
    args = read(" ".join(words for words, _, _ in REFERENCE))
    assert [name for _, name, value in REFERENCE if getattr(args, name) != value] == []


@pytest.mark.parametrize("option", options(without="config"))
def test_option_from_every_source(option: Option, tmp_path: Path) -> None:
    text, value = sample(option)
    separate = [text] if option.name == "api_key" else text.replace(",", " ").split()
    words = [option.flag] if value is True else [option.flag, *separate]
    file = tmp_path / "f.yaml"
    file.write_text(yaml.safe_dump({option.name.replace("_", "-"): text}))
    native = tmp_path / "native.toml"
    native.write_text(f"{option.name} = {_toml(value)}")
    found = [
        parse(words, {}),
        *(parse([], {f"SGLANG_ROUTER_{key.upper()}": text}) for key in option.keys),
        *(parse(["--config", str(path)], {}) for path in (file, native)),
    ]
    assert [getattr(args, option.name) for args in found] == [value] * len(found)
    assert all(option.name in args.given for args in found)
    assert getattr(parse([], {}), option.name) == option.default != value


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value if item is not None) + "]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.parametrize("option", options())
def test_default_is_a_value_and_never_shared(option: Option) -> None:
    assert option.accept(option.default) == option.default
    assert not isinstance(option.default, (list, dict)) or option.fresh_default() is not option.default


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS.values() if isinstance(o.check, NumberRange)], ids=lambda o: o.name
)
def test_range(option: Option) -> None:
    bounds = option.check
    assert isinstance(bounds, NumberRange)
    highest = [] if bounds.high is None else [bounds.high]
    outside = [bounds.low - 1, *(high + 1 for high in highest)]
    (outside if bounds.open else highest).append(bounds.low)
    for number in outside:
        message = refused(f"{option.flag}={number:g}")
        assert message == f"{option.flag}: '{number:g}' is not {option.expects}"
    for edge in highest:
        assert option.accept(edge) == edge


@pytest.mark.parametrize("option", [o for o in OPTIONS.values() if o.kind.metavar in ("N", "X")], ids=lambda o: o.name)
def test_not_a_number(option: Option) -> None:
    texts: tuple[object, ...] = ("x", "nan", "inf", "1e999", "1 x", True, [[1]], {})
    for text in texts:
        with pytest.raises(ValueError, match=r" is not a"):
            option.accept(text)
    assert option.default is not None or option.accept("") is None


def test_defaults_of_the_first_version() -> None:
    args = RouterArgs()
    assert (args.policy, args.host, args.port) == ("cache_aware", "127.0.0.1", 30000)
    assert (args.cache_threshold, args.balance_abs_threshold, args.balance_rel_threshold) == (0.5, 32, 1.0001)
    assert (args.eviction_interval_secs, args.max_tree_size) == (60, 1 << 24)
    assert (args.max_worker_retries, args.max_total_retries) == (3, 6)
    assert (args.max_payload_size, args.health_check_interval_secs) == (512 << 20, 10)


def test_policies_are_those_of_core() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)


# -- help and documentation --------------------------------------------------------------------------------


def test_page_is_up_to_date() -> None:
    page = Path(__file__).parents[1] / "docs" / "options.md"
    assert page.read_text() == markdown(), "run: python -m sglang_router.config --markdown > docs/options.md"


def test_help_tells_everything() -> None:
    text = " ".join(new_parser("x").format_help().split()).replace("- ", "-")
    for option in OPTIONS.values():
        assert f"{option.flag} " in text
        assert option.help.split(".")[0] in text
        assert all(choice in text for choice in option.choices)
    assert text.count("[default: ") + text.count("; default: ") == len(OPTIONS)
    assert text.count("not available yet") == sum(o.status == "later" for o in OPTIONS.values())
    for words in (
        "default: 536870912 bytes (512 MiB)",
        "default: 30 s",
        "also --eviction-interval]",
        "--verbose (=",
    ):
        assert words in text


# -- sources -----------------------------------------------------------------------------------------------


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("port: 1\nhost: h\npolicy: random\n")
    args = read(f"--config {file} --port 3", PORT="2", HOST="e")
    assert (args.port, args.host, args.policy, args.cache_threshold) == (3, "e", "random", 0.5)
    assert args.given == {"config", "port", "host", "policy"}
    assert args.from_file == {"policy"}
    assert read("", CONFIG=str(file)).port == 1


def test_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text(f'worker_urls = ["{A}"]\ncache-threshold = 1\ndisable-retries = true\nlog_level = "warn"\n')
    args = read(f"--config {file}")
    assert (args.worker_urls, args.cache_threshold, args.disable_retries, args.log_level) == (
        [A],
        1,
        True,
        "warn",
    )


def test_null_and_empty_mean_not_given(tmp_path: Path) -> None:
    file = tmp_path / "router.yml"
    file.write_text("port:\nworker-api-key: null\n")
    assert read(f"--config {file}", HOST="", LOG_DIR=" ").given == {"config"}
    file.write_text("# nothing\n")
    assert read(f"--config {file}") == RouterArgs(config=str(file))


def test_kubernetes_service_link_is_not_a_port() -> None:
    assert read(PORT="tcp://10.0.0.7:30000").port == 30000


@pytest.mark.parametrize("switch", ["1", "TRUE", "yes", "on", "0", "false", "No", "off"])
def test_switch_in_the_environment(switch: str) -> None:
    assert read(DISABLE_RETRIES=switch).disable_retries == (switch.lower() in ("1", "true", "yes", "on"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.yaml", "polcy: random", ": 'polcy' is not an option; did you mean policy?"),
        ("r.yaml", "zzz: 1", ": 'zzz' is not an option"),
        ("r.yaml", "1: 1", ": 1 is not an option"),
        ("r.yaml", "config: other.yaml", ": 'config' cannot be set in a file"),
        ("r.yaml", "port: x", ": port: 'x' is not a whole number from 1 to 65535"),
        ("r.yaml", "port: 3.5", ": port: 3.5 is not a whole number from 1 to 65535"),
        ("r.yaml", "port: yes", ": port: True is not a whole number from 1 to 65535"),
        ("r.yaml", "host: 5", ": host: 5 is not a text"),
        ("r.yaml", "worker-api-key: 12345", ": worker-api-key: the value is not a text"),
        ("r.yaml", "worker-urls: [1]", ": worker-urls: [1] is not a list of texts"),
        ("r.yaml", "disable-retries: perhaps", ": disable-retries: 'perhaps' is not true or false"),
        ("r.yaml", "- a", " must be a mapping of options to values, as in `port: 30000`"),
        ("r.yaml", "a: [", ": expected the node content, but found '<stream end>' in line 1, column 5"),
        ("r.yaml", "a: !!python/object:os.system x", ": could not determine a constructor"),
        ("r.yaml", "a: \x01", ": unacceptable character"),
        ("r.toml", "a = ", ": Invalid value"),
        ("r.json", "{}", ": the name of the file must end in .yaml, .yml or .toml"),
        ("r.yaml", "verbose: 7", ": verbose: 7 is not true or false"),
        ("r.yaml", "eviction-interval: 5\neviction-interval-secs: 6", " two names of one option"),
    ],
)
def test_bad_file(name: str, text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    found = refused(f"--config {file}")
    assert found.startswith(str(file))
    assert message in found


@pytest.mark.parametrize(
    "flags",
    [
        "--otlp-traces-endpoint http://u:hunter2@h:1?x",
        "--otlp-traces-endpoint http://:hunter2@h:1",
        "--otlp-traces-endpoint u:hunter2@h",
        "--discovery-dns u:hunter2@h",
        "--discovery-dns u:hun/ter2:hunter2@h",
        "--cors-allowed-origins https://u:hunter2@h",
        "--control-plane-allowed-hosts http://u:hunter2@h",
        "--port http://u:hunter2@h",
        "--worker-urls http://u:hunter2@h",
        "--scale-webhook http://u:hunter2@h --autoscale 1:2",
        "--jwt-issuer https://u:hunter2@h --jwt-audience a",
        "--shared-state redis://u:hunter2@h:x",
    ],
)
def test_no_error_shows_the_password_of_a_url(flags: str) -> None:
    assert "hunter2" not in refused(flags)


FILES = [
    "worker-urls: ['http://u:hunter2@h', 5]",
    "port: http://u:hunter2@h/x",
    "models: {a: 'x:hunter2@h'}",
]


@pytest.mark.parametrize("text", FILES)
def test_nor_does_an_error_of_a_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert "hunter2" not in refused(f"--config {file}")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("r.yaml", "policy: cost\n\nport: x\n", ":3"),
        ("r.yaml", "{policy: cost,\n 'port': x}", ":2"),
        ("r.yml", "\ufeffmodels:\n  port: {}\nport: x", ":3"),
        ("r.yaml", "verbose: &it yes\nport: *it", ":2"),
        ("r.yaml", "<<: {port: x}", ""),  # it is in another mapping
        ("r.yaml", "policy: cost\n? 1\n: 2", ":2"),
        ("r.yaml", "queue-size: 1\nqueue_size: 2", ":2"),
        ("r.toml", "policy = 'cost'\nport = 'x'", ":2"),
        ("r.toml", "policy = 'cost'\n[ports]\nx = 1", ":2"),
        ("r.toml", "'port' = 0", ":1"),
    ],
)
def test_a_wrong_option_of_a_file_is_told_with_its_line(name: str, text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert refused(f"--config {file}").startswith(f"{file}{line}: ")


def test_unreadable_file(tmp_path: Path) -> None:
    missing, binary = tmp_path / "no.yaml", tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe")
    assert refused(f"--config {missing}") == f"{missing} cannot be read: No such file or directory"
    assert refused(f"--config {binary}") == f"{binary} is not UTF-8 text"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--port abc", "--port: 'abc' is not a whole number from 1 to 65535"),
        ("--port", "--port: expected one argument"),
        ("--prot 1", "unknown flag --prot; did you mean --port?"),
        ("--worker-url http://a", "unknown flag --worker-url; did you mean --worker-urls?"),
        ("--worker-apikey=hush", "unknown flag --worker-apikey; did you mean --worker-api-key?"),
        ("--qqqqqqq", "unknown flag --qqqqqqq; see --help"),
        ("stray", "unexpected argument 'stray'; see --help"),
        ("--host http://x", "--host: 'http://x' is not a host name or an IP address"),
        (
            "--kv-events-endpoint w1:5557",
            "--kv-events-endpoint: 'w1:5557' is not an address, as in tcp://{host}:5557",
        ),
        (
            "--kv-events-replay-endpoint tcp://{name}:5557",
            "--kv-events-replay-endpoint: 'tcp://{name}:5557' is not an address, as in tcp://{host}:5557",
        ),
        (
            "--health-check-endpoint health",
            "--health-check-endpoint: 'health' is not a path: it must begin with /",
        ),
        ("--request-id-headers a:b", "--request-id-headers: 'a:b' is not the name of a header"),
        ("--session-headers a:b", "--session-headers: 'a:b' is not the name of a header"),
        ("--session-headers x-a X-Request-ID", "--session-headers: 'x-request-id' is new for each request"),
        ("--session-fields a.b.c", "--session-fields: 'a.b.c' is not the name of a field"),
        ("--session-fields a-b", "--session-fields: 'a-b' is not the name of a field"),
        (
            "--prometheus-duration-buckets 1 1",
            "--prometheus-duration-buckets: the buckets must be positive and asc",
        ),
        ("--worker-urls http://a http://A/", "--worker-urls: worker URL http://a is given twice"),
        (
            "--worker-urls a:80",
            "--worker-urls: worker URL 'a:80' must begin with http:// or https://; try http://a:80",
        ),
        ("--selector app", "--selector: ['app'] is not a list of key=value"),
        ("--selector app=a,b", "--selector: 'a,b' is not the value of a label; a selector is a list of KEY=VALUE"),
        ("--selector _x=a", "--selector: '_x' is not the key of a label or an annotation, as in example.com/name"),
        ("--service-discovery", "--service-discovery needs the labels of the workers' pods: --selector app=NAME, or"),
        ("--service-discovery-namespace A_b", "'A_b' is not the name of a namespace: small letters, digits and -"),
        ("--inference-pool llama", "--inference-pool: 'llama' is not NAMESPACE/NAME, as in default/llama"),
        ("--inference-pool A/llama", "'A' is not the name of a namespace: small letters, digits and -"),
        ("--inference-pool a/b --service-discovery --selector a=b", "both say which pods; give only one of them"),
        ("--bootstrap-port-annotation /x", "'/x' is not the key of a label or an annotation"),
        ("--model-id-from pod", "--model-id-from: 'pod' is not namespace, label:KEY or annotation:KEY"),
        ("--model-id-from label:", "--model-id-from: 'label:' is not namespace, label:KEY or annotation:KEY"),
        ("--model-id-from label:a/b/c", "'a/b/c' is not the key of a label or an annotation"),
        ("--discovery-file workers.txt", "workers.txt: the name of the file must end in .yaml, .yml or .json"),
        ("--discovery-dns engines", "--discovery-dns: 'engines' needs a port, as in engines:8000"),
        ("--discovery-dns e:1 e:1", "--discovery-dns: e:1 is given twice"),
        ("--discovery-dns-interval-secs 0.5", "'0.5' is not a number of at least 1"),
        (
            "--prefill http://a x",
            "--prefill: [['http://a', 'x']] is not a URL with an optional port number or 'none'",
        ),
        (
            "--control-plane-api-keys i:n:root:hush",
            "--control-plane-api-keys: this is not ID:NAME:ROLE:KEY with the role admin or user",
        ),
        ("--api-key alice hush", "each key needs a flag of its own; quote a name together with its key: 'NAME KEY'"),
        ("--tls-cert-path c", "--tls-cert-path and --tls-key-path belong together; give both"),
        ("--client-key-path k", "--client-cert-path and --client-key-path belong together; give both"),
        (
            "--control-plane-open --control-plane-api-keys-file f",
            "--control-plane-open cannot be used with control-plane keys; give only one of them",
        ),
        ("--control-plane-allowed-hosts http://h", "'http://h' is not the name of a host, as in router.example.com"),
        ("--control-plane-allowed-hosts h:80", "'h:80' is not the name of a host"),
        ("--control-plane-allowed-hosts a..b", "'a..b' is not the name of a host"),
        ("--control-plane-allowed-hosts .", "'.' is not the name of a host"),
        ("--cors-allowed-origins chat.example.com", "'chat.example.com' is not an origin, as in https://"),
        ("--cors-allowed-origins https://h/path", "'https://h/path' is not an origin"),
        ("--cors-allowed-origins https://h:0x1", "'https://h:0x1' is not an origin"),
        ("--cors-allowed-origins https://u@h", "'https://***@h' is not an origin"),
        (
            "--retry-max-backoff-ms 1",
            "--retry-max-backoff-ms must not be less than --retry-initial-backoff-ms",
        ),
        ("--policy bucket", "--policy: 'bucket' is not one of cache_aware, cost, round_robin, random"),
        ("--policy cache-awar", "did you mean cache_aware?"),
    ],
)
def test_bad_command_line(words: str, message: str) -> None:
    found = refused(words)
    assert message in found
    assert "hush" not in found


def test_bad_variable() -> None:
    assert refused(PORT="x") == "SGLANG_ROUTER_PORT: 'x' is not a whole number from 1 to 65535"


# -- other names -------------------------------------------------------------------------------------------


def test_old_names_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("eviction_interval: 5\nretry-max-retries: 4\nverbose: true\n")
    ways = [
        read("--eviction-interval 5 --retry-max-retries 4 --verbose"),
        read(EVICTION_INTERVAL="5", RETRY_MAX_RETRIES="4", VERBOSE="1"),
        read(f"--config {file}"),
        RouterArgs(eviction_interval=5, retry_max_retries=4, verbose=True),
        RouterArgs.from_cli_args(SimpleNamespace(eviction_interval=5, retry_max_retries=4, verbose=True)),
    ]
    for args in ways:
        final = args.checked()
        assert (final.eviction_interval_secs, final.max_total_retries, final.log_level) == (5, 3, "debug")
        assert (args.eviction_interval, args.retry_max_retries, args.verbose) == (5, 4, True)
        assert final.checked() == final


def test_old_name_counts_as_much_as_its_source() -> None:
    args = read("--eviction-interval 5 --verbose", EVICTION_INTERVAL_SECS="6", LOG_LEVEL="error").checked()
    assert (args.eviction_interval_secs, args.log_level) == (5, "debug")
    args = read("--eviction-interval-secs 7 --log-level warn", EVICTION_INTERVAL="6", VERBOSE="1").checked()
    assert (args.eviction_interval_secs, args.eviction_interval, args.log_level) == (7, 7, "warn")


def test_both_names_must_agree() -> None:
    assert read("--eviction-interval 4 --eviction-interval-secs 4").eviction_interval_secs == 4
    assert "two names of one option" in refused("--eviction-interval 4 --eviction-interval-secs 5")
    with pytest.raises(ConfigError, match="two names of one option"):
        RouterArgs(eviction_interval=4, eviction_interval_secs=5).checked()


def test_retries_as_either_router_counts_them() -> None:
    assert read("--max-total-retries 4 --retry-max-retries 5").checked().max_total_retries == 4
    assert "conflict" in refused("--max-total-retries 4 --retry-max-retries 4")
    assert refused("--retry-max-retries 0") == "--retry-max-retries: '0' is not a whole number of at least 1"


def test_aliases_have_targets() -> None:
    assert all(alias.target in OPTIONS for alias in ALIASES.values())


def test_set_level_after_verbose_wins() -> None:
    args = read("--verbose")
    args.log_level = "warn"
    assert args.checked().log_level == "warn"


# -- derived values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [o for o in OPTIONS.values() if o.status == "later"], ids=lambda o: o.name)
def test_missing_feature_is_refused_when_used(option: Option) -> None:
    text, _ = sample(option)
    message = refused(**{option.name.upper(): text})
    assert message == f"not available in this version: {option.flag}; start without it"


def test_a_missing_feature_that_is_not_used_does_no_harm() -> None:
    assert read("--queue-size 100 --max-concurrent-requests -1 --backend sglang").checked().queue_size == 100


def test_inert_options_are_named_and_pass() -> None:
    args = read("--model-path m --history-backend none --redis-pool-max 16").checked()
    assert args.without_effect() == ["--model-path", "--history-backend"]
    assert read("--port 1").without_effect() == []


def test_disable_retries() -> None:
    args = read("--disable-retries --retry-max-retries 5").checked()
    assert (args.max_worker_retries, args.max_total_retries) == (1, 0)
    assert args.checked() == args


def test_values_that_follow_others() -> None:
    args = read("--host 0.0.0.0 --cb-timeout-duration-secs 90").checked()
    assert (args.prometheus_host, args.cb_max_timeout_duration_secs) == ("0.0.0.0", 90)
    assert read("--prometheus-host ::1").checked().prometheus_host == "::1"


def test_explicit_metrics_port_is_known() -> None:
    assert "prometheus_port" in read("--prometheus-port 29000").checked().given
    assert "prometheus_port" not in read().checked().given
    by_hand = RouterArgs()
    by_hand.prometheus_port = 29001
    assert "prometheus_port" in by_hand.checked().given


def test_checking_leaves_the_original_alone() -> None:
    args = RouterArgs(worker_urls=["HTTP://a/"], disable_retries=True, retry_max_retries=2)
    before = pickle.loads(pickle.dumps(args))
    assert args.checked().worker_urls == ["http://a"]
    assert args == before
    assert args.checked() == args.checked()


def test_checking_sees_what_was_set_by_hand() -> None:
    for name, value in (
        ("port", 0),
        ("worker_urls", ["x"]),
        ("policy", "best"),
        ("request_timeout_secs", "soon"),
    ):
        args = RouterArgs()
        setattr(args, name, value)
        with pytest.raises(ConfigError, match="^" + OPTIONS[name].flag):
            args.checked()


def test_first_fields_by_position() -> None:
    args = RouterArgs([A], "0.0.0.0", 1)
    assert (args.worker_urls, args.host, args.port) == ([A], "0.0.0.0", 1)


def test_file_named_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("port: 5\npolicy: random\n")
    args = RouterArgs(config=str(file), policy="manual").checked()
    assert (args.port, args.policy) == (5, "manual")
    assert args.from_file == {"port"}


def test_repr_shows_changes_but_no_secrets() -> None:
    secrets = [option for option in OPTIONS.values() if option.secret]
    args = RouterArgs(**{option.name: sample(option)[1] for option in secrets}, port=1)
    shown = repr(args)
    assert shown == f"RouterArgs(port=1, {', '.join(f'{option.name}=***' for option in secrets)})"
    assert repr(RouterArgs()) == "RouterArgs()"
    assert {"worker_api_key", "api_key", "control_plane_api_keys"} <= {option.name for option in secrets}


# -- other launchers ---------------------------------------------------------------------------------------


def launcher(prefix: bool, without_address: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-path", default="engine/model") if prefix else None
    RouterArgs.add_cli_args(parser, use_router_prefix=prefix, exclude_host_port=without_address)
    return parser


def test_flags_inside_another_parser() -> None:
    words = f"--router-policy random --router-eviction-interval 5 --worker-urls {A} --port 7".split()
    namespace = launcher(prefix=True, without_address=False).parse_args(words)
    assert (namespace.router_policy, namespace.router_queue_size, namespace.worker_urls) == (
        "random",
        100,
        [A],
    )
    namespace.router_cache_threshold = 0.9  # launchers change what they have parsed
    args = RouterArgs.from_cli_args(
        namespace,
        use_router_prefix=True,
        environ={"SGLANG_ROUTER_POLICY": "manual", "SGLANG_ROUTER_LOG_LEVEL": "warn"},
    )
    assert (args.policy, args.port, args.cache_threshold, args.log_level) == ("random", 7, 0.9, "warn")
    assert args.checked().eviction_interval_secs == 5
    assert args.model_path is None, "the engine's option is not the router's"


def test_address_of_another_parser() -> None:
    parser = launcher(prefix=True, without_address=True)
    parser.add_argument("--host", default="h")
    args = RouterArgs.from_cli_args(parser.parse_args([]), use_router_prefix=True, environ={})
    assert (args.host, args.port) == ("h", 30000)
    assert "--port" not in parser.format_help()


def test_help_of_another_parser_has_each_default_once() -> None:
    text = " ".join(launcher(prefix=False, without_address=False).format_help().split())
    assert text.count("(default: ") == 0


def test_error_inside_another_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launcher(prefix=True, without_address=False).parse_args(["--router-cache-threshold", "2"])
    assert "--router-cache-threshold: '2' is not a number from 0 to 1" in capsys.readouterr().err


def test_plain_object_is_taken_at_its_word() -> None:
    given = SimpleNamespace(worker_urls=[A], eviction_interval=9, verbose=False, log_level=None, prometheus_port=None)
    args = RouterArgs.from_cli_args(given, environ={"SGLANG_ROUTER_PORT": "1"}).checked()
    assert (args.port, args.eviction_interval_secs, args.log_level, args.prometheus_port) == (
        30000,
        9,
        "info",
        29000,
    )
    assert args.worker_urls is not given.worker_urls


# -- worker URLs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("http://a", "http://a"),
        (" HTTP://Host.Example:8000/ ", "http://host.example:8000"),
        ("https://a_b-c.d:443//", "https://a_b-c.d:443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://[2001:DB8::1]/", "http://[2001:db8::1]"),
        ("http://10.0.0.1:1/Base/", "http://10.0.0.1:1/Base"),
    ],
)
def test_worker_url(text: str, normal: str) -> None:
    assert parse_worker_url(text) == normal


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "characters"),
        ("a:80", "try http://a:80"),
        ("ftp://a", "must begin with"),
        ("http:/a", "must begin with"),
        ("http://", "no valid host"),
        ("http:///x", "no valid host"),
        ("http://:80", "no valid host"),
        ("http://a:", "cannot be read"),
        ("http://a:x", "cannot be read"),
        ("http://a:0", "from 1 to 65535"),
        ("http://a:65536", "from 1 to 65535"),
        ("http://a:" + "9" * 5000, "from 1 to 65535"),
        ("http://::1:80", "brackets"),
        ("http://[::1", "cannot be read"),
        ("http://[1.2.3.4]", "no valid host"),
        ("http://[fe80::1%25eth0]", "no valid host"),
        ("http://-a", "no valid host"),
        ("http://a b", "characters"),
        ("http://a\r\nx", "characters"),
        ("http://é", "characters"),
        ("http://a\\b", "characters"),
        ("http://a?x=1", "query"),
        ("http://a/#x", "fragment"),
        ("grpc://a:1", "only HTTP workers"),
    ],
)
def test_bad_worker_url(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_worker_url(text)


@pytest.mark.parametrize("text", ["http://u:hush@a", "u:hush@a:80", "http://a?key=hush", "http://u:hush@a b"])
def test_bad_worker_url_keeps_secrets(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_worker_url(text)
    assert "hush" not in str(caught.value)


@given(st.from_regex(r"https?://[\[\]a-zA-Z0-9:.@/?_-]{0,20}", fullmatch=True) | st.text())
def test_normal_form_is_stable(text: str) -> None:
    try:
        normal = parse_worker_url(text)
    except ConfigError:
        return
    assert parse_worker_url(normal) == normal
    assert "@" not in normal.split("/")[2]
    assert not normal.endswith("/")


# -- autoscaling -------------------------------------------------------------------------------------------


def test_a_range_of_workers() -> None:
    assert read("--autoscale 0:4").checked().scale_range == (0, 4)
    assert read("--autoscale 02:2").checked().autoscale == "2:2"
    assert read("").checked().scale_range is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--autoscale 3", "--autoscale: '3' is not MIN:MAX, as in 1:8"),
        ("--autoscale=-1:3", "--autoscale: '-1:3' is not MIN:MAX, as in 1:8"),
        ("--autoscale 4:2", "--autoscale: '4:2': MIN must not be above MAX, and MAX must be at least 1"),
        ("--autoscale 0:0", "--autoscale: '0:0': MIN must not be above MAX, and MAX must be at least 1"),
        ("--autoscale 1:2 --scale-webhook ftp://h", "--scale-webhook: the webhook must be a URL that begins with http"),
        ("--autoscale 1:2 --scale-webhook http://u:pw@h/", "--scale-webhook: the webhook's URL must not hold cred"),
        ("--autoscale 1:2 --dp-aware", "--autoscale cannot be used with --dp-aware"),
        ("--scale-webhook http://h/", "--scale-webhook and --scale-command need --autoscale MIN:MAX"),
    ],
)
def test_what_cannot_scale_is_refused(words: str, message: str) -> None:
    said = refused(words)
    assert said.startswith(message)
    assert "pw" not in said


def test_a_command_is_words() -> None:
    assert read("--autoscale 1:2", SCALE_COMMAND="kubectl scale 'a b'").checked().scale_command
    assert refused("--autoscale 1:2", SCALE_COMMAND="kubectl 'a b").endswith("No closing quotation")
