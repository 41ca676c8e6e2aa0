"""Measure large request bodies: how many are served while far more come than fit, and what memory they take.

    clients (this process) ──> router ──> worker that reads everything          each a process of its own

Goodput: clients upload bodies of a tenth of --max-buffered-request-bytes, each at the same limited speed, again and
again; a refused one tries again at once. 1x is the number of clients whose bodies fit; the others come in addition.
Meanwhile a polite client sends small requests. Memory: eight bodies of 100 MB are in flight at the same time.

    PYTHONPATH=tests python -m scripts.uploads [--quick]

Exits with status 1 if the goodput is below 90 % of that at 1x, if a small request fails, or if the memory is above 1.2
times the bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from scripts.hostile import PLAIN, Part

from hostile.arena import post
from routers import RouterProcess, start_router

LIMIT = 10_000_000
BODY = LIMIT // 10
FIT = LIMIT * 7 // 8 // BODY
SPEED = 2_000_000
LARGE = 100_000_000
PATH = "/v1/audio/transcriptions"


@contextlib.contextmanager
def running(*flags: str) -> Iterator[RouterProcess]:
    """A router before one worker."""
    worker = Part("--role", "worker")
    try:
        with tempfile.TemporaryDirectory() as folder:
            router = start_router([worker.line()], *PLAIN, *flags, log=Path(folder) / "router.log")
            try:
                router.until_healthy()
                yield router
                router.end()
            finally:
                if router.process.poll() is None:
                    router.process.kill()
                    router.process.wait()
    finally:
        worker.end()


def megabytes(router: RouterProcess, field: str = "VmRSS") -> float:
    """A figure of the router's memory: resident now, or VmHWM, the most so far."""
    lines = Path(f"/proc/{router.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def framed(body: bytes, path: str, chunked: bool) -> bytes:
    if not chunked:
        return post(path, body)
    head = post(path, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


async def ask(port: int, request: bytes, speed: float = 0.0) -> int:
    """Send a request on a connection of its own, at most so many bytes per second; return the status, 0 without."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    head.add_done_callback(lambda done: done.cancelled() or done.exception())  # also when nobody looks any more
    try:
        step = 65536 if speed else len(request)
        for at in range(0, len(request), step):
            if head.done():  # refused
                break
            writer.write(request[at : at + step])
            await writer.drain()
            if speed:
                await asyncio.sleep(step / speed)
        return int((await head).split(b" ")[1])
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0
    finally:
        head.cancel()
        writer.transport.abort()


async def load(port: int, clients: int, seconds: float, chunked: bool) -> tuple[float, Counter[int], Counter[int]]:
    """Return uploads served per second, statuses of uploads, and statuses of small requests."""
    request, small = framed(b"x" * BODY, PATH, chunked), post(PATH, b"hello")
    statuses: Counter[int] = Counter()
    smalls: Counter[int] = Counter()
    warm = time.monotonic() + 2.0
    end = warm + seconds

    async def upload() -> None:
        while time.monotonic() < end:
            status = await ask(port, request, SPEED)
            if warm <= time.monotonic() < end:
                statuses[status] += 1
            if status != 200:
                await asyncio.sleep(0.1)

    async def polite() -> None:
        while time.monotonic() < end:
            smalls[await ask(port, small)] += 1
            await asyncio.sleep(0.02)

    tasks = [asyncio.ensure_future(work) for work in (polite(), *(upload() for _ in range(clients)))]
    await asyncio.sleep(2.0 + seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return statuses[200] / seconds, statuses, smalls


def goodput(seconds: float, chunked: bool) -> bool:
    """Print a row for each load; return whether all are good."""
    good, at_one = True, 0.0
    for times in (1, 2, 4, 40):
        with running("--max-buffered-request-bytes", str(LIMIT)) as router:
            port = urlsplit(router.url).port or 0
            rate, statuses, smalls = asyncio.run(load(port, FIT * times, seconds, chunked))
            peak = megabytes(router, "VmHWM")
        at_one = at_one or rate
        share = rate / at_one if at_one else 0.0
        good = good and share >= 0.9 and set(smalls) == {200}
        others = {status: count for status, count in statuses.items() if status != 200}
        kind = "chunked" if chunked else "length"
        print(
            f"{kind:<8} {times:>3}x {FIT * times:>4} clients  {rate:6.1f} uploads/s {share:5.0%}"
            f"  others {others or '-'}  small {dict(smalls)}  peak {peak:.0f} MB",
            flush=True,
        )
    return good


async def hold(router: RouterProcess, path: str, count: int) -> float:
    """Return the most memory, in MB, that so many bodies in flight take."""
    port = urlsplit(router.url).port or 0
    body = b'{"text": "%b"}' % (b"x" * (LARGE - 12))
    request = framed(body, path, False)
    before = megabytes(router)
    answers = [asyncio.ensure_future(ask(port, request)) for _ in range(count)]
    await asyncio.gather(*answers)
    assert [answer.result() for answer in answers] == [200] * count
    return megabytes(router, "VmHWM") - before


def memory() -> bool:
    """Print a row for each kind of body; return whether all are good."""
    good = True
    for path in (PATH, "/generate"):
        with running() as router:
            taken = asyncio.run(hold(router, f"{path}?lie=late", 8))
            after = megabytes(router)
        ratio = taken * 1e6 / (8 * LARGE)
        good = good and ratio <= 1.2
        print(f"8 x 100 MB to {path}: {taken:.0f} MB at most, {ratio:.2f}x; {after:.0f} MB afterwards", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="uploads", description="Measures large request bodies.")
    parser.add_argument("--quick", action="store_true", help="4 seconds for each load instead of 15")
    chosen = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 1 << 20 else max(soft, 65536), hard))
    seconds = 4.0 if chosen.quick else 15.0
    good = [memory(), goodput(seconds, False), goodput(seconds, True)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
