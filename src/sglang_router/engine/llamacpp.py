"""Run llama.cpp's own HTTP server in the foreground of this process: a real engine for any machine.

    python -m sglang_router.engine --backend llamacpp --model-path MODEL.gguf --port 8000

The server comes with the package `xllamacpp` (the extra `sglang-router[llamacpp]`). It runs C++ threads in this process
and needs no compiler and no GPU. Python only reads options, starts the server, prints its URL, and waits for a signal.

    options ──> CommonParams ──> Server(params)  loads the model, listens  ──> "... on http://127.0.0.1:8000"
                                     │
               SIGTERM, SIGINT ──> wake-up socket ──> _exit(0)

Two properties of that library shape this file (version 2026.10):

- The constructor holds the interpreter's lock until the model is loaded, so no Python signal handler can run meanwhile.
  Therefore a signal has its default effect during loading and ends the process at once: no request is running yet.
- The destructor hangs while a request is running. Therefore the process ends with `os._exit`: the system closes the
  sockets, and clients see a broken connection, as when any other engine is killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from sglang_router.errors import ConfigError

GGUF_MAGIC = b"GGUF"
VERBOSITY = {"critical": 0, "error": 1, "warning": 2, "info": 3, "debug": 4}  # of llama.cpp; 0 is silence
HTTP_THREADS = 128  # each open connection occupies one; with the default of about 5, a burst blocks /health for 5 s
INSTALL = "the llama.cpp engine is not installed: pip install xllamacpp"


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:  # the server would use the port modulo 65536
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_router.engine --backend llamacpp",
        description="Serve a GGUF model with llama.cpp's own HTTP server.",
    )
    add = parser.add_argument
    add("--model-path", type=Path, required=True, metavar="FILE", help="the model, a .gguf file")
    add("--port", type=_port, required=True, help="port to listen on; 0 takes a free one")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--alias", metavar="NAME", help="model name in answers (the file's name)")
    add("--parallel", type=int, default=4, metavar="N", help="slots, requests that run at once (%(default)s)")
    add("--ctx-size", type=int, default=16384, metavar="N", help="tokens of all slots together (%(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="compute threads (0: llama.cpp chooses)")
    add(
        "--cache-ram", type=int, default=8192, metavar="MIB", help="prompt cache in addition to the slots (%(default)s)"
    )
    add("--log-level", choices=VERBOSITY, default="critical", help="of llama.cpp, to stderr (%(default)s)")
    return parser


def _library() -> ModuleType:
    try:
        import xllamacpp
    except ImportError as error:
        raise ConfigError(INSTALL) from error
    module: ModuleType = xllamacpp
    return module


def _check_model(path: Path) -> None:
    """Check the file before llama.cpp does: llama.cpp reports every failure with the same message."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ConfigError(f"cannot read the model {path}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ConfigError(f"{path} is not a GGUF file (it does not begin with 'GGUF')")


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _serve(options: argparse.Namespace) -> object:
    """Return the running server, loaded and listening. Keep a reference: its destructor stops it."""
    library = _library()
    _check_model(options.model_path)
    _check_address(options.host, options.port)
    params = library.CommonParams()
    params.model.path = str(options.model_path)
    params.model_alias = {options.alias or options.model_path.stem}
    params.hostnames = [options.host]
    params.port = options.port
    params.n_parallel = options.parallel
    params.n_ctx = options.ctx_size
    params.cache_ram_mib = options.cache_ram
    params.n_threads_http = HTTP_THREADS
    params.endpoint_metrics = True
    params.offline = True
    params.verbosity = VERBOSITY[options.log_level]
    if options.threads > 0:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    try:
        return library.Server(params)
    except RuntimeError as error:
        raise ConfigError(
            f"llama.cpp could not load {options.model_path}: the file is broken, too large for this machine, "
            "or of a kind that this build does not support; --log-level error shows llama.cpp's own message"
        ) from error


def _signals() -> tuple[socket.socket, socket.socket]:
    """Return a socket that gets a byte on SIGTERM or SIGINT, which do nothing else from now on, and its other end.

    Not `sigwait`, because a thread of the server may get the signal.
    """
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return woken, wake


def _run(options: argparse.Namespace) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    server = _serve(options)
    woken, _wake = _signals()  # before the line that says that it serves: whoever reads it may send a signal at once
    address = getattr(server, "listening_address", f"http://{options.host}:{options.port}")
    sys.stdout.write(f"llama.cpp serves {options.model_path.name} on {address}\n")
    sys.stdout.flush()
    woken.recv(1)
    os._exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, which end the process with status 0.

    `argv` is the command line without the program's name and without `--backend llamacpp`. A mistake of the user (no
    library, no model, port in use) prints one line on standard error and returns 2.
    """
    options = _parser().parse_args(argv)
    try:
        _run(options)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
