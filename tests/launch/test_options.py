"""launch_server's command line: which words go to the launcher, to the router, and to the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import ConfigError
from sglang_router.launch.backends import BACKENDS
from sglang_router.launch.options import BACKEND_NAMES, LAUNCH, CommandLine, markdown, parse

PAGE = Path(__file__).parents[2] / "docs" / "launch.md"


def read(words: str = "", **environ: str) -> CommandLine:
    return parse(words.split(), {"SGLANG_ROUTER_" + name: value for name, value in environ.items()})


def refused(words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(words)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- the launcher's --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--backend vllm", "backend", "vllm"),
        ("--model-path org/model", "model_path", "org/model"),
        ("--model=org/model", "model_path", "org/model"),
        ("--dp-size 4", "dp_size", 4),
        ("--dp 4", "dp_size", 4),
        ("-dp 4", "dp_size", 4),
        ("--data-parallel-size=4", "dp_size", 4),
        ("--router-dp-worker-base-port 40000", "router_dp_worker_base_port", 40000),
        ("--dp-worker-host 0.0.0.0", "dp_worker_host", "0.0.0.0"),
        ("--engine-python /v/bin/python", "engine_python", "/v/bin/python"),
        ("--log-dir logs", "log_dir", "logs"),
        ("--router-max-restarts 0", "router_max_restarts", 0),
        ("--router-restart-window-secs 60", "router_restart_window_secs", 60),
        ("--router-restart-initial-backoff-secs 0.5", "router_restart_initial_backoff_secs", 0.5),
        ("--router-restart-max-backoff-secs 5", "router_restart_max_backoff_secs", 5),
        ("--router-hang-timeout-secs 9", "router_hang_timeout_secs", 9),
        ("--router-drain-timeout-secs 9", "router_drain_timeout_secs", 9),
        ("--router-stop-grace-secs 9", "router_stop_grace_secs", 9),
    ],
)
def test_own_option(words: str, name: str, value: object) -> None:
    line = read(words)
    assert getattr(line.options, name) == value != getattr(read().options, name)
    assert line.engine == ()
    assert (line.router.model_path, line.router.backend) == (None, "sglang"), "the router's options of these names"


@pytest.mark.parametrize(("backend", "size"), [("sglang", 1), ("vllm", 1), ("llamacpp", 2), ("builtin", 2)])
def test_number_of_replicas(backend: str, size: int) -> None:
    assert read(f"--backend {backend}").options.size == size
    assert read(f"--backend {backend} --dp-size 3").options.size == 3


def test_names_of_backends() -> None:
    assert tuple(BACKENDS) == BACKEND_NAMES


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--backend sglnag", "--backend: 'sglnag' is not one of sglang, vllm, llamacpp, builtin; did you mean sglang?"),
        ("--dp-size 0", "--dp-size: '0' is not a whole number from 1 to 1024"),
        ("--dp-size 2 --dp 3", "two names of one option, with different values"),
        ("--dp-size", "--dp-size: expected one argument"),
        ("--router-restart-max-backoff-secs 0.5", "must not be less than"),
        ("--router-polcy random", "unknown flag --router-polcy; did you mean --router-policy?"),
        ("--router_policy=random", "unknown flag --router_policy; did you mean --router-policy?"),
        ("--router-qqqqqqqqqqqqqqqq=hush", "unknown flag --router-qqqqqqqqqqqqqqqq; see --help"),
        ("--port x", "--port: 'x' is not a whole number from 1 to 65535"),
    ],
)
def test_mistake(words: str, why: str) -> None:
    message = refused(words)
    assert why in message
    assert "hush" not in message


# -- the router's ----------------------------------------------------------------------------------------------------


def test_router_options() -> None:
    words = "--host 0.0.0.0 --port 8000 --router-policy random --router-log-level warn --router-cache-threshold=0.9"
    router = read(words).router
    assert (router.host, router.port, router.policy, router.log_level) == ("0.0.0.0", 8000, "random", "warn")
    assert router.cache_threshold == 0.9


def test_environment_and_file_speak_to_the_router(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("port: 7\npolicy: manual")
    line = read(f"--router-config {file} --router-policy random", HOST="::1", LOG_LEVEL="warn", BACKEND="openai")
    router = line.router
    assert (router.host, router.port, router.policy, router.log_level) == ("::1", 7, "random", "warn")
    assert line.options.backend == "sglang"
    assert read("--port 30000", PORT="1").router.port == 30000, "a flag wins, also with the default's value"


def test_router_logs_beside_the_engines() -> None:
    assert read("--log-dir a").router.log_dir == "a"
    assert read("--log-dir a --router-log-dir b").router.log_dir == "b"
    assert read("--log-dir a", LOG_DIR="b").router.log_dir == "b"
    assert read("--router-log-dir b").options.log_dir is None


# -- the engine's ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--tp-size 2 --mem-fraction-static 0.8 --quantization fp8",
        "--seed=-1 --bias -1 --ratio -0.5",
        '--override {"a":1,"b":[-1,2]}',
        "-tp 2 -pp 2 -hf org/model -O3",
        "--config engine.yaml --api-key k --log-level debug --model-pathology --portal --hosts a b",
        "--lora-paths a=b c=d --enable-metrics --x= --",
    ],
)
def test_engine_flags_are_left_alone(words: str) -> None:
    expected = tuple(word for word in words.split() if word != "--")
    assert read(words).engine == expected
    assert read(f"--port 1 {words}").engine == expected


def test_all_behind_two_dashes_is_the_engines() -> None:
    line = read("--port 1 --a -- --port 2 --router-x --help -- -h")
    assert line.engine == ("--a", "--port", "2", "--router-x", "--help", "--", "-h")
    assert line.router.port == 1


OWN = ["--dp-size 2", "--port=8", "--router-policy random", "--router-log-level=warn", "--model m", "-dp 2"]
KNOWN = {option.flag for option in LAUNCH.options.values()} | {"--dp", "--model", "--host", "--port", "-dp"}
OURS = ("--router", "--data-parallel-size", "--worker-urls", "--help")
names = st.from_regex(r"--?[a-z][a-z0-9_-]{1,12}", fullmatch=True).filter(
    lambda name: name not in KNOWN and not name.startswith(OURS)
)
numbers = st.integers(max_value=-1).map(str) | st.floats(-1e6, -0.001).map(lambda number: f"{number:.3f}")
values = st.text().filter(lambda text: not text.startswith("-")) | numbers
theirs = st.tuples(names, st.text()).map("=".join).map(lambda word: [word]) | st.lists(values, max_size=2).flatmap(
    lambda found: names.map(lambda name: [name, *found])
)


groups = st.sampled_from(OWN).map(lambda words: (True, words.split())) | theirs.map(lambda words: (False, words))


@given(st.lists(groups))
def test_engine_words_stay_as_they_are_and_in_order(groups: list[tuple[bool, list[str]]]) -> None:
    line = parse([word for _, words in groups for word in words], {})
    assert line.engine == tuple(word for own, words in groups if not own for word in words)


# -- help and page ---------------------------------------------------------------------------------------------------


def test_help_shows_own_options_first_and_needs_nothing() -> None:
    program = (
        "import sys\nfrom sglang_router.launch_server import main\n"
        "try: main(['-h'])\nexcept SystemExit as end: print('status', end.code)\n"
        "print([m for m in ('asyncio', 'uvloop', 'httptools', 'starlette', 'xllamacpp') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("status 0\n[]\n")
    flags = ["--backend", "--dp-size", "--router-max-restarts", "--worker-urls", "--router-policy"]
    places = [done.stdout.index(f"\n  {flag} ") for flag in flags]
    assert places == sorted(places)
    assert "goes unchanged to each engine" in done.stdout


def test_page_holds_the_tables() -> None:
    before, _, rest = PAGE.read_text("utf-8").partition("<!-- options: begin -->\n")
    tables, _, after = rest.partition("<!-- options: end -->\n")
    assert tables == markdown()
    assert before
    assert after
