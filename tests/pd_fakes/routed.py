"""A router process in front of fake pairs, and what must hold after every test: nothing is left anywhere.

    with routed(SglangPair(decodes=2)) as bed:
        bed.send("/generate", {"text": "x"})            # a future of its answer
        bed.fakes.hold(Stage.ADMITTED, bed.pair.decode) # see pd_fakes.fleet

At the end every engine must be idle (no request, no queue, no token) and the router's load 0 on every worker.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Generic, TypeVar

from pd_fakes.edge import EdgeServer
from pd_fakes.fleet import Fakes, Group, running
from routers import Answer, RouterProcess, router_process

FLAGS = (
    *("--policy", "round_robin", "--slow-start-secs", "0", "--disable-outlier-ejection"),
    *("--engine-report-interval-secs", "0.2", "--worker-startup-check-interval", "0.1"),
)

G = TypeVar("G", bound=Group)


class Bed(Generic[G]):
    """See the module. `routed` makes it."""

    def __init__(self, fakes: Fakes[G], router: RouterProcess, threads: ThreadPoolExecutor) -> None:
        self.fakes = fakes
        self.router = router
        self._threads = threads

    @property
    def pair(self) -> G:
        return self.fakes.pair

    def send(self, path: str, body: Any, **headers: str) -> Future[Answer]:
        """Send a request in a thread of its own."""
        return self._threads.submit(self.router.post, path, body, **headers)

    def ask(self, path: str, body: Any, **headers: str) -> Answer:
        return self.router.post(path, body, **headers)

    @contextlib.contextmanager
    def client(self, path: str, body: Any) -> Iterator[socket.socket]:
        """Send a request on a connection that is closed at the end of the block, answered or not."""
        data = json.dumps(body).encode()
        host, port = self.router.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
            yield connection

    @staticmethod
    def first_event(stream: BinaryIO) -> bytes:
        """Read an answer up to its first event: what a killed engine has sent, but the router not read, is lost."""
        found = b""
        while not found.rpartition(b"\n")[0].rpartition(b"\n")[2].startswith(b"data:"):
            line = stream.readline()
            assert line, found
            found += line
        return found

    def surveyed(self) -> None:
        """Wait until the router has heard twice of every engine what it is and how busy it is."""
        for engine in self.pair.engines:
            self.fakes.until(engine, lambda it: _surveys(it) >= 2)

    def all_over(self) -> None:
        """Check that nothing is left on the engines and in the router."""
        self.fakes.idle()
        self.router.until(lambda: all(worker["load"] == 0 for worker in self.router.workers().values()))


def _surveys(engine: EdgeServer) -> int:
    return max(engine.count("/v1/loads"), engine.count("/metrics")) if engine.count("/v1/models") else 0


@contextlib.contextmanager
def routed(pair: G, *flags: str) -> Iterator[Bed[G]]:
    """Yield engines and a router that knows all of them, and check at the end that nothing is left of any request."""
    with (
        running(pair) as fakes,
        ThreadPoolExecutor(64) as threads,
        router_process([], *pair.flags, *FLAGS, *flags) as router,
    ):
        router.until_healthy()
        bed = Bed(fakes, router, threads)
        yield bed
        bed.all_over()
