"""Prefill/decode pairs of real engines, with real transfer of the KV cache between them, on a machine without a GPU.

    sglang-pd    SGLang, Mooncake over TCP        one prefill, two decodes
    vllm-pd      vLLM, NixlConnector over TCP     the same
    vllm-push-pd vLLM, NixlPushConnector over TCP the same

Engines are those of `engines`, with their transfer library beside them (.engines/mooncake, .engines/nixl) and the
Debian libraries that it needs (.engines/debian; nothing of the system is changed). SGLang opens ports on all
interfaces, whatever its --host says, so a pair lives in a network namespace that has only loopback (`enter_namespace`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scripts.real_engines.engines import ENVIRONMENTS, SGLANG_CPU, VLLM_CPU, Engine, SetupError, run_quietly
from scripts.real_engines.launched import Answer, CourseError, end_with_parent

LAUNCHER = Path(__file__).parent / "pair_engine.py"
MOONCAKE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
NIXL = ("nixl==1.5.1", "nixl-cu12==1.5.1")
VLLM_VERSION = "0.32.0+cpu"  # from the part after the plus it takes that it is for processors
DEBIAN = ("libibverbs1", "librdmacm1", "libnl-3-200", "libnl-route-3-200", "libnuma1", "liburing2")
WINDOW = 8
"""Requests that an engine runs at once."""
HEALTHY_WITHIN = 900.0
"""Seconds. Three engines start at once on two cores that other programs use as well."""
MODEL = "tiny"
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP_RUNNING = 0x8914, 0x41


class Place(NamedTuple):
    """Where one engine listens: its own port, and that of its transfers."""

    role: str
    number: int
    port: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.role}{self.number}"


class PairKind(NamedTuple):
    """One kind of pair.

    name       its name for scripts/test-engines
    engine     the engine
    module     what starts it
    libraries  installs its transfer library; returns what goes first on the import path
    flags      the flags of one engine
    environ    its variables
    """

    name: str
    engine: Engine
    module: str
    libraries: Callable[[str], list[Path]]
    flags: Callable[[Place], Sequence[str]]
    environ: Callable[[Place], Mapping[str, str]]


# -- installing --------------------------------------------------------------------------------------------------------


def _beside(python: str, name: str, *packages: str) -> Path:
    """Return .engines/name, with packages in it but not what they require."""
    folder = ENVIRONMENTS / name
    stamp = folder / "installed"
    wanted = f"{' '.join(packages)}\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"  installing {' '.join(packages)} into .engines/{name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
        run_quietly((*pip, "install", "--no-deps", "--target", str(folder), *packages))
        stamp.write_text(wanted)
    return folder


def _mooncake(python: str) -> list[Path]:
    return [_beside(python, "mooncake", MOONCAKE)]


def _nixl(python: str) -> list[Path]:
    """Its connector asks for the version of a distribution `vllm`; the one for processors has another name."""
    folder = _beside(python, "nixl", *NIXL)
    about = folder / f"vllm-{VLLM_VERSION}.dist-info" / "METADATA"
    about.parent.mkdir(exist_ok=True)
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n")
    return [folder]


def debian_libraries() -> list[Path]:
    """Return folders with the shared libraries that the transfer libraries need; unpack them if needed."""
    folder = ENVIRONMENTS / "debian"
    root, stamp = folder / "root", folder / "installed"
    if not stamp.exists():
        print(f"  unpacking {', '.join(DEBIAN)} into .engines/debian", flush=True)
        packages = folder / "packages"
        packages.mkdir(parents=True, exist_ok=True)
        fetched = subprocess.run(["apt-get", "download", *DEBIAN], cwd=packages, capture_output=True, text=True)
        if fetched.returncode:
            said = fetched.stderr[-500:]
            raise SetupError(
                f"apt-get download (of Debian 12's {' '.join(DEBIAN)}) failed; apt-get update first?\n{said}"
            )
        for package in packages.glob("*.deb"):
            run_quietly(("dpkg-deb", "-x", str(package), str(root)))
        stamp.write_text("".join(f"{name}\n" for name in DEBIAN))
    return [*root.glob("usr/lib/*-linux-gnu"), *root.glob("lib/*-linux-gnu")]


# -- the two kinds -----------------------------------------------------------------------------------------------------


def _sglang_flags(place: Place) -> Sequence[str]:
    own = {
        "prefill": ("--disaggregation-bootstrap-port", str(place.side)),
        "decode": ("--disaggregation-decode-retraction-backup", "cpu_tensor"),
    }
    return (
        *("--served-model-name", MODEL, "--device", "cpu", "--attention-backend", "torch_native"),
        *("--disable-overlap-schedule", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
        *("--max-total-tokens", "16384", "--context-length", "8192", "--max-running-requests", str(WINDOW)),
        *("--enable-cache-report", "--enable-metrics", "--sleep-on-idle", "--skip-server-warmup"),
        *("--disaggregation-mode", place.role, "--disaggregation-transfer-backend", "mooncake_tcp", *own[place.role]),
    )


def _sglang_environ(place: Place) -> Mapping[str, str]:
    return {
        **SGLANG_CPU.environ,
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES": "1",  # what a client must not be able to use
        "SGLANG_HOST_IP": "127.0.0.1",
        "HOST_IP": "127.0.0.1",
        "MC_FORCE_TCP": "1",
    }


def _vllm_flags(connector: str, place: Place) -> Sequence[str]:
    transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return (
        *("--served-model-name", MODEL, "--dtype", "bfloat16", "--max-model-len", "8192", "--enforce-eager"),
        *("--max-num-seqs", str(WINDOW), "--block-size", "32", "--enable-prefix-caching"),
        *("--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer)),
    )


def _vllm_environ(place: Place) -> Mapping[str, str]:
    return {
        **VLLM_CPU.environ,
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(place.side),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "UCX_TLS": "tcp,self,sm",
    }


SGLANG_PD = PairKind("sglang-pd", SGLANG_CPU, "sglang.launch_server", _mooncake, _sglang_flags, _sglang_environ)
_VLLM = (VLLM_CPU, "vllm.entrypoints.openai.api_server", _nixl)
VLLM_PD = PairKind("vllm-pd", *_VLLM, partial(_vllm_flags, "NixlConnector"), _vllm_environ)
VLLM_PUSH_PD = PairKind("vllm-push-pd", *_VLLM, partial(_vllm_flags, "NixlPushConnector"), _vllm_environ)
KINDS = {kind.name: kind for kind in (SGLANG_PD, VLLM_PD, VLLM_PUSH_PD)}


# -- the network -------------------------------------------------------------------------------------------------------


def enter_namespace() -> None:
    """Give this process, and all that it starts, a network of its own that has only loopback. Needs one thread.

    Raises: SetupError if the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWNET | CLONE_NEWUSER
    if libc.unshare(flags):
        why = os.strerror(ctypes.get_errno())
        raise SetupError(f"no network namespace: {why}. Run this as root, or allow user namespaces")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP_RUNNING))


# -- running ---------------------------------------------------------------------------------------------------------


def call(url: str, method: str, path: str, value: Any = None, timeout: float = 120.0) -> Answer:
    """Send one request on a connection of its own; a value goes as JSON, bytes as they are. Raises: OSError."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout)
    with contextlib.closing(connection):
        body = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        try:
            got = connection.getresponse()
            return Answer(got.status, {name.lower(): text for name, text in got.getheaders()}, got.read())
        except http.client.HTTPException as error:
            raise ConnectionResetError(str(error)) from None


class PairEngine:
    """One engine of a pair: a process group of its own."""

    def __init__(self, place: Place, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.place = place
        self.url = f"http://127.0.0.1:{place.port}"
        self._command = command
        self._environ = environ
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<PairEngine {self.place.name} {self.url}>"

    def start(self) -> None:
        with self._log.open("ab") as sink:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
                env={**os.environ, **self._environ},
            )

    def healthy(self) -> bool:
        """Return whether GET /health is 200. Raises: CourseError if the engine has ended."""
        if self._process is None or self._process.poll() is not None:
            raise CourseError(f"{self.place.name} has ended:\n{self._tail()}")
        try:
            return call(self.url, "GET", "/health", timeout=5.0).status == 200
        except OSError:
            return False

    def until_healthy(self) -> None:
        deadline = time.monotonic() + HEALTHY_WITHIN
        while not self.healthy():
            if time.monotonic() > deadline:
                raise CourseError(f"{self.place.name} is not healthy after {HEALTHY_WITHIN:.0f} s:\n{self._tail()}")
            time.sleep(0.5)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the engine."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """kill -9 of the whole engine."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def alive(self) -> bool:
        try:
            return self.healthy()
        except CourseError:
            return False

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self.kill()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


class RealPair:
    """Engines of one kind: one prefill and some decodes. A context manager: healthy inside, gone after it."""

    def __init__(
        self, kind: PairKind, python: str, imports: Sequence[Path], model: Path, folder: Path, decodes: int
    ) -> None:
        self.kind = kind
        places = [
            Place("prefill", 1, 8301, 8998),
            *(Place("decode", n, 8400 + n, 8800 + n) for n in range(1, decodes + 1)),
        ]
        libraries = [str(path) for path in (*debian_libraries(), *_shared_objects(imports))]
        self.engines = []
        for place in places:
            environ = {
                **kind.environ(place),
                "PAIR_ENGINE": kind.module,
                "PYTHONPATH": os.pathsep.join(map(str, imports)),
                "LD_LIBRARY_PATH": os.pathsep.join(libraries),
                "TMPDIR": str(folder),
            }
            command = [python, str(LAUNCHER), *_model(kind, model), "--host", "127.0.0.1"]
            command += ["--port", str(place.port), *kind.flags(place)]
            self.engines.append(PairEngine(place, command, environ, folder / f"{place.name}.log"))
        self.prefill, *self.decodes = self.engines

    def __enter__(self) -> RealPair:
        try:
            self.restart(*self.engines)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self.engines:
            engine.stop()

    def mend(self) -> None:
        """Let stopped engines go on, and start those again that have ended."""
        for engine in self.engines:
            engine.signal(signal.SIGCONT)
        self.restart(*(engine for engine in self.engines if not engine.alive()))

    def restart(self, *engines: PairEngine) -> None:
        """Start engines, and wait until they are healthy and have done a plain request if they can.

        A vLLM engine whose very first work is a hand-over may end.
        """
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.until_healthy()
            if self.kind is not SGLANG_PD:
                body = {"model": MODEL, "prompt": "WARM UP " * 20, "max_tokens": 2}
                if call(engine.url, "POST", "/v1/completions", body).status != 200:
                    raise CourseError(f"{engine.place.name} cannot answer a plain request")


def _model(kind: PairKind, model: Path) -> tuple[str, str]:
    return ("--model-path" if kind is SGLANG_PD else "--model", str(model))


def _shared_objects(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of wheels that hold shared libraries."""
    return sorted(
        {path.parent for folder in folders for path in folder.glob("*/*.so*")}
        | {path for folder in folders for path in folder.glob("*.libs")}
    )


def install(kind: PairKind) -> tuple[str, list[Path]]:
    """Install what a kind needs; return the interpreter, and what goes first on its import path."""
    python = kind.engine.install()
    debian_libraries()
    return python, kind.libraries(python)
