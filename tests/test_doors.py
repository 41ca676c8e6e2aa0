"""The commands as processes: output, exit status; and the functions behind them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_router import router_args
from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.launch_router import (
    CustomHelpFormatter,
    exit_status,
    launch_router,
    main,
    parse_router_args,
)
from sglang_router.version import version_line

LAUNCH = [sys.executable, "-m", "sglang_router.launch_router"]
CONSOLE = [str(Path(sysconfig.get_path("scripts")) / "sglang-router")]
MODULE = [sys.executable, "-m", "sglang_router"]


def run(command: list[str], *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_ROUTER_")}
    return subprocess.run(
        [*command, *words], env={**clean, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--port", "no"], "error: --port: 'no' is not a whole number from 1 to 65535"),
        (["--polcy", "random"], "error: unknown flag --polcy; did you mean --policy?"),
        (["--config", "/nowhere/r.yaml"], "error: /nowhere/r.yaml cannot be read: No such file or directory"),
        (
            ["--service-discovery"],
            "error: --service-discovery needs the labels of the workers' pods: --selector app=NAME",
        ),
        (
            ["--worker-urls", "grpc://a:1"],
            "error: --worker-urls: worker URL 'grpc://a:1': only HTTP workers are",
        ),
    ],
)
@pytest.mark.parametrize("door", [LAUNCH, [*CONSOLE, "launch"]], ids=["module", "console"])
def test_mistake_is_one_line_and_status_2(door: list[str], words: list[str], line: str) -> None:
    done = run(door, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_bad_variable_is_one_line() -> None:
    done = run(LAUNCH, SGLANG_ROUTER_CACHE_THRESHOLD="7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: SGLANG_ROUTER_CACHE_THRESHOLD: '7' is not a number from 0 to 1\n"


@pytest.mark.parametrize(
    "door", [LAUNCH, [*CONSOLE, "launch"], [*MODULE, "launch"]], ids=["launch", "console", "module"]
)
def test_help(door: list[str]) -> None:
    done = run(door, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert "--worker-urls" in done.stdout


def test_help_loads_neither_server_nor_engine() -> None:
    program = (
        "import sys\nfrom sglang_router.launch_router import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('asyncio', 'uvloop', 'httptools', 'starlette', 'uvicorn') if m in sys.modules])\n"
    )
    assert run([sys.executable, "-c", program]).stdout.endswith("\n[]\n")


@pytest.mark.parametrize("door", [CONSOLE, MODULE], ids=["console", "module"])
def test_console(door: list[str]) -> None:
    bare, asked = run(door), run(door, "--help")
    assert (bare.returncode, asked.returncode) == (1, 0)
    assert bare.stdout == asked.stdout
    assert "launch" in bare.stdout
    assert run(door, "-V").stdout == run(door, "--version").stdout == f"{version_line()}\n"
    assert run(door, "--version-verbose").stdout.startswith(f"{version_line()}\nPython 3.")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lanch"], "error: unknown command 'lanch'; did you mean launch?\n"),
        (["--qqq"], "error: unknown flag --qqq; see --help\n"),
    ],
)
def test_unknown_command(words: list[str], line: str) -> None:
    done = run(CONSOLE, *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_engine_gets_the_rest() -> None:
    done = run(CONSOLE, "engine", "--help")
    assert done.returncode == 0
    assert "--capacity-tokens" in done.stdout


def test_page_of_options() -> None:
    page = run([sys.executable, "-m", "sglang_router.config"], "--markdown")
    assert (page.returncode, page.stderr) == (0, "")
    assert page.stdout.startswith("# Options\n")
    assert run([sys.executable, "-m", "sglang_router.config"]).returncode == 1


@pytest.mark.parametrize("door", [[*LAUNCH, "--help"], CONSOLE], ids=["argparse", "console"])
def test_reader_of_help_may_leave(door: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(door, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # newer versions of argparse hide the broken pipe


def test_output_that_cannot_be_written_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*CONSOLE, "check-config"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


# -- as functions ------------------------------------------------------------------------------------------


class Server:
    """Replaces the real server and records the options that it was started with."""

    def __init__(self) -> None:
        self.started: list[RouterArgs] = []

    def serve(self, args: RouterArgs) -> int:
        self.started.append(args)
        return 0


def test_launch_checks_and_hands_over() -> None:
    server, args = Server(), RouterArgs(worker_urls=["http://A/"], eviction_interval=7)
    assert [launch_router(args, serve=server.serve), launch_router(args, serve=server.serve)] == [0, 0]
    first, second = server.started
    assert first == second
    assert (first.worker_urls, first.eviction_interval_secs) == (["http://a"], 7)
    assert args.worker_urls == ["http://A/"]


def test_launch_takes_a_namespace_with_old_names() -> None:
    server = Server()
    old = SimpleNamespace(
        worker_urls=["http://a"],
        policy="round_robin",
        host="127.0.0.1",
        port=3001,
        cache_threshold=0.5,
        balance_abs_threshold=32,
        balance_rel_threshold=1.0001,
        eviction_interval=5,
        max_tree_size=1 << 24,
        verbose=True,
    )
    assert launch_router(old, serve=server.serve) == 0
    (args,) = server.started
    assert (args.policy, args.port, args.eviction_interval_secs, args.log_level) == (
        "round_robin",
        3001,
        5,
        "debug",
    )


def test_launch_refuses_by_exception() -> None:
    with pytest.raises(ConfigError, match=r"^not available in this version: --backend"):
        launch_router(RouterArgs(backend="openai"), serve=Server().serve)


def test_one_warning_names_all_without_effect(capsys: pytest.CaptureFixture[str]) -> None:
    launch_router(parse_router_args(["--model-path", "m", "--reasoning-parser", "r"]), serve=Server().serve)
    assert (
        capsys.readouterr().err
        == "warning: these options have no effect in this router: --model-path, --reasoning-parser\n"
    )
    launch_router(RouterArgs(), serve=Server().serve)
    assert capsys.readouterr().err == ""


def test_parse_router_args_ends_as_argparse_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_router_args(["--port", "x"])
    assert capsys.readouterr().err.startswith("error: --port: 'x'")


def test_names_of_the_reference() -> None:
    assert router_args.RouterArgs is RouterArgs
    assert CustomHelpFormatter("prog").format_help() == ""


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(ConfigError("two\nlines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, "")],
)
def test_exit_status(error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: raising(error)) == status
    assert capsys.readouterr() == ("", line)


def test_main_takes_words() -> None:
    assert main(["--port", "0"]) == 2
