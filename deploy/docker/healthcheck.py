"""Ask the router in this container whether it is well: status 0, or 1 with the reason.

    healthcheck.py                 /liveness: the router answers. What an orchestrator may restart it for
    healthcheck.py /readiness      a request would find a worker. What others may wait for
    healthcheck.py /liveness 17    the same of the router that is process 17; in a container it is process 1

Host, port and TLS are those of the router's own command line, variables and file, so there is nothing to set here.
Neither path needs a key. A certificate is not looked at: it is of another name, and the connection does not leave the
container.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_router.config import OPTIONS
from sglang_router.config.flags import GIVEN, new_parser
from sglang_router.config.sources import merge
from sglang_router.errors import ConfigError

TIMEOUT = 2.0
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}  # noqa: S104
"""Addresses that stand for all of this container, and what to connect to."""
CONFIG = "SGLANG_ROUTER_CONFIG"


def command_line(process: str) -> list[str]:
    """Return what follows the router's name on the command line of a process; an init before it is left out."""
    words = Path(f"/proc/{process}/cmdline").read_text("utf-8", "surrogateescape").split("\0")[:-1]
    names = [Path(word).name.partition(".")[0].replace("_", "-") for word in words]
    router = names.index("sglang-router") if "sglang-router" in names else len(words) - 1
    return words[router + 1 :]


def options(words: Sequence[str]) -> dict[str, Any]:
    """Return where the router listens, and its certificate. Words that are no options of the router are ignored.

    Raises: ConfigError; SystemExit for options that cannot be read.
    """
    known, _ = new_parser("healthcheck").parse_known_args(list(words))
    given: frozenset[str] = getattr(known, GIVEN)
    flags = {name: getattr(known, name) for name in given}
    try:
        values = merge(flags, os.environ).values
    except ConfigError:  # somebody is just writing the file: the router goes on with what it has read
        flags.pop("config", None)
        values = merge(flags, {name: text for name, text in os.environ.items() if name != CONFIG}).values
    return {name: values.get(name, OPTIONS[name].default) for name in ("host", "port", "server_cert_path")}


def status(words: Sequence[str], path: str) -> int:
    """Return what the router with this command line answers. Raises: ConfigError, OSError, HTTPException."""
    where = options(words)
    host, port = EVERYWHERE.get(where["host"], where["host"].strip("[]")), where["port"]
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    if where["server_cert_path"]:
        trusting = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=trusting)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def main(path: str = "/liveness", process: str = "1") -> int:
    """Ask, and say what came; return the exit status."""
    try:
        got = status(command_line(process), path)
    except (ConfigError, OSError, SystemExit, http.client.HTTPException) as error:
        print(f"{path}: {error or type(error).__name__}")
        return 1
    print(f"{path}: {got}")
    return 0 if got == 200 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
