"""The state file: what the router knows, on disk, for the next start.

    load()        at the start: workers, drained or not, prefixes; a file that cannot be believed is one warning
    save()        every `interval`, when the router begins to stop, and before a successor takes over

    loop     | frame |    pause    | frame |    pause    | ...     `restart.snapshot.frames`, a fraction of a ms each
    thread            '-- write --'         '-- write --'          fsync, rename

The router serves meanwhile: after each frame the loop has four times as long for other work. A fork would stop the
router for 30 ms at 400 MB (the kernel copies page tables), and might double its memory.

The file appears whole or not at all (a temporary file, fsync, rename), and only its owner may read it (0600): it holds
the keys of workers that were added with their own, and the beginnings of prompts. A file that others may write is not
believed; one that others may read is warned of, and the next save makes it private again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from sglang_router.errors import ConfigError
from sglang_router.restart import snapshot
from sglang_router.restart.saved_worker import SavedWorker
from sglang_router.restart.snapshot import HEADER_SIZE, HeaderBuilder, Snapshot, Unreadable
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.policies.base import PrefixMemory
from sglang_router.routing.worker import Worker
from sglang_router.words import counted
from sglang_router.workers.sources import ConfiguredWorkers

log = logging.getLogger("sglang_router.state")

_PAUSE_FACTOR = 4.0
"""The pause after a frame is so many times as long as the frame took."""
_MIN_PAUSE = 0.001
"""Seconds."""
_WRITE_BYTES = 1 << 18
"""Bytes that a thread writes at once; more if one frame has more."""


class Clocks(NamedTuple):
    """`now`: seconds of the fleet's clock; `today`: seconds since 1970."""

    now: Callable[[], float] = time.monotonic
    today: Callable[[], float] = time.time


class StateFile:
    """See the module.

    memory      returns what the policy remembers of prefixes, if it does; empty at `load`
    configured  what flags and file say about workers
    suspended   whether this router must not write now, because its successor does

    Raises: ConfigError when there cannot be a file of that name.
    """

    def __init__(
        self,
        path: str,
        fleet: Fleet,
        memory: Callable[[], PrefixMemory | None],
        configured: ConfiguredWorkers,
        *,
        suspended: Callable[[], bool] = lambda: False,
        clocks: Clocks | None = None,
    ) -> None:
        self._path = os.path.realpath(path)  # a symbolic link stays one
        self._fleet = fleet
        self._memory_now = memory
        self._configured = configured
        self._suspended = suspended
        self._clocks = clocks or Clocks()
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._failing = False  # the last save failed, and a warning said so
        folder = os.path.dirname(self._path)
        if os.path.isdir(self._path) or not os.path.isdir(folder):
            raise ConfigError(f"--state-file {path}: it must name a file in a folder that exists")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"--state-file {path}: its folder cannot be written to")

    # -- reading -------------------------------------------------------------------------------------------------------

    def load(self) -> int:
        """Register the workers of the file and fill the memory; returns how many workers. It blocks, so call it before
        the router serves."""
        try:
            data = _read(self._path)
            if data is None:
                return 0
            found = snapshot.read(data)
            workers = self._register(found)
            self._fill(found, workers)
        except Unreadable as exc:
            log.warning("the state file %s %s; what it may hold is not used", self._path, exc)
            return len(self._fleet)
        held = self._memory.held if self._memory is not None else 0
        log.info("restored %s and %d bytes of prefixes from %s", counted(len(workers), "worker"), held, self._path)
        return len(workers)

    def _register(self, found: Snapshot) -> list[tuple[SavedWorker, Worker]]:
        workers = []
        for saved in found.head.workers:
            spec = saved.spec_today(self._configured)
            if spec is not None:
                worker = self._fleet.add(spec, self._clocks.now(), restored=saved.id)
                self._fleet.set_draining(worker, saved.draining)
                self._fleet.set_paused(worker, tuple(saved.paused))
                worker.weights = saved.weights
                workers.append((saved, worker))
        return workers

    def _fill(self, found: Snapshot, workers: list[tuple[SavedWorker, Worker]]) -> None:
        """Restore the prefixes of the workers whose first check will show whether their process is still there."""
        pools = self._fleet.pools
        if self._memory is not None:
            slots = {
                saved.slot: worker.slot
                for saved, worker in workers
                if saved.slot >= 0
                and worker.spec.health.enabled
                and pools.of(worker).policy.memory is self._memory  # slots of another pool belong to another tree
            }
            found.fill(self._memory, slots, self._clocks.now(), self._clocks.today())

    @property
    def _memory(self) -> PrefixMemory | None:
        """What is saved: the policy may be another one now than at the start (`routing.pool.Pool.use`)."""
        return self._memory_now()

    # -- writing -------------------------------------------------------------------------------------------------------

    def start(self, interval: float) -> None:
        """Save every `interval` seconds from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run(interval))

    async def _run(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            if not self._suspended():
                await self.save()

    async def save(self, *, hurry: bool = False) -> bool:
        """Write the file; `hurry`: without pauses. Returns whether it worked; the first failure is one warning."""
        async with self._writing:
            try:
                await self._write(hurry)
            except OSError as exc:
                if not self._failing:
                    log.warning("the state file %s cannot be written: %s", self._path, exc.strerror or exc)
                self._failing = True
                return False
            self._failing = False
            return True

    async def _write(self, hurry: bool) -> None:
        """Raises: OSError"""
        new = _NewFile(self._path)
        try:
            await _in_thread(new.create)
            head = self._head()
            frames = snapshot.frames(head, self._memory)
            while made := await _some(frames, hurry):
                await _in_thread(new.append, made)
            await _in_thread(new.finish)
        finally:
            new.discard()

    def _head(self) -> snapshot.Head:
        """Return the header. A worker of another pool has its slot in another memory, which is not saved."""
        head = snapshot.head_of(self._fleet, self._configured, self._clocks.now(), self._clocks.today())
        pools = self._fleet.pools
        saved_here = {worker.id for worker in self._fleet if pools.of(worker).policy.memory is self._memory}
        for saved in head.workers:
            if saved.id not in saved_here:
                saved.slot = -1
        return head

    async def close(self) -> None:
        """Save no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


# -- the file --------------------------------------------------------------------------------------------------------


async def _some(frames: Iterator[bytes], hurry: bool) -> bytes:
    """Make the frames for one write, with pauses for other work; nothing when there are no more."""
    made: list[bytes] = []
    size = 0
    while size < _WRITE_BYTES:
        began = time.perf_counter()
        frame = next(frames, None)
        if frame is None:
            break
        made.append(frame)
        size += len(frame)
        took = time.perf_counter() - began
        await asyncio.sleep(0 if hurry else max(_MIN_PAUSE, took * _PAUSE_FACTOR))
    return b"".join(made)


async def _in_thread(work: Callable[..., None], *arguments: object) -> None:
    """Run work that may block in a thread. A cancelled caller still waits for its end: until then nobody else may
    touch the file."""
    job = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise


class _NewFile:
    """The new file, under a temporary name until it is whole."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._name = f"{path}.{os.getpid()}.new"
        self._file: BinaryIO | None = None
        self._header = HeaderBuilder()

    def create(self) -> None:
        """Create the file, with space for the header. Raises: OSError"""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(self._path).st_mode):  # a device, a pipe: it must not be replaced
                raise OSError(errno.EINVAL, "it is not a plain file")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name)  # left by a killed process that had the same id
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._name, flags, 0o600), "wb")
        self._file.write(bytes(HEADER_SIZE))

    def append(self, frames: bytes) -> None:
        """Write frames."""
        assert self._file is not None
        self._header.add(frames)
        self._file.write(frames)

    def finish(self) -> None:
        """Write the header and put the file in the place of the old one, durably."""
        assert self._file is not None
        self._file.seek(0)
        self._file.write(self._header.build())
        self._file.flush()
        os.fsync(self._file.fileno())
        os.rename(self._name, self._path)
        folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Close it; remove what was not finished."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._name)


def _read(path: str) -> bytes | None:
    """Return the content of a file that only its owner can have written; None when there is no file.

    Raises: Unreadable
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block the start
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise Unreadable("is not a plain file")
            if facts.st_mode & 0o022 or facts.st_uid not in (os.geteuid(), 0):
                raise Unreadable("can be written by others (it should be ours, with mode 0600)")
            head = file.read(snapshot.HEADER_SIZE)
            snapshot.check_header(head, facts.st_size)  # before it is read whole: it may be huge
            if facts.st_mode & 0o044:
                log.warning("%s holds keys and prompts, and others may read it: run chmod 600 %s", path, path)
            return head + file.read(facts.st_size - len(head))
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise Unreadable(f"cannot be read: {exc.strerror or exc}") from None
