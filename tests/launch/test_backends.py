"""How engines are started, without processes: commands, GPUs, ports and environment for an invented machine."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_router.errors import ConfigError
from sglang_router.launch.backends import BACKENDS, EngineBackend, EngineSetup
from sglang_router.launch.engine_flags import EngineFlags
from sglang_router.launch.machine import LocalMachine, PortAllocator, port_is_free, take_port
from sglang_router.launch.replica import EngineCommand


def backend(
    name: str,
    *engine: str,
    gpus: int = 0,
    cores: int = 8,
    size: int = 2,
    ranks: int = 0,
    model: str | None = "m",
    host: str = "127.0.0.1",
    python: str = "py",
    environ: Mapping[str, str] | None = None,
) -> EngineBackend:
    machine = LocalMachine(cores, gpus, "lo", environ or {}, take_port=lambda host, port: True)
    return BACKENDS[name](
        EngineSetup(
            model=model,
            engine=engine,
            size=size,
            ranks=ranks,
            host=host,
            python=python,
            machine=machine,
            fetch=lambda: Path("small.gguf"),
        )
    )


def last(command: EngineCommand, flag: str) -> str:
    """The value of a flag's last use."""
    at = len(command.argv) - 1 - command.argv[::-1].index(flag)
    return command.argv[at + 1]


def visible(command: EngineCommand) -> str | None:
    return command.env.get("CUDA_VISIBLE_DEVICES")


# -- commands ----------------------------------------------------------------------------------------------------------


def test_sglang() -> None:
    command = backend("sglang", "--tp-size", "2", "--x", gpus=8).command(1, 31001)
    assert command.argv == (
        *("py", "-m", "sglang.launch_server", "--model-path", "m", "--tp-size", "2", "--x"),
        *("--base-gpu-id", "2", "--host", "127.0.0.1", "--port", "31001"),
    )
    assert command.env == {
        "SGLANG_DP_RANK": "1",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "SGLANG_TIMEOUT_KEEP_ALIVE": "75",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
    }
    assert (command.url, command.runtime) == ("http://127.0.0.1:31001", "sglang")


def test_vllm() -> None:
    command = backend("vllm", "--seed", "1", gpus=2).command(1, 31001)
    assert command.argv == (
        *("py", "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--seed", "1"),
        *("--host", "127.0.0.1", "--port", "31001"),
    )
    assert command.env == {
        "CUDA_VISIBLE_DEVICES": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "OTEL_SERVICE_NAME": "vllm",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
    }
    assert command.runtime == "vllm"


def test_llamacpp() -> None:
    command = backend("llamacpp", "--parallel", "2", cores=8, size=3, model="f.gguf").command(0, 5)
    assert command.argv == (
        *(sys.executable, "-m", "sglang_router.engine", "--backend", "llamacpp", "--model-path", "f.gguf"),
        *("--threads", "2", "--parallel", "2", "--host", "127.0.0.1", "--port", "5"),
    )
    assert backend("llamacpp", "--threads", "5").command(0, 5).argv.count("--threads") == 1
    assert last(backend("llamacpp", cores=1, size=3).command(0, 5), "--threads") == "1"


def test_llamacpp_without_a_model_fetches_one() -> None:
    made = backend("llamacpp", model=None)
    made.prepare()
    assert last(made.command(0, 5), "--model-path") == "small.gguf"


def test_builtin() -> None:
    command = backend("builtin", "--speed", "0", model="name").command(0, 5)
    assert command.argv == (
        *(sys.executable, "-m", "sglang_router.engine", "--model", "name", "--speed", "0"),
        *("--host", "127.0.0.1", "--port", "5"),
    )
    assert "--model" not in backend("builtin", model=None).command(0, 5).argv


@pytest.mark.parametrize(
    ("name", "host", "url"),
    [
        ("builtin", "0.0.0.0", "http://127.0.0.1:5"),
        ("sglang", "::", "http://[::1]:5"),
        ("vllm", "10.0.0.1", "http://10.0.0.1:5"),
        ("llamacpp", "fd00::1", "http://[fd00::1]:5"),
    ],
)
def test_address(name: str, host: str, url: str) -> None:
    command = backend(name, host=host).command(0, 5)
    assert command.url == url
    assert last(command, "--host") == host
    assert not {"VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"} & command.env.keys(), "only on loopback"


@pytest.mark.parametrize("flag", ["--nnodes", "--dist-init-addr", "--data-parallel-address=10.0.0.1"])
def test_engines_on_several_machines_are_not_confined(flag: str) -> None:
    for name in ("sglang", "vllm"):
        assert not {"VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"} & backend(name, flag).command(0, 5).env.keys()


# -- the user can override defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("sglang", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"),
        ("sglang", "SGLANG_TIMEOUT_KEEP_ALIVE"),
        ("sglang", "GLOO_SOCKET_IFNAME"),
        ("vllm", "GLOO_SOCKET_IFNAME"),
        ("vllm", "VLLM_HOST_IP"),
        ("vllm", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"),
        ("vllm", "OTEL_SERVICE_NAME"),
        ("vllm", "VLLM_CPU_OMP_THREADS_BIND"),
        ("vllm", "OMP_NUM_THREADS"),
        ("builtin", "PYTHONUNBUFFERED"),
    ],
)
def test_variables_of_the_user_stay(name: str, variable: str) -> None:
    assert variable in backend(name).command(0, 5).env
    assert variable not in backend(name, environ={variable: "mine"}).command(0, 5).env


def test_rank_of_sglang_is_ours() -> None:
    assert backend("sglang", environ={"SGLANG_DP_RANK": "7"}).command(1, 5).env["SGLANG_DP_RANK"] == "1"


def sglang_package(folder: Path, *sources: str) -> Path:
    package = folder / "sglang"
    for source in ("__init__.py", "launch_server.py", *sources):
        (package / source).parent.mkdir(parents=True, exist_ok=True)
        (package / source).write_text("raise ImportError  # finding it must not import it\n")
    return package


@pytest.mark.parametrize(
    ("source", "text", "flag"),
    [
        ("srt/server_args.py", 'add_argument("--sleep-on-idle")', True),
        ("srt/arg_groups/fields/device.py", "sleep_on_idle: bool", True),
        ("srt/server_args.py", "nothing", False),
    ],
)
def test_sglang_sleeps_if_it_can(source: str, text: str, flag: bool, tmp_path: Path) -> None:
    (sglang_package(tmp_path, source) / source).write_text(text)
    python = fake_python(tmp_path, tmp_path)
    for engine, times in (((), int(flag)), (("--sleep-on-idle",), 1)):
        made = backend("sglang", *engine, python=python)
        made.prepare()
        assert made.command(0, 5).argv.count("--sleep-on-idle") == times


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "gpus", "most", "bases"),
    [
        ("", 8, 8, ["0", "1", "2"]),
        ("--tp-size 2", 8, 4, ["0", "2", "4"]),
        ("--tp 2 --pp-size=2", 13, 3, ["0", "4", "8"]),
        ("--tensor-parallel-size=2 --base-gpu-id 2", 8, 3, ["2", "4", "6"]),
        ("--tp-size 2 --gpu-id-step 2", 12, 3, ["0", "4", "8"]),
        ("--tp-size x", 3, 3, ["0", "1", "2"]),
    ],
)
def test_gpus_of_sglang(flags: str, gpus: int, most: int, bases: list[str]) -> None:
    made = backend("sglang", *flags.split(), gpus=gpus)
    assert made.max_replicas() == most
    assert [last(made.command(rank, 5), "--base-gpu-id") for rank in range(3)] == bases
    with pytest.raises(ConfigError, match=f"no GPU is left for rank {most}"):
        made.command(most, 5)


def test_gpus_that_are_hidden_do_not_count() -> None:
    made = backend("sglang", gpus=8, environ={"CUDA_VISIBLE_DEVICES": "4,5"})
    assert made.max_replicas() == 2
    assert last(made.command(1, 5), "--base-gpu-id") == "1", "the number among the visible ones"


def test_no_gpu_known_or_needed() -> None:
    made = backend("sglang", "--device", "cpu", gpus=1)
    assert made.max_replicas() is None
    assert "--base-gpu-id" not in made.command(3, 5).argv
    assert backend("sglang").max_replicas() is None, "another maker's GPUs, perhaps"
    assert backend("vllm").max_replicas() is None
    assert backend("llamacpp", gpus=1).max_replicas() is None
    assert backend("builtin", gpus=1).max_replicas() is None


@pytest.mark.parametrize(
    ("given", "flags", "slices"),
    [
        (None, "", ["0", "1", "2", "3"]),
        (None, "-tp 2", ["0,1", "2,3"]),
        ("6,7", "", ["6", "7"]),
        ("GPU-aa, GPU-bb ,GPU-cc,GPU-dd", "--tensor_parallel_size=2", ["GPU-aa,GPU-bb", "GPU-cc,GPU-dd"]),
        ("MIG-1,MIG-2,-1,MIG-3", "", ["MIG-1", "MIG-2"]),
        ("0,1,2", "--tp-size 2", ["0,1"]),
    ],
)
def test_gpus_of_vllm(given: str | None, flags: str, slices: list[str]) -> None:
    environ = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    made = backend("vllm", *flags.split(), gpus=4, environ=environ)
    assert made.max_replicas() == len(slices)
    assert [visible(made.command(rank, 5)) for rank in range(len(slices))] == slices
    with pytest.raises(ConfigError, match="no GPU is left") as caught:
        made.command(len(slices), 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [None, "", "-1"])
def test_vllm_without_gpu_shares_the_cores(given: str | None) -> None:
    environ = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    gpus = 0 if given is None else 4
    command = backend("vllm", gpus=gpus, environ=environ, cores=7, size=3).command(2, 5)
    assert visible(command) is None, "left alone"
    assert (command.env["VLLM_CPU_OMP_THREADS_BIND"], command.env["OMP_NUM_THREADS"]) == ("nobind", "2")


@pytest.mark.parametrize(("name", "flag"), [("sglang", "--dp-size"), ("vllm", "--data-parallel-size")])
def test_ranks_inside_one_engine(name: str, flag: str) -> None:
    made = backend(name, "--tp-size", "2", gpus=4, ranks=2, size=1)
    command = made.command(0, 5)
    assert last(command, flag) == "2"
    assert made.max_replicas() == 1
    assert "SGLANG_DP_RANK" not in command.env
    with pytest.raises(ConfigError):
        backend(name, "--tp-size", "2", gpus=3, ranks=2, size=1).command(0, 5)


def test_ranks_of_the_others() -> None:
    assert last(backend("builtin", ranks=2, size=1).command(0, 5), "--dp-size") == "2"
    assert why_not(backend("llamacpp", ranks=2, size=1)).startswith("llamacpp has no data-parallel ranks")


def test_attention_ranks_share_their_gpus() -> None:
    assert backend("sglang", "--tp", "4", "--enable-dp-attention", gpus=4, ranks=4, size=1).max_replicas() == 1


def test_engine_flags() -> None:
    flags = EngineFlags(["--a", "--b", "1", "--b=2", "-c", "--d_e", "x", "y"])
    assert [flags.text(name) for name in ("--b", "-c", "--d-e", "--none")] == ["2", "--d_e", "x", ""]
    assert flags.given("--none", "--a")
    assert not flags.given("y")
    assert flags.number(["--none"], 7) == 7
    assert EngineFlags(["--tp", "0"]).gpus == EngineFlags([]).gpus == 1


# -- ports -------------------------------------------------------------------------------------------------------------


def test_ports_are_the_next_free_ones_and_for_good() -> None:
    taken = {101, 103}
    ports = PortAllocator("h", 100, lambda host, port: host == "h" and port not in taken)
    assert [ports(rank) for rank in (0, 1, 2)] == [100, 102, 104]
    assert ports(5) == 105
    taken |= {100, 102}
    assert [ports(rank) for rank in (0, 1, 2, 3)] == [100, 102, 104, 106]


def test_no_port_is_left() -> None:
    ports = PortAllocator("h", 65535, lambda host, port: True)
    assert ports(0) == 65535
    with pytest.raises(ConfigError, match="--router-dp-worker-base-port"):
        ports(1)


def test_port_is_free_if_one_could_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)):
        server.accept()[0].close()  # leaves a connection in TIME_WAIT
    assert port_is_free("127.0.0.1", port)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's abstract names of sockets")
def test_a_port_that_another_launcher_has_taken_is_not_free_although_nobody_listens_yet() -> None:
    take = "from sglang_router.launch.machine import take_port; print(take_port('127.0.0.1', {}), flush=True); input()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not take_port("127.0.0.1", port)
    other = [sys.executable, "-c", take.format(port)]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "True\n"
        assert port_is_free("127.0.0.1", port)
        assert not take_port("127.0.0.1", port)
        launcher.kill()
    assert take_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_address_that_cannot_be_had(host: str) -> None:
    with pytest.raises(ConfigError, match=f"^--dp-worker-host {host}: "):
        port_is_free(host, 5)


def test_this_machine() -> None:
    here = LocalMachine.here()
    assert here.cores >= 1
    assert here.gpus >= 0


# -- what is installed -------------------------------------------------------------------------------------------------


def fake_python(folder: Path, path: Path) -> str:
    """An interpreter that finds packages in `path` as well."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def why_not(made: EngineBackend) -> str:
    with pytest.raises(ConfigError) as caught:
        made.prepare()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_engine_that_is_not_there(name: str) -> None:
    message = why_not(backend(name, python=sys.executable))
    assert message.startswith(f"{name} is not installed for {sys.executable}: run pip install {name}, or ")
    assert message.endswith("available here: --backend llamacpp, --backend builtin")


def test_folder_of_that_name_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    assert "not installed" in why_not(backend("sglang", python=fake_python(tmp_path, tmp_path)))


def test_model_must_be_named(tmp_path: Path) -> None:
    sglang_package(tmp_path)
    python = fake_python(tmp_path, tmp_path)
    assert why_not(backend("sglang", python=python, model=None)) == "no model: give it with --model-path MODEL"
    made = backend("sglang", "--config", "f.yaml", python=python, model=None)
    made.prepare()
    assert "--model-path" not in made.command(0, 5).argv, "the engine's file may name it"


@pytest.mark.parametrize(
    ("python", "why"),
    [("/nowhere/python", "cannot be run: No such file"), ("/bin/false", "is not a working Python")],
)
def test_interpreter_that_does_not_work(python: str, why: str) -> None:
    assert why in why_not(backend("vllm", python=python))


def test_builtin_is_always_there() -> None:
    backend("builtin", model=None).prepare()
