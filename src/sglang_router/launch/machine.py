"""What this machine offers to engines: processor cores, GPUs, free ports, environment.

Backends get it as an argument, so that tests can pass any machine.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_router.errors import ConfigError

_HIGHEST_PORT = 65535


@dataclass(frozen=True)
class LocalMachine:
    """The resources that backends count on.

    cores         processor cores that this process may use
    gpus          number of NVIDIA devices
    loopback      name of the loopback network interface
    take_port     (host, port) -> bool: `take_port` below
    """

    cores: int
    gpus: int
    loopback: str
    environ: Mapping[str, str]
    take_port: Callable[[str, int], bool]

    @staticmethod
    def here() -> LocalMachine:
        """Return the machine on which this process runs."""
        devices = [each for each in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", each.name)]
        loopback = "lo" if sys.platform == "linux" else "lo0"
        return LocalMachine(_cores(), len(devices), loopback, os.environ, take_port)

    def visible_gpus(self) -> list[str]:
        """Return the GPUs that engines may use, named as in CUDA_VISIBLE_DEVICES: numbers, UUIDs or MIG instances.

        The list is empty when there are no GPUs or the variable hides them. Names after a -1 do not count (CUDA C++
        Programming Guide, "CUDA Environment Variables").
        """
        given = self.environ.get("CUDA_VISIBLE_DEVICES")
        if given is None:
            return [str(number) for number in range(self.gpus)]
        names: list[str] = []
        for name in map(str.strip, given.split(",")):
            if name in ("", "-1"):
                break
            names.append(name)
        return names


class PortAllocator:
    """Assigns one port to each rank: the first free port from base + rank on that no other rank has. A rank keeps its
    port.
    """

    def __init__(self, host: str, base: int, take: Callable[[str, int], bool]) -> None:
        self._host = host
        self._base = base
        self._take = take
        self._of: dict[int, int] = {}

    def __call__(self, rank: int) -> int:
        """Return the port of a rank. Raises: ConfigError if no port is left."""
        if rank not in self._of:
            self._of[rank] = self._find(rank)
        return self._of[rank]

    def _find(self, rank: int) -> int:
        taken = set(self._of.values())
        for port in range(self._base + rank, _HIGHEST_PORT + 1):
            if port not in taken and self._take(self._host, port):
                return port
        raise ConfigError(
            f"no port is free on {self._host} from {self._base + rank} on; choose another --router-dp-worker-base-port"
        )


def take_port(host: str, port: int) -> bool:
    """Take a port for an engine of this process, for as long as this process runs.

    Return False if no server could listen there now, or another launcher of this machine has taken it: its engine will
    listen there only when its model is loaded. (A name of Linux that belongs to the same network namespace as the port.
    Binding the port itself would be in the engine's way.)

    Raises: ConfigError if no server can listen on this address at all.
    """
    if not port_is_free(host, port):
        return False
    if sys.platform == "linux":
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sglang-router/engine/{host}/{port}")
        except OSError as error:
            claim.close()
            return error.errno != errno.EADDRINUSE  # else, a very long name or a system without them: only not claimed
        claim.detach()  # closed when this process ends
    return True


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Connections of an earlier server in TIME_WAIT do not matter.

    Raises: ConfigError if no server can listen on this address at all.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)  # with SO_REUSEADDR two sockets may bind one port, but only one may listen
    except PermissionError:  # ports below 1024 need a privilege
        return False
    except socket.gaierror as error:
        raise ConfigError(f"--dp-worker-host {host}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise ConfigError(f"--dp-worker-host {host}: {error.strerror}") from None
    return True


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
