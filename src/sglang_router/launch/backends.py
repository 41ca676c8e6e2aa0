"""How each engine is started: command, environment, GPUs, and whether it is installed. One class per backend.

    BACKENDS[name](setup).prepare()               ConfigError if the engine cannot be started at all
                         .command(rank, port)     -> Command; ConfigError if there is no GPU for that rank
                         .max_replicas()          how many there are GPUs for

                 command                                   GPUs of a rank             beside the user's environment
    sglang       -m sglang.launch_server                   --base-gpu-id              SGLANG_DP_RANK, three defaults
    vllm         -m vllm.entrypoints.openai.api_server     CUDA_VISIBLE_DEVICES       five defaults
    llamacpp     -m sglang_router.engine --backend ...     none, shares the cores
    builtin      -m sglang_router.engine                   none

The user has the last word wherever a flag or variable is only a default (each with its reason below). Host, port and
GPUs are not: they stand at the end, where they win over whatever stands before.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sglang_router.errors import ConfigError
from sglang_router.launch.engine_flags import EngineFlags
from sglang_router.launch.machine import Machine
from sglang_router.launch.replica import Command

INSTALL = {
    "sglang": "pip install sglang",
    "vllm": "pip install vllm",
    "llamacpp": "pip install 'sglang-router[llamacpp]'",
}
_MODULES = {"sglang": "launch_server.py", "vllm": "entrypoints/openai/api_server.py"}
"""What is run of each package: a folder that happens to have its name is no engine."""
_KEEP_ALIVE = "75"
"""Seconds for which an engine keeps an idle connection: longer than the router does, so that the router, which knows
what it is about to send, is the one to close."""

_SEVERAL_MACHINES = (
    *("--nnodes", "--node-rank", "--dist-init-addr", "--nccl-init-addr"),
    *("--master-addr", "--data-parallel-address"),
)
"""Flags of an engine that reaches beyond this machine."""
_LOOK = (
    "from importlib.util import find_spec; import sys; found = find_spec(sys.argv[1]);"
    " print(*(found and found.submodule_search_locations or ()), sep=chr(10))"
)


@dataclass(frozen=True)
class Setup:
    """What is asked for, and what there is to do it with.

    model     what --model-path says; None without
    engine    the engine's own flags
    size      most replicas that may run at once
    ranks     data-parallel ranks inside one engine (--router-dp-aware); 0: each replica is one of its own
    host      on which engines listen
    python    interpreter that has the engine
    fetch     gets a small model for who has none: the path of a .gguf file
    """

    model: str | None
    engine: tuple[str, ...]
    size: int
    ranks: int
    host: str
    python: str
    machine: Machine
    fetch: Callable[[], Path]

    @property
    def flags(self) -> EngineFlags:
        return EngineFlags(self.engine)

    @property
    def confined(self) -> bool:
        """Whether an engine's processes need to reach each other on this machine only."""
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return loopback and not self.flags.given(*_SEVERAL_MACHINES)

    @property
    def cores_each(self) -> int:
        """Processors for each replica, if they share them evenly."""
        return max(1, self.machine.cores // max(1, self.size))

    def defaults(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Those of the variables that the user has not set."""
        return {name: value for name, value in environ.items() if name not in self.machine.environ}

    def url(self, port: int) -> str:
        """Where the router reaches an engine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Backend(Protocol):
    """One kind of engine."""

    def prepare(self) -> None:
        """Makes sure that it can be started; to be called once, before anything else.

        Raises: ConfigError that says what to install or to give.
        """

    def command(self, rank: int, port: int) -> Command:
        """How replica `rank` is started. Raises: ConfigError, if there is no GPU left for it."""

    def max_replicas(self) -> int | None:
        """For how many there are GPUs; None if that is not known or none are needed."""


class SGLang:
    """GPUs are counted from --base-gpu-id among those that CUDA_VISIBLE_DEVICES shows."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        flags = setup.flags
        self._cpu = flags.text("--device") == "cpu"
        self._step = max(1, flags.number(["--gpu-id-step"]))
        self._base = flags.number(["--base-gpu-id"], default=0)
        shared = flags.given("--enable-dp-attention")  # its ranks work on the same GPUs
        self._gpus = flags.gpus * (1 if shared else max(1, setup.ranks))
        # Else each scheduler spins on a core while there is nothing to do. Older versions have no such flag.
        self._sleeps = False

    def prepare(self) -> None:
        folder = _installed("sglang", self._setup.python)
        _needs_model(self._setup)
        self._sleeps = _knows(folder, "sleep_on_idle")

    def command(self, rank: int, port: int) -> Command:
        setup = self._setup
        words = [setup.python, "-m", "sglang.launch_server", *_model("--model-path", setup.model), *setup.engine]
        if self._sleeps and not setup.flags.given("--sleep-on-idle"):
            words.append("--sleep-on-idle")
        if setup.ranks:
            words += ["--dp-size", str(setup.ranks)]
        if not self._cpu:
            _has_gpus(setup, rank, self.max_replicas(), self._gpus)
            words += ["--base-gpu-id", str(self._base + rank * self._gpus * self._step)]
        environ = setup.defaults(
            {
                "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # else GET /health generates a token: 1 s each time
                "SGLANG_TIMEOUT_KEEP_ALIVE": _KEEP_ALIVE,  # else 5 s
            }
        )
        if setup.confined:  # else on the address that the host's name stands for
            environ |= setup.defaults({"GLOO_SOCKET_IFNAME": setup.machine.loopback})
        if not setup.ranks:
            environ["SGLANG_DP_RANK"] = str(rank)
        return _command(setup, words, environ, port, "sglang")

    def max_replicas(self) -> int | None:
        gpus = len(self._setup.machine.visible_gpus())
        if self._cpu or not gpus:
            return None
        return max(0, (gpus - 1 - self._base) // self._step + 1) // self._gpus


class VLLM:
    """Each rank sees its own slice of CUDA_VISIBLE_DEVICES, whatever that names."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._gpus = setup.flags.gpus * max(1, setup.ranks)
        self._visible = setup.machine.visible_gpus()

    def prepare(self) -> None:
        _installed("vllm", self._setup.python)
        _needs_model(self._setup)

    def command(self, rank: int, port: int) -> Command:
        setup = self._setup
        words = [setup.python, "-m", "vllm.entrypoints.openai.api_server"]
        words += [*_model("--model", setup.model), *setup.engine]
        if setup.ranks:
            words += ["--data-parallel-size", str(setup.ranks)]
        environ = setup.defaults({"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": _KEEP_ALIVE})  # else 5 s
        if setup.confined:  # else its processes talk to each other through sockets on all interfaces
            environ |= setup.defaults({"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": setup.machine.loopback})
        if self._visible:
            _has_gpus(setup, rank, self.max_replicas(), self._gpus)
            mine = self._visible[rank * self._gpus : (rank + 1) * self._gpus]
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        else:  # the CPU build: else every replica binds its threads to the same cores
            threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(setup.cores_each)}
            environ |= setup.defaults(threads)
        return _command(setup, words, environ, port, "vllm")

    def max_replicas(self) -> int | None:
        return len(self._visible) // self._gpus if self._visible else None


class LlamaCpp:
    """llama.cpp's own server, out of the wheel xllamacpp; the replicas share the processors."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model = setup.model

    def prepare(self) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise _missing("llamacpp", self._setup.python)
        if self._setup.ranks:
            raise ConfigError("llamacpp has no data-parallel ranks inside: start it without --router-dp-aware")
        if self._model is None:
            self._model = str(self._setup.fetch())

    def command(self, rank: int, port: int) -> Command:
        setup = self._setup
        words = [sys.executable, "-m", "sglang_router.engine", "--backend", "llamacpp"]
        words += _model("--model-path", self._model)
        if not setup.flags.given("--threads"):
            words += ["--threads", str(setup.cores_each)]
        return _command(setup, [*words, *setup.engine], {}, port, "llamacpp")

    def max_replicas(self) -> int | None:
        return None


class BuiltIn:
    """The stand-in that needs no model; --model-path is the name it gives itself."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def prepare(self) -> None:
        """It is always there."""

    def command(self, rank: int, port: int) -> Command:
        setup = self._setup
        words = [sys.executable, "-m", "sglang_router.engine", *_model("--model", setup.model), *setup.engine]
        if setup.ranks:
            words += ["--dp-size", str(setup.ranks)]
        return _command(setup, words, {}, port, "builtin")

    def max_replicas(self) -> int | None:
        return None


BACKENDS: dict[str, Callable[[Setup], Backend]] = {
    "sglang": SGLang,
    "vllm": VLLM,
    "llamacpp": LlamaCpp,
    "builtin": BuiltIn,
}


def _command(setup: Setup, words: list[str], environ: dict[str, str], port: int, runtime: str) -> Command:
    address = ("--host", setup.host, "--port", str(port))
    unbuffered = setup.defaults({"PYTHONUNBUFFERED": "1"})  # else its lines come late, through a pipe
    return Command(argv=(*words, *address), env={**unbuffered, **environ}, url=setup.url(port), runtime=runtime)


def _model(flag: str, model: str | None) -> list[str]:
    return [flag, model] if model is not None else []


def _needs_model(setup: Setup) -> None:
    """A file with the engine's options may name it as well."""
    if setup.model is None and not setup.flags.given("--config"):
        raise ConfigError("give the model: --model-path MODEL")


def _has_gpus(setup: Setup, rank: int, most: int | None, each: int) -> None:
    if most is None or rank < most:
        return
    visible = setup.machine.visible_gpus()
    raise ConfigError(
        f"{len(visible)} GPUs ({','.join(visible)}) do for {most} replicas of {each}: no GPU is left for rank {rank};"
        " lower --dp-size or the engine's parallel sizes"
    )


# -- what is installed -----------------------------------------------------------------------------------------------


def _installed(backend: str, python: str) -> Path:
    """The folder of an engine's package in the environment of `python`.

    Raises: ConfigError, if it is not there.
    """
    folder = _find(backend, python)
    if folder is None:
        raise _missing(backend, python)
    return folder


def _find(backend: str, python: str) -> Path | None:
    """The same, or None. It is looked for and not imported: that would take seconds."""
    found = (folder for folder in _folders(backend, python) if (folder / _MODULES[backend]).is_file())
    return next(found, None)


def _folders(package: str, python: str) -> list[Path]:
    look = [python, "-c", _LOOK, package]
    try:
        done = subprocess.run(look, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer within 60 s"
        raise ConfigError(f"--engine-python {python} cannot be run: {reason}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ConfigError(f"--engine-python {python} is not a Python that works: {last}")
    return [Path(line) for line in done.stdout.splitlines() if line]


def _missing(backend: str, python: str) -> ConfigError:
    there = [name for name in BACKENDS if name != backend and _is_there(name, python)]
    return ConfigError(
        f"{backend} is not installed for {python}: {INSTALL[backend]}, or name the interpreter that has it with"
        f" --engine-python; here are: {', '.join('--backend ' + name for name in there)}"
    )


def _is_there(backend: str, python: str) -> bool:
    if backend == "builtin":
        return True
    if backend == "llamacpp":
        return importlib.util.find_spec("xllamacpp") is not None
    return _find(backend, python) is not None


def _knows(folder: Path, option: str) -> bool:
    """Whether an SGLang knows an option; where they are declared has moved between versions."""
    sources = [folder / "srt" / "server_args.py", *(folder / "srt" / "arg_groups").rglob("*.py")]
    wanted = re.compile(option.replace("_", "[-_]"))
    return any(wanted.search(source.read_text("utf-8", "replace")) for source in sources if source.is_file())
