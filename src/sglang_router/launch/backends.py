"""How to start each kind of engine: command, environment, GPUs, and whether it is installed. One class per backend.

    BACKENDS[name](setup).prepare()               ConfigError if the engine cannot be started at all
                         .command(rank, port)     -> EngineCommand; ConfigError if there is no GPU for that rank
                         .max_replicas()          the number of replicas for which there are GPUs

                 command                                   GPUs of a rank             added to the user's environment
    sglang       -m sglang.launch_server                   --base-gpu-id              SGLANG_DP_RANK, three defaults
    vllm         -m vllm.entrypoints.openai.api_server     CUDA_VISIBLE_DEVICES       five defaults
    llamacpp     -m sglang_router.engine --backend ...     none, shares the cores
    builtin      -m sglang_router.engine                   none

The user can override each flag and variable that is only a default; the reason for each default is in the code below.
The user cannot override host, port and GPUs: they come last on the command line and override what is before them.
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
from sglang_router.launch.machine import LocalMachine
from sglang_router.launch.replica import EngineCommand
from sglang_router.words import are, counted

INSTALL = {
    "sglang": "pip install sglang",
    "vllm": "pip install vllm",
    "llamacpp": "pip install xllamacpp",
}
_MODULES = {"sglang": "launch_server.py", "vllm": "entrypoints/openai/api_server.py"}
"""The file of each package that is run. A folder without it is not the engine, even if it has the package's name."""
_KEEP_ALIVE = "75"
"""Seconds for which an engine keeps an idle connection. That is longer than the router keeps it, so that the router
closes first and never sends a request on a connection that the engine is closing."""

_SEVERAL_MACHINES = (
    *("--nnodes", "--node-rank", "--dist-init-addr", "--nccl-init-addr"),
    *("--master-addr", "--data-parallel-address"),
)
"""Flags of an engine that spans several machines."""
_FIND_PACKAGE = (
    "from importlib.util import find_spec; import sys; found = find_spec(sys.argv[1]);"
    " print(*(found and found.submodule_search_locations or ()), sep=chr(10))"
)


@dataclass(frozen=True)
class EngineSetup:
    """What the user asked for, and the machine to do it on.

    model     value of --model-path; None if it was not given
    engine    the engine's own flags
    size      most replicas that may run at once
    ranks     data-parallel ranks inside one engine (--router-dp-aware); 0: each replica is one rank
    host      address on which the engines listen
    python    interpreter of the environment in which the engine is installed
    fetch     downloads a small model if none was given, and returns the path of its .gguf file
    """

    model: str | None
    engine: tuple[str, ...]
    size: int
    ranks: int
    host: str
    python: str
    machine: LocalMachine
    fetch: Callable[[], Path]

    @property
    def flags(self) -> EngineFlags:
        return EngineFlags(self.engine)

    @property
    def confined(self) -> bool:
        """Whether all processes of an engine run on this machine and need the loopback interface only."""
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return loopback and not self.flags.given(*_SEVERAL_MACHINES)

    @property
    def cores_each(self) -> int:
        """Processor cores for each replica if the replicas share them evenly."""
        return max(1, self.machine.cores // max(1, self.size))

    def defaults(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return those of the variables that the user has not set."""
        return {name: value for name, value in environ.items() if name not in self.machine.environ}

    def url(self, port: int) -> str:
        """Return the URL at which the router reaches an engine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class EngineBackend(Protocol):
    """One kind of engine."""

    def prepare(self) -> None:
        """Check that the engine can be started. Call it once, before the other methods.

        Raises: ConfigError that says what to install or which option to give.
        """

    def command(self, rank: int, port: int) -> EngineCommand:
        """Return how to start replica `rank`. Raises: ConfigError if there is no GPU left for it."""

    def max_replicas(self) -> int | None:
        """Return the number of replicas for which there are GPUs; None if that is unknown or they need none."""


class SGLangBackend:
    """SGLang. It counts GPUs from --base-gpu-id among those in CUDA_VISIBLE_DEVICES."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        flags = setup.flags
        self._cpu = flags.text("--device") == "cpu"
        self._step = max(1, flags.number(["--gpu-id-step"]))
        self._base = flags.number(["--base-gpu-id"], default=0)
        shared = flags.given("--enable-dp-attention")  # with it, all ranks use the same GPUs
        self._gpus = flags.gpus * (1 if shared else max(1, setup.ranks))
        # Whether this version has --sleep-on-idle. Without the flag, each idle scheduler keeps a core busy.
        self._can_sleep = False

    def prepare(self) -> None:
        folder = _installed("sglang", self._setup.python)
        _needs_model(self._setup)
        self._can_sleep = _has_option(folder, "sleep_on_idle")

    def command(self, rank: int, port: int) -> EngineCommand:
        setup = self._setup
        words = [setup.python, "-m", "sglang.launch_server", *_model("--model-path", setup.model), *setup.engine]
        if self._can_sleep and not setup.flags.given("--sleep-on-idle"):
            words.append("--sleep-on-idle")
        if setup.ranks:
            words += ["--dp-size", str(setup.ranks)]
        if not self._cpu:
            _has_gpus(setup, rank, self.max_replicas(), self._gpus)
            words += ["--base-gpu-id", str(self._base + rank * self._gpus * self._step)]
        environ = setup.defaults(
            {
                # SGLang's default generates a token for each GET /health, which takes 1 s.
                "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
                "SGLANG_TIMEOUT_KEEP_ALIVE": _KEEP_ALIVE,  # SGLang's default: 5 s
            }
        )
        if setup.confined:  # SGLang's default: the address to which the host's name resolves
            environ |= setup.defaults({"GLOO_SOCKET_IFNAME": setup.machine.loopback})
        if not setup.ranks:
            environ["SGLANG_DP_RANK"] = str(rank)
        return _command(setup, words, environ, port, "sglang")

    def max_replicas(self) -> int | None:
        gpus = len(self._setup.machine.visible_gpus())
        if self._cpu or not gpus:
            return None
        return max(0, (gpus - 1 - self._base) // self._step + 1) // self._gpus


class VLLMBackend:
    """vLLM. Each rank gets its own part of the list in CUDA_VISIBLE_DEVICES, whatever kind of names it holds."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self._gpus = setup.flags.gpus * max(1, setup.ranks)
        self._visible = setup.machine.visible_gpus()

    def prepare(self) -> None:
        _installed("vllm", self._setup.python)
        _needs_model(self._setup)

    def command(self, rank: int, port: int) -> EngineCommand:
        setup = self._setup
        words = [setup.python, "-m", "vllm.entrypoints.openai.api_server"]
        words += [*_model("--model", setup.model), *setup.engine]
        if setup.ranks:
            words += ["--data-parallel-size", str(setup.ranks)]
        environ = setup.defaults(
            {
                "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": _KEEP_ALIVE,  # vLLM's default: 5 s
                "OTEL_SERVICE_NAME": "vllm",  # vLLM's default: unknown_service, in each of its traces
            }
        )
        if setup.confined:  # vLLM's default: its processes listen to each other on all interfaces
            environ |= setup.defaults({"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": setup.machine.loopback})
        if self._visible:
            _has_gpus(setup, rank, self.max_replicas(), self._gpus)
            mine = self._visible[rank * self._gpus : (rank + 1) * self._gpus]
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        else:  # the CPU build. Its default binds the threads of all replicas to the same cores.
            threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(setup.cores_each)}
            environ |= setup.defaults(threads)
        return _command(setup, words, environ, port, "vllm")

    def max_replicas(self) -> int | None:
        return len(self._visible) // self._gpus if self._visible else None


class LlamaCppBackend:
    """llama.cpp's own server, from the package xllamacpp. The replicas share the processor cores."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self._model = setup.model

    def prepare(self) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise _missing("llamacpp", self._setup.python)
        if self._setup.ranks:
            raise ConfigError("llamacpp has no data-parallel ranks: start it without --router-dp-aware")
        if self._model is None:
            self._model = str(self._setup.fetch())

    def command(self, rank: int, port: int) -> EngineCommand:
        setup = self._setup
        words = [sys.executable, "-m", "sglang_router.engine", "--backend", "llamacpp"]
        words += _model("--model-path", self._model)
        if not setup.flags.given("--threads"):
            words += ["--threads", str(setup.cores_each)]
        return _command(setup, [*words, *setup.engine], {}, port, "llamacpp")

    def max_replicas(self) -> int | None:
        return None


class BuiltInBackend:
    """The built-in engine, which needs no model. --model-path only sets the model name that it reports."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup

    def prepare(self) -> None:
        """Do nothing: the built-in engine is always installed."""

    def command(self, rank: int, port: int) -> EngineCommand:
        setup = self._setup
        words = [sys.executable, "-m", "sglang_router.engine", *_model("--model", setup.model), *setup.engine]
        if setup.ranks:
            words += ["--dp-size", str(setup.ranks)]
        return _command(setup, words, {}, port, "builtin")

    def max_replicas(self) -> int | None:
        return None


BACKENDS: dict[str, Callable[[EngineSetup], EngineBackend]] = {
    "sglang": SGLangBackend,
    "vllm": VLLMBackend,
    "llamacpp": LlamaCppBackend,
    "builtin": BuiltInBackend,
}


def _command(setup: EngineSetup, words: list[str], environ: dict[str, str], port: int, runtime: str) -> EngineCommand:
    address = ("--host", setup.host, "--port", str(port))
    unbuffered = setup.defaults({"PYTHONUNBUFFERED": "1"})  # Python buffers output to a pipe: lines would come late
    return EngineCommand(argv=(*words, *address), env={**unbuffered, **environ}, url=setup.url(port), runtime=runtime)


def _model(flag: str, model: str | None) -> list[str]:
    return [flag, model] if model is not None else []


def _needs_model(setup: EngineSetup) -> None:
    """Check that there is a model. A file given to the engine with --config may name it as well."""
    if setup.model is None and not setup.flags.given("--config"):
        raise ConfigError("no model: give it with --model-path MODEL")


def _has_gpus(setup: EngineSetup, rank: int, most: int | None, each: int) -> None:
    if most is None or rank < most:
        return
    visible = setup.machine.visible_gpus()
    raise ConfigError(
        f"{counted(len(visible), 'GPU')} ({','.join(visible)}) {are(len(visible))} enough for"
        f" {counted(most, 'replica')} of {each}: no GPU is left for rank {rank}; lower --dp-size or the"
        " engine's parallel sizes"
    )


# -- what is installed -----------------------------------------------------------------------------------------------


def _installed(backend: str, python: str) -> Path:
    """Return the folder of an engine's package in the environment of `python`.

    Raises: ConfigError if it is not installed there.
    """
    folder = _find(backend, python)
    if folder is None:
        raise _missing(backend, python)
    return folder


def _find(backend: str, python: str) -> Path | None:
    """Return the same, or None. The package is searched for and not imported: an import takes seconds."""
    found = (folder for folder in _folders(backend, python) if (folder / _MODULES[backend]).is_file())
    return next(found, None)


def _folders(package: str, python: str) -> list[Path]:
    command = [python, "-c", _FIND_PACKAGE, package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer within 60 s"
        raise ConfigError(f"--engine-python {python} cannot be run: {reason}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ConfigError(f"--engine-python {python} is not a working Python: {last}")
    return [Path(line) for line in done.stdout.splitlines() if line]


def _missing(backend: str, python: str) -> ConfigError:
    there = [name for name in BACKENDS if name != backend and _is_there(name, python)]
    return ConfigError(
        f"{backend} is not installed for {python}: run {INSTALL[backend]}, or give the interpreter that has it with"
        f" --engine-python; available here: {', '.join('--backend ' + name for name in there)}"
    )


def _is_there(backend: str, python: str) -> bool:
    if backend == "builtin":
        return True
    if backend == "llamacpp":
        return importlib.util.find_spec("xllamacpp") is not None
    return _find(backend, python) is not None


def _has_option(folder: Path, option: str) -> bool:
    """Whether this SGLang has an option. Versions declare options in different files."""
    sources = [folder / "srt" / "server_args.py", *(folder / "srt" / "arg_groups").rglob("*.py")]
    wanted = re.compile(option.replace("_", "[-_]"))
    return any(wanted.search(source.read_text("utf-8", "replace")) for source in sources if source.is_file())
