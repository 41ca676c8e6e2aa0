"""Options as people write them: units, any case, lists in one word, flags given twice, misspelt variables, marks in
files; and the defaults of another router."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sglang_router.config import OPTIONS, RouterArgs, parse, small_files
from sglang_router.config.compat import DEFAULTS_0_3_2
from sglang_router.config.page import migrating_table
from sglang_router.config.units import plain_number
from sglang_router.errors import ConfigError
from sglang_router.launch.options import parse as parse_launcher

A, B, C = "http://a:1", "http://b:2", "http://c:3"


def read(*words: str, **environ: str) -> RouterArgs:
    return parse(words, environ).checked()


# -- case 26: small ones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "plain"),
    [
        ("64MiB", "bytes", 64 << 20),
        ("64mb", "bytes", 64 << 20),
        ("10m", "bytes", 10 << 20),
        ("1g", "bytes", 1 << 30),
        ("1.5 GiB", "bytes", 3 << 29),
        ("2t", "bytes", 2 << 40),
        ("512k", "bytes", 512 << 10),
        ("7b", "bytes", 7),
        ("30s", "s", 30),
        ("500ms", "s", 0.5),
        ("5m", "s", 300),
        ("2h", "s", 7200),
        ("1d", "s", 86400),
        ("200ms", "ms", 200),
        ("7d", "days", 7),
        ("36h", "days", 1.5),
        ("1.5s", "ms", 1500),
    ],
)
def test_case_26_numbers_have_units(text: str, unit: str, plain: float) -> None:
    """`--max-payload-size 64MiB` was refused."""
    assert float(plain_number(text, unit)) == plain


@pytest.mark.parametrize(
    ("text", "unit"),
    [("5m", ""), ("5q", "s"), ("5s", "bytes"), ("5kk", "bytes"), ("k", "bytes"), ("1e3", "bytes"), ("5 5m", "s")],
)
def test_other_texts_are_left_to_the_reader(text: str, unit: str) -> None:
    assert plain_number(text, unit) == text


def test_case_26_units_in_options(tmp_path: Path) -> None:
    """Sizes and times take units wherever they come from; a fraction of a byte is a mistake, as before."""
    file = tmp_path / "r.yaml"
    file.write_text("queue-timeout-secs: 2m\n")
    words = ("--max-payload-size", "64MiB", "--retry-max-backoff-ms", "1s", "--config", str(file))
    args = read(*words, SGLANG_ROUTER_MAX_TREE_SIZE="10m")
    assert (args.max_payload_size, args.max_tree_size) == (64 << 20, 10 << 20)
    assert [args.retry_max_backoff_ms, args.queue_timeout_secs] == [1000.0, 120.0]
    for bad in ("0.3b", "64MiX", "m"):
        with pytest.raises(ConfigError, match="is not a whole number of at least 1"):
            read("--max-payload-size", bad)


@pytest.mark.parametrize(
    ("word", "level"),
    [("INFO", "info"), ("warning", "warn"), ("WARNING", "warn"), ("Critical", "error"), ("trace", "debug")],
)
def test_case_26_levels_in_any_case_and_by_other_names(word: str, level: str) -> None:
    """`--log-level INFO` was refused."""
    assert read("--log-level", word).log_level == level
    assert RouterArgs(log_level=word).checked().log_level == level


def test_case_26_choices_in_any_case() -> None:
    """The same for every option that has choices."""
    args = read("--policy", "Round-Robin", "--log-format", "JSON", SGLANG_ROUTER_ASSIGNMENT_MODE="MIN_LOAD")
    assert (args.policy, args.log_format, args.assignment_mode) == ("round_robin", "json", "min_load")


def test_case_26_lists_in_one_word() -> None:
    """`--worker-urls A,B` was one strange URL."""
    args = read("--worker-urls", f"{A},{B}", C, "--request-id-headers", "x-a, x-b")
    assert (args.worker_urls, args.request_id_headers) == ([A, B, C], ["x-a", "x-b"])
    assert read("--cors-allowed-origins", f"{A},{B}").cors_allowed_origins == [A, B]


BROKEN = {
    "date.yaml": "port: 2026-13-45\n",
    "digits.yaml": f"port: {'9' * 5000}\n",
    "no integer.yaml": 'port: !!int ""\n',
    "no date.yaml": "port: !!timestamp x\n",
    "no switch.yaml": "dp-aware: !!bool x\n",
    "deep.yaml": "port: " + "[" * 1000,
    "deep.toml": "port = " + "[" * 1000,
    "date.toml": "port = 2026-13-45\n",
    "twice.yaml": "port: 1\nhost: a\nport: 2\n",
    "twice.toml": "port = 1\nport = 2\n",
    "two spellings.yaml": "worker-urls: []\nworker_urls: []\n",
    "two spellings.toml": "tls-cert-path = 'a'\nserver_cert_path = 'b'\n",
    "mark.yaml": "\0",
}


@pytest.mark.parametrize("name", BROKEN)
def test_case_26_a_broken_file_is_one_line(name: str, tmp_path: Path) -> None:
    """Some were a traceback, at the start and at SIGHUP; a key that was there twice was taken."""
    file = tmp_path / name
    file.write_text(BROKEN[name])
    with pytest.raises(ConfigError) as caught:
        read("--config", str(file))
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_case_12_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    """The start, or the event loop at SIGHUP, waited for the writer of a pipe, for ever."""
    file = tmp_path / "r.yaml"
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="is not a plain file"):
        read("--config", str(file))
    with pytest.raises(ConfigError, match="is not a plain file"):
        small_files.read("/dev/zero", pipe=True)
    assert small_files.read(file, pipe=True) == b""  # no writer
    large = tmp_path / "large"
    large.write_bytes(bytes(small_files.LARGEST + 1))
    with pytest.raises(ConfigError, match="is larger than 1 MiB"):
        small_files.read(large)


def test_case_12_an_empty_file_does_not_remove_the_workers(tmp_path: Path) -> None:
    """SIGHUP while an editor or a script wrote the file anew took all workers away."""
    file = tmp_path / "r.yaml"
    file.write_text(f"worker-urls: [{A}]\n")
    args = read("--config", str(file))
    for text in ("", "# soon\n", "worker-urls:\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="holds no options"):
            args.reread()
    file.write_text("worker-urls: []\n")
    assert args.reread().worker_urls == []


@pytest.mark.parametrize(
    ("host", "normal"),
    [("::0", "::"), ("[0:0:0:0:0:0:0:0]", "::"), ("::1", "::1"), ("LocalHost", "localhost"), ("0.0.0.0", "0.0.0.0")],
)
def test_case_15_an_address_has_one_spelling(host: str, normal: str) -> None:
    """`--host ::0` served no IPv4, and `--host LOCALHOST` was said to be open to everybody."""
    args = read("--host", host, "--prometheus-host", host)
    assert (args.host, args.prometheus_host) == (normal, normal)


@pytest.mark.parametrize("host", ["*", "0.0.0.0:30000", "localhost:1", "http://a", "a b", ""])
def test_case_15_what_is_no_address(host: str) -> None:
    """`*` was taken; a host with a port was a name that cannot be found."""
    with pytest.raises(ConfigError, match="is not a host name or an IP address"):
        read("--host", host)


def test_f40_flags_with_a_list_add_up() -> None:
    """`--control-plane-api-keys A --control-plane-api-keys B` was B alone."""
    args = read(
        *("--control-plane-api-keys", "a:A:admin:k1", "--control-plane-api-keys", "b:B:user:k2"),
        *("--worker-urls", A, "--worker-urls", B, "--api-key", "x", "--api-key", "y"),
        *("--cors-allowed-origins", A, "--cors-allowed-origins", B, "--ca-cert-paths", "c", "--ca-cert-paths", "d"),
        *("--request-id-headers", "x-a", "--request-id-headers", "x-b", "--policy", "random", "--policy", "manual"),
    )
    assert [key.key for key in args.control_plane_api_keys] == ["k1", "k2"]
    assert [key.key for key in args.api_key] == ["x", "y"]
    assert (args.worker_urls, args.cors_allowed_origins, args.ca_cert_paths) == ([A, B], [A, B], ["c", "d"])
    assert (args.request_id_headers, args.policy) == (["x-a", "x-b"], "manual")


SEVERAL = [option for option in OPTIONS.values() if isinstance(option.default, (list, dict))]


@pytest.mark.parametrize("option", SEVERAL, ids=lambda option: option.flag)
def test_f40_every_flag_with_several_values(option: Any) -> None:
    """No option with a list or a mapping forgets what its flag said before."""
    values = {
        "control_plane_api_keys": ("a:A:admin:k", "b:B:user:l"),
        "prometheus_duration_buckets": ("1", "2"),
        "models": ('{"a":{}}', '{"b":{}}'),
        "control_plane_allowed_hosts": ("a.example.com", "b.example.com"),
    }
    first, second = values.get(option.name, ("k=1", "l=2") if isinstance(option.default, dict) else (A, B))
    args = parse([option.flag, first, option.flag, second], {})
    assert len(getattr(args, option.name)) == 2


def test_case_26_misspelt_variables_are_told() -> None:
    """`SGLANG_ROUTER_POLCY=random` had no effect, and no word was said of it."""
    environ = {
        "SGLANG_ROUTER_POLCY": "random",
        "SGLANG_ROUTER_POLICY": "manual",
        "SGLANG_ROUTER_PORT": "tcp://10.0.0.7:30000",  # what Kubernetes sets for a service of this name
        "SGLANG_ROUTER_SERVICE_HOST": "10.0.0.7",
        "SGLANG_ROUTER_SERVICE_PORT_HTTP": "80",
        "SGLANG_ROUTER_PORT_30000_TCP_ADDR": "10.0.0.7",
        "SGLANG_ROUTER_DESIRED_WORKERS": "3",
        "SGLANG_ROUTER_EVICTION_INTERVAL": "7",
    }
    told = ("SGLANG_ROUTER_POLCY is not a variable of this router; did you mean SGLANG_ROUTER_POLICY?",)
    assert parse([], environ).slips == told
    assert parse_launcher(["--backend", "builtin"], environ).router.slips == told


@pytest.mark.parametrize(("name", "text"), [("r.toml", "port = 31000\n"), ("r.yaml", "port: 31000\n")])
def test_case_26_a_file_may_begin_with_a_mark(name: str, text: str, tmp_path: Path) -> None:
    """A byte order mark, with which some editors begin a file, made it unreadable."""
    file = tmp_path / name
    file.write_text(text, encoding="utf-8-sig")
    assert read("--config", str(file)).port == 31000


# -- read again --------------------------------------------------------------------------------------------------------


def test_case_12_a_file_is_read_again_and_flags_stay(tmp_path: Path) -> None:
    """What flags and variables set stays; what the file does not say any more returns to its default."""
    file = tmp_path / "r.yaml"
    file.write_text(f"worker-urls: [{A}]\nqueue-size: 7\nport: 31000\n")
    args = read("--config", str(file), "--port", "32000", SGLANG_ROUTER_POLICY="random")
    assert args.reread() == args
    assert args.reread().from_file == {"worker_urls", "queue_size"}
    file.write_text(f"worker-urls: [{B}]\nlog-level: WARNING\nport: 33000\npolicy: manual\n")
    new = args.reread()
    assert (new.worker_urls, new.log_level, new.queue_size) == ([B], "warn", 100)
    assert (new.port, new.policy) == (32000, "random")
    file.write_text("port: x\n")
    with pytest.raises(ConfigError, match="'x' is not a whole number"):
        args.reread()


# -- the defaults of 0.3.2 ---------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
REFERENCE: dict[str, Any] = {
    "host": "0.0.0.0",
    "port": 30000,
    "worker_urls": [],
    "policy": "cache_aware",
    "prefill_policy": None,
    "decode_policy": None,
    "cache_threshold": 0.3,
    "balance_abs_threshold": 64,
    "balance_rel_threshold": 1.5,
    "bucket_adjust_interval_secs": 5,
    "eviction_interval_secs": 60,
    "max_tree_size": 67108864,
    "max_idle_secs": 14400,
    "assignment_mode": "random",
    "max_payload_size": 536870912,
    "worker_startup_timeout_secs": 1800,
    "worker_startup_check_interval": 30,
    "service_discovery_port": 80,
    "log_dir": None,
    "log_level": "info",
    "prometheus_port": 29000,
    "prometheus_host": "0.0.0.0",
    "prometheus_duration_buckets": None,
    "request_id_headers": None,
    "request_timeout_secs": 1800,
    "shutdown_grace_period_secs": 180,
    "cors_allowed_origins": ["*"],  # none given means any origin there
    "max_concurrent_requests": -1,
    "queue_size": 100,
    "queue_timeout_secs": 60,
    "rate_limit_tokens_per_second": None,
    "max_total_retries": 4,  # --retry-max-retries 5 counts the first attempt
    "retry_initial_backoff_ms": 50,
    "retry_max_backoff_ms": 30000,
    "retry_backoff_multiplier": 1.5,
    "retry_jitter_factor": 0.2,
    "cb_failure_threshold": 10,
    "cb_success_threshold": 3,
    "cb_timeout_duration_secs": 60,
    "cb_window_duration_secs": 120,
    "health_failure_threshold": 3,
    "health_success_threshold": 2,
    "health_check_timeout_secs": 5,
    "health_check_interval_secs": 60,
    "health_check_endpoint": "/health",
    "tokenizer_cache_l0_max_entries": 10000,
    "tokenizer_cache_l1_max_memory": 52428800,
    "backend": "sglang",
    "history_backend": "memory",
    "otlp_traces_endpoint": "localhost:4317",
}
"""The defaults of the reference router 0.3.2, where they are not "none" or "off"."""


def test_compat_sets_the_defaults_of_0_3_2() -> None:
    """Each option of 0.3.2 has its default there; those that differ are what `--compat` sets, and nothing else."""
    args = read("--compat", "0.3.2")
    assert {name: getattr(args, name) for name in REFERENCE} == REFERENCE
    assert args.assumed == DEFAULTS_0_3_2.keys()
    ours = RouterArgs().checked()
    others = [name for name in OPTIONS if name not in DEFAULTS_0_3_2 and name != "compat"]
    assert [name for name in others if getattr(args, name) != getattr(ours, name)] == []
    assert all(DEFAULTS_0_3_2[name] != OPTIONS[name].default for name in DEFAULTS_0_3_2)
    assert args.given == {"compat"}


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--cache-threshold 0.5", "cache_threshold", 0.5),  # our default, but given
        ("--host 127.0.0.1", "host", "127.0.0.1"),
        ("--retry-max-retries 3", "max_total_retries", 2),
        ("--max-total-retries 6", "max_total_retries", 6),
        ("--disable-retries", "max_worker_retries", 1),
        ("--control-plane-api-keys a:A:admin:k", "control_plane_open", False),
        ("--cb-timeout-duration-secs 90", "cb_max_timeout_duration_secs", 90),
    ],
)
def test_what_is_given_wins_over_compat(words: str, name: str, value: object) -> None:
    assert getattr(read("--compat", "0.3.2", *words.split()), name) == value


def test_compat_from_every_side() -> None:
    assert read(SGLANG_ROUTER_COMPAT="0.3.2", SGLANG_ROUTER_HOST="10.0.0.1").host == "10.0.0.1"
    assert RouterArgs(compat="0.3.2").checked().checked().host == "0.0.0.0"
    assert RouterArgs(compat="0.3.2", cache_threshold=0.7).checked().cache_threshold == 0.7
    line = parse_launcher(["--backend", "builtin", "--router-compat", "0.3.2"], {})
    assert line.router.checked().balance_abs_threshold == 64
    with pytest.raises(ConfigError, match=r"'0.2' is not one of 0.3.2"):
        read("--compat", "0.2")


def test_the_page_has_what_compat_sets() -> None:
    _, _, rest = PAGE.read_text().partition("<!-- compat: begin -->\n")
    assert rest.partition("<!-- compat: end -->")[0] == migrating_table(), (
        "see python -m sglang_router.config --migrating"
    )
